package nbd_test

import (
	"fmt"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
)

// pump moves count requests of n bytes through p at its full depth.
func pump(t testing.TB, p *nbd.Pipeline, write bool, bufs [][]byte, count int) {
	n := len(bufs[0])
	slots := int(p.Size()) / n
	for sent, done := 0, 0; done < count; {
		for sent < count && p.Idle() > 0 {
			buf, off := bufs[sent%len(bufs)], int64(sent*7%slots)*int64(n)
			if write {
				p.Write(buf, off)
			} else {
				p.Read(buf, off)
			}
			sent++
		}
		if _, err := p.Next(); err != nil {
			t.Fatal(err)
		}
		done++
	}
}

func pipeline(t testing.TB, depth, n int) (*nbd.Pipeline, [][]byte) {
	mem := blockdev.NewMemory(8<<20, 4096)
	write(t, mem, pattern(8<<20), 0)
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: mem})
	p, err := nbd.DialPipeline(testContext(t), "unix", path, "rw", depth)
	check(t, err)
	t.Cleanup(func() { p.Close() })
	bufs := make([][]byte, depth)
	for i := range bufs {
		bufs[i] = pattern(n)
	}
	return p, bufs
}

// TestNoAllocations counts those of client and server together.
func TestNoAllocations(t *testing.T) {
	for _, test := range []struct{ depth, bytes int }{{1, 4096}, {32, 4096}, {8, 1 << 20}} {
		for _, w := range []bool{false, true} {
			p, bufs := pipeline(t, test.depth, test.bytes)
			pump(t, p, w, bufs, 10*test.depth) // workers start, lists grow
			// Another worker may start at any time, which is not per request: what
			// is would be there every time.
			requests := 10 * test.depth
			n := testing.AllocsPerRun(10, func() { pump(t, p, w, bufs, requests) })
			for range 2 {
				n = min(n, testing.AllocsPerRun(10, func() { pump(t, p, w, bufs, requests) }))
			}
			if int(n) > requests/50 {
				t.Errorf("depth %d, %d bytes, write %v: %v allocations in %d requests, want none", test.depth, test.bytes, w, n, requests)
			}
		}
	}
}

func BenchmarkServer(b *testing.B) {
	for _, load := range []struct{ depth, bytes int }{{1, 4096}, {32, 4096}, {8, 1 << 20}} {
		for _, w := range []bool{false, true} {
			b.Run(fmt.Sprintf("depth=%d/bytes=%d/write=%v", load.depth, load.bytes, w), func(b *testing.B) {
				p, bufs := pipeline(b, load.depth, load.bytes)
				pump(b, p, w, bufs, 4*load.depth)
				b.SetBytes(int64(load.bytes))
				b.ReportAllocs()
				b.ResetTimer()
				pump(b, p, w, bufs, b.N)
			})
		}
	}
}
