package volume_test

import (
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
)

// interrupted is a device on which something else happens right before a change is
// done.
type interrupted struct {
	*faultdev.Device
	before func()
}

func (d *interrupted) WriteAt(p []byte, off int64) (int, error) {
	d.before()
	return d.Device.WriteAt(p, off)
}

func (d *interrupted) WriteZeroes(off, n int64, mayPunch bool) error {
	d.before()
	return d.Device.WriteZeroes(off, n, mayPunch)
}

func (d *interrupted) Discard(off, n int64) error {
	d.before()
	return d.Device.Discard(off, n)
}

// TestDetachedFlushBesideWrite: what was written to the header is durable after the
// next flush, also if another flush ran while it was being written. A rekey counts
// on that while the guest flushes.
func TestDetachedFlushBesideWrite(t *testing.T) {
	t.Parallel()
	const size = 64 << 10
	for name, change := range map[string]func(*volume.Detached) error{
		"write":   func(d *volume.Detached) error { _, err := d.WriteAt(make([]byte, size), 0); return err },
		"zeroes":  func(d *volume.Detached) error { return d.WriteZeroes(0, size, true) },
		"discard": func(d *volume.Detached) error { return d.Discard(0, size) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mem := blockdev.NewMemory(size, 512)
			ones := make([]byte, size)
			for i := range ones {
				ones[i] = 1
			}
			_, err := mem.WriteAt(ones, 0)
			check(t, err)
			header := faultdev.New(mem, nil)
			var dev *volume.Detached
			dev = volume.NewDetached(&interrupted{header, func() { check(t, dev.Flush()) }}, blockdev.NewMemory(size, 512))
			check(t, change(dev))
			check(t, dev.Flush())
			for seed := range uint64(8) {
				for i, b := range contents(t, header.PowerLoss(rand.New(rand.NewPCG(seed, 0)))) {
					if b != 0 {
						t.Fatalf("after a power loss byte %d is the old one, in spite of a flush", i)
					}
				}
			}
		})
	}
}
