package volumed

import (
	"errors"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volumectl"
)

// counted is a Device that counts what is done with it.
type counted struct {
	blockdev.Device

	reads, readBytes, writes, writtenBytes, flushes, failures atomic.Uint64
}

var _ blockdev.Extenter = (*counted)(nil)

func (c *counted) failed(err error) {
	if err != nil {
		c.failures.Add(1)
	}
}

// ReadAt implements [blockdev.Device].
func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Device.ReadAt(p, off)
	c.reads.Add(1)
	c.readBytes.Add(uint64(n))
	c.failed(err)
	return n, err
}

// WriteAt implements [blockdev.Device].
func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.Device.WriteAt(p, off)
	c.writes.Add(1)
	c.writtenBytes.Add(uint64(n))
	c.failed(err)
	return n, err
}

// WriteZeroes implements [blockdev.Device].
func (c *counted) WriteZeroes(off, n int64, mayPunch bool) error {
	err := c.Device.WriteZeroes(off, n, mayPunch)
	c.writes.Add(1)
	c.failed(err)
	return err
}

// Discard implements [blockdev.Device].
func (c *counted) Discard(off, n int64) error {
	err := c.Device.Discard(off, n)
	c.writes.Add(1)
	c.failed(err)
	return err
}

// Flush implements [blockdev.Device].
func (c *counted) Flush() error {
	err := c.Device.Flush()
	c.flushes.Add(1)
	c.failed(err)
	return err
}

// NextExtent implements [blockdev.Extenter]. A device that does not know its
// holes is all data.
func (c *counted) NextExtent(off int64) (blockdev.Extent, error) {
	if e, ok := c.Device.(blockdev.Extenter); ok {
		return e.NextExtent(off)
	}
	if off < 0 || off >= c.Size() {
		return blockdev.Extent{}, blockdev.ErrOutOfRange
	}
	return blockdev.Extent{Offset: off, Length: c.Size() - off}, nil
}

// resize changes the size of the device, if it can.
func (c *counted) resize(size int64) error {
	r, ok := c.Device.(blockdev.Resizer)
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
