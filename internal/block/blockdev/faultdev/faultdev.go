// Package faultdev is a device that fails where it is told to and can lose
// power, so that a test can prove what survives.
//
// Every request counts as one operation, in the order of arrival: reads, writes,
// zeroes, discards, flushes and resizes. One of them can be made to fail, in one
// of the [Mode]s, and if the [Fault] is Dead, all later ones fail undone, as if
// the process had been killed there. The loop of a test is: fail operation 0,
// then 1, then 2, until one run no longer reaches the fault.
//
// # Power loss
//
// [Device.PowerLoss] returns what a disk may hold after the power went. The
// rules, which are those of the contract in package blockdev:
//
//   - A block is never torn inside.
//   - What was written before the last successful flush is there.
//   - Each request since is, at random and independently, there, not there, or
//     torn: there in some of its blocks, at random. So requests may be reordered.
//   - After a failed flush, what was requested before it stays at random also when
//     a later flush succeeds: the kernel reports lost writes once and drops them.
//   - A resize is there or not. Blocks beyond the size are gone; a gap reads as
//     zeros.
//
// A Device keeps all in memory. It is safe for concurrent use; operations run
// one at a time.
package faultdev

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"strongroom/internal/block/blockdev"
)

// ErrInjected is what a fault returns.
var ErrInjected = errors.New("injected fault")

// Mode is how an operation fails. It always returns [ErrInjected].
type Mode int

// The modes.
const (
	Undone Mode = iota // nothing was done
	Done               // all was done
	Torn               // of a write, read, zeroes or discard, every other block was done; a flush or resize was not
)

// Modes lists all modes.
func Modes() []Mode { return []Mode{Undone, Done, Torn} }

// String returns the name of the mode.
func (m Mode) String() string { return [...]string{"undone", "done", "torn"}[m] }

// Fault says which operation fails, and how.
type Fault struct {
	Op   int // counts from 0
	Mode Mode
	Dead bool // all later operations fail undone
}

// Kind is what an operation does.
type Kind string

// The kinds of operations.
const (
	None   Kind = ""
	Read   Kind = "read"
	Write  Kind = "write" // zeroes and discards too
	Flush  Kind = "flush"
	Resize Kind = "resize"
)

// Device is a faulty disk in memory.
type Device struct {
	mem *blockdev.Memory

	mu       sync.Mutex
	fault    *Fault
	ops      int
	injected Kind
	serial   int                // of the last operation, whatever Inject does to ops
	older    map[int64]*history // by block: what it may hold instead of mem's contents
	sizes    []resizing         // since the last flush, oldest first
	closed   bool
}

// history is the past of a block since it was last known to be durable.
type history struct {
	changes []change // oldest first, never empty
	suspect bool     // a flush has failed since the last change
}

// change is what one operation did to one block.
type change struct {
	op     int    // its serial
	before []byte // contents of the block
}

// resizing is what one operation did to the size.
type resizing struct {
	op     int
	before int64
}

var (
	_ blockdev.Resizer  = (*Device)(nil)
	_ blockdev.Extenter = (*Device)(nil)
)

// New returns a device with the contents of mem, all durable. mem has whole
// blocks; it belongs to the Device from now on. A nil fault means none.
func New(mem *blockdev.Memory, fault *Fault) *Device {
	return &Device{mem: mem, fault: fault, older: map[int64]*history{}}
}

// Ops returns how many operations have arrived.
func (d *Device) Ops() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ops
}

// Injected returns the kind of the operation that the fault has hit, or [None]
// as long as it was not reached.
func (d *Device) Injected() Kind {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.injected
}

// Inject replaces the fault; operations count from 0 again.
func (d *Device) Inject(fault *Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault, d.ops, d.injected = fault, 0, None
}

// Heal lets all operations succeed from now on. What Injected returns stays.
func (d *Device) Heal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = nil
}

// Contents returns what the device holds now, as a process that was killed and
// started again would find it.
func (d *Device) Contents() *blockdev.Memory {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mem.Clone()
}

// PowerLoss returns what the disk may hold after a power loss now, by the rules
// in the package comment.
func (d *Device) PowerLoss(rng *rand.Rand) *blockdev.Memory {
	d.mu.Lock()
	defer d.mu.Unlock()
	fates := make([]fate, d.serial+1)
	for op := range fates {
		fates[op] = fate(rng.IntN(3))
	}
	there := func(op int) bool { return fates[op] == kept || fates[op] == torn && rng.IntN(2) == 0 }

	disk := d.mem.Clone()
	size := disk.Size()
	for i := len(d.sizes) - 1; i >= 0 && !there(d.sizes[i].op); i-- {
		size = d.sizes[i].before
	}
	must(disk.Resize(size))
	for _, block := range slices.Sorted(maps.Keys(d.older)) { // so that the seed decides, not the order of the map
		off := block * int64(d.BlockSize())
		if off+int64(d.BlockSize()) > size {
			continue
		}
		changes := d.older[block].changes
		for i := len(changes) - 1; i >= 0 && !there(changes[i].op); i-- {
			_, err := disk.WriteAt(changes[i].before, off)
			must(err)
		}
	}
	return disk
}

// fate is what becomes of an unflushed operation when the power goes.
type fate int

const (
	kept fate = iota
	dropped
	torn // drawn for each block
)

// must panics on an error of a healthy memory device, which has none.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// begin counts an operation and says how it goes on. mu is held.
func (d *Device) begin(kind Kind) (do bool, mode Mode, err error) {
	if d.closed {
		return false, Undone, blockdev.ErrClosed
	}
	op := d.ops
	d.ops++
	d.serial++
	switch {
	case d.fault == nil || op < d.fault.Op:
		return true, Done, nil
	case op == d.fault.Op:
		d.injected = kind
		return d.fault.Mode != Undone, d.fault.Mode, fmt.Errorf("operation %d: %w (%s)", op, ErrInjected, d.fault.Mode)
	case d.fault.Dead:
		return false, Undone, fmt.Errorf("operation %d: %w (dead since %d)", op, ErrInjected, d.fault.Op)
	}
	return true, Done, nil
}

// alter runs do on the range, or on every other block of it, after saving the
// blocks that it touches.
func (d *Device) alter(off, n int64, do func(off, n int64) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := blockdev.CheckRange(d.mem.Size(), off, n); err != nil {
		return err
	}
	run, mode, failure := d.begin(Write)
	if !run {
		return failure
	}
	err := d.pieces(off, n, mode == Torn, func(off, n int64) error {
		d.save(off, n)
		return do(off, n)
	})
	return errors.Join(failure, err)
}

// pieces calls f for the whole range, or if torn for every other block of it.
func (d *Device) pieces(off, n int64, torn bool, f func(off, n int64) error) error {
	if !torn {
		return f(off, n)
	}
	unit := int64(d.BlockSize())
	for i, end := int64(0), off+n; off < end; i++ {
		k := min(unit-off%unit, end-off)
		if i%2 == 0 {
			if err := f(off, k); err != nil {
				return err
			}
		}
		off += k
	}
	return nil
}

// save remembers the present contents of the blocks of a range.
func (d *Device) save(off, n int64) {
	unit := int64(d.BlockSize())
	start, length := blockdev.Widen(off, n, unit)
	for at := start; at < start+length; at += unit {
		contents := make([]byte, unit)
		_, err := d.mem.ReadAt(contents[:min(unit, d.mem.Size()-at)], at)
		must(err)
		h := d.older[at/unit]
		if h == nil {
			h = &history{}
			d.older[at/unit] = h
		}
		h.changes, h.suspect = append(h.changes, change{d.serial, contents}), false
	}
}

// ReadAt implements [blockdev.Device].
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := blockdev.CheckRange(d.mem.Size(), off, int64(len(p))); err != nil {
		return 0, err
	}
	run, mode, failure := d.begin(Read)
	if !run {
		return 0, failure
	}
	err := d.pieces(off, int64(len(p)), mode == Torn, func(at, n int64) error {
		_, err := d.mem.ReadAt(p[at-off:at-off+n], at)
		return err
	})
	if failure != nil || err != nil {
		return 0, errors.Join(failure, err)
	}
	return len(p), nil
}

// WriteAt implements [blockdev.Device].
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	err := d.alter(off, int64(len(p)), func(at, n int64) error {
		_, err := d.mem.WriteAt(p[at-off:at-off+n], at)
		return err
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteZeroes implements [blockdev.Device].
func (d *Device) WriteZeroes(off, n int64, mayPunch bool) error {
	return d.alter(off, n, func(off, n int64) error { return d.mem.WriteZeroes(off, n, mayPunch) })
}

// Discard implements [blockdev.Device].
func (d *Device) Discard(off, n int64) error {
	return d.alter(off, n, d.mem.Discard)
}

// Flush implements [blockdev.Device].
func (d *Device) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	run, mode, failure := d.begin(Flush)
	if errors.Is(failure, blockdev.ErrClosed) {
		return failure
	}
	if !run || mode == Torn {
		for _, h := range d.older {
			h.suspect = true
		}
		return failure
	}
	for block, h := range d.older {
		if !h.suspect {
			delete(d.older, block)
		}
	}
	d.sizes = nil
	return failure
}

// Resize implements [blockdev.Resizer].
func (d *Device) Resize(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	run, mode, failure := d.begin(Resize)
	if !run || mode == Torn {
		return failure
	}
	if old := d.mem.Size(); size >= 0 && size%int64(d.BlockSize()) == 0 && size != old {
		if size < old {
			d.save(size, old-size)
		}
		d.sizes = append(d.sizes, resizing{d.serial, old})
	}
	return errors.Join(failure, d.mem.Resize(size))
}

// NextExtent implements [blockdev.Extenter]. It is not counted.
func (d *Device) NextExtent(off int64) (blockdev.Extent, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return blockdev.Extent{}, blockdev.ErrClosed
	}
	return d.mem.NextExtent(off)
}

// Size implements [blockdev.Device].
func (d *Device) Size() int64 { return d.mem.Size() }

// BlockSize implements [blockdev.Device].
func (d *Device) BlockSize() int { return d.mem.BlockSize() }

// Close implements [blockdev.Device]. Contents and PowerLoss work on.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	return nil
}
