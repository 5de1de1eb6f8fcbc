package volume_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

func isThin(t *testing.T, dev blockdev.Device) bool {
	t.Helper()
	info, err := volume.Inspect(dev)
	check(t, err)
	return info.Thin
}

// TestThin: a thin volume stays so until Fill has ended, and an interrupted Fill
// may be called again.
func TestThin(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 4 << 20, DEK: dek, Safe: newSafe(t, dek, "a", 1), Thin: true})
	v := openVolume(t, mem, dek)
	_, err := v.WriteAt(pattern(1<<20, 1), 1<<20)
	check(t, err)
	want := contents(t, v)
	ctx, cancel := context.WithCancel(t.Context())
	if err := v.Fill(ctx, func(int64, int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Fatalf("Fill, cancelled, reports %v", err)
	}
	if !isThin(t, mem) {
		t.Error("cut short, Fill took the mark")
	}
	for range 2 {
		check(t, v.Fill(t.Context(), nil))
		if isThin(t, mem) {
			t.Error("Fill left the mark")
		}
	}
	if !bytes.Equal(contents(t, v), want) {
		t.Error("Fill changed the contents")
	}
}

// TestFaultsFill: whichever I/O fails, and if the power fails with it, a volume
// that is not thin any more has no empty sector, and none has lost anything.
func TestFaultsFill(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 256 << 10, DEK: dek, Thin: true})
	start := openVolume(t, mem, dek)
	_, err := start.WriteAt(pattern(64<<10, 7), 64<<10)
	check(t, err)
	want := contents(t, start)
	check(t, start.Close())
	atEveryFault(t, mem, func(t *testing.T, dev *faultdev.Device) error {
		v, err := openFaulty(dev, dek)
		if err != nil {
			return err
		}
		err = v.Fill(t.Context(), nil)
		for _, disk := range survivors(dev, rng) {
			thin := isThin(t, disk)
			if err == nil && thin {
				t.Error("Fill succeeded, and the volume is thin")
			}
			if !thin && bytes.ContainsRune(emptySectors(t, disk, testOffset, 512), '-') {
				t.Fatal("a volume that is not thin has an empty sector")
			}
			if !bytes.Equal(contents(t, openVolume(t, disk, dek)), want) {
				t.Error("the contents have changed")
			}
		}
		if err == nil && dev.Injected() == faultdev.Read {
			return errHealed
		}
		return err
	})
}
