package volume_test

import (
	"bytes"
	"fmt"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestZeros holds the volume to docs/spec/volume.md, "Zeros": by what the
// storage below it contains, not by what the volume says.
func TestZeros(t *testing.T) {
	t.Parallel()
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			t.Parallel()
			dek := keymemtest.Random(t, 64)
			mem := blockdev.NewMemory(0, 512)
			format(t, mem, volume.FormatOptions{Size: 1 << 20, SectorSize: sector, DEK: dek, AllowDiscards: true})
			v := openVolume(t, mem, dek)
			// empty returns how many of the n sectors from the first are all zeros below.
			empty := func(first, n int) (count int) {
				t.Helper()
				p := make([]byte, sector)
				for i := range n {
					_, err := mem.ReadAt(p, testOffset+int64((first+i)*sector))
					check(t, err)
					if bytes.Equal(p, make([]byte, sector)) {
						count++
					}
				}
				return count
			}
			all := 1 << 20 / sector
			if got := empty(0, all); got != all {
				t.Fatalf("new volume: %d of %d sectors are empty", got, all)
			}
			s := int64(sector)

			// Zeros that are written are encrypted, by whatever request.
			_, err := v.WriteAt(make([]byte, 3*sector), 10*s)
			check(t, err)
			check(t, v.WriteZeroes(20*s, 3*s, true))
			check(t, v.WriteZeroes(30*s, 3*s, false))
			if got := empty(0, all); got != all-9 {
				t.Errorf("after 9 sectors of zeros: %d of %d sectors are empty", got, all)
			}
			// A part of a sector makes the whole of it written, and its
			// neighbours stay empty in the same block of the storage.
			_, err = v.WriteAt([]byte{1}, 40*s+17)
			check(t, err)
			check(t, v.WriteZeroes(50*s+1, 1, true))
			if got := empty(40, 1) + empty(50, 1); got != 0 {
				t.Error("a sector written in part is empty")
			}
			if got := empty(41, 9); got != 9 {
				t.Errorf("%d of 9 neighbours are empty", got)
			}
			// Discard empties whole sectors only.
			check(t, v.Discard(10*s+1, 3*s-2))
			if empty(10, 1) != 0 || empty(11, 1) != 1 || empty(12, 1) != 0 {
				t.Errorf("after discard of one whole sector and parts of two: empty %d %d %d", empty(10, 1), empty(11, 1), empty(12, 1))
			}
			if got := contents(t, v)[:40*s]; !bytes.Equal(got, make([]byte, 40*s)) {
				t.Error("zeros do not read as zeros")
			}

			// Fill leaves nothing empty and changes nothing that is read.
			before := contents(t, v)
			var done int64
			check(t, v.Fill(t.Context(), func(d, total int64) {
				if d <= done || total != 1<<20 {
					t.Errorf("progress %d of %d after %d", d, total, done)
				}
				done = d
			}))
			if got := empty(0, all); got != 0 || done != 1<<20 {
				t.Errorf("after Fill: %d sectors are empty, progress %d", got, done)
			}
			if !bytes.Equal(contents(t, v), before) {
				t.Error("Fill changed the contents")
			}
		})
	}
}

func TestDiscardNotAllowed(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 1 << 20, DEK: dek})
	v := openVolume(t, mem, dek)
	want := pattern(1<<20, 3)
	_, err := v.WriteAt(want, 0)
	check(t, err)
	check(t, v.Discard(0, 1<<20))
	if !bytes.Equal(contents(t, v), want) {
		t.Error("a volume that allows no discards discarded")
	}
}

// TestNearlyEmptySector reads ciphertext that is zeros but for its last byte.
func TestNearlyEmptySector(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 64 << 10, DEK: dek})
	raw := make([]byte, 64<<10)
	raw[20*512-1] = 1
	_, err := mem.WriteAt(raw, testOffset)
	check(t, err)
	want, err := oracle(dek, raw, 512)
	check(t, err)
	if !bytes.Equal(contents(t, openVolume(t, mem, dek)), want) {
		t.Error("contents differ")
	}
}

// holey has one hole, of any alignment.
type holey struct {
	*blockdev.Memory
	start, end int64
}

func (h holey) NextExtent(off int64) (blockdev.Extent, error) {
	switch {
	case off < h.start:
		return blockdev.Extent{Offset: off, Length: h.start - off}, nil
	case off < h.end:
		return blockdev.Extent{Offset: off, Length: h.end - off, Hole: true}, nil
	}
	return blockdev.Extent{Offset: off, Length: h.Size() - off}, nil
}

// TestExtentsOddHoles has holes below that are no whole sectors: what the volume
// calls a hole must lie wholly in one.
func TestExtentsOddHoles(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	const size, sector = 64 << 10, 4096
	for _, hole := range [][2]int64{{0, size}, {100, 200}, {100, 9000}, {4096, 8192}, {5000, 9000}, {5000, 12288}, {60_000, size}, {8192, 8193}} {
		mem := holey{blockdev.NewMemory(0, 512), testOffset + hole[0], testOffset + hole[1]}
		format(t, mem, volume.FormatOptions{Size: size, SectorSize: sector, DEK: dek})
		v := openVolume(t, mem, dek)
		first, last := (hole[0]+sector-1)/sector*sector, hole[1]/sector*sector // of the whole sectors in it
		for start := int64(0); start < size; start += 511 {
			for off := start; off < size; {
				e, err := v.NextExtent(off)
				check(t, err)
				if e.Offset != off || e.Length <= 0 || off+e.Length > size {
					t.Fatalf("hole %v: NextExtent(%d) = %+v", hole, off, e)
				}
				if e.Hole && (off < first || off+e.Length > last) || !e.Hole && off >= first && off < last {
					t.Fatalf("hole %v: NextExtent(%d) = %+v", hole, off, e)
				}
				off += e.Length
			}
		}
	}
}

// TestExtents checks holes against a layout made by hand.
func TestExtents(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512) // allocates 4096 bytes at once
	format(t, mem, volume.FormatOptions{Size: 1 << 20, DEK: dek, AllowDiscards: true})
	v := openVolume(t, mem, dek)
	_, err := v.WriteAt([]byte{1}, 100<<10)
	check(t, err)
	for _, c := range []struct {
		off  int64
		want blockdev.Extent
	}{
		{0, blockdev.Extent{Offset: 0, Length: 100 << 10, Hole: true}},
		{77, blockdev.Extent{Offset: 77, Length: 100<<10 - 77, Hole: true}},
		{100<<10 + 513, blockdev.Extent{Offset: 100<<10 + 513, Length: 4096 - 513}},
		{104 << 10, blockdev.Extent{Offset: 104 << 10, Length: 920 << 10, Hole: true}},
	} {
		if got, err := v.NextExtent(c.off); err != nil || got != c.want {
			t.Errorf("NextExtent(%d) = %+v, %v; want %+v", c.off, got, err, c.want)
		}
	}
}
