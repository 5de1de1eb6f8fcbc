package volume

import (
	"context"
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
)

// Fill writes encrypted zeros to every sector that was never written or was
// discarded, so that dm-crypt, to which such a sector is noise, reads the same
// as this package. The storage below is then wholly allocated, and the header no
// longer says that the volume is thin. The volume may be in use meanwhile; what
// is discarded then is not filled again. Fill may be stopped and called again;
// it flushes at its end. progress, if not nil, is called with bytes done and
// bytes to do. The header of a volume that is being rekeyed stays thin
// ([ErrRekeying]).
func (v *Volume) Fill(ctx context.Context, progress func(done, total int64)) error {
	for off, size := int64(0), v.Size(); off < size; {
		if err := context.Cause(ctx); err != nil {
			return fmt.Errorf("cannot fill volume %s: %w", v.uuid, err)
		}
		n := min(bufferSize, size-off)
		pass, err := v.enter("fill", off, n, blockdev.Exclusive)
		if err != nil {
			return err
		}
		err = v.fill(off, n)
		v.guard.Leave(pass)
		if err != nil {
			return v.fail("fill", off, n, err)
		}
		off += n
		if progress != nil {
			progress(off, size)
		}
	}
	if err := v.Flush(); err != nil {
		return err
	}
	if err := v.noteFilled(); err != nil {
		return fmt.Errorf("cannot note that volume %s is filled: %w", v.uuid, err)
	}
	return nil
}

// noteFilled takes from the header that the volume is thin, if it says so.
func (v *Volume) noteFilled() error {
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return err
	}
	defer v.guard.Leave(pass)
	v.header.Lock()
	defer v.header.Unlock()
	return withHeaderLock(v.dev, blockdev.Exclusive, func() error {
		h, err := readLUKS(v.dev)
		if err != nil || !h.Thin() {
			return err
		}
		if err := errors.Join(v.unchanged(h), h.SetThin(false)); err != nil {
			return err
		}
		return h.Commit(watchedStorage{v})
	})
}

// fill does so for the n bytes of sectors at off, at most bufferSize. The range is
// held.
func (v *Volume) fill(off, n int64) error {
	space := v.buffers.get(bufferSize)
	defer v.buffers.put(space)
	buf := space[:n]
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
