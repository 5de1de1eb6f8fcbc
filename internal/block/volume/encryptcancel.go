package volume

import (
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
)

// CancelEncryption undoes an encryption in place that has encrypted nothing yet:
// the disk is then plain, as it was. It returns [ErrEncrypting] if part of it is
// encrypted, which only [EncryptInPlace] can bring to an end, and does nothing
// if none was begun. Size is that of [EncryptOptions].
func CancelEncryption(dev blockdev.Resizer, size int64) error {
	if err := cancelEncryption(dev, size); err != nil {
		return fmt.Errorf("cannot undo the encryption of a disk in place: %w", err)
	}
	return nil
}

func cancelEncryption(dev blockdev.Resizer, size int64) error {
	e := &encryption{dev: dev, buf: make([]byte, moveChunk)}
	found, err := findEncryption(dev, size)
	switch {
	case err != nil:
		return err
	case found == nil && size > 0:
		return e.shrink(size)
	case found == nil:
		return nil
	case found.finished || found.state.Boundary != found.state.Size:
		return fmt.Errorf("%w: part of its data is encrypted", ErrEncrypting)
	}
	e.header, e.state = found.header, found.state
	if found.fromRecord {
		if err := e.unused(); err != nil {
			return err
		}
	}
	if err := e.writeRecord(); err != nil {
		return err
	}
	for _, part := range []luks.Area{{Offset: headersSize, Size: e.state.Shift - headersSize}, {Size: headersSize}} {
		if err := e.move(part.Offset, e.state.StorageMin()+part.Offset, part.Size, nil); err != nil {
			return err
		}
		if err := dev.Flush(); err != nil {
			return err
		}
	}
	// The start counts again, and not its copy, of which cutting the file may leave a
	// part.
	if err := dev.WriteZeroes(e.recordOffset(), headersSize, false); err != nil {
		return err
	}
	if err := dev.Flush(); err != nil {
		return err
	}
	return e.shrink(e.state.Size)
}
