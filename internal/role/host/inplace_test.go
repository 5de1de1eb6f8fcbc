package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// inPlaceZones is how many zones the disk of the tests has, of 1 MiB each.
const inPlaceZones = 3

// plainVM makes a VM with a plain disk of inPlaceZones and one of 1 MiB, and returns
// its id and what is on the first one.
func (b *bench) plainVM(t testing.TB, name string) (id string, want []byte) {
	t.Helper()
	req := request(name, keysafe.Ref{})
	req.Disks = []*strongroomv1.NewDisk{{SizeBytes: inPlaceZones << 20, Plain: true}, {SizeBytes: 1 << 20, Plain: true}}
	check(t, b.createVM(t.Context(), req, quiet))
	want = bytes.Repeat([]byte("the guest wrote "), inPlaceZones<<20/16)
	b.write(t, name, "disk-0.raw", want)
	return req.GetId(), want
}

// stopAt returns a context, and a report that ends it when so many bytes are done.
func stopAt(t testing.TB, bytes int64) (context.Context, report, error) {
	t.Helper()
	reason := errors.New("no longer wanted")
	ctx, cancel := context.WithCancelCause(t.Context())
	t.Cleanup(func() { cancel(nil) })
	return ctx, func(_ string, done, _ int64, _ string) {
		if done >= bytes {
			cancel(reason)
		}
	}, reason
}

// vmJSON returns what is in a VM's folder.
func (b *bench) vmJSON(t testing.TB, name string) *bundle.VM {
	t.Helper()
	vm, err := bundle.Read(filepath.Join(b.root, name))
	check(t, err)
	return vm
}

// TestEncryptInPlace encrypts the disks of a VM one after the other. They are then
// like any others.
func TestEncryptInPlace(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	id, want := b.plainVM(t, "web-1")
	wantKind(t, "an unknown disk", b.encryptInPlace(ctx, id, []string{"disk-9"}, b.newRef(t), 0, quiet), errs.NotFound)
	wantKind(t, "a key that is not here", b.encryptInPlace(ctx, id, nil, keysafe.Ref{Provider: "kp-9", KeyID: "k"}, 0, quiet), errs.Locked)

	is := func(step string, key keysafe.Ref, files ...string) {
		t.Helper()
		vm := b.vmJSON(t, "web-1")
		if vm.Key == nil || vm.Key.Ref() != key || vm.Disks[0].Encrypting+vm.Disks[1].Encrypting != "" {
			t.Errorf("%s: vm.json is %+v", step, vm)
		}
		if got := b.files(t, "web-1"); !slices.Equal(got, files) {
			t.Errorf("%s: the folder holds %v, want %v", step, got, files)
		}
		if !bytes.Equal(b.content(t, id, "disk-0", len(want)), want) {
			t.Errorf("%s: the disk has changed", step)
		}
	}
	first, second := b.newRef(t), b.newRef(t)
	check(t, b.encryptInPlace(ctx, id, []string{"disk-1"}, first, 0, quiet))
	is("one disk", first, "disk-0.raw", "disk-1.luks")
	var last, total int64
	check(t, b.encryptInPlace(ctx, id, nil, second, 0, func(_ string, done, all int64, _ string) { last, total = done, all }))
	if last != inPlaceZones<<20 || total != last {
		t.Errorf("progress ended at %d of %d", last, total)
	}
	is("all disks", second, "disk-0.luks", "disk-1.luks")
	check(t, b.encryptInPlace(ctx, id, nil, second, 0, quiet)) // the task, resumed
	is("again", second, "disk-0.luks", "disk-1.luks")
	file, err := os.ReadFile(filepath.Join(b.root, "web-1", "disk-0.luks"))
	check(t, err)
	if len(file) != (inPlaceZones+1)<<20 || bytes.Contains(file, want[:16]) {
		t.Errorf("the file has %d bytes, or plain data", len(file))
	}
	vm := b.described(t, id)
	if d := vm.GetDisks()[0]; d.GetEncryption() != nil || d.GetKey().GetKeyId() != second.KeyID || d.GetThin() || vm.GetCryptoState() != "unlocked" {
		t.Errorf("described as %v", vm)
	}
	if d := vm.GetDisks()[1]; d.GetKey().GetKeyId() != first.KeyID || !d.GetThin() { // of holes only
		t.Errorf("described as %v", vm)
	}
	check(t, b.rekeyVM(ctx, id, nil, first, depth{deep: true}, quiet))
	check(t, b.resizeDisk(ctx, id, "disk-0", (inPlaceZones+1)<<20))
	is("rekeyed and resized", first, "disk-0.luks", "disk-1.luks")
	check(t, b.decryptVM(ctx, id, nil, 0, quiet))
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.raw", "disk-1.raw"}) || !bytes.Equal(b.content(t, id, "disk-0", len(want)), want) {
		t.Errorf("decrypted: the folder holds %v", got)
	}
}

// TestEncryptInPlaceStopped: a disk of which a part is encrypted is told as that,
// kept from everything else, and goes on: here or where its folder is registered
// next, under whatever KEK, as long as its own can be had.
func TestEncryptInPlaceStopped(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	id, want := b.plainVM(t, "web-1")
	first, second := b.newRef(t), b.newRef(t)
	stopped, r, reason := stopAt(t, 1<<20)
	err := b.encryptInPlace(stopped, id, []string{"disk-0"}, first, 0, r)
	if !errors.Is(err, reason) || errs.ReasonOf(err) != strongroomv1.ReasonEncryptionInProgress || errs.HintOf(err) == "" {
		t.Fatalf("error %v, reason %q, hint %q", err, errs.ReasonOf(err), errs.HintOf(err))
	}
	begun := bundle.Disk{Name: "disk-0", File: "disk-0.luks", Format: bundle.FormatLUKS, SizeBytes: inPlaceZones << 20, Encrypting: "disk-0.raw"}
	if vm := b.vmJSON(t, "web-1"); vm.Disks[0] != begun || vm.Key.Ref() != first {
		t.Errorf("vm.json is %+v", vm)
	}
	before, err := os.ReadFile(filepath.Join(b.root, "web-1", "disk-0.raw"))
	check(t, err)

	shown := func(when string) {
		t.Helper()
		vm := b.described(t, id)
		d := vm.GetDisks()[0]
		if vm.GetCryptoState() != "unlocked" || d.GetEncryption().GetDoneBytes() != 1<<20 || d.GetEncryption().GetTotalBytes() != inPlaceZones<<20 ||
			!d.GetEncrypted() || d.GetKey().GetKeyId() != first.KeyID || d.GetFile() != "disk-0.raw" || d.GetAllocatedBytes() == 0 {
			t.Errorf("%s described as %v", when, vm)
		}
	}
	shown("stopped")
	refused := map[string]func() error{
		"power-on":      func() error { return b.powerOn(ctx, id) },
		"encrypt":       func() error { return b.encryptVM(ctx, id, nil, second, 0, quiet) },
		"decrypt":       func() error { return b.decryptVM(ctx, id, nil, 0, quiet) },
		"shallow rekey": func() error { return b.rekeyVM(ctx, id, nil, second, depth{}, quiet) },
		"deep rekey":    func() error { return b.rekeyVM(ctx, id, nil, second, depth{deep: true}, quiet) },
		"resize":        func() error { return b.resizeDisk(ctx, id, "disk-0", 8<<20) },
		"fill":          func() error { return b.fillDisks(ctx, id, nil, quiet) },
		"snapshot": func() error {
			return b.createSnapshot(ctx, &strongroomv1.AgentCreateSnapshotRequest{Id: id, SnapshotId: uuid.NewString(), Snapshot: "before"}, quiet)
		},
		"clone": func() error { return b.cloneVM(ctx, cloneRequest("web-2", id, second), quiet) },
		"export": func() error {
			_, err := b.exportDiskKey(ctx, id, "disk-0", make([]byte, parcel.PublicKeySize))
			return err
		},
	}
	for name, do := range refused {
		err := do()
		wantKind(t, name, err, errs.InvalidState)
		if errs.ReasonOf(err) != strongroomv1.ReasonEncryptionInProgress || errs.HintOf(err) == "" {
			t.Errorf("%s: %v, reason %q, hint %q", name, err, errs.ReasonOf(err), errs.HintOf(err))
		}
	}
	check(t, b.resizeDisk(ctx, id, "disk-1", 2<<20)) // the other one is free

	// Elsewhere, without its provider and with it.
	check(t, b.unregisterVM(ctx, id, false))
	registered, err := b.registerVM("ds-1", "web-1", "")
	check(t, err)
	if registered != id {
		t.Errorf("registered as %s", registered)
	}
	shown("registered elsewhere")
	check(t, b.syncProviders(nil))
	if vm := b.described(t, id); vm.GetCryptoState() != "locked" || vm.GetDisks()[0].GetKey().GetKeyId() != first.KeyID {
		t.Errorf("without its key described as %v", vm)
	}
	wantKind(t, "without its key", b.encryptInPlace(ctx, id, nil, first, 0, quiet), errs.Locked)
	if after, err := os.ReadFile(filepath.Join(b.root, "web-1", "disk-0.raw")); err != nil || !bytes.Equal(after, before) {
		t.Errorf("what was refused has changed the disk (error %v)", err)
	}
	check(t, b.syncProviders([]*strongroomv1.WantedProvider{b.wanted(t, b.provider)}))
	check(t, b.encryptInPlace(ctx, id, []string{"disk-0"}, second, 0, quiet))
	if d := b.described(t, id).GetDisks()[0]; d.GetEncryption() != nil || d.GetKey().GetKeyId() != second.KeyID {
		t.Errorf("at the end described as %v", d)
	}
	if !bytes.Equal(b.content(t, id, "disk-0", len(want)), want) {
		t.Error("the disk has changed")
	}
}

// TestEncryptInPlaceUndone: what is stopped, or fails, before anything is encrypted
// leaves the VM as it was.
func TestEncryptInPlaceUndone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id, want := b.plainVM(t, "web-1")
	before := b.vmJSON(t, "web-1")
	folder := filepath.Join(b.root, "web-1")
	disk := filepath.Join(folder, "disk-0.raw")
	is := func(name string) {
		t.Helper()
		if now := b.vmJSON(t, "web-1"); now.Disks[0] != before.Disks[0] || now.Key != nil {
			t.Errorf("%s: vm.json is %+v", name, now)
		}
		if now, err := os.ReadFile(disk); err != nil || !bytes.Equal(now, want) {
			t.Errorf("%s: the disk has changed (error %v)", name, err)
		}
	}
	stopped, r, _ := stopAt(t, 0)
	if err := b.encryptInPlace(stopped, id, nil, b.newRef(t), 0, r); !errors.Is(err, context.Canceled) || errs.ReasonOf(err) != "" {
		t.Errorf("stopped at once: %v, reason %q", err, errs.ReasonOf(err))
	}
	is("stopped at once")
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.raw", "disk-1.raw"}) {
		t.Errorf("the folder holds %v", got)
	}

	check(t, os.WriteFile(filepath.Join(folder, "disk-0.luks"), nil, 0o600))
	wantKind(t, "a file in the way", b.encryptInPlace(t.Context(), id, nil, b.newRef(t), 0, quiet), errs.Exists)
	is("a file in the way")
	check(t, os.Remove(filepath.Join(folder, "disk-0.luks")))

	check(t, os.Mkdir(filepath.Join(folder, bundle.FileName+".new"), 0o700))
	if err := b.encryptInPlace(t.Context(), id, nil, b.newRef(t), 0, quiet); err == nil {
		t.Error("it went on without vm.json")
	}
	is("vm.json cannot be replaced")
	check(t, os.Remove(filepath.Join(folder, bundle.FileName+".new")))

	check(t, os.Truncate(disk, int64(len(want))+512)) // an interrupted resize
	wantKind(t, "a longer file", b.encryptInPlace(t.Context(), id, nil, b.newRef(t), 0, quiet), errs.InvalidState)
	check(t, os.Truncate(disk, int64(len(want))))
	is("a longer file")

	outside := filepath.Join(t.TempDir(), "disk")
	check(t, os.Rename(disk, outside))
	check(t, os.Symlink(outside, disk))
	wantKind(t, "a link", b.encryptInPlace(t.Context(), id, nil, b.newRef(t), 0, quiet), errs.Invalid)
	is("a link")

	snapshot := &strongroomv1.AgentCreateSnapshotRequest{Id: id, SnapshotId: uuid.NewString(), Snapshot: "before"}
	check(t, os.Remove(disk))
	check(t, os.Rename(outside, disk))
	check(t, b.createSnapshot(t.Context(), snapshot, quiet))
	if err := b.encryptInPlace(t.Context(), id, nil, b.newRef(t), 0, quiet); errs.ReasonOf(err) != strongroomv1.ReasonHasSnapshots {
		t.Errorf("with a snapshot: %v", err)
	}
	is("a snapshot")

	req := request("web-2", keysafe.Ref{})
	req.Disks[0].SizeBytes = 32 << 10
	check(t, b.createVM(t.Context(), req, quiet))
	wantKind(t, "a tiny disk", b.encryptInPlace(t.Context(), req.GetId(), nil, b.newRef(t), 0, quiet), errs.Invalid)
	if d := b.vmJSON(t, "web-2").Disks[0]; d.Format != bundle.FormatRaw || d.Encrypting != "" {
		t.Errorf("the tiny disk is %+v", d)
	}
	check(t, b.encryptVM(t.Context(), req.GetId(), nil, b.newRef(t), 0, quiet))
}

// unnamed is a folder in which files keep their names.
type unnamed struct{ recrypt.Dir }

var errUnnamed = errors.New("killed before the rename")

func (unnamed) Rename(string, string) error { return errUnnamed }

// TestEncryptInPlaceKilled: whatever step was the last before the host was killed,
// the VM cannot be powered on, may be deleted, and the next call goes on to the end.
func TestEncryptInPlaceKilled(t *testing.T) {
	t.Parallel()
	for name, until := range map[string]func(t *testing.T, b *bench, o *offline, ref keysafe.Ref){
		"vm.json": func(*testing.T, *bench, *offline, keysafe.Ref) {},
		"grown": func(t *testing.T, _ *bench, o *offline, _ keysafe.Ref) {
			t.Helper()
			check(t, os.Truncate(filepath.Join(o.dir, "disk-0.raw"), (inPlaceZones+2)<<20))
		},
		"a zone": func(t *testing.T, b *bench, o *offline, ref keysafe.Ref) {
			t.Helper()
			ctx, cancel := context.WithCancelCause(t.Context())
			if undone, err := recrypt.EncryptInPlace(ctx, o.folder(), "disk-0.raw", "disk-0.luks", inPlaceZones<<20, ref, b.kek, 0, func(int64, int64) { cancel(errUnnamed) }); undone || !errors.Is(err, errUnnamed) {
				t.Fatal(undone, err)
			}
		},
		"all zones": func(t *testing.T, b *bench, o *offline, ref keysafe.Ref) {
			t.Helper()
			if undone, err := recrypt.EncryptInPlace(t.Context(), unnamed{o.folder()}, "disk-0.raw", "disk-0.luks", inPlaceZones<<20, ref, b.kek, 0, nil); undone || !errors.Is(err, errUnnamed) {
				t.Fatal(undone, err)
			}
		},
		"renamed": func(t *testing.T, b *bench, o *offline, ref keysafe.Ref) {
			t.Helper()
			_, err := recrypt.EncryptInPlace(t.Context(), o.folder(), "disk-0.raw", "disk-0.luks", inPlaceZones<<20, ref, b.kek, 0, nil)
			check(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			id, want := b.plainVM(t, "web-1")
			ref := b.newRef(t)
			o, err := b.takeOffline(t.Context(), id, "a test")
			check(t, err)
			check(t, o.beginInPlace(0, ref))
			until(t, b, o, ref)
			o.release()

			if vm := b.described(t, id); vm.GetCryptoState() != "unlocked" || vm.GetDisks()[0].GetEncryption() == nil || vm.GetDisks()[0].GetKey().GetKeyId() != ref.KeyID {
				t.Errorf("described as %v", vm)
			}
			if err := b.powerOn(t.Context(), id); errs.ReasonOf(err) != strongroomv1.ReasonEncryptionInProgress {
				t.Errorf("power-on: %v", err)
			}
			dead := filepath.Join(b.root, "web-2") // as if it had been the VM's folder
			check(t, os.CopyFS(dead, os.DirFS(filepath.Join(b.root, "web-1"))))
			check(t, bundle.Remove(dead, b.vmJSON(t, "web-2")))

			check(t, b.encryptInPlace(t.Context(), id, nil, ref, 0, quiet))
			if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.luks", "disk-1.luks"}) {
				t.Errorf("the folder holds %v", got)
			}
			if d := b.vmJSON(t, "web-1").Disks[0]; d.Encrypting != "" || !bytes.Equal(b.content(t, id, "disk-0", len(want)), want) {
				t.Errorf("at the end the disk is %+v, or has changed", d)
			}
		})
	}
}
