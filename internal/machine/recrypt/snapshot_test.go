package recrypt_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/machine/recrypt"
)

// copyOf is the name of the file that a disk is copied to.
func copyOf(disk string) string { return "snapshot." + disk }

func copyDisk(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error {
	if disk == plainName {
		return recrypt.CopyPlain(ctx, f, copyOf(disk), disk, nil)
	}
	return recrypt.Copy(ctx, f, copyOf(disk), disk, keks, nil)
}

// TestCopyFaults fails every operation of a copy in turn. The original is as it
// was; of the copy there is nothing or all, after a power loss too; and the next
// attempt succeeds.
func TestCopyFaults(t *testing.T) {
	t.Parallel()
	for _, disk := range []string{plainName, luksName} {
		for _, reflink := range []bool{false, true} {
			for _, mode := range faultdev.Modes() {
				t.Run(fmt.Sprintf("%s/reflink=%v/%s", disk, reflink, mode), func(t *testing.T) {
					t.Parallel()
					rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
					b := newBench(t, disk)
					n := 0
					for b.copyFails(t, rng, disk, reflink, faultdev.Fault{Op: n, Mode: mode}) {
						n += blockdevtest.FaultStep
					}
					if n < 2 {
						t.Errorf("only %d operations were there to fail", n)
					}
				})
			}
		}
	}
}

func (b *bench) copyFails(t *testing.T, rng *rand.Rand, disk string, reflink bool, fault faultdev.Fault) bool {
	t.Helper()
	folder := b.folder.clone(&fault)
	folder.reflink = reflink
	want := append(folder.list(), copyOf(disk))
	slices.Sort(want)
	err := copyDisk(t.Context(), folder, disk, b.keys.get)
	hit := folder.hit
	defer func() {
		if t.Failed() {
			t.Logf("failed was operation %d, %s; error %v", fault.Op, hit, err)
		}
	}()
	if err != nil && !errors.Is(err, faultdev.ErrInjected) {
		t.Errorf("error %v hides its cause", err)
	}
	if left := folder.opened(); len(left) > 0 {
		t.Errorf("left open: %v", left)
	}
	for _, left := range []*faultFolder{folder.powerLoss(rng), folder} {
		left.inject(nil)
		if err == nil || left.names[copyOf(disk)] != nil {
			b.holds(t, left, copyOf(disk), b.keys)
		}
		b.holds(t, left, disk, b.keys)
		left.reflink = reflink
		check(t, copyDisk(t.Context(), left, disk, b.keys.get))
		after := left.powerLoss(rng)
		b.holds(t, after, copyOf(disk), b.keys)
		b.holds(t, after, disk, b.keys)
		if got := after.list(); !slices.Equal(got, want) {
			t.Errorf("the folder holds %v, want %v", got, want)
		}
	}
	return hit != "" && !t.Failed()
}

// TestCopyIsTheDisk: the copy of an encrypted disk has its identity, and a rekey
// of either leaves the other's key safe alone.
func TestCopyIsTheDisk(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	check(t, copyDisk(t.Context(), b.folder, luksName, b.keys.get))
	info, safes, err := recrypt.Inspect(b.folder, luksName)
	check(t, err)
	copied, copiedSafes, err := recrypt.Inspect(b.folder, copyOf(luksName))
	check(t, err)
	if copied.UUID != info.UUID || copiedSafes.Current.KEK != safes.Current.KEK || copiedSafes.Current.Owner != safes.Current.Owner {
		t.Errorf("the copy is %+v with key safe %+v, not %+v with %+v", copied, copiedSafes.Current, info, safes.Current)
	}
	old, all := keyring{"old": b.keys["old"]}, b.with(t, "next")
	check(t, recrypt.ShallowRekey(t.Context(), b.folder, copyOf(luksName), reference("next"), all.get))
	b.holds(t, b.folder, luksName, old)
	b.holds(t, b.folder, copyOf(luksName), keyring{"next": all["next"]})
}

// TestCopyRefuses: a disk that does not open, or is under two DEKs, is not copied,
// and what had the copy's name stays.
func TestCopyRefuses(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	check(t, copyDisk(t.Context(), b.folder, luksName, b.keys.get))
	before := b.folder.list()
	if err := copyDisk(t.Context(), b.folder, luksName, keyring{}.get); err == nil {
		t.Error("a disk whose key is not here was copied")
	}
	for op := 0; ; op++ { // killed at each operation in turn, until that leaves one under way
		f := b.folder.clone(&faultdev.Fault{Op: op, Mode: faultdev.Done, Dead: true})
		if err := recrypt.DeepRekey(t.Context(), f, luksName, reference("next"), b.with(t, "next").get, nil, nil); err == nil {
			t.Fatal("no rekey was interrupted")
		}
		f.inject(nil)
		if _, safes, err := recrypt.Inspect(f, luksName); err != nil || safes.Next == nil {
			continue
		}
		if err := copyDisk(t.Context(), f, luksName, b.keys.get); !errors.Is(err, volume.ErrRekeying) || !slices.Equal(f.list(), before) {
			t.Errorf("error %v; there is %v", err, f.list())
		}
		break
	}
	b.holds(t, b.folder, copyOf(luksName), b.keys)
}
