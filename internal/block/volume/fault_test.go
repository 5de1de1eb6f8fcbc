package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// clones is how many outcomes of each power loss are looked at.
const clones = 3

// errHealed says that a header copy could not be read and the other one was
// used, which is no error.
var errHealed = errors.New("one header copy was not read")

// openFaulty opens a volume on a device that may fail. The error is errHealed
// if it did and that made no difference.
func openFaulty(dev *faultdev.Device, dek *keymem.Key) (*volume.Volume, error) {
	v, err := volume.Open(dev, dek, volume.Options{})
	if err == nil && dev.Injected() != faultdev.None {
		v.Close()
		return nil, errHealed
	}
	return v, err
}

// atEveryFault runs test on devices that start as disk and fail at operation 0,
// 1, 2 and so on, in every mode, with the rest of the operations failing or not,
// until none is left to fail. test returns the error of what it tried.
func atEveryFault(t *testing.T, disk *blockdev.Memory, test func(t *testing.T, dev *faultdev.Device) error) {
	t.Helper()
	forEveryFault(t, func(f faultdev.Fault) *faultdev.Device { return faultdev.New(disk.Clone(), &f) }, test)
}

// forEveryFault is [atEveryFault] for what start makes.
func forEveryFault[D interface{ Injected() faultdev.Kind }](t *testing.T, start func(faultdev.Fault) D, test func(*testing.T, D) error) {
	t.Helper()
	for _, mode := range faultdev.Modes() {
		for _, dead := range []bool{false, true} {
			for op := 0; ; op += blockdevtest.FaultStep {
				dev := start(faultdev.Fault{Op: op, Mode: mode, Dead: dead})
				ok := t.Run(fmt.Sprintf("%s/%d/dead=%v", mode, op, dead), func(t *testing.T) {
					err := test(t, dev)
					hit := dev.Injected()
					if healed := hit == faultdev.Read && err == errHealed; hit != faultdev.None && !healed && !errors.Is(err, faultdev.ErrInjected) {
						t.Errorf("a failed %s was swallowed: error %v", hit, err)
					}
					if hit == faultdev.None && err != nil {
						t.Errorf("error %v without a fault", err)
					}
				})
				if !ok {
					return
				}
				if dev.Injected() == faultdev.None {
					if op == 0 {
						t.Fatal("no operation to fail")
					}
					break
				}
			}
		}
	}
}

// survivors returns disks that a power loss, and a kill, may leave.
func survivors(dev *faultdev.Device, rng *rand.Rand) []*blockdev.Memory {
	disks := []*blockdev.Memory{dev.Contents()}
	for range clones {
		disks = append(disks, dev.PowerLoss(rng))
	}
	return disks
}

// TestFaultsFormat: there is no volume, or one that reads as zeros, also where
// there was something else before.
func TestFaultsFormat(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	used := blockdev.NewMemory(200<<10, 512)
	_, err := used.WriteAt(pattern(200<<10, 1), 0)
	check(t, err)
	for name, disk := range map[string]*blockdev.Memory{"new": blockdev.NewMemory(0, 512), "used": used} {
		for _, size := range []int64{64 << 10, 0} {
			if name == "new" && size == 0 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
					err := volume.Format(dev, volume.FormatOptions{Size: size, DEK: dek, UUID: testUUID, DataOffset: testOffset, Overwrite: true})
					for _, disk := range survivors(dev, rng) {
						v, openErr := volume.Open(disk, dek, volume.Options{})
						switch {
						case openErr == nil:
							if got := contents(t, v); !bytes.Equal(got, make([]byte, len(got))) || size != 0 && len(got) != int(size) {
								t.Errorf("a new volume has %d bytes or does not read as zeros", len(got))
							}
							v.Close()
						case err == nil:
							t.Errorf("a volume that was made does not open: %v", openErr)
						case !errors.Is(openErr, volume.ErrNotVolume) && !errors.Is(openErr, volume.ErrTruncated) && !errors.Is(openErr, volume.ErrCorrupt):
							t.Errorf("error %v", openErr)
						}
					}
					return err
				})
			})
		}
	}
}

// TestFaultsReplaceSafe: the old safe or the new one, never neither, and the
// data are there; after success the new one in both copies; and it can be
// repeated.
func TestFaultsReplaceSafe(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk := blockdev.NewMemory(0, 512)
	format(t, disk, volume.FormatOptions{Size: 64 << 10, DEK: dek, Safe: newSafe(t, dek, "old", 1)})
	v := openVolume(t, disk, dek)
	want := pattern(64<<10, 1)
	_, err := v.WriteAt(want, 0)
	check(t, err)
	check(t, v.Close())
	next, third := newSafe(t, dek, "new", 2), newSafe(t, dek, "third", 3)

	keyOf := func(t *testing.T, disk blockdev.Device) string {
		t.Helper()
		info, err := volume.Inspect(disk)
		check(t, err)
		if len(info.Safes) != 1 {
			t.Fatalf("%d safes", len(info.Safes))
		}
		return info.Safes[0].KEK.KeyID
	}
	for _, live := range []bool{false, true} {
		t.Run(fmt.Sprintf("live=%v", live), func(t *testing.T) {
			atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
				replace := func() error { return volume.ReplaceSafe(dev, next) }
				if live {
					v, err := openFaulty(dev, dek)
					if err != nil {
						return err
					}
					replace = func() error { return v.ReplaceSafe(next) }
				}
				err := replace()
				if err == nil && dev.Injected() == faultdev.Read {
					return errHealed
				}
				for _, disk := range survivors(dev, rng) {
					key := keyOf(t, disk)
					if key != "old" && key != "new" || err == nil && key != "new" {
						t.Errorf("after error %v the safe is %q", err, key)
					}
					v := openVolume(t, disk, dek)
					if !bytes.Equal(contents(t, v), want) {
						t.Error("contents differ")
					}
					// Whatever was left, the next rekey heals it.
					check(t, v.ReplaceSafe(third))
					bothCopies(t, disk, "third")
				}
				if err == nil {
					bothCopies(t, dev.PowerLoss(rng), "new")
				}
				if dev.Heal(); err != nil { // the same process tries again
					check(t, volume.ReplaceSafe(dev, third))
					for range clones {
						bothCopies(t, dev.PowerLoss(rng), "third")
					}
				}
				return err
			})
		})
	}
}

// bothCopies checks that each header copy alone gives the safe.
func bothCopies(t *testing.T, disk *blockdev.Memory, want string) {
	t.Helper()
	for _, off := range []int64{0, 16 << 10} {
		one := disk.Clone()
		check(t, damage(one, off+5000))
		info, err := volume.Inspect(one)
		check(t, err)
		if len(info.Safes) != 1 || info.Safes[0].KEK.KeyID != want {
			t.Errorf("without the copy at %d the safes are %+v, want %q", off, info.Safes, want)
		}
	}
}

// TestFaultsResize: the old size or the new one, with the data, and zeros after.
func TestFaultsResize(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk := blockdev.NewMemory(0, 512)
	format(t, disk, volume.FormatOptions{Size: 64 << 10, DEK: dek})
	v := openVolume(t, disk, dek)
	want := pattern(64<<10, 1)
	_, err := v.WriteAt(want, 0)
	check(t, err)
	check(t, v.Close())
	atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
		v, err := openFaulty(dev, dek)
		if err != nil {
			return err
		}
		err = v.Resize(128 << 10)
		if err == nil {
			err = v.Flush()
		}
		for _, disk := range survivors(dev, rng) {
			v := openVolume(t, disk, dek)
			got := contents(t, v)
			if len(got) != 128<<10 && (len(got) != 64<<10 || err == nil) {
				t.Errorf("after error %v the size is %d", err, len(got))
			}
			if !bytes.Equal(got[:64<<10], want) || !bytes.Equal(got[64<<10:], make([]byte, len(got)-64<<10)) {
				t.Error("contents differ")
			}
		}
		return err
	})
}

// TestFaultsWrite: bytes outside the request are never harmed, those inside are
// old or new, or also zeros if the request was a discard.
func TestFaultsWrite(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	for _, sector := range []int{512, 4096} {
		dek := keymemtest.Random(t, 64)
		disk := blockdev.NewMemory(0, sector)
		format(t, disk, volume.FormatOptions{Size: 192 << 10, SectorSize: sector, DEK: dek, AllowDiscards: true})
		v := openVolume(t, disk, dek)
		before := pattern(192<<10, 1)
		_, err := v.WriteAt(before, 0)
		check(t, err)
		check(t, v.Close())
		const off, n = 5000, 140_001 // more than one buffer, aligned nowhere
		for name, request := range map[string]struct {
			inside []byte
			run    func(v *volume.Volume) error
		}{
			"write":   {pattern(n, 77), func(v *volume.Volume) error { _, err := v.WriteAt(pattern(n, 77), off); return err }},
			"zero":    {make([]byte, n), func(v *volume.Volume) error { return v.WriteZeroes(off, n, true) }},
			"discard": {make([]byte, n), func(v *volume.Volume) error { return v.Discard(off, n) }},
		} {
			t.Run(fmt.Sprintf("%s/%d", name, sector), func(t *testing.T) {
				atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
					v, err := openFaulty(dev, dek)
					if err != nil {
						return err
					}
					err = request.run(v)
					for _, disk := range survivors(dev, rng) {
						got := contents(t, openVolume(t, disk, dek))
						for i := range got {
							if got[i] == before[i] {
								continue
							}
							inside := i >= off && i < off+n
							if !inside || got[i] != request.inside[i-off] {
								t.Fatalf("byte %d (inside: %v) is %#x, was %#x", i, inside, got[i], before[i])
							}
						}
					}
					return err
				})
			})
		}
	}
}

// TestFaultsEncrypt encrypts a plain disk. Its copy is not plain at any time,
// and good if Copy says so; the plain disk is not touched.
func TestFaultsEncrypt(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	plain := blockdev.NewMemory(1<<20+64<<10, 512) // two chunks of a copy
	marker := []byte("a secret of the guest's, in all of its sectors; 64 bytes of them")
	for _, off := range []int64{0, 1<<20 + 4096} {
		_, err := plain.WriteAt(bytes.Repeat(marker, 512), off)
		check(t, err)
	}
	want := contents(t, plain)
	atEveryFault(t, blockdev.NewMemory(0, 512), func(t *testing.T, dev *faultdev.Device) error {
		err := encrypt(t, dev, plain, dek)
		for _, disk := range survivors(dev, rng) {
			if bytes.Contains(contents(t, disk), marker) {
				t.Fatal("the copy holds plaintext")
			}
			if err == nil && !bytes.Equal(contents(t, openVolume(t, disk, dek)), want) {
				t.Error("the copy differs")
			}
		}
		if !bytes.Equal(contents(t, plain), want) {
			t.Error("the source was changed")
		}
		return err
	})
}

func encrypt(t *testing.T, dst blockdev.Resizer, src blockdev.Device, dek *keymem.Key) error {
	if err := volume.Format(dst, volume.FormatOptions{Size: src.Size(), DEK: dek, UUID: testUUID, DataOffset: testOffset}); err != nil {
		return err
	}
	v, err := volume.Open(dst, dek, volume.Options{})
	if err != nil {
		return err
	}
	defer v.Close()
	if f, ok := dst.(*faultdev.Device); ok && f.Injected() != faultdev.None {
		return errHealed
	}
	return volume.Copy(t.Context(), v, src, volume.CopyOptions{KeepHoles: true, Verify: true})
}

// TestFaultsDeepRekey fails every operation on the old disk while it is copied
// to one with another DEK: the old one stays as it was.
func TestFaultsDeepRekey(t *testing.T) {
	t.Parallel()
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	disk := blockdev.NewMemory(0, 512)
	format(t, disk, volume.FormatOptions{Size: 1 << 20, DEK: oldDEK})
	v := openVolume(t, disk, oldDEK)
	_, err := v.WriteAt(pattern(300<<10, 1), 100<<10)
	check(t, err)
	want := contents(t, v)
	check(t, v.Close())
	before := contents(t, disk.Clone())
	atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
		src, err := openFaulty(dev, oldDEK)
		if err != nil {
			return err
		}
		defer src.Close()
		dst := blockdev.NewMemory(0, 512)
		if err := encrypt(t, dst, src, newDEK); err != nil {
			return err
		}
		if !bytes.Equal(contents(t, openVolume(t, dst.Clone(), newDEK)), want) {
			t.Error("the copy differs")
		}
		_, err = volume.Open(dst.Clone(), oldDEK, volume.Options{})
		wantError(t, err, volume.ErrWrongKey)
		if !bytes.Equal(contents(t, dev.Contents()), before) {
			t.Error("the source was changed")
		}
		return nil
	})
}
