package host

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/recrypt"
)

// TestRekeyRateChanges: a deep rekey that would take months ends at once, when
// its rate is changed.
func TestRekeyRateChanges(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ref := b.newRef(t)
	req := request("web-1", ref)
	req.Disks = []*strongroomv1.NewDisk{{SizeBytes: 12 << 20}}
	check(t, b.createVM(t.Context(), req, quiet))
	id := req.GetId()
	wantKind(t, "without a rekey", b.setRekeyRate(id, 1), errs.InvalidState)
	wantKind(t, "a VM that is not here", b.setRekeyRate("web-9", 1), errs.NotFound)
	o, err := b.takeOffline(t.Context(), id, "a test")
	check(t, err)
	vol, _, err := recrypt.OpenVolume(t.Context(), o.folder(), "disk-0.luks", b.kek)
	check(t, err)
	_, err = vol.WriteAt(bytes.Repeat([]byte("the guest wrote "), 12<<20/16), 0)
	check(t, err)
	check(t, vol.Close())
	o.release()

	moved, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() {
		ended <- b.rekeyVM(t.Context(), id, nil, b.newRef(t), depth{deep: true, rate: 1}, func(_ string, done, _ int64, _ string) {
			if done > 0 {
				moved <- struct{}{}
			}
		})
	}()
	select {
	case <-moved:
	case err := <-ended:
		t.Fatalf("it has ended: %v", err)
	}
	wantKind(t, "a negative rate", b.setRekeyRate(id, -1), errs.Invalid)
	check(t, b.setRekeyRate(id, 0))
	check(t, <-ended)
	wantKind(t, "at the end", b.setRekeyRate(id, 1), errs.InvalidState)
}

// TestDeepRekeyGivesWay: a deep rekey of a VM that is off makes room for a
// power-on, and goes on afterwards; in between nothing else touches the disk, and
// whoever goes on chooses the KEK.
func TestDeepRekeyGivesWay(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	const size = 12 << 20 // three zones
	req := request("web-1", keysafe.Ref{})
	req.Disks = []*strongroomv1.NewDisk{{SizeBytes: size}}
	check(t, b.createVM(ctx, req, quiet))
	id := req.GetId()
	want := bytes.Repeat([]byte("the guest wrote "), size/16)
	b.write(t, "web-1", "disk-0.raw", want)
	first, second, third := b.newRef(t), b.newRef(t), b.newRef(t)
	check(t, b.encryptVM(ctx, id, nil, first, 0, quiet))
	disk := filepath.Join(b.root, "web-1", "disk-0.luks")
	old, _, err := b.unwrap(ctx, disk)
	check(t, err)
	defer old.Close()

	m, err := b.machine(id)
	check(t, err)
	slow := depth{deep: true, rate: 1} // a zone, and the next one months later
	reason := errors.New("the controller is gone")
	life, end := context.WithCancelCause(ctx)
	moved := make(chan struct{}, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- b.rekeyVM(life, id, nil, second, slow, func(_ string, done, _ int64, _ string) {
			if done > 0 {
				moved <- struct{}{}
			}
		})
	}()
	select {
	case <-moved:
	case err := <-ended:
		t.Fatalf("it has ended: %v", err)
	}
	_, err = m.acquire(ctx) // does not go first
	wantKind(t, "another operation", err, errs.InvalidState)
	release, err := m.acquireFirst(ctx)
	check(t, err)
	if safes, info, err := peek(disk); err != nil || safes.Next == nil || safes.Next.KEK != second || info.Rekey.Done != size/3 {
		t.Errorf("safes %+v, rekey %+v, %v", safes, info.Rekey, err)
	}
	if safes, _, err := peek(disk); err == nil {
		key, next, err := b.unwrap(ctx, disk)
		check(t, err)
		if !key.Equal(old) || next.Equal(old) || safes.Current.KEK != first {
			t.Error("not the keys before and after")
		}
		check(t, errors.Join(key.Close(), next.Close()))
	}
	described, err := b.describe(ctx, m)
	check(t, err)
	if r := described.GetDisks()[0].GetRekey(); r.GetDoneBytes() != size/3 || r.GetTotalBytes() != size || r.GetKey().GetKeyId() != second.KeyID || described.GetCryptoState() != "unlocked" {
		t.Errorf("described as %v", described)
	}
	end(reason)
	release() // the rekey was waiting for it, and has no reason any more
	if err := <-ended; !errors.Is(err, reason) {
		t.Errorf("the rekey ended with %v", err)
	}

	for name, do := range map[string]func() error{
		"encrypt":  func() error { return b.encryptVM(ctx, id, nil, b.newRef(t), 0, quiet) },
		"decrypt":  func() error { return b.decryptVM(ctx, id, nil, 0, quiet) },
		"rekey":    func() error { return b.rekeyVM(ctx, id, nil, b.newRef(t), depth{}, quiet) },
		"snapshot": func() error { return b.createSnapshot(ctx, snapshotRequest(id, "first"), quiet) },
	} {
		err := do()
		wantKind(t, name+" during a deep rekey", err, errs.InvalidState)
		if errs.ReasonOf(err) != strongroomv1.ReasonRekeyInProgress || errs.HintOf(err) == "" {
			t.Errorf("%s: reason %q, hint %q", name, errs.ReasonOf(err), errs.HintOf(err))
		}
	}
	check(t, b.rekeyVM(ctx, id, nil, third, depth{deep: true}, quiet))
	safes, info, err := peek(disk)
	check(t, err)
	if safes.Current.KEK != third || safes.Next != nil || info.Rekey != nil {
		t.Errorf("safes %+v, rekey %+v", safes, info.Rekey)
	}
	key, _, err := b.unwrap(ctx, disk)
	check(t, err)
	if key.Equal(old) {
		t.Error("the DEK is the old one")
	}
	check(t, key.Close())
	if !bytes.Equal(b.content(t, id, "disk-0", size), want) {
		t.Error("the disk has changed")
	}
}
