package mirror

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"strongroom/internal/block/blockdev"
)

const (
	// chunk is how much is copied at once, in bytes: the longest that a request waits
	// for.
	chunk = 1 << 20
	// hole is how much of a hole is passed over at once.
	hole = 64 << 20
	// yieldMax bounds how long the copy rests after a chunk, for users.
	yieldMax = 100 * time.Millisecond
)

// CopyOptions say how the new device is filled.
type CopyOptions struct {
	// KeepHoles leaves holes of the old device alone; see volume.CopyOptions.
	KeepHoles bool
	// Rate bounds what is copied, and then compared, in bytes a second; 0: unbounded.
	Rate int64
	// Progress, if not nil, is called after each chunk with the bytes done and the
	// bytes to do; all count twice, copied and compared.
	Progress func(done, total int64)
}

// Copy brings the new device to the state of the old one, compares the two, and
// makes the new one durable, while the Mirror is in use. It is called once. If it
// returns an error, ctx's included, the new device is given up. After it returned
// nil the devices stay the same until [Mirror.Parted] says otherwise.
//
// While users are at work it takes half of the time.
func (m *Mirror) Copy(ctx context.Context, opts CopyOptions) error {
	if m.copying.Swap(true) {
		return fmt.Errorf("cannot copy disk: %w: it is copied only once", ErrParted)
	}
	if err := m.copy(ctx, opts); err != nil {
		_ = m.part(err) // it is not held yet
		return fmt.Errorf("cannot copy disk: %w", err)
	}
	return nil
}

func (m *Mirror) copy(ctx context.Context, opts CopyOptions) error {
	c := &copier{m: m, opts: opts, total: 2 * m.Size()}
	if opts.Rate > 0 {
		c.limit = rate.NewLimiter(rate.Limit(opts.Rate), chunk)
	}
	size := min(chunk, m.Size())
	c.want, c.got = make([]byte, size), make([]byte, size)
	for _, step := range []func(off int64) (int64, error){c.copyChunk, c.compareChunk} {
		for off := int64(0); off < m.Size(); {
			n, err := c.paced(ctx, func() (int64, error) { return step(off) })
			if err != nil {
				return err
			}
			off += n
		}
	}
	// From here on a flush reaches both devices. What was written before is
	// made durable now.
	m.mu.Lock()
	m.synced = true
	m.mu.Unlock()
	if err := m.to.Flush(); err != nil {
		return err
	}
	return m.Parted()
}

// copier is one call of Copy.
type copier struct {
	m           *Mirror
	opts        CopyOptions
	limit       *rate.Limiter // nil: unbounded
	done, total int64
	want, got   []byte
}

// paced does one step, when it may be done, and tells of it.
func (c *copier) paced(ctx context.Context, step func() (int64, error)) (int64, error) {
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	if err := c.m.Parted(); err != nil {
		return 0, err
	}
	before, begin := c.m.requests.Load(), time.Now()
	n, err := step()
	if err != nil {
		return 0, err
	}
	c.done += n
	if c.opts.Progress != nil {
		c.opts.Progress(c.done, c.total)
	}
	if c.m.requests.Load() != before {
		if err := rest(ctx, min(time.Since(begin), yieldMax)); err != nil {
			return 0, err
		}
	}
	if c.limit == nil {
		return n, nil
	}
	if err := c.limit.WaitN(ctx, int(min(n, chunk))); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return 0, err
	}
	return n, nil
}

// rest waits for a time, or until ctx ends.
func rest(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// copyChunk copies what is at the boundary and moves it on.
func (c *copier) copyChunk(off int64) (int64, error) {
	m := c.m
	if c.opts.KeepHoles && m.extents != nil {
		if n, err := c.passHole(off); n > 0 || err != nil {
			return n, err
		}
	}
	n := min(chunk, m.Size()-off)
	pass, err := m.guard.Enter(off, n, blockdev.Exclusive)
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	buf := c.want[:n]
	if _, err := m.from.ReadAt(buf, off); err != nil {
		return 0, err
	}
	if _, err := m.to.WriteAt(buf, off); err != nil {
		return 0, err
	}
	m.boundary.Store(off + n)
	return n, nil
}

// passHole moves the boundary over the hole at off, if there is one, and returns
// its length.
func (c *copier) passHole(off int64) (int64, error) {
	m := c.m
	n := min(hole, m.Size()-off)
	pass, err := m.guard.Enter(off, n, blockdev.Exclusive)
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	e, err := m.extents.NextExtent(off)
	if err != nil || !e.Hole {
		return 0, err
	}
	n = min(n, e.Length)
	m.boundary.Store(off + n)
	return n, nil
}

// compareChunk compares what is at off.
func (c *copier) compareChunk(off int64) (int64, error) {
	m := c.m
	n := min(chunk, m.Size()-off)
	pass, err := m.guard.Enter(off, n, blockdev.Exclusive)
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	if k := bothHoles(m.extents, m.to, off, n); k > 0 {
		return k, nil
	}
	want, got := c.want[:n], c.got[:n]
	if _, err := m.from.ReadAt(want, off); err != nil {
		return 0, err
	}
	if _, err := m.to.ReadAt(got, off); err != nil {
		return 0, err
	}
	if !bytes.Equal(want, got) {
		if err := m.Parted(); err != nil {
			return 0, err // that is why
		}
		return 0, fmt.Errorf("%w in the %d bytes at %d", ErrVerify, n, off)
	}
	return n, nil
}

// bothHoles returns how many bytes at off, at most n, are a hole of both devices.
func bothHoles(from blockdev.Extenter, to blockdev.Device, off, n int64) int64 {
	other, ok := to.(blockdev.Extenter)
	if !ok || from == nil {
		return 0
	}
	for _, dev := range []blockdev.Extenter{from, other} {
		e, err := dev.NextExtent(off)
		if err != nil || !e.Hole {
			return 0
		}
		n = min(n, e.Length)
	}
	return n
}
