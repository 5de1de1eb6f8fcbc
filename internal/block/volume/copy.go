package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/block/blockdev"
)

// ErrVerify: what was read back from the destination of a [Copy] is not what
// the source holds.
var ErrVerify = errors.New("copy differs from its source")

const (
	// copyChunk is how much is copied at once, in bytes.
	copyChunk = 1 << 20
	// copyWorkersMax bounds the memory of a copy: two chunks for each worker.
	copyWorkersMax = 8
)

// CopyOptions say how disks are copied.
type CopyOptions struct {
	// KeepHoles leaves holes of the source alone: the destination must read as
	// zeros there already, as a new volume or file does. Otherwise zeros are
	// written for them.
	//
	// It is right for a source that is a [Volume], whose holes were never written
	// or were discarded, and for a destination that is a plain file. For a plain
	// source and an encrypted destination it saves space at a price: zeros that
	// the guest wrote may be holes of a plain file, and dm-crypt reads holes as
	// noise. With us the copy reads the same either way; before dm-crypt opens a
	// copy made so, [Volume.Fill] must run.
	KeepHoles bool
	// Verify reads both disks again after the copy and compares them, but for
	// what is a hole in both.
	Verify bool
	// Progress, if not nil, is called with the bytes done and the bytes to do,
	// holes included; with Verify they count twice. Calls come one at a time,
	// with done growing, and hold the copy up.
	Progress func(done, total int64)
}

// Copy copies the disk src to dst, which is at least as large, and flushes dst.
// It is how a disk is encrypted (plain file to new volume), decrypted (volume to
// plain file) and rekeyed deeply (volume to new volume with another DEK). What
// dst has beyond the size of src is left as it is. src is only read; nobody may
// write to it meanwhile.
//
// On an error, [ErrVerify] and ctx's included, dst holds anything and is to be
// thrown away.
func Copy(ctx context.Context, dst, src blockdev.Device, opts CopyOptions) error {
	if src.Size() > dst.Size() {
		return fmt.Errorf("cannot copy disk of %d bytes to one of %d bytes: %w", src.Size(), dst.Size(), blockdev.ErrOutOfRange)
	}
	total := src.Size()
	if opts.Verify {
		total *= 2
	}
	progress := &progress{report: opts.Progress, total: total}
	err := inChunks(ctx, src, opts.KeepHoles, progress, func(c chunk, buf, _ []byte) error {
		if c.hole {
			return dst.WriteZeroes(c.off, int64(len(buf)), false)
		}
		if _, err := src.ReadAt(buf, c.off); err != nil {
			return err
		}
		_, err := dst.WriteAt(buf, c.off)
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot copy disk: %w", err)
	}
	if err := dst.Flush(); err != nil {
		return fmt.Errorf("cannot copy disk: %w", err)
	}
	if !opts.Verify {
		return nil
	}
	err = inChunks(ctx, src, false, progress, func(c chunk, want, got []byte) error {
		if c.hole && isHole(dst, c.off, int64(len(want))) {
			return nil // both read as zeros
		}
		if _, err := src.ReadAt(want, c.off); err != nil {
			return err
		}
		if _, err := dst.ReadAt(got, c.off); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%w in the %d bytes at %d", ErrVerify, len(want), c.off)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot verify copy of disk: %w", err)
	}
	return nil
}

// isHole reports whether n bytes at off are known to be a hole of dev.
func isHole(dev blockdev.Device, off, n int64) bool {
	extenter, ok := dev.(blockdev.Extenter)
	if !ok {
		return false
	}
	e, err := extenter.NextExtent(off)
	return err == nil && e.Hole && e.Length >= n
}

// chunk is a piece of a disk that is data or a hole throughout.
type chunk struct {
	off  int64
	hole bool
}

// inChunks calls work for all of dev, in chunks that end at multiples of
// copyChunk and at the ends of extents, several at a time; without those that
// are holes if skipHoles. The buffers have the length of the chunk.
func inChunks(ctx context.Context, dev blockdev.Device, skipHoles bool, progress *progress, work func(c chunk, buf, buf2 []byte) error) error {
	plan := &plan{dev: dev}
	plan.extenter, _ = dev.(blockdev.Extenter)
	group, ctx := errgroup.WithContext(ctx)
	for range min(runtime.GOMAXPROCS(0), copyWorkersMax) {
		group.Go(func() error {
			size := min(copyChunk, dev.Size())
			buf, buf2 := make([]byte, size), make([]byte, size)
			for {
				if err := context.Cause(ctx); err != nil {
					return err
				}
				c, n, err := plan.next(skipHoles)
				if n == 0 || err != nil {
					return err
				}
				if !c.hole || !skipHoles {
					if err := work(c, buf[:n], buf2[:n]); err != nil {
						return err
					}
				}
				progress.add(n)
			}
		})
	}
	return group.Wait()
}

// plan hands out the chunks of a disk in order.
type plan struct {
	dev      blockdev.Device
	extenter blockdev.Extenter // nil: all is data

	mu     sync.Mutex
	off    int64           // where the next chunk starts
	extent blockdev.Extent // the one that holds off, if it reaches beyond
}

// next returns the next chunk and its length; 0: there is none. With
// wholeHoles a hole comes as one chunk, however long.
func (p *plan) next(wholeHoles bool) (chunk, int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	size := p.dev.Size()
	if p.off >= size {
		return chunk{}, 0, nil
	}
	if p.extent.Offset+p.extent.Length <= p.off {
		p.extent = blockdev.Extent{Offset: p.off, Length: size - p.off}
		if p.extenter != nil {
			var err error
			if p.extent, err = p.extenter.NextExtent(p.off); err != nil {
				return chunk{}, 0, err
			}
		}
	}
	c := chunk{off: p.off, hole: p.extent.Hole}
	end := p.extent.Offset + p.extent.Length
	if !c.hole || !wholeHoles {
		end = min(end, p.off-p.off%copyChunk+copyChunk)
	}
	p.off = end
	return c, end - c.off, nil
}

// progress adds up what several goroutines have done.
type progress struct {
	report func(done, total int64) // may be nil
	total  int64

	mu   sync.Mutex
	done int64
}

func (p *progress) add(n int64) {
	if p == nil || p.report == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	p.report(p.done, p.total)
}
