//go:build !race

// Allocations, times and guests mean nothing under the race detector.

package vhostuser_test

import (
	"fmt"
	"math"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/vhostuser/vhostusertest"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
)

// pump moves count requests of n bytes through q at a depth.
func pump(t testing.TB, q *vhostusertest.Queue, op uint32, depth, n int, size int64, count int) {
	places := size / int64(n)
	for sent, done := 0, 0; done < count; {
		for sent < count && sent-done < depth {
			q.Submit(q.Slot(), op, uint64(int64(sent)*7%places*int64(n)/512), n)
			sent++
		}
		if err := q.Kick(); err != nil {
			t.Fatal(err)
		}
		if _, status, err := q.Next(); err != nil || status != vhostusertest.OK {
			t.Fatalf("status %d, %v", status, err)
		}
		done++
	}
}

type load struct {
	depth, bytes int
	op           uint32
}

func loads() []load {
	var all []load
	for _, op := range []uint32{vhostusertest.Read, vhostusertest.Write} {
		for _, l := range [][2]int{{1, 4096}, {32, 4096}, {1, 1 << 20}, {8, 1 << 20}} {
			all = append(all, load{l[0], l[1], op})
		}
	}
	return all
}

func (l load) String() string {
	return fmt.Sprintf("depth=%d/bytes=%d/write=%v", l.depth, l.bytes, l.op == vhostusertest.Write)
}

// TestNoAllocations counts those of both ends together.
func TestNoAllocations(t *testing.T) {
	mem := blockdev.NewMemory(8<<20, 4096)
	if _, err := mem.WriteAt(pattern(8<<20), 0); err != nil {
		t.Fatal(err)
	}
	for _, scatter := range []bool{false, true} {
		for _, l := range loads() {
			_, path := start(t, vhostuser.Config{Device: mem})
			q := dial(t, path, vhostusertest.Options{Scatter: scatter}).Queues[0]
			pump(t, q, l.op, l.depth, l.bytes, mem.Size(), 20*l.depth)
			requests := 20 * l.depth
			// Another worker may start at any time, which is not per request: what is
			// would be there every time.
			n := math.Inf(1)
			for range 3 {
				n = min(n, testing.AllocsPerRun(5, func() { pump(t, q, l.op, l.depth, l.bytes, mem.Size(), requests) }))
			}
			if int(n) > max(1, requests/20) {
				t.Errorf("%v, scattered %v: %v allocations in %d requests, want none", l, scatter, n, requests)
			}
		}
	}
}

func BenchmarkServer(b *testing.B) {
	const size = 64 << 20
	for _, encrypted := range []bool{false, true} {
		file, err := blockdev.OpenFile(filepath.Join(b.TempDir(), "disk"), blockdev.FileOptions{Create: true})
		check(b, err)
		var dev blockdev.Device = file
		if encrypted {
			dev = encrypt(b, file)
		} else {
			check(b, file.Resize(size))
		}
		_, path := start(b, vhostuser.Config{Device: dev})
		zero := make([]byte, 1<<20)
		for off := int64(0); off < size; off += 1 << 20 {
			_, err := dev.WriteAt(zero, off)
			check(b, err)
		}
		for _, l := range loads() {
			b.Run(fmt.Sprintf("encrypted=%v/%v", encrypted, l), func(b *testing.B) {
				q := dial(b, path, vhostusertest.Options{}).Queues[0]
				pump(b, q, l.op, l.depth, l.bytes, size, 4*l.depth)
				b.SetBytes(int64(l.bytes))
				b.ReportAllocs()
				b.ResetTimer()
				pump(b, q, l.op, l.depth, l.bytes, size, b.N)
			})
		}
		b.Cleanup(func() { dev.Close() })
	}
}

// encrypt makes an encrypted volume of 64 MiB on dev.
func encrypt(b *testing.B, dev blockdev.Resizer) blockdev.Device {
	dek, err := keymem.Random(64)
	check(b, err)
	defer dek.Close()
	check(b, volume.Format(dev, volume.FormatOptions{UUID: "0d4f9a1c-7b52-4f0e-9d57-6a0c3f5e2b11", Size: 64 << 20, DEK: dek}))
	v, err := volume.Open(dev, dek, volume.Options{})
	check(b, err)
	return v
}
