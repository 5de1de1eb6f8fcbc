package vhostusertest

import (
	"encoding/binary"
	"fmt"
	"sync"

	"strongroom/internal/block/blockdev"
)

const sector = 512

// Device is the disk of a Frontend as a [blockdev.Device], as a guest's file
// system sees it: unaligned requests are made of whole sectors.
type Device struct {
	f      *Frontend
	size   int64
	guard  blockdev.Guard
	queues chan *Queue // not in use
	close  sync.Once
}

var _ blockdev.Device = (*Device)(nil)

// NewDevice returns the disk of f, which belongs to the Device from now on.
func NewDevice(f *Frontend) (*Device, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	d := &Device{f: f, size: size, queues: make(chan *Queue, len(f.Queues))}
	for _, q := range f.Queues {
		d.queues <- q
	}
	return d, nil
}

// enter admits a request on the sectors that hold a range, and takes a queue.
func (d *Device) enter(off, n int64, access blockdev.Access) (*blockdev.Pass, *Queue, error) {
	wideOff, wideLen := blockdev.Widen(off, n, sector)
	pass, err := d.guard.Enter(wideOff, wideLen, access)
	if err != nil {
		return nil, nil, err
	}
	err = blockdev.CheckRange(d.size, off, n)
	if err == nil && access == blockdev.Exclusive && d.f.Features&FeatureReadOnly != 0 {
		err = blockdev.ErrReadOnly
	}
	if err != nil {
		d.guard.Leave(pass)
		return nil, nil, err
	}
	return pass, <-d.queues, nil
}

func (d *Device) leave(pass *blockdev.Pass, q *Queue) {
	d.queues <- q
	d.guard.Leave(pass)
}

// do does one request with n bytes of the slot's data.
func do(q *Queue, slot int, op uint32, off int64, n int) error {
	q.Submit(slot, op, uint64(off/sector), n)
	if err := q.Kick(); err != nil {
		return err
	}
	got, status, err := q.Next()
	if err != nil {
		return err
	}
	if got != slot || status != OK {
		return fmt.Errorf("request %d on %d bytes at %d: slot %d, status %d", op, n, off, got-slot, status)
	}
	return nil
}

// each splits a range into parts that a slot can hold, sectors wide.
func (d *Device) each(q *Queue, off, n int64, f func(slot int, wideOff, wideLen, into, part int64) error) error {
	limit := int64(d.f.opts.DataSize) - 2*sector
	for n > 0 {
		k := min(n, limit)
		wideOff, wideLen := blockdev.Widen(off, k, sector)
		slot := q.Slot()
		if err := f(slot, wideOff, wideLen, off-wideOff, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// ReadAt implements [blockdev.Device].
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	pass, q, err := d.enter(off, int64(len(p)), blockdev.Shared)
	if err != nil {
		return 0, err
	}
	defer d.leave(pass, q)
	done := 0
	err = d.each(q, off, int64(len(p)), func(slot int, wideOff, wideLen, into, part int64) error {
		if err := do(q, slot, Read, wideOff, int(wideLen)); err != nil {
			return err
		}
		whole := make([]byte, wideLen)
		q.Fetch(slot, whole)
		done += copy(p[done:], whole[into:into+part])
		return nil
	})
	return done, err
}

// WriteAt implements [blockdev.Device].
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	pass, q, err := d.enter(off, int64(len(p)), blockdev.Exclusive)
	if err != nil {
		return 0, err
	}
	defer d.leave(pass, q)
	done := 0
	err = d.write(q, off, int64(len(p)), func(whole []byte) { done += copy(whole, p[done:]) })
	return done, err
}

// write changes a range by what fill puts into its parts.
func (d *Device) write(q *Queue, off, n int64, fill func(part []byte)) error {
	return d.each(q, off, n, func(slot int, wideOff, wideLen, into, part int64) error {
		whole := make([]byte, wideLen)
		if into != 0 || part != wideLen {
			if err := do(q, slot, Read, wideOff, int(wideLen)); err != nil {
				return err
			}
			q.Fetch(slot, whole)
			q.Slot() // again the one that was last given back
		}
		fill(whole[into : into+part])
		q.Fill(slot, whole)
		return do(q, slot, Write, wideOff, int(wideLen))
	})
}

// ranged does a discard or zeroing of the whole sectors of a range.
func (d *Device) ranged(q *Queue, op uint32, off, n int64, flags uint32) error {
	start, end := (off+sector-1)&^(sector-1), (off+n)&^(sector-1)
	const limit = 8 << 20
	for ; start < end; start += limit {
		k := min(end-start, limit)
		var b [16]byte
		binary.LittleEndian.PutUint64(b[:], uint64(start/sector))
		binary.LittleEndian.PutUint32(b[8:], uint32(k/sector))
		binary.LittleEndian.PutUint32(b[12:], flags)
		slot := q.Slot()
		q.Fill(slot, b[:])
		if err := do(q, slot, op, 0, len(b)); err != nil {
			return err
		}
	}
	return nil
}

// WriteZeroes implements [blockdev.Device].
func (d *Device) WriteZeroes(off, n int64, mayPunch bool) error {
	pass, q, err := d.enter(off, n, blockdev.Exclusive)
	if err != nil {
		return err
	}
	defer d.leave(pass, q)
	start, end := (off+sector-1)&^(sector-1), (off+n)&^(sector-1)
	zero := func(part []byte) { clear(part) }
	if start >= end {
		return d.write(q, off, n, zero)
	}
	if err := d.write(q, off, start-off, zero); err != nil {
		return err
	}
	if err := d.write(q, end, off+n-end, zero); err != nil {
		return err
	}
	flags := uint32(0)
	if mayPunch {
		flags = 1
	}
	return d.ranged(q, WriteZeroes, off, n, flags)
}

// Discard implements [blockdev.Device].
func (d *Device) Discard(off, n int64) error {
	pass, q, err := d.enter(off, n, blockdev.Exclusive)
	if err != nil {
		return err
	}
	defer d.leave(pass, q)
	return d.ranged(q, Discard, off, n, 0)
}

// Flush implements [blockdev.Device].
func (d *Device) Flush() error {
	pass, err := d.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return err
	}
	q := <-d.queues
	defer d.leave(pass, q)
	return do(q, q.Slot(), Flush, 0, 0)
}

// Size implements [blockdev.Device].
func (d *Device) Size() int64 { return d.size }

// BlockSize implements [blockdev.Device].
func (d *Device) BlockSize() int { return sector }

// Close implements [blockdev.Device].
func (d *Device) Close() error {
	d.guard.Close()
	d.close.Do(d.f.Close)
	return nil
}
