package volume_test

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestRekeyStateMachine drives volumes with random requests between the zones of
// one rekey after another, with pauses, reopenings and growth, and compares them
// with a byte slice. A failure prints how to replay it.
func TestRekeyStateMachine(t *testing.T) {
	t.Parallel()
	keys := []*keymem.Key{keymemtest.Random(t, 64), keymemtest.Random(t, 64), keymemtest.Random(t, 64)}
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(rt *rapid.T) { rekeyStateMachine(t, rt, keys, sector) })
		})
	}
}

func rekeyStateMachine(t *testing.T, rt *rapid.T, keys []*keymem.Key, sector int) {
	const sizeMax = 160 << 10
	ok := func(err error) {
		if err != nil {
			rt.Fatal(err)
		}
	}
	mem := blockdev.NewMemory(0, rapid.SampledFrom([]int{512, 4096}).Draw(rt, "block"))
	want := make([]byte, rapid.IntRange(1, sizeMax/8192).Draw(rt, "size")*4096)
	ok(volume.Format(mem, volume.FormatOptions{Size: int64(len(want)), SectorSize: sector, DEK: keys[0], UUID: testUUID, DataOffset: testOffset, AllowDiscards: true}))
	now := 0 // the key of the volume, or of a rekey the old one
	rekeying := false
	next := func() *keymem.Key { return keys[(now+1)%len(keys)] }
	v, err := volume.Open(mem, keys[0], volume.Options{})
	ok(err)
	defer func() { v.Close() }()
	span := func(rt *rapid.T) (off, n int) {
		off = rapid.IntRange(0, len(want)).Draw(rt, "offset")
		n = rapid.OneOf(rapid.IntRange(0, 3*sector), rapid.IntRange(0, 64<<10)).Draw(rt, "length")
		return off, min(n, len(want)-off)
	}
	request := func(rt *rapid.T) {
		off, n := span(rt)
		switch rapid.SampledFrom([]string{"write", "write", "zero", "discard", "read", "flush", "grow"}).Draw(rt, "request") {
		case "write":
			p := pattern(n, rapid.Byte().Draw(rt, "seed"))
			_, err := v.WriteAt(p, int64(off))
			ok(err)
			copy(want[off:], p)
		case "zero":
			ok(v.WriteZeroes(int64(off), int64(n), rapid.Bool().Draw(rt, "may punch")))
			clear(want[off : off+n])
		case "discard":
			ok(v.Discard(int64(off), int64(n)))
			if first, last := (off+sector-1)/sector*sector, (off+n)/sector*sector; first < last {
				clear(want[first:last])
			}
		case "read":
			got := make([]byte, n)
			_, err := v.ReadAt(got, int64(off))
			ok(err)
			if !bytes.Equal(got, want[off:off+n]) {
				rt.Fatalf("%d bytes at %d differ", n, off)
			}
		case "flush":
			ok(v.Flush())
		case "grow":
			if n := len(want) + 4096*rapid.IntRange(0, 4).Draw(rt, "blocks"); n <= sizeMax {
				ok(v.Resize(int64(n)))
				want = append(want, make([]byte, n-len(want))...)
			}
		}
	}
	rt.Repeat(map[string]func(*rapid.T){
		"request": request,
		"rekey": func(rt *rapid.T) {
			zones := rapid.IntRange(1, 12).Draw(rt, "zones")
			interleave := rapid.Bool().Draw(rt, "interleave")
			opts := volume.RekeyOptions{Zone: int64(rapid.IntRange(1, 6).Draw(rt, "zone")) * 4096}
			if !rekeying || rapid.Bool().Draw(rt, "name the key again") {
				opts.NewDEK = next()
			}
			ok(rekeyZones(v, zones, opts, func() {
				if interleave {
					request(rt)
				}
			}))
			info, err := v.Inspect()
			ok(err)
			if rekeying = info.Rekey != nil; !rekeying {
				now = (now + 1) % len(keys)
			}
		},
		"reopen": func(rt *rapid.T) {
			ok(v.Close())
			mem = mem.Clone()
			a, b := keys[now], next()
			if rapid.Bool().Draw(rt, "swap") {
				a, b = b, a
			}
			v, err = openBoth(mem, a, b)
			ok(err)
		},
		"one key": func(rt *rapid.T) {
			_, err := volume.Open(mem.Clone(), keys[now], volume.Options{})
			if (err != nil) != rekeying {
				rt.Fatalf("rekeying %v, opening with one key reports %v", rekeying, err)
			}
		},
		"": func(rt *rapid.T) {
			got := make([]byte, v.Size())
			_, err := v.ReadAt(got, 0)
			ok(err)
			if !bytes.Equal(got, want) {
				rt.Fatal("contents differ")
			}
		},
	})
}
