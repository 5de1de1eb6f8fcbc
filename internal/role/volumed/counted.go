package volumed

import (
	"context"
	"errors"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volumectl"
)

// counted is a Device that counts what is done with it, that can be another one
// between two requests, and whose requests can be held back. It is made by
// newCounted.
type counted struct {
	gate *gate
	// device changes while no request is inside the gate.
	device atomic.Pointer[blockdev.Device]

	reads, readBytes, writes, writtenBytes, flushes, failures atomic.Uint64
}

var _ blockdev.Extenter = (*counted)(nil)

func newCounted(device blockdev.Device) *counted {
	c := &counted{gate: newGate()}
	c.device.Store(&device)
	return c
}

// now returns the present device.
func (c *counted) now() blockdev.Device { return *c.device.Load() }

// swap makes the device what change returns of the present one, while there is no
// request, unless that fails.
func (c *counted) swap(change func(blockdev.Device) (blockdev.Device, error)) error {
	if err := c.gate.close(context.Background()); err != nil {
		return err
	}
	defer c.gate.open()
	next, err := change(c.now())
	if err == nil {
		c.device.Store(&next)
	}
	return err
}

// Size implements [blockdev.Device].
func (c *counted) Size() int64 { return c.now().Size() }

// BlockSize implements [blockdev.Device].
func (c *counted) BlockSize() int { return c.now().BlockSize() }

// Close implements [blockdev.Device].
func (c *counted) Close() error { return c.now().Close() }

func (c *counted) failed(err error) {
	if err != nil {
		c.failures.Add(1)
	}
}

// ReadAt implements [blockdev.Device].
func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.gate.enter()
	defer c.gate.leave()
	n, err := c.now().ReadAt(p, off)
	c.reads.Add(1)
	c.readBytes.Add(uint64(n))
	c.failed(err)
	return n, err
}

// WriteAt implements [blockdev.Device].
func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	c.gate.enter()
	defer c.gate.leave()
	n, err := c.now().WriteAt(p, off)
	c.writes.Add(1)
	c.writtenBytes.Add(uint64(n))
	c.failed(err)
	return n, err
}

// WriteZeroes implements [blockdev.Device].
func (c *counted) WriteZeroes(off, n int64, mayPunch bool) error {
	c.gate.enter()
	defer c.gate.leave()
	err := c.now().WriteZeroes(off, n, mayPunch)
	c.writes.Add(1)
	c.failed(err)
	return err
}

// Discard implements [blockdev.Device].
func (c *counted) Discard(off, n int64) error {
	c.gate.enter()
	defer c.gate.leave()
	err := c.now().Discard(off, n)
	c.writes.Add(1)
	c.failed(err)
	return err
}

// Flush implements [blockdev.Device].
func (c *counted) Flush() error {
	c.gate.enter()
	defer c.gate.leave()
	err := c.now().Flush()
	c.flushes.Add(1)
	c.failed(err)
	return err
}

// NextExtent implements [blockdev.Extenter]. A device that does not know its
// holes is all data.
func (c *counted) NextExtent(off int64) (blockdev.Extent, error) {
	c.gate.enter()
	defer c.gate.leave()
	if e, ok := c.now().(blockdev.Extenter); ok {
		return e.NextExtent(off)
	}
	if off < 0 || off >= c.now().Size() {
		return blockdev.Extent{}, blockdev.ErrOutOfRange
	}
	return blockdev.Extent{Offset: off, Length: c.now().Size() - off}, nil
}

// resize changes the size of the device, if it can.
func (c *counted) resize(size int64) error {
	c.gate.enter()
	defer c.gate.leave()
	r, ok := c.now().(blockdev.Resizer)
	if !ok {
		return errors.New("the disk has a fixed size")
	}
	return r.Resize(size)
}

// report puts the counters into s.
func (c *counted) report(s *volumectl.DiskStatus) {
	s.Reads, s.ReadBytes = c.reads.Load(), c.readBytes.Load()
	s.Writes, s.WrittenBytes = c.writes.Load(), c.writtenBytes.Load()
	s.Flushes, s.Failures = c.flushes.Load(), c.failures.Load()
}
