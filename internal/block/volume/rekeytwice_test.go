package volume_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// left is a device that outlives the process that has it open: what that has written
// and not flushed stays in the kernel's memory.
type left struct{ *faultdev.Device }

func (left) Close() error { return nil }

// TestRekeyTwice: a rekey fails or is killed at each operation, another process goes on
// with what it finds in the kernel's memory, the guest at work, and at each of its
// first operations the power goes. Nothing that the guest has flushed is lost.
func TestRekeyTwice(t *testing.T) {
	t.Parallel()
	const size, zone = 12 << 10, 4096
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	check(t, volume.Format(mem, volume.FormatOptions{Size: size, DEK: oldDEK, UUID: testUUID, DataOffset: testOffset}))
	v := openVolume(t, mem, oldDEK)
	_, err := v.WriteAt(pattern(size, 1), 0)
	check(t, err)
	start := mem.Clone()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	opts := volume.RekeyOptions{NewDEK: newDEK, Zone: zone}

	reopen := func(dev blockdev.Device) *volume.Volume {
		t.Helper()
		info, err := volume.Inspect(dev)
		check(t, err)
		if info.Rekey != nil {
			v, err := openBoth(dev, oldDEK, newDEK)
			check(t, err)
			return v
		}
		// One key is known to be its, as the key safe in the header tells.
		v, err := volume.Open(dev, newDEK, volume.Options{})
		if errors.Is(err, volume.ErrWrongKey) {
			v, err = volume.Open(dev, oldDEK, volume.Options{})
		}
		check(t, err)
		return v
	}
	for _, dead := range []bool{false, true} {
		for first, reached := 0, true; reached; first += blockdevtest.FaultStep {
			for second := range 4 {
				dev := left{faultdev.New(start.Clone(), nil)}
				v, err := volume.Open(dev, oldDEK, volume.Options{})
				check(t, err)
				dev.Inject(&faultdev.Fault{Op: first, Dead: dead})
				_ = rekeyZones(v, 4, opts, nil)
				reached = dev.Injected() != faultdev.None
				dev.Heal()
				check(t, v.Close())

				v = reopen(dev)
				want := pattern(size, 2)
				_, err = v.WriteAt(want, 0)
				check(t, err)
				check(t, v.Flush())
				dev.Inject(&faultdev.Fault{Op: second, Dead: true})
				_ = rekeyZones(v, 2, opts, nil) // refused if it is done
				check(t, v.Close())
				for range 3 {
					v := reopen(dev.PowerLoss(rng))
					if !bytes.Equal(contents(t, v), want) {
						t.Fatalf("dead=%v, fault %d, power loss %d: contents differ", dead, first, second)
					}
					check(t, v.Close())
				}
			}
		}
	}
}
