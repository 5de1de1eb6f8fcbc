package volume_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// begunRekey returns a disk on which a rekey was begun that has moved nothing, and
// what it holds.
func begunRekey(t *testing.T, oldDEK, newDEK *keymem.Key) (*blockdev.Memory, []byte) {
	t.Helper()
	disk, want := rekeyDisk(t, oldDEK)
	v, err := volume.Open(disk.Clone(), oldDEK, volume.Options{})
	check(t, err)
	check(t, v.Close())
	v = openVolume(t, disk, oldDEK)
	wantError(t, v.Rekey(stopped(t), volume.RekeyOptions{NewDEK: newDEK, NewSafe: newSafe(t, newDEK, "new", 1)}), errPause)
	return disk.Clone(), want
}

// stopped returns a context that has ended.
func stopped(t *testing.T) context.Context {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errPause)
	return ctx
}

// TestCancelRekey undoes a rekey of which nothing was moved, and no other.
func TestCancelRekey(t *testing.T) {
	t.Parallel()
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	disk, want := begunRekey(t, oldDEK, newDEK)
	v, err := openBoth(disk, newDEK, oldDEK)
	check(t, err)
	defer v.Close()
	check(t, v.CancelRekey())
	check(t, v.CancelRekey())
	if !bytes.Equal(contents(t, v), want) {
		t.Error("contents differ")
	}
	onlyUnder(t, disk, oldDEK, newDEK, want)
	info, err := v.Inspect()
	check(t, err)
	if info.Rekey != nil || len(info.Safes) != 1 || info.Safes[0].KEK.KeyID != "old" {
		t.Errorf("info %+v", info)
	}

	third := keymemtest.Random(t, 64)
	check(t, rekeyZones(v, 1, volume.RekeyOptions{NewDEK: third, Zone: rekeyZone}, func() { wantError(t, v.CancelRekey(), volume.ErrRekeying) }))
	wantError(t, v.CancelRekey(), volume.ErrRekeying)
	check(t, v.Rekey(t.Context(), volume.RekeyOptions{}))
	check(t, v.CancelRekey())
	onlyUnder(t, disk, third, oldDEK, want)
}

// TestFaultsCancelRekey fails every operation of an undo. What a kill or a power
// loss leaves opens with both keys, and either way out is open; and so it is in
// the volume in which the fault was.
func TestFaultsCancelRekey(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	begun, want := begunRekey(t, oldDEK, newDEK)
	atEveryFault(t, begun, func(t *testing.T, dev *faultdev.Device) error {
		v, err := openBoth(dev, oldDEK, newDEK)
		if err != nil {
			return err
		}
		if dev.Injected() != faultdev.None {
			return errHealed
		}
		err = v.CancelRekey()
		if err == nil && dev.Injected() == faultdev.Read {
			err = errHealed
		}
		for i, disk := range survivors(dev, rng) {
			if err == nil {
				onlyUnder(t, disk.Clone(), oldDEK, newDEK, want)
			}
			again, openErr := openBoth(disk, newDEK, oldDEK)
			if openErr != nil {
				t.Fatalf("survivor %d of error %v does not open: %v", i, err, openErr)
			}
			if !bytes.Equal(contents(t, again), want) {
				t.Fatalf("survivor %d of error %v: contents differ", i, err)
			}
			if i%2 == 0 {
				check(t, again.CancelRekey())
				onlyUnder(t, disk.Clone(), oldDEK, newDEK, want)
			} else {
				check(t, again.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK}))
				onlyUnder(t, disk.Clone(), newDEK, oldDEK, want)
			}
			check(t, again.Close())
		}
		if dev.Heal(); err == nil || err == errHealed {
			return err
		}
		if !bytes.Equal(contents(t, v), want) {
			t.Error("contents differ in the running volume")
		}
		if rng.IntN(2) == 0 {
			check(t, v.CancelRekey())
			onlyUnder(t, dev.Contents(), oldDEK, newDEK, want)
		}
		third := keymemtest.Random(t, 64)
		if rekeyErr := v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: third}); rekeyErr != nil {
			wantError(t, rekeyErr, volume.ErrWrongKey) // the one begun is still under way
			check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK}))
			third = newDEK
		}
		onlyUnder(t, dev.Contents(), third, oldDEK, want)
		return err
	})
}

// TestRekeyOtherSafe goes on with a rekey under a key safe of another KEK, with
// faults: whatever is left opens, and the next attempt has its safe.
func TestRekeyOtherSafe(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	begun, want := begunRekey(t, oldDEK, newDEK)
	other := newSafe(t, newDEK, "other", 2)
	ids := func(info volume.Info) (list []string) {
		for _, s := range info.Safes {
			list = append(list, s.KEK.KeyID)
		}
		return list
	}
	atEveryFault(t, begun, func(t *testing.T, dev *faultdev.Device) error {
		v, err := openBoth(dev, oldDEK, newDEK)
		if err != nil {
			return err
		}
		if dev.Injected() != faultdev.None {
			return errHealed
		}
		err = v.Rekey(stopped(t), volume.RekeyOptions{NewSafe: other})
		if bytes.Contains([]byte(err.Error()), []byte("pause")) {
			if err = nil; dev.Injected() == faultdev.Read {
				err = errHealed
			}
		}
		for _, disk := range survivors(dev, rng) {
			info, inspectErr := volume.Inspect(disk)
			check(t, inspectErr)
			if got := ids(info); len(got) != 2 || got[0] != "old" || got[1] != "other" && (got[1] != "new" || err == nil) {
				t.Fatalf("after error %v the safes are %q", err, got)
			}
			again, openErr := openBoth(disk, newDEK, oldDEK)
			check(t, openErr)
			check(t, again.Rekey(t.Context(), volume.RekeyOptions{NewSafe: other}))
			info, inspectErr = again.Inspect()
			check(t, inspectErr)
			if got := ids(info); len(got) != 1 || got[0] != "other" {
				t.Fatalf("at the end the safes are %q", got)
			}
			onlyUnder(t, disk, newDEK, oldDEK, want)
			check(t, again.Close())
		}
		return err
	})
}

// headerCopy is the length of one copy of the header, in bytes.
const headerCopy = 16 << 10

// TestRekeyTidies: without a rekey and a new key, Rekey makes good what was cut
// short at the end of one.
func TestRekeyTidies(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	disk, want := rekeyDisk(t, dek)
	v := openVolume(t, disk, dek)
	stale := make([]byte, headerCopy)
	_, err := disk.ReadAt(stale, headerCopy)
	check(t, err)
	check(t, v.ReplaceSafe(newSafe(t, dek, "next", 2)))
	_, err = disk.WriteAt(stale, headerCopy) // as if the second copy had not been reached
	check(t, err)
	_, err = disk.WriteAt(pattern(4096, 9), testOffset-8192)
	check(t, err)
	check(t, v.Rekey(t.Context(), volume.RekeyOptions{}))
	info, err := v.Inspect()
	check(t, err)
	if len(info.Damage) != 0 || info.Safes[0].KEK.KeyID != "next" {
		t.Errorf("info %+v", info)
	}
	onlyUnder(t, disk, dek, keymemtest.Random(t, 64), want)
}

// TestRateChanges: a rekey that waits for its turn goes on when it is allowed
// more.
func TestRateChanges(t *testing.T) {
	t.Parallel()
	dek, next := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	disk, want := rekeyDisk(t, dek)
	v := openVolume(t, disk, dek)
	rate := volume.NewRate(1)
	began := time.Now()
	zones := 0
	check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next, Zone: rekeyZone, Rate: rate, Progress: func(int64, int64) {
		if zones++; zones == 1 {
			go rate.Set(0) // the next zone would be due in hours
		}
	}}))
	if took := time.Since(began); took > time.Hour {
		t.Errorf("it took %v", took)
	}
	if rate.PerSecond() != 0 {
		t.Errorf("the rate is %d", rate.PerSecond())
	}
	onlyUnder(t, disk, next, dek, want)
}
