package volume

import (
	"context"
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
)

// Adopt copies the encrypted data of a LUKS volume of another program, which
// lie in that segment of src, to the volume on dst, as they are: nothing is
// decrypted. [Format] has just made the volume, with the same DEK and sector
// size, and at least as large. What was copied is read back and compared; dst is
// flushed. src is only read.
//
// A sector that is all zeros in src reads as zeros in the volume, and as noise
// in dm-crypt, before and after: it was never written, or it was discarded.
//
// Errors are those of [Copy]; then dst is to be thrown away.
func Adopt(ctx context.Context, dst, src blockdev.Device, segment luks.Segment, progress func(done, total int64)) error {
	fail := func(err error) error { return fmt.Errorf("cannot take over LUKS volume: %w", err) }
	h, err := readHeader(dst)
	if err != nil {
		return fail(err)
	}
	own, room, err := layout(dst, h)
	if err != nil {
		return fail(err)
	}
	length, err := segment.Length(src.Size())
	if err != nil {
		return fail(err)
	}
	if own.SectorSize != segment.SectorSize {
		return fail(fmt.Errorf("%w: sectors of %d bytes, not %d", ErrUnsupported, own.SectorSize, segment.SectorSize))
	}
	err = Copy(ctx, window{dst, own.Offset, room}, window{src, segment.Offset, length}, CopyOptions{KeepHoles: true, Verify: true, Progress: progress})
	if err != nil {
		return fail(err)
	}
	return nil
}

// window is a part of a Device as one for [Copy]. Closing it does nothing.
type window struct {
	blockdev.Device
	start, size int64 // bytes
}

var _ blockdev.Extenter = window{}

func (w window) Size() int64  { return w.size }
func (w window) Close() error { return nil }

func (w window) ReadAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange(w.size, off, int64(len(p))); err != nil {
		return 0, err
	}
	return w.Device.ReadAt(p, w.start+off)
}

func (w window) WriteAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange(w.size, off, int64(len(p))); err != nil {
		return 0, err
	}
	return w.Device.WriteAt(p, w.start+off)
}

func (w window) WriteZeroes(off, n int64, mayPunch bool) error {
	if err := blockdev.CheckRange(w.size, off, n); err != nil {
		return err
	}
	return w.Device.WriteZeroes(w.start+off, n, mayPunch)
}

func (w window) Discard(off, n int64) error {
	if err := blockdev.CheckRange(w.size, off, n); err != nil {
		return err
	}
	return w.Device.Discard(w.start+off, n)
}

func (w window) NextExtent(off int64) (blockdev.Extent, error) {
	e := blockdev.Extent{Offset: w.start + off, Length: w.size - off}
	if dev, ok := w.Device.(blockdev.Extenter); ok {
		var err error
		if e, err = dev.NextExtent(w.start + off); err != nil {
			return blockdev.Extent{}, err
		}
	}
	return blockdev.Extent{Offset: off, Length: min(e.Length, w.size-off), Hole: e.Hole}, nil
}
