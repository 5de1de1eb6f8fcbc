package volumed

import (
	"errors"
	"sync"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volumectl"
)

// counted is a Device that counts what is done with it, and that can be another
// one between two requests.
type counted struct {
	mu     sync.RWMutex    // read-held by requests
	device blockdev.Device // guarded by mu

	reads, readBytes, writes, writtenBytes, flushes, failures atomic.Uint64
}

var _ blockdev.Extenter = (*counted)(nil)

// swap makes the device what change returns of the present one, while there is no
// request, unless that fails.
func (c *counted) swap(change func(blockdev.Device) (blockdev.Device, error)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	next, err := change(c.device)
	if err == nil {
		c.device = next
	}
	return err
}

// Size implements [blockdev.Device].
func (c *counted) Size() int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.device.Size()
}

// BlockSize implements [blockdev.Device].
func (c *counted) BlockSize() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.device.BlockSize()
}

// Close implements [blockdev.Device].
func (c *counted) Close() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.device.Close()
}

func (c *counted) failed(err error) {
	if err != nil {
		c.failures.Add(1)
	}
}

// ReadAt implements [blockdev.Device].
func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	n, err := c.device.ReadAt(p, off)
	c.reads.Add(1)
	c.readBytes.Add(uint64(n))
	c.failed(err)
	return n, err
}

// WriteAt implements [blockdev.Device].
func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	n, err := c.device.WriteAt(p, off)
	c.writes.Add(1)
	c.writtenBytes.Add(uint64(n))
	c.failed(err)
	return n, err
}

// WriteZeroes implements [blockdev.Device].
func (c *counted) WriteZeroes(off, n int64, mayPunch bool) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	err := c.device.WriteZeroes(off, n, mayPunch)
	c.writes.Add(1)
	c.failed(err)
	return err
}

// Discard implements [blockdev.Device].
func (c *counted) Discard(off, n int64) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	err := c.device.Discard(off, n)
	c.writes.Add(1)
	c.failed(err)
	return err
}

// Flush implements [blockdev.Device].
func (c *counted) Flush() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	err := c.device.Flush()
	c.flushes.Add(1)
	c.failed(err)
	return err
}

// NextExtent implements [blockdev.Extenter]. A device that does not know its
// holes is all data.
func (c *counted) NextExtent(off int64) (blockdev.Extent, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if e, ok := c.device.(blockdev.Extenter); ok {
		return e.NextExtent(off)
	}
	if off < 0 || off >= c.device.Size() {
		return blockdev.Extent{}, blockdev.ErrOutOfRange
	}
	return blockdev.Extent{Offset: off, Length: c.device.Size() - off}, nil
}

// resize changes the size of the device, if it can.
func (c *counted) resize(size int64) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	r, ok := c.device.(blockdev.Resizer)
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
