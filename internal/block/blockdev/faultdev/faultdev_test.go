package faultdev_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
)

const block = 512

func TestConformance(t *testing.T) {
	blockdevtest.Run(t, blockdevtest.Suite{
		New: func(_ testing.TB, size int64) blockdev.Device {
			return faultdev.New(blockdev.NewMemory(size, block), nil)
		},
		// What was flushed must be there after a power loss.
		Reopen: func(t testing.TB, dev blockdev.Device) blockdev.Device {
			dev.Close()
			seed := blockdevtest.Seed(t)
			return faultdev.New(dev.(*faultdev.Device).PowerLoss(rand.New(rand.NewPCG(seed, 0))), nil)
		},
		Allocates: true,
	})
}

func TestModes(t *testing.T) {
	t.Parallel()
	for mode, want := range map[faultdev.Mode][]byte{
		faultdev.Undone: {0, 0, 0, 0},
		faultdev.Done:   {1, 1, 1, 1},
		faultdev.Torn:   {1, 0, 1, 0},
	} {
		dev := faultdev.New(blockdev.NewMemory(4*block, block), &faultdev.Fault{Op: 0, Mode: mode})
		if _, err := dev.WriteAt(bytes.Repeat([]byte{1}, 4*block), 0); !errors.Is(err, faultdev.ErrInjected) {
			t.Errorf("%v: error %v, want ErrInjected", mode, err)
		}
		if got := blocks(t, dev); !bytes.Equal(got, want) {
			t.Errorf("%v: blocks hold %v, want %v", mode, got, want)
		}
		if got := dev.Injected(); got != faultdev.Write {
			t.Errorf("%v: Injected() = %q", mode, got)
		}
	}
}

func TestDead(t *testing.T) {
	t.Parallel()
	dev := faultdev.New(blockdev.NewMemory(4*block, block), &faultdev.Fault{Op: 1, Mode: faultdev.Done, Dead: true})
	for op, want := range []error{nil, faultdev.ErrInjected, faultdev.ErrInjected, faultdev.ErrInjected} {
		if _, err := dev.WriteAt(bytes.Repeat([]byte{1}, block), int64(op)*block); !errors.Is(err, want) {
			t.Errorf("operation %d: error %v, want %v", op, err, want)
		}
	}
	if got, want := blocks(t, dev.Contents()), []byte{1, 1, 0, 0}; !bytes.Equal(got, want) {
		t.Errorf("blocks hold %v, want %v", got, want)
	}
}

// TestPowerLoss checks that every outcome which the rules allow does come, and
// no other.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dev := faultdev.New(blockdev.NewMemory(2*block, block), nil)
	put := func(b, value byte) {
		if _, err := dev.WriteAt(bytes.Repeat([]byte{value}, block), int64(b)*block); err != nil {
			t.Fatal(err)
		}
	}
	outcomes := func() map[[2]byte]bool {
		seen := map[[2]byte]bool{}
		for range 300 {
			seen[[2]byte(blocks(t, dev.PowerLoss(rng)))] = true
		}
		return seen
	}
	wantOutcomes := func(step string, first, second []byte) {
		t.Helper()
		want := map[[2]byte]bool{}
		for _, a := range first {
			for _, b := range second {
				want[[2]byte{a, b}] = true
			}
		}
		got := outcomes()
		for o := range got {
			if !want[o] {
				t.Errorf("%s: outcome %v is not allowed", step, o)
			}
		}
		if len(got) < len(want) {
			t.Errorf("%s: outcomes %v, want all of %v", step, got, want)
		}
	}
	wantOutcomes("fresh", []byte{0}, []byte{0})
	put(0, 1)
	put(0, 2)
	put(1, 3)
	wantOutcomes("unflushed", []byte{0, 1, 2}, []byte{0, 3})
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	wantOutcomes("flushed", []byte{2}, []byte{3})
	put(0, 4)
	dev.Inject(&faultdev.Fault{Op: 0, Mode: faultdev.Undone})
	if err := dev.Flush(); !errors.Is(err, faultdev.ErrInjected) {
		t.Fatalf("Flush: %v", err)
	}
	put(1, 5)
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	wantOutcomes("flushed after a failed flush", []byte{2, 4}, []byte{5})
}

// TestPowerLossSize checks that an unflushed size comes or goes.
func TestPowerLossSize(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dev := faultdev.New(blockdev.NewMemory(2*block, block), nil)
	if err := dev.Resize(8 * block); err != nil {
		t.Fatal(err)
	}
	if _, err := dev.WriteAt(make([]byte, block), 7*block); err != nil {
		t.Fatal(err)
	}
	seen := map[int64]bool{}
	for range 100 {
		seen[dev.PowerLoss(rng).Size()] = true
	}
	if len(seen) != 2 || !seen[2*block] || !seen[8*block] {
		t.Errorf("sizes after power loss: %v, want %d and %d", seen, 2*block, 8*block)
	}
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := dev.PowerLoss(rng).Size(); got != 8*block {
		t.Errorf("size after flush and power loss: %d, want %d", got, 8*block)
	}
}

// blocks returns the first byte of each block.
func blocks(t *testing.T, dev blockdev.Device) []byte {
	t.Helper()
	var first []byte
	for off := int64(0); off < dev.Size(); off += block {
		var b [block]byte
		if _, err := dev.ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		first = append(first, b[0])
	}
	return first
}
