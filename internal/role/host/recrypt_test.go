package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
)

// write writes to a plain disk of a VM.
func (b *bench) write(t testing.TB, vm, file string, content []byte) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(b.root, vm, file), os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteAt(content, 0)
	check(t, errors.Join(err, f.Close()))
}

func (b *bench) files(t testing.TB, vm string) []string {
	t.Helper()
	return slices.DeleteFunc(list(t, filepath.Join(b.root, vm)), func(name string) bool { return name == ".lock" || name == bundle.FileName })
}

// TestLifeOfADisk encrypts, rekeys and decrypts.
func TestLifeOfADisk(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	req := request("web-1", keysafe.Ref{})
	req.Disks = append(req.Disks, req.Disks[0])
	check(t, b.createVM(ctx, req, quiet))
	id := req.GetId()
	want := bytes.Repeat([]byte("what the guest wrote "), 1000)
	b.write(t, "web-1", "disk-0.raw", want)
	is := func(step string, key *keysafe.Ref, files ...string) {
		t.Helper()
		vm, err := bundle.Read(filepath.Join(b.root, "web-1"))
		check(t, err)
		if key == nil && vm.Key != nil || key != nil && (vm.Key == nil || vm.Key.Ref() != *key) {
			t.Errorf("%s: the VM's key is %v, want %v", step, vm.Key, key)
		}
		if len(vm.Retired) > 0 {
			t.Errorf("%s: still retired: %v", step, vm.Retired)
		}
		if got := b.files(t, "web-1"); !slices.Equal(got, files) {
			t.Errorf("%s: the folder holds %v, want %v", step, got, files)
		}
		if !bytes.Equal(b.content(t, id, "disk-0", len(want)), want) {
			t.Errorf("%s: the disk has changed", step)
		}
	}
	generation := func(disk string) uint64 {
		t.Helper()
		safes, _, err := peek(filepath.Join(b.root, "web-1", disk+".luks"))
		check(t, err)
		return safes.Current.Generation
	}
	wantKind(t, "a rekey of a plain VM", b.rekeyVM(ctx, id, nil, b.newRef(t), depth{deep: true}, quiet), errs.InvalidState)
	wantKind(t, "an unknown disk", b.encryptVM(ctx, id, []string{"disk-9"}, b.newRef(t), 0, quiet), errs.NotFound)
	wantKind(t, "a key that is not here", b.encryptVM(ctx, id, nil, keysafe.Ref{Provider: "kp-9", KeyID: "k"}, 0, quiet), errs.Locked)
	is("refused", nil, "disk-0.raw", "disk-1.raw")

	first := b.newRef(t)
	check(t, b.encryptVM(ctx, id, []string{"disk-1", "disk-1"}, first, 0, quiet))
	is("one disk", &first, "disk-0.raw", "disk-1.luks")
	wantKind(t, "a rekey of its plain disk", b.rekeyVM(ctx, id, []string{"disk-0"}, b.newRef(t), depth{}, quiet), errs.InvalidState)
	for range 2 { // the second call finds all done
		var last, total int64
		check(t, b.encryptVM(ctx, id, nil, first, 0, func(_ string, done, all int64, _ string) { last, total = done, all }))
		if last != total {
			t.Errorf("progress ended at %d of %d", last, total)
		}
		is("all disks", &first, "disk-0.luks", "disk-1.luks")
	}

	second := b.newRef(t)
	for range 2 {
		check(t, b.rekeyVM(ctx, id, nil, second, depth{}, quiet))
		is("shallow rekey", &second, "disk-0.luks", "disk-1.luks")
		if g := generation("disk-0"); g != 2 {
			t.Errorf("generation %d", g)
		}
	}
	third := b.newRef(t)
	check(t, b.rekeyVM(ctx, id, []string{"disk-0"}, third, depth{deep: true}, quiet))
	is("deep rekey of one disk", &second, "disk-0.luks", "disk-1.luks")
	for range 2 {
		check(t, b.rekeyVM(ctx, id, nil, third, depth{deep: true}, quiet))
		is("deep rekey", &third, "disk-0.luks", "disk-1.luks")
		if g := generation("disk-1"); g != 3 {
			t.Errorf("generation %d", g)
		}
	}
	check(t, b.decryptVM(ctx, id, []string{"disk-0"}, 0, quiet))
	is("one disk decrypted", &third, "disk-0.raw", "disk-1.luks")
	check(t, b.decryptVM(ctx, id, nil, 0, quiet))
	is("decrypted", nil, "disk-0.raw", "disk-1.raw")
}

// TestRetired: a plain disk that was to be deleted when the host was killed is
// deleted by whatever comes next.
func TestRetired(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", keysafe.Ref{})
	dir := filepath.Join(b.root, "web-1")
	b.write(t, "web-1", "disk-0.raw", []byte("a secret"))
	plain, err := os.ReadFile(filepath.Join(dir, "disk-0.raw"))
	check(t, err)
	ref := b.newRef(t)
	check(t, b.encryptVM(t.Context(), id, nil, ref, 0, quiet))
	vm, err := bundle.Read(dir)
	check(t, err)
	want := vm.Clone()
	vm.Retired = []string{"disk-0.raw"}
	check(t, bundle.Write(dir, vm))
	check(t, os.WriteFile(filepath.Join(dir, "disk-0.raw"), plain, 0o600))
	check(t, os.WriteFile(filepath.Join(dir, "disk-0.luks.new"), []byte("unfinished"), 0o600))

	check(t, b.encryptVM(t.Context(), id, nil, ref, 0, quiet)) // the task, resumed
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.luks"}) {
		t.Errorf("the folder holds %v", got)
	}
	now, err := bundle.Read(dir)
	check(t, err)
	if diff := cmp.Diff(want, now); diff != "" {
		t.Error(diff)
	}
}

// TestFailedSwitch: if vm.json cannot be replaced the VM is as it was, and with
// the cause gone the next attempt succeeds, also with another KEK.
func TestFailedSwitch(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", keysafe.Ref{})
	block := filepath.Join(b.root, "web-1", bundle.FileName+".new")
	check(t, os.Mkdir(block, 0o700))
	if err := b.encryptVM(t.Context(), id, nil, b.newRef(t), 0, quiet); err == nil {
		t.Fatal("it succeeded")
	}
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.raw", bundle.FileName + ".new"}) {
		t.Errorf("the folder holds %v", got)
	}
	check(t, os.Remove(block))
	check(t, b.encryptVM(t.Context(), id, nil, b.newRef(t), 0, quiet))
}

func TestCancelledEncryption(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", keysafe.Ref{})
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no longer wanted")
	err := b.encryptVM(ctx, id, nil, b.newRef(t), 0, func(_ string, done, _ int64, _ string) {
		if done > 0 {
			cancel(reason)
		}
	})
	if !errors.Is(err, reason) {
		t.Errorf("error %v", err)
	}
	if got := b.files(t, "web-1"); !slices.Equal(got, []string{"disk-0.raw"}) {
		t.Errorf("the folder holds %v", got)
	}
}

// TestLinkedDisk: a disk of a folder from elsewhere that is a link is not
// followed by anything.
func TestLinkedDisk(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ref := b.newRef(t)
	id := b.create(t, "web-1", ref)
	outside := t.TempDir()
	dir := filepath.Join(b.root, "web-1")
	for _, name := range []string{"disk-0.raw", "disk-1.luks"} {
		check(t, os.Rename(filepath.Join(dir, name), filepath.Join(outside, name)))
		check(t, os.Symlink(filepath.Join(outside, name), filepath.Join(dir, name)))
	}
	before, err := os.ReadFile(filepath.Join(outside, "disk-1.luks"))
	check(t, err)
	for name, do := range map[string]func() error{
		"encrypt":       func() error { return b.encryptVM(t.Context(), id, nil, b.newRef(t), 0, quiet) },
		"decrypt":       func() error { return b.decryptVM(t.Context(), id, nil, 0, quiet) },
		"shallow rekey": func() error { return b.rekeyVM(t.Context(), id, nil, b.newRef(t), depth{}, quiet) },
		"deep rekey":    func() error { return b.rekeyVM(t.Context(), id, nil, b.newRef(t), depth{deep: true}, quiet) },
		"unwrap": func() error {
			dek, next, err := b.unwrap(t.Context(), filepath.Join(dir, "disk-1.luks"))
			dek.Close()
			next.Close()
			return err
		},
	} {
		if do() == nil {
			t.Errorf("%s followed a link", name)
		}
	}
	if after, err := os.ReadFile(filepath.Join(outside, "disk-1.luks")); err != nil || !bytes.Equal(after, before) {
		t.Errorf("what the link leads to was changed (error %v)", err)
	}
	m, err := b.machine(id)
	check(t, err)
	if vm, err := b.describe(t.Context(), m); err != nil || vm.GetCryptoState() != "locked" || vm.GetLockReason() == "" {
		t.Errorf("describe = %v, %v", vm, err)
	}
	check(t, b.unregisterVM(t.Context(), id, true)) // removes the links
	if got := list(t, outside); len(got) != 2 {
		t.Errorf("outside there is %v", got)
	}
}

// TestRekeyOwn: the VM's own key changes with chosen disks, or alone, and other
// disks keep their keys; repeated, it is the same.
func TestRekeyOwn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	wantKind(t, "the own key of a plain VM", b.rekeyVM(ctx, b.create(t, "plain", keysafe.Ref{}), nil, b.newRef(t), depth{own: true}, quiet), errs.InvalidState)
	first, second, third := b.newRef(t), b.newRef(t), b.newRef(t)
	req := request("web-1", first)
	req.Disks = append(req.Disks, req.Disks[1])
	check(t, b.createVM(ctx, req, quiet))
	is := func(step string, want ...keysafe.Ref) {
		t.Helper()
		vm, err := bundle.Read(filepath.Join(b.root, "web-1"))
		check(t, err)
		got := []keysafe.Ref{vm.Key.Ref()}
		for _, d := range vm.Disks[1:] {
			safes, _, err := peek(filepath.Join(b.root, "web-1", d.File))
			check(t, err)
			got = append(got, safes.Current.KEK)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: keys %v, want %v", step, got, want)
		}
	}
	is("created", first, first, first)
	for range 2 {
		check(t, b.rekeyVM(ctx, req.GetId(), nil, second, depth{own: true}, quiet))
		is("the VM alone", second, first, first)
	}
	for range 2 {
		check(t, b.rekeyVM(ctx, req.GetId(), []string{"disk-2"}, third, depth{own: true}, quiet))
		is("the VM and a disk", third, first, third)
	}
	m, err := b.machine(req.GetId())
	check(t, err)
	m.setRunning(&running{})
	check(t, b.rekeyVM(ctx, req.GetId(), nil, second, depth{own: true}, quiet))
	is("the VM alone, while it runs", second, first, third)
	m.setRunning(nil)
	check(t, b.syncProviders(nil))
	wantKind(t, "a key that is not here", b.rekeyVM(ctx, req.GetId(), nil, first, depth{own: true}, quiet), errs.Locked)
}
