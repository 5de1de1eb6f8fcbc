package recrypt_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/machine/recrypt"
)

// adopts takes the encrypted disk in from over into a disk in to, as if it were
// another program's.
func (b *bench) adopts(t *testing.T, to, from recrypt.Folder) error {
	t.Helper()
	src, err := from.Open(luksName)
	if err != nil {
		return err
	}
	foreign, err := luks.ReadForeign(src, src.Size())
	if err == nil {
		err = recrypt.Adopt(t.Context(), to, luksName, diskSize, src, foreign.Segment, b.oldDEK, reference("new"), b.keys.get, nil)
	}
	return errors.Join(err, src.Close())
}

// adopted checks a disk that was taken over: it has the DEK of before, and needs the
// new KEK only.
func (b *bench) adopted(t *testing.T, f *faultFolder) {
	t.Helper()
	if got := f.list(); !slices.Equal(got, []string{luksName}) {
		t.Fatalf("the folder holds %v", got)
	}
	b.holds(t, f, luksName, keyring{"new": b.keys["new"]})
	if !b.dek(t, f).Equal(b.oldDEK) {
		t.Error("it has another DEK")
	}
	info, safes, err := recrypt.Inspect(f, luksName)
	check(t, err)
	original, _, err := recrypt.Inspect(b.folder, luksName)
	check(t, err)
	if info.UUID == original.UUID || safes.Current.KEK != reference("new") || safes.Current.Generation != 1 {
		t.Errorf("it is %+v with key safe %+v", info, safes.Current)
	}
}

// TestAdoptFaults fails every operation on the new disk, and on the image, in turn.
// The image is as it was; of the disk there is nothing or all; and the next attempt
// succeeds, in the same folder, whatever is left there.
func TestAdoptFaults(t *testing.T) {
	t.Parallel()
	for _, inImage := range []bool{false, true} {
		for _, mode := range faultdev.Modes() {
			for _, dead := range []bool{false, true} {
				t.Run(fmt.Sprintf("image=%v/%s/dead=%v", inImage, mode, dead), func(t *testing.T) {
					t.Parallel()
					rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
					b := newBench(t, luksName)
					n := 0
					for b.adoptFails(t, rng, inImage, faultdev.Fault{Op: n, Mode: mode, Dead: dead}) {
						n += blockdevtest.FaultStep
					}
					if n < 4 {
						t.Errorf("only %d operations were there to fail", n)
					}
				})
			}
		}
	}
}

func (b *bench) adoptFails(t *testing.T, rng *rand.Rand, inImage bool, fault faultdev.Fault) bool {
	t.Helper()
	from, to := b.folder.clone(nil), newFaultFolder()
	faulty := to
	if inImage {
		faulty = from
	}
	faulty.inject(&fault)
	err := b.adopts(t, to, from)
	hit := faulty.hit
	defer func() {
		if t.Failed() {
			t.Logf("failed was operation %d, %s; error %v", fault.Op, hit, err)
		}
	}()
	switch {
	case err != nil && !errors.Is(err, faultdev.ErrInjected):
		t.Errorf("error %v hides its cause", err)
	case hit == "" && err != nil:
		t.Errorf("error %v without a fault", err)
	}
	if left := append(to.opened(), from.opened()...); len(left) > 0 {
		t.Errorf("left open: %v", left)
	}
	lost := to.powerLoss(rng)
	if err == nil {
		b.adopted(t, lost)
	} else if lost.names[luksName] != nil { // renamed, and not told to be
		b.holds(t, lost, luksName, b.keys)
	}
	from.inject(nil)
	b.usable(t, from.powerLoss(rng), b.keys)
	if err != nil {
		check(t, b.adopts(t, lost, from))
		b.adopted(t, lost.powerLoss(rng))
	}
	return hit != "" && !t.Failed()
}

// TestAdoptNotThis: an image that does not fit, or is not there, becomes no disk.
func TestAdoptNotThis(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	src, err := b.folder.Open(luksName)
	check(t, err)
	defer src.Close()
	foreign, err := luks.ReadForeign(src, src.Size())
	check(t, err)
	to := newFaultFolder()
	for name, adopt := range map[string]func() error{
		"a size that is too small": func() error {
			return recrypt.Adopt(t.Context(), to, luksName, diskSize-512, src, foreign.Segment, b.oldDEK, reference("new"), b.keys.get, nil)
		},
		"no KEK": func() error {
			return recrypt.Adopt(t.Context(), to, luksName, diskSize, src, foreign.Segment, b.oldDEK, reference("gone"), b.keys.get, nil)
		},
		"no image": func() error {
			return recrypt.Adopt(t.Context(), to, luksName, diskSize, blockdev.NewMemory(0, 512), foreign.Segment, b.oldDEK, reference("new"), b.keys.get, nil)
		},
	} {
		if err := adopt(); err == nil {
			t.Errorf("%s: no error", name)
		}
		if left := to.list(); len(left) > 0 {
			t.Errorf("%s: left behind: %v", name, left)
		}
	}
}
