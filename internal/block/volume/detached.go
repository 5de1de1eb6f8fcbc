package volume

import (
	"errors"
	"sync"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
)

// Sentinels of detached headers; see those of luks.
var (
	// ErrDetached: the storage holds a detached header only. It is also an
	// [ErrUnsupported].
	ErrDetached = luks.ErrDetached
	// ErrOtherDevice: a detached header was made for another device.
	ErrOtherDevice = luks.ErrOtherDevice
)

// Detached is the storage of a volume whose header is not in front of its data: a
// device for the header and one for the data. It is one Device to the rest of this
// package: the header, keyslot area and journal included, begins at 0, the data at
// a place where no header reaches. Flush makes both durable.
//
// It is safe for concurrent use, like the two devices.
type Detached struct {
	header, data blockdev.Device

	written atomic.Bool // something may be in the header's device that is not durable
	mu      sync.Mutex  // held while that is flushed
}

// detachedBase is where the data of a [Detached] begin, in bytes.
const detachedBase = 1 << 30

var (
	_ blockdev.Extenter     = (*Detached)(nil)
	_ blockdev.HeaderLocker = (*Detached)(nil)
	_ blockdev.EarlyFlusher = (*Detached)(nil)
)

// NewDetached returns the storage of the volume whose header is on one device and
// whose data are on the other. Both belong to it from then on.
func NewDetached(header, data blockdev.Device) *Detached {
	return &Detached{header: header, data: data}
}

// dataBase returns where in dev a data offset of 0 is.
func dataBase(dev blockdev.Device) int64 {
	if _, ok := dev.(*Detached); ok {
		return detachedBase
	}
	return 0
}

// route returns the device of a request at off, and where in it that is.
func (d *Detached) route(off int64) (blockdev.Device, int64) {
	if off < detachedBase {
		return d.header, off
	}
	return d.data, off - detachedBase
}

// changed notes that a request at off that changes something was done, whatever came
// of it. Before, it would be lost on a flush that runs beside the request and does
// not cover it.
func (d *Detached) changed(off int64) {
	if off < detachedBase {
		d.written.Store(true)
	}
}

// ReadAt implements [blockdev.Device].
func (d *Detached) ReadAt(p []byte, off int64) (int, error) {
	dev, off := d.route(off)
	return dev.ReadAt(p, off)
}

// WriteAt implements [blockdev.Device].
func (d *Detached) WriteAt(p []byte, off int64) (int, error) {
	defer d.changed(off)
	dev, at := d.route(off)
	return dev.WriteAt(p, at)
}

// WriteZeroes implements [blockdev.Device].
func (d *Detached) WriteZeroes(off, n int64, mayPunch bool) error {
	defer d.changed(off)
	dev, at := d.route(off)
	return dev.WriteZeroes(at, n, mayPunch)
}

// Discard implements [blockdev.Device].
func (d *Detached) Discard(off, n int64) error {
	defer d.changed(off)
	dev, at := d.route(off)
	return dev.Discard(at, n)
}

// Flush implements [blockdev.Device].
func (d *Detached) Flush() error { return errors.Join(d.flushHeader(), d.data.Flush()) }

func (d *Detached) flushHeader() error {
	d.mu.Lock() // whoever comes second relies on the flush of the first
	defer d.mu.Unlock()
	if !d.written.Swap(false) {
		return nil
	}
	err := d.header.Flush()
	if err != nil {
		d.written.Store(true)
	}
	return err
}

// FlushEarly implements [blockdev.EarlyFlusher].
func (d *Detached) FlushEarly(off, n int64) {
	dev, off := d.route(off)
	if dev, ok := dev.(blockdev.EarlyFlusher); ok {
		dev.FlushEarly(off, n)
	}
}

// NextExtent implements [blockdev.Extenter]. Between header and data is a hole.
func (d *Detached) NextExtent(off int64) (blockdev.Extent, error) {
	if end := d.header.Size(); off >= end && off < detachedBase {
		return blockdev.Extent{Offset: off, Length: detachedBase - off, Hole: true}, nil
	}
	dev, at := d.route(off)
	extenter, ok := dev.(blockdev.Extenter)
	if !ok {
		return blockdev.Extent{Offset: off, Length: dev.Size() - at}, nil
	}
	e, err := extenter.NextExtent(at)
	e.Offset = off
	return e, err
}

// WithHeaderLock implements [blockdev.HeaderLocker].
func (d *Detached) WithHeaderLock(access blockdev.Access, f func() error) error {
	return withHeaderLock(d.header, access, f)
}

// Size implements [blockdev.Device].
func (d *Detached) Size() int64 { return detachedBase + d.data.Size() }

// BlockSize implements [blockdev.Device].
func (d *Detached) BlockSize() int { return max(d.header.BlockSize(), d.data.BlockSize()) }

// Close implements [blockdev.Device].
func (d *Detached) Close() error { return errors.Join(d.data.Close(), d.header.Close()) }

// readLUKS reads the header of the volume on dev, whose lock is held.
func readLUKS(dev blockdev.Device) (*luks.Header, error) {
	if d, ok := dev.(*Detached); ok {
		return luks.ReadDetached(d.header, d.header.Size(), d.data.Size())
	}
	h, err := luks.Read(dev, dev.Size())
	if err == nil && h.Detached() {
		err = ErrDetached
	}
	return h, err
}
