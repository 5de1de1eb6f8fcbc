// Command ioengine measures ways to do file I/O from Go, for the decision in
// docs/adr/0011-io-engine.md:
//
//   - pread: blockdev.File, called by as many goroutines as the depth says. It is
//     what volumes use.
//   - ring: a loop in one thread that keeps the depth in flight on an io_uring,
//     with a registered file, registered buffers, and batches; nobody waits for a
//     single request. It is what io_uring can do at best.
//   - ring behind calls: the same io_uring behind blocking calls of goroutines, as
//     a blockdev.Device on it would have to be.
//
// Each is measured in turn, in several rounds; medians are shown, and ratios to
// pread. The tables go to standard output.
//
//	go run ./test/bench/ioengine [-disk DIR] [-tmpfs DIR] [-rounds N]
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "ioengine:", err)
		os.Exit(1)
	}
}

// place is where the file lies and how it is opened.
type place struct {
	name   string
	dir    string
	direct bool
}

// load is what is measured.
type load struct {
	write bool
	size  int // bytes of a request; 4 KiB at random, 1 MiB in sequence
	depth int
}

// engine does requests of a load until the time is over, and returns how many.
type engine struct {
	name string
	run  func(path string, direct bool, l load, size int64, d time.Duration) (requests int, err error)
}

func run() error {
	disk := flag.String("disk", ".", "a folder on a disk")
	tmpfs := flag.String("tmpfs", "/dev/shm", "a folder on a tmpfs")
	rounds := flag.Int("rounds", 5, "how often each load is measured")
	duration := flag.Duration("duration", 400*time.Millisecond, "of one measurement")
	size := flag.Int64("size", 512<<20, "of the file, in bytes")
	flag.Parse()
	engines := []engine{{"pread", runCalls(openFile)}, {"ring", runLoop}, {"ring behind calls", runCalls(openQueue)}}
	for _, p := range []place{{"tmpfs, page cache", *tmpfs, false}, {"disk, page cache", *disk, false}, {"disk, direct", *disk, true}} {
		if err := measure(p, engines, *rounds, *duration, *size); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

func measure(p place, engines []engine, rounds int, d time.Duration, size int64) error {
	dir, err := os.MkdirTemp(p.dir, "ioengine")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "file")
	if err := fill(path, size); err != nil {
		return err
	}
	fmt.Printf("\n%s\n\n| load | engine | requests/s | MiB/s | CPU s/GiB | : pread |\n|---|---|---|---|---|---|\n", p.name)
	for _, bytes := range []int{4 << 10, 1 << 20} {
		for _, write := range []bool{false, true} {
			for _, depth := range []int{1, 32, 128} {
				if err := measureLoad(path, p.direct, load{write, bytes, depth}, engines, rounds, d, size); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func measureLoad(path string, direct bool, l load, engines []engine, rounds int, d time.Duration, size int64) error {
	rates, costs := make([][]float64, len(engines)), make([][]float64, len(engines))
	for range rounds {
		for i, e := range engines {
			before, start := cpu(), time.Now()
			n, err := e.run(path, direct, l, size, d)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", l, e.name, err)
			}
			if n == 0 {
				return fmt.Errorf("%s, %s: nothing was done", l, e.name)
			}
			rates[i] = append(rates[i], float64(n)/time.Since(start).Seconds())
			costs[i] = append(costs[i], (cpu()-before).Seconds()/(float64(n)*float64(l.size)/(1<<30)))
		}
	}
	for i, e := range engines {
		rate := median(rates[i])
		ratio := ""
		if i > 0 {
			ratio = fmt.Sprintf("%.2f", rate/median(rates[0]))
		}
		fmt.Printf("| %s | %s | %.0f | %.0f | %.2f | %s |\n", l, e.name, rate, rate*float64(l.size)/(1<<20), median(costs[i]), ratio)
	}
	return nil
}

func (l load) String() string {
	op, size := "read", "4 KiB random"
	if l.write {
		op = "write"
	}
	if l.size > 4<<10 {
		size = "1 MiB"
	}
	return fmt.Sprintf("%s %s, depth %d", size, op, l.depth)
}

// next returns the offset of a request.
func (l load) next(i int, rng *rand.Rand, size int64) int64 {
	if l.size > 4<<10 {
		return int64(i) * int64(l.size) % size
	}
	return rng.Int64N(size/int64(l.size)) * int64(l.size)
}

// target is what goroutines call.
type target interface {
	do(worker int, write bool, p []byte, off int64) error
	Close() error
}

// runCalls returns an engine of goroutines that call a target.
func runCalls(open func(path string, direct bool, buffers [][]byte) (target, error)) func(string, bool, load, int64, time.Duration) (int, error) {
	return func(path string, direct bool, l load, size int64, d time.Duration) (int, error) {
		buffers, free, err := newBuffers(l.depth, l.size)
		if err != nil {
			return 0, err
		}
		defer free()
		t, err := open(path, direct, buffers)
		if err != nil {
			return 0, err
		}
		var (
			group    sync.WaitGroup
			counts   = make([]int, l.depth)
			failures = make([]error, l.depth)
			deadline = time.Now().Add(d)
		)
		for w := range l.depth {
			group.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 1))
				for i := w; time.Now().Before(deadline) && failures[w] == nil; i += l.depth {
					failures[w] = t.do(w, l.write, buffers[w], l.next(i, rng, size))
					counts[w]++
				}
			})
		}
		group.Wait()
		n := 0
		for _, c := range counts {
			n += c
		}
		return n, errors.Join(append(failures, t.Close())...)
	}
}

// fileTarget is the product's own way.
type fileTarget struct{ *blockdev.File }

func openFile(path string, direct bool, _ [][]byte) (target, error) {
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Direct: direct})
	return fileTarget{f}, err
}

func (f fileTarget) do(_ int, write bool, p []byte, off int64) (err error) {
	if write {
		_, err = f.WriteAt(p, off)
	} else {
		_, err = f.ReadAt(p, off)
	}
	return err
}

// newBuffers returns n buffers of size bytes, aligned to pages.
func newBuffers(n, size int) ([][]byte, func(), error) {
	all, err := unix.Mmap(-1, 0, n*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil, err
	}
	buffers := make([][]byte, n)
	for i := range buffers {
		buffers[i] = all[i*size : (i+1)*size]
	}
	return buffers, func() { unix.Munmap(all) }, nil
}

// fill writes size bytes that are no holes.
func fill(path string, size int64) error {
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Resize(size); err != nil {
		return err
	}
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i * 7)
	}
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Flush()
}

func cpu() time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func median(all []float64) float64 {
	slices.SortFunc(all, cmp.Compare[float64])
	return all[len(all)/2]
}
