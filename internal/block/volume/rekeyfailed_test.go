package volume_test

import (
	"bytes"
	"errors"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

var errReported = errors.New("reported as failed")

// lying is a device that reports writes of the header as failed which it has done, after
// a number of them, and the next flushes as failed that are asked for.
type lying struct {
	*blockdev.Memory
	headers int // writes of the header that are reported as they are; negative: all
	flushes int // that fail
}

func (l *lying) WriteAt(p []byte, off int64) (int, error) {
	n, err := l.Memory.WriteAt(p, off)
	if off < 32<<10 && err == nil {
		if l.headers == 0 {
			return 0, errReported
		}
		l.headers--
	}
	return n, err
}

func (l *lying) Flush() error {
	if l.flushes > 0 {
		l.flushes--
		return errReported
	}
	return l.Memory.Flush()
}

// TestNoGrowthWhenLost: after a rekey whose last commit may have been done, nothing can
// be written behind the end of before: under which key would that be?
func TestNoGrowthWhenLost(t *testing.T) {
	t.Parallel()
	const size = 32 << 10
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	dev := &lying{Memory: blockdev.NewMemory(0, 512), headers: -1}
	check(t, volume.Format(dev, volume.FormatOptions{Size: size, DEK: oldDEK, UUID: testUUID, DataOffset: testOffset}))
	v, err := volume.Open(dev, oldDEK, volume.Options{})
	check(t, err)
	_, err = v.WriteAt(pattern(size, 1), 0)
	check(t, err)

	dev.headers = 2 + 1 + 2 // the beginning, with the copy that it relies on, and the zone
	wantError(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK}), errReported)
	dev.headers = -1
	p, want := make([]byte, 512), pattern(512, 2)
	if err := v.Resize(2 * size); err == nil {
		_, err := v.WriteAt(want, size)
		check(t, err)
	} else {
		wantError(t, err, errReported)
	}
	mem := dev.Memory.Clone()
	check(t, v.Close())

	v, err = openBoth(mem, oldDEK, newDEK)
	check(t, err)
	defer v.Close()
	if v.Size() == size {
		check(t, v.Resize(2*size))
		_, err := v.WriteAt(want, size)
		check(t, err)
	}
	_, err = v.ReadAt(p, size)
	check(t, err)
	if !bytes.Equal(p, want) {
		t.Error("what was written to a volume that grew after its rekey failed is not there")
	}
}

// TestFlushOfHeaderFails: a flush that fails while the header is changed may have lost
// writes of the guest, which is told so by its own flushes.
func TestFlushOfHeaderFails(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*volume.Volume) error{
		"safe": func(v *volume.Volume) error { return v.ReplaceSafe(newSafe(t, keymemtest.Random(t, 64), "next", 2)) },
		"rekey": func(v *volume.Volume) error {
			return v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: keymemtest.Random(t, 64)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dek := keymemtest.Random(t, 64)
			dev := &lying{Memory: blockdev.NewMemory(0, 512), headers: -1}
			check(t, volume.Format(dev, volume.FormatOptions{Size: 32 << 10, DEK: dek, UUID: testUUID, DataOffset: testOffset}))
			v, err := volume.Open(dev, dek, volume.Options{})
			check(t, err)
			defer v.Close()
			_, err = v.WriteAt(pattern(512, 1), 0)
			check(t, err)
			dev.flushes = 1
			wantError(t, change(v), errReported)
			wantError(t, v.Flush(), errReported)
		})
	}
}
