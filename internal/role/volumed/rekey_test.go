package volumed_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/volumeproc"
)

// rekeyOf returns what a volume process tells of the rekey of disk-0.
func rekeyOf(t *testing.T, p *volumeproc.Process) *volumectl.Rekey {
	t.Helper()
	status, err := p.Status(t.Context())
	check(t, err)
	return status.Disks[0].Rekey
}

// awaitRekey waits until the rekey of disk-0 is as is says.
func awaitRekey(t *testing.T, p *volumeproc.Process, what string, is func(*volumectl.Rekey) bool) {
	t.Helper()
	var r *volumectl.Rekey
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if r = rekeyOf(t, p); is(r) {
			return
		}
	}
	t.Fatalf("waited for %s: %+v", what, r)
}

// nextSafe returns a new DEK and a key safe for it.
func nextSafe(t *testing.T, generation uint64) (*keymem.Key, *keysafe.Safe) {
	t.Helper()
	dek := keymemtest.Random(t, volumectl.KeySize)
	safe, err := keysafe.Wrap(keymemtest.Random(t, keysafe.KEKSize), dek, keysafe.Ref{Provider: "kp-2", KeyID: "k1"}, volume.Owner(diskUUID), generation)
	check(t, err)
	return dek, safe
}

// addBoth opens disk-0 with two DEKs and passes it on.
func addBoth(t *testing.T, p *volumeproc.Process, path string, dek, next *keymem.Key) {
	t.Helper()
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{})
	check(t, err)
	defer dev.Close()
	file, err := dev.Dup()
	check(t, err)
	defer file.Close()
	check(t, p.AddDisk(t.Context(), volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS, SizeMin: diskSize}, file, dek, next))
}

// TestRekey rekeys a disk in a real process that is killed in the middle of it,
// stops and goes on, while clients read and write.
func TestRekey(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	path, dek, _, _ := newVolume(t)
	addBoth(t, p, path, dek, nil)
	qemuIO(t, uri(dir, "disk-0"), "write -P 0x5a 0 8M", "flush")
	next, safe := nextSafe(t, 2)

	// Stopped before anything moved, it is undone. The first zone comes at once,
	// so that this needs a rekey that does not get so far: one that is refused.
	wrong := *safe
	wrong.Owner = volume.Owner("another disk")
	check(t, p.Rekey(ctx, "disk-0", next, &wrong, 0))
	awaitRekey(t, p, "the refusal", func(r *volumectl.Rekey) bool { return r != nil && !r.Running && r.Failure != nil })
	wantKind(t, rekeyOf(t, p).Failure.Err(), errs.Invalid)
	check(t, p.StopRekey(ctx, "disk-0"))
	if r := rekeyOf(t, p); r != nil {
		t.Errorf("after the refused rekey was stopped: %+v", r)
	}

	// A zone of 4 MiB is half the disk; the second would come in an hour.
	check(t, p.Rekey(ctx, "disk-0", next, safe, 1<<10))
	half := func(r *volumectl.Rekey) bool { return r != nil && r.Done == diskSize/2 && r.Total == diskSize }
	awaitRekey(t, p, "half of the disk", func(r *volumectl.Rekey) bool { return half(r) && r.Running && r.Rate == 1<<10 })
	other, otherSafe := nextSafe(t, 3)
	wantKind(t, p.Rekey(ctx, "disk-0", other, otherSafe, 0), errs.InvalidState)
	wantKind(t, p.ReplaceSafe(ctx, "disk-0", otherSafe), errs.InvalidState)
	qemuIO(t, uri(dir, "disk-0"), "read -P 0x5a 0 8M", "write -P 0xa5 3M 2M", "flush")

	check(t, p.Kill(ctx))
	p = start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	addBoth(t, p, path, next, dek) // in whatever order
	awaitRekey(t, p, "what the header says", func(r *volumectl.Rekey) bool { return half(r) && !r.Running && r.Failure == nil })
	qemuIO(t, uri(dir, "disk-0"), "read -P 0x5a 0 3M", "read -P 0xa5 3M 2M", "read -P 0x5a 5M 3M")
	check(t, p.StopRekey(ctx, "disk-0"))
	check(t, p.Rekey(ctx, "disk-0", nil, nil, 1)) // the last zone comes at once
	check(t, p.Rekey(ctx, "disk-0", nil, nil, 1<<30))
	awaitRekey(t, p, "the end", func(r *volumectl.Rekey) bool { return r == nil })
	qemuIO(t, uri(dir, "disk-0"), "read -P 0x5a 0 3M", "read -P 0xa5 3M 2M", "read -P 0x5a 5M 3M")
	check(t, p.Rekey(ctx, "disk-0", nil, nil, 0)) // makes good what was cut short, here nothing
	awaitRekey(t, p, "the end of it", func(r *volumectl.Rekey) bool { return r == nil })
	check(t, p.Stop(ctx))
	checkSafe(t, path, safe)
	for key, want := range map[*keymem.Key]error{next: nil, dek: volume.ErrWrongKey} {
		checkOpens(t, path, key, want)
	}
}

func checkOpens(t *testing.T, path string, key *keymem.Key, want error) {
	t.Helper()
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true})
	check(t, err)
	v, err := volume.Open(dev, key, volume.Options{ReadOnly: true})
	if want != nil {
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte(want.Error())) {
			t.Errorf("opened with %v, want %v", err, want)
		}
		check(t, dev.Close())
		return
	}
	check(t, err)
	check(t, v.Close())
}

// TestRekeyEnds: a process that is told to end stops a rekey first.
func TestRekeyEnds(t *testing.T) {
	t.Parallel()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	path, dek, _, _ := newVolume(t)
	addBoth(t, p, path, dek, nil)
	qemuIO(t, uri(dir, "disk-0"), "write -P 0x5a 0 8M")
	raw := filepath.Join(t.TempDir(), "disk-1.raw")
	check(t, os.WriteFile(raw, make([]byte, 1<<20), 0o600))
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-1", Format: volumectl.Raw}, raw, nil))
	next, safe := nextSafe(t, 2)
	wantKind(t, p.Rekey(t.Context(), "disk-1", next, safe, 0), errs.Invalid)
	wantKind(t, p.Rekey(t.Context(), "disk-2", next, safe, 0), errs.NotFound)
	wantKind(t, p.StopRekey(t.Context(), "disk-1"), errs.Invalid)
	check(t, p.Rekey(t.Context(), "disk-0", next, safe, 1<<10))
	awaitRekey(t, p, "the first zone", func(r *volumectl.Rekey) bool { return r != nil && r.Done > 0 })
	check(t, p.Stop(t.Context()))
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true})
	check(t, err)
	defer dev.Close()
	info, err := volume.Inspect(dev)
	check(t, err)
	if info.Rekey == nil || info.Rekey.InZone || info.Rekey.Done != diskSize/2 || len(info.Safes) != 2 {
		t.Errorf("info %+v, rekey %+v", info, info.Rekey)
	}
}
