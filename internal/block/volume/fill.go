package volume

import (
	"context"
	"fmt"

	"strongroom/internal/block/blockdev"
)

// Fill writes encrypted zeros to every sector that was never written or was
// discarded, so that dm-crypt, to which such a sector is noise, reads the same
// as this package. The storage below is then wholly allocated. The volume may
// be in use meanwhile. Fill may be stopped and called again; it flushes at its
// end. progress, if not nil, is called with bytes done and bytes to do.
func (v *Volume) Fill(ctx context.Context, progress func(done, total int64)) error {
	buf := v.buffers.get()
	defer v.buffers.put(buf)
	for off, size := int64(0), v.Size(); off < size; {
		if err := context.Cause(ctx); err != nil {
			return fmt.Errorf("cannot fill volume %s: %w", v.uuid, err)
		}
		n := min(bufferSize, size-off)
		pass, err := v.enter("fill", off, n, blockdev.Exclusive)
		if err != nil {
			return err
		}
		err = v.fill(buf[:n], off)
		v.guard.Leave(pass)
		if err != nil {
			return v.fail("fill", off, n, err)
		}
		off += n
		if progress != nil {
			progress(off, size)
		}
	}
	return v.Flush()
}

// fill does so for the sectors at off, using buf, which has their length. The
// range is held.
func (v *Volume) fill(buf []byte, off int64) error {
	if _, err := v.dev.ReadAt(buf, v.segment.Offset+off); err != nil {
		return err
	}
	sector := v.segment.SectorSize
	for start := 0; start < len(buf); {
		end := start
		for end < len(buf) && isZero(buf[end:end+sector]) {
			end += sector
		}
		if end == start {
			start += sector
			continue
		}
		run := buf[start:end]
		v.encrypt(run, nil, 0, off+int64(start))
		if _, err := v.dev.WriteAt(run, v.segment.Offset+off+int64(start)); err != nil {
			return err
		}
		start = end
	}
	return nil
}
