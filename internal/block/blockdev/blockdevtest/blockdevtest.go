// Package blockdevtest is the conformance suite of package blockdev: every
// implementation of [blockdev.Device] passes [Run].
//
// Random tests print their seed; the environment variable STRONGROOM_TEST_SEED
// replays one.
package blockdevtest

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
)

// Suite tells how to make the devices under test.
type Suite struct {
	// New returns a fresh device of size bytes, a multiple of 64 KiB, that
	// reads as zeros. It registers a clean-up for what Close leaves behind.
	New func(t testing.TB, size int64) blockdev.Device
	// Reopen closes dev, which New or Reopen returned and which was flushed, and
	// opens its storage again. Nil: contents end with Close.
	Reopen func(t testing.TB, dev blockdev.Device) blockdev.Device
	// ReadOnly is as Reopen, for reading only. Nil: the device has no such mode.
	ReadOnly func(t testing.TB, dev blockdev.Device) blockdev.Device
	// Allocates says that requests may allocate: true for test devices only.
	Allocates bool
}

// size is of the devices under test: enough for requests that an
// implementation splits.
const size = 1 << 20

// Seed returns the seed of a random test, and logs it.
func Seed(t testing.TB) uint64 {
	seed := rand.Uint64()
	if s := os.Getenv("STRONGROOM_TEST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("STRONGROOM_TEST_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("replay with STRONGROOM_TEST_SEED=%d", seed)
	return seed
}

// Run runs the suite. t must not be parallel: allocations are counted.
func Run(t *testing.T, s Suite) {
	tests := []struct {
		name string
		run  func(*testing.T)
	}{
		{"Fresh", s.fresh},
		{"Unaligned", s.unaligned},
		{"OutOfRange", s.outOfRange},
		{"WriteZeroes", s.writeZeroes},
		{"Discard", s.discard},
		{"Resize", s.resize},
		{"Extents", s.extents},
		{"Close", s.close},
		{"CloseWaits", s.closeWaits},
		{"ReadOnly", s.readOnly},
		{"Durable", s.durable},
		{"Model", s.model},
		{"BlocksAreAtomic", s.blocksAreAtomic},
		{"NeighboursSurvive", s.neighboursSurvive},
		{"Allocations", s.allocations},
	}
	for _, test := range tests {
		t.Run(test.name, test.run)
	}
}

func (s Suite) fresh(t *testing.T) {
	dev := s.New(t, size)
	defer dev.Close()
	if got := dev.Size(); got != size {
		t.Errorf("Size() = %d, want %d", got, size)
	}
	bs := dev.BlockSize()
	if bs < 512 || bs > 65536 || bs&(bs-1) != 0 {
		t.Errorf("BlockSize() = %d, want a power of two from 512 to 65536", bs)
	}
	got := fill(size, 0xEE)
	read(t, dev, got, 0)
	if i := firstDifference(got, make([]byte, size)); i >= 0 {
		t.Errorf("byte %d of a fresh device is %#x, want 0", i, got[i])
	}
}

// unaligned writes and reads with every kind of alignment at block borders.
func (s Suite) unaligned(t *testing.T) {
	dev := s.New(t, size)
	defer dev.Close()
	want := random(rand.New(rand.NewPCG(1, 1)), size)
	write(t, dev, want, 0)
	bs := dev.BlockSize()
	edges := []int{0, 1, 15, 511, 512, 513, bs - 1, bs, bs + 1, 2*bs - 1, 3 * bs, 128<<10 - 1, 128<<10 + 1, 300<<10 + 7, size - bs, size - 1, size}
	for _, from := range edges {
		for _, to := range edges {
			if from > to {
				continue
			}
			p := random(rand.New(rand.NewPCG(uint64(from), uint64(to))), to-from)
			kept := bytes.Clone(p)
			write(t, dev, p, int64(from))
			if !bytes.Equal(p, kept) {
				t.Fatalf("WriteAt(%d bytes, %d) changed its buffer", len(p), from)
			}
			copy(want[from:], p)
			got := make([]byte, to-from)
			read(t, dev, got, int64(from))
			if !bytes.Equal(got, p) {
				t.Fatalf("ReadAt(%d bytes, %d) differs from what was written there", len(p), from)
			}
		}
	}
	expect(t, dev, want)
}

func (s Suite) outOfRange(t *testing.T) {
	dev := s.New(t, size)
	defer dev.Close()
	want := random(rand.New(rand.NewPCG(2, 2)), size)
	write(t, dev, want, 0)
	p := make([]byte, 512)
	for _, off := range []int64{-1, -512, math.MinInt64, size - 511, size, size + 1, math.MaxInt64, math.MaxInt64 - 511} {
		_, err := dev.ReadAt(p, off)
		wantError(t, "ReadAt", err, blockdev.ErrOutOfRange)
		_, err = dev.WriteAt(p, off)
		wantError(t, "WriteAt", err, blockdev.ErrOutOfRange)
	}
	for _, r := range [][2]int64{{0, -1}, {-1, 1}, {0, size + 1}, {1, size}, {size, 1}, {1, math.MaxInt64}, {math.MaxInt64, math.MaxInt64}, {512, math.MinInt64}} {
		wantError(t, "WriteZeroes", dev.WriteZeroes(r[0], r[1], true), blockdev.ErrOutOfRange)
		wantError(t, "WriteZeroes", dev.WriteZeroes(r[0], r[1], false), blockdev.ErrOutOfRange)
		wantError(t, "Discard", dev.Discard(r[0], r[1]), blockdev.ErrOutOfRange)
	}
	for _, off := range []int64{0, 1, size} { // empty requests are fine up to the end
		if n, err := dev.ReadAt(nil, off); n != 0 || err != nil {
			t.Errorf("ReadAt(empty, %d) = %d, %v", off, n, err)
		}
		if n, err := dev.WriteAt(nil, off); n != 0 || err != nil {
			t.Errorf("WriteAt(empty, %d) = %d, %v", off, n, err)
		}
		check(t, dev.WriteZeroes(off, 0, true))
		check(t, dev.WriteZeroes(off, 0, false))
		check(t, dev.Discard(off, 0))
	}
	expect(t, dev, want)
}

func (s Suite) writeZeroes(t *testing.T) {
	for _, mayPunch := range []bool{false, true} {
		dev := s.New(t, size)
		defer dev.Close()
		want := random(rand.New(rand.NewPCG(3, 3)), size)
		write(t, dev, want, 0)
		for _, r := range [][2]int64{{0, 512}, {8192, 4096}, {20000, 1}, {33333, 7777}, {64 << 10, 512 << 10}, {size - 100, 100}, {700000, 200001}} {
			check(t, dev.WriteZeroes(r[0], r[1], mayPunch))
			clear(want[r[0] : r[0]+r[1]])
		}
		expect(t, dev, want)
	}
}

// discard checks that every block of a discarded range is as before or zero and
// that nothing else changed.
func (s Suite) discard(t *testing.T) {
	dev := s.New(t, size)
	defer dev.Close()
	before := random(rand.New(rand.NewPCG(4, 4)), size)
	write(t, dev, before, 0)
	discarded := make([]bool, size)
	for _, r := range [][2]int64{{0, 512}, {8192, 4096}, {20000, 1}, {33333, 7777}, {64 << 10, 512 << 10}, {size - 100, 100}} {
		check(t, dev.Discard(r[0], r[1]))
		for i := r[0]; i < r[0]+r[1]; i++ {
			discarded[i] = true
		}
	}
	after := make([]byte, size)
	read(t, dev, after, 0)
	for i := range after {
		if after[i] != before[i] && (!discarded[i] || after[i] != 0) {
			t.Fatalf("byte %d (discarded: %v) became %#x, was %#x", i, discarded[i], after[i], before[i])
		}
	}
	write(t, dev, before, 0) // and it can be used again
	expect(t, dev, before)
}

func (s Suite) resize(t *testing.T) {
	opened := s.New(t, size)
	defer opened.Close()
	dev, ok := opened.(blockdev.Resizer)
	if !ok {
		return
	}
	want := random(rand.New(rand.NewPCG(5, 5)), size)
	write(t, dev, want, 0)
	bs := int64(dev.BlockSize())
	for _, bad := range []int64{-1, -bs, bs + 1, size - 1, math.MinInt64} {
		wantError(t, "Resize", dev.Resize(bad), blockdev.ErrBadSize)
	}
	expect(t, dev, want)
	for _, n := range []int64{2 * size, size / 2, size/2 + bs, bs, 3*size + bs, size} {
		check(t, dev.Resize(n))
		if got := dev.Size(); got != n {
			t.Fatalf("Size() after Resize(%d) = %d", n, got)
		}
		if n < int64(len(want)) {
			want = want[:n:n]
		}
		want = append(want, make([]byte, n-int64(len(want)))...)
		expect(t, dev, want)
		_, err := dev.ReadAt(make([]byte, 1), n)
		wantError(t, "ReadAt at the new end", err, blockdev.ErrOutOfRange)
	}
	write(t, dev, want[:bs], size-bs)
}

// extents checks that extents cover the device, have a length, and that holes
// read as zeros.
func (s Suite) extents(t *testing.T) {
	opened := s.New(t, size)
	defer opened.Close()
	dev, ok := opened.(blockdev.Extenter)
	if !ok {
		return
	}
	write(t, dev, random(rand.New(rand.NewPCG(6, 6)), 100_000), 123_456)
	check(t, dev.Discard(140_000, 40_000))
	check(t, dev.WriteZeroes(300_000, 3000, false))
	contents := make([]byte, size)
	read(t, dev, contents, 0)
	for _, start := range []int64{0, 1, 511, 512, 123_456, 150_001, size - 1} {
		for off := start; off < size; {
			e, err := dev.NextExtent(off)
			check(t, err)
			if e.Offset != off || e.Length <= 0 || e.Length > size-off {
				t.Fatalf("NextExtent(%d) = %+v, on a device of %d bytes", off, e, size)
			}
			if run := contents[off : off+e.Length]; e.Hole && firstDifference(run, make([]byte, len(run))) >= 0 {
				t.Fatalf("NextExtent(%d) = %+v, but it holds data", off, e)
			}
			off += e.Length
		}
	}
	for _, off := range []int64{-1, size, math.MaxInt64} {
		_, err := dev.NextExtent(off)
		wantError(t, "NextExtent", err, blockdev.ErrOutOfRange)
	}
}

func (s Suite) close(t *testing.T) {
	dev := s.New(t, size)
	check(t, dev.Close())
	check(t, dev.Close())
	p := make([]byte, 512)
	_, err := dev.ReadAt(p, 0)
	wantError(t, "ReadAt", err, blockdev.ErrClosed)
	_, err = dev.WriteAt(p, 0)
	wantError(t, "WriteAt", err, blockdev.ErrClosed)
	wantError(t, "WriteZeroes", dev.WriteZeroes(0, 512, true), blockdev.ErrClosed)
	wantError(t, "Discard", dev.Discard(0, 512), blockdev.ErrClosed)
	wantError(t, "Flush", dev.Flush(), blockdev.ErrClosed)
	if r, ok := dev.(blockdev.Resizer); ok {
		wantError(t, "Resize", r.Resize(2*size), blockdev.ErrClosed)
	}
	if e, ok := dev.(blockdev.Extenter); ok {
		_, err := e.NextExtent(0)
		wantError(t, "NextExtent", err, blockdev.ErrClosed)
	}
}

// closeWaits closes a busy device: each request succeeds or fails with
// ErrClosed, and once Close has returned none succeeds.
func (s Suite) closeWaits(t *testing.T) {
	dev := s.New(t, size)
	closed := make(chan struct{})
	running := make(chan struct{}, 8)
	var workers sync.WaitGroup
	for range cap(running) {
		workers.Go(func() {
			p := make([]byte, 3000)
			for i := 0; ; i++ {
				late := false
				select {
				case <-closed:
					late = true
				default:
				}
				_, err := dev.WriteAt(p, int64(i*1000%(size-3000)))
				if i == 0 {
					running <- struct{}{}
				}
				if err == nil && late {
					t.Error("a write succeeded after Close had returned")
				}
				if err != nil && !errors.Is(err, blockdev.ErrClosed) {
					t.Errorf("write while closing: %v", err)
				}
				if err != nil || late {
					return
				}
			}
		})
	}
	for range cap(running) {
		<-running
	}
	check(t, dev.Close())
	close(closed)
	workers.Wait()
}

func (s Suite) readOnly(t *testing.T) {
	if s.ReadOnly == nil {
		return
	}
	dev := s.New(t, size)
	want := random(rand.New(rand.NewPCG(7, 7)), size)
	write(t, dev, want, 0)
	check(t, dev.Flush())
	dev = s.ReadOnly(t, dev)
	defer dev.Close()
	_, err := dev.WriteAt(make([]byte, 512), 0)
	wantError(t, "WriteAt", err, blockdev.ErrReadOnly)
	wantError(t, "WriteZeroes", dev.WriteZeroes(0, 512, true), blockdev.ErrReadOnly)
	wantError(t, "Discard", dev.Discard(0, 512), blockdev.ErrReadOnly)
	if r, ok := dev.(blockdev.Resizer); ok {
		wantError(t, "Resize", r.Resize(2*size), blockdev.ErrReadOnly)
	}
	check(t, dev.Flush())
	expect(t, dev, want)
}

func (s Suite) durable(t *testing.T) {
	if s.Reopen == nil {
		return
	}
	dev := s.New(t, size)
	want := random(rand.New(rand.NewPCG(8, 8)), size)
	write(t, dev, want, 0)
	check(t, dev.WriteZeroes(5000, 5000, true))
	clear(want[5000:10000])
	if r, ok := dev.(blockdev.Resizer); ok {
		check(t, r.Resize(size+64<<10))
		want = append(want, make([]byte, 64<<10)...)
	}
	check(t, dev.Flush())
	dev = s.Reopen(t, dev)
	defer func() { dev.Close() }()
	expect(t, dev, want)
	write(t, dev, want[:700], 300)
	copy(want[300:], bytes.Clone(want[:700]))
	check(t, dev.Flush())
	dev = s.Reopen(t, dev)
	expect(t, dev, want)
}

// model compares a random sequence of requests with a byte slice.
func (s Suite) model(t *testing.T) {
	rng := rand.New(rand.NewPCG(Seed(t), 0))
	dev := s.New(t, size)
	defer func() { dev.Close() }()
	want := make([]byte, size)
	for range 400 {
		off := rng.Int64N(size + 1)
		n := min(int64(1)<<rng.IntN(20)+rng.Int64N(600), size-off)
		if rng.IntN(2) == 0 {
			off, n = off&^511, n&^511
		}
		switch op := rng.IntN(10); {
		case op < 5:
			p := random(rng, int(n))
			write(t, dev, p, off)
			copy(want[off:], p)
		case op < 8:
			got := make([]byte, n)
			read(t, dev, got, off)
			if i := firstDifference(got, want[off:off+n]); i >= 0 {
				t.Fatalf("byte %d is %#x, want %#x", off+int64(i), got[i], want[off+int64(i)])
			}
		case op < 9:
			check(t, dev.WriteZeroes(off, n, rng.IntN(2) == 0))
			clear(want[off : off+n])
		case s.Reopen != nil:
			check(t, dev.Flush())
			dev = s.Reopen(t, dev)
		}
	}
	expect(t, dev, want)
}

// blocksAreAtomic writes uniform blocks from several goroutines while others
// read: a block with two values was torn.
func (s Suite) blocksAreAtomic(t *testing.T) {
	dev := s.New(t, 64<<10)
	defer dev.Close()
	bs := dev.BlockSize()
	blocks := min(8, 64<<10/bs)
	var workers sync.WaitGroup
	for w := range 4 {
		workers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			for range 300 {
				first := rng.IntN(blocks)
				p := make([]byte, (1+rng.IntN(blocks-first))*bs)
				if w%2 == 0 {
					for i := range p {
						p[i] = byte(w + 1)
					}
					if _, err := dev.WriteAt(p, int64(first*bs)); err != nil {
						t.Error(err)
					}
					continue
				}
				if _, err := dev.ReadAt(p, int64(first*bs)); err != nil {
					t.Error(err)
				}
				for ; len(p) > 0; p = p[bs:] {
					if i := firstDifference(p[:bs], fill(bs, p[0])); i >= 0 {
						t.Errorf("a block holds %#x at its start and %#x at %d", p[0], p[i], i)
						return
					}
				}
			}
		})
	}
	workers.Wait()
}

// neighboursSurvive lets goroutines write their own bytes of shared blocks: a
// read-modify-write that is not locked loses some.
func (s Suite) neighboursSurvive(t *testing.T) {
	dev := s.New(t, 64<<10)
	defer dev.Close()
	const workers, piece = 8, 100
	want := make([]byte, 64<<10)
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 10))
			for range 60 {
				at := (rng.IntN(5)*workers + w) * piece
				p := random(rng, piece)
				if _, err := dev.WriteAt(p, int64(at)); err != nil {
					t.Error(err)
				}
				copy(want[at:], p)
			}
		})
	}
	group.Wait()
	expect(t, dev, want)
}

func (s Suite) allocations(t *testing.T) {
	if s.Allocates || RaceDetector {
		return
	}
	dev := s.New(t, size)
	defer dev.Close()
	write(t, dev, fill(size, 1), 0)
	large, small := make([]byte, 512<<10), make([]byte, 700)
	requests := []struct {
		name string
		run  func() error
	}{
		{"aligned write", func() error { _, err := dev.WriteAt(large, 64<<10); return err }},
		{"aligned read", func() error { _, err := dev.ReadAt(large, 64<<10); return err }},
		{"unaligned write", func() error { _, err := dev.WriteAt(small, 12345); return err }},
		{"unaligned read", func() error { _, err := dev.ReadAt(small, 12345); return err }},
		{"zeroes", func() error { return dev.WriteZeroes(100, 9000, false) }},
		{"discard", func() error { return dev.Discard(700<<10, 5000) }},
		{"flush", dev.Flush},
	}
	for _, r := range requests {
		check(t, r.run()) // pools fill
		// The whole process's allocations are counted, those of the runtime and
		// of a collected pool too: one that belongs to the request is there
		// every time.
		n := testing.AllocsPerRun(20, func() { check(t, r.run()) })
		for range 2 {
			n = min(n, testing.AllocsPerRun(20, func() { check(t, r.run()) }))
		}
		if n > 0 {
			t.Errorf("%s: %v allocations per request, want none", r.name, n)
		}
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func write(t testing.TB, dev blockdev.Device, p []byte, off int64) {
	t.Helper()
	if n, err := dev.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

func read(t testing.TB, dev blockdev.Device, p []byte, off int64) {
	t.Helper()
	if n, err := dev.ReadAt(p, off); n != len(p) || err != nil {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

// expect compares the whole device.
func expect(t testing.TB, dev blockdev.Device, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	read(t, dev, got, 0)
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

func fill(n int, value byte) []byte { return bytes.Repeat([]byte{value}, n) }

func random(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		v := rng.Uint64()
		for j := range 8 {
			p[i+j] = byte(v >> (8 * j))
		}
	}
	for i := n &^ 7; i < n; i++ {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// Eventually waits until ok reports true, and fails the test after a minute.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("waited too long until %s", what)
		case <-poll.C:
		}
	}
}
