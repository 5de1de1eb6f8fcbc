package volume

import (
	"bytes"
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keysafe"
)

// EncryptionInfo is what an encryption in place has left on a disk.
type EncryptionInfo struct {
	UUID string
	// Safe holds the DEK; nil if that is kept elsewhere.
	Safe        *keysafe.Safe
	Done, Total int64 // bytes
	// Finished: the disk is a plain LUKS2 volume, perhaps not one of ours.
	Finished bool
}

// InspectEncryption tells what an encryption in place has left on dev, also if it
// was interrupted before there was a header. Size is that of [EncryptOptions]. It
// needs no key and writes nothing. It returns nil if nothing was begun.
func InspectEncryption(dev blockdev.Device, size int64) (*EncryptionInfo, error) {
	info, err := inspectEncryption(dev, size)
	if err != nil {
		return nil, fmt.Errorf("cannot inspect the encryption of a disk in place: %w", err)
	}
	return info, nil
}

func inspectEncryption(dev blockdev.Device, size int64) (*EncryptionInfo, error) {
	found, err := findEncryption(dev, size)
	if found == nil || err != nil {
		return nil, err
	}
	info := &EncryptionInfo{
		UUID: found.header.UUID(), Done: found.state.Size - found.state.Boundary, Total: found.state.Size, Finished: found.finished,
	}
	safes, err := found.header.Safes()
	if len(safes) > 0 {
		info.Safe = safes[0]
	}
	return info, err
}

// foundEncryption is what was found of an encryption in place.
type foundEncryption struct {
	header     *luks.Header
	state      luks.Encryption
	fromRecord bool // the header is the record's; there is none where it should be
	finished   bool // it is plain LUKS2
}

// findEncryption returns what there is on dev of an encryption of a disk of size
// bytes, or nil if none was begun.
func findEncryption(dev blockdev.Device, size int64) (*foundEncryption, error) {
	if size > 0 && dev.Size() == size {
		return nil, nil
	}
	h, err := readHeader(dev)
	if err == nil {
		e, underWay, err := h.Encryption()
		switch {
		case err == nil && underWay && (size == 0 || size == e.Size):
			if n := dev.Size(); n < e.StorageMax() && (e.Boundary > 0 || n < e.StorageMin()) {
				return nil, fmt.Errorf("%w: it has %d bytes, its encryption needs %d", ErrTruncated, n, e.StorageMax())
			}
			return &foundEncryption{header: h, state: e}, nil
		case err != nil && size == 0:
			return nil, err
		}
		// With the size known, a header that does not fit it is the guest's data.
		if segment, segErr := dataSegment(dev, h); segErr == nil && (size == 0 || dev.Size() == segment.Offset+size) {
			return &foundEncryption{header: h, finished: true}, nil
		}
		if size == 0 {
			return nil, ErrEncrypted
		}
	} else if !notHeader(err) || size == 0 && errors.Is(err, ErrDetached) {
		return nil, err
	} else if _, readErr := dev.ReadAt(make([]byte, min(headersSize, dev.Size())), 0); readErr != nil {
		return nil, readErr // what cannot be read may be a header
	}
	for _, shift := range shifts {
		if found, err := findRecord(dev, shift); err != nil || found != nil && (size == 0 || found.state.Size == size) {
			return found, err
		}
	}
	if errors.Is(err, ErrCorrupt) {
		return nil, err
	}
	return nil, nil
}

// notHeader reports whether err, of reading a header, may come of what a plain
// disk holds, or of a header that was being written.
func notHeader(err error) bool {
	for _, target := range []error{ErrNotVolume, ErrCorrupt, ErrTruncated, ErrUnsupported, luks.ErrVersion} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// findRecord returns the encryption that moves a disk by shift, if it has left a
// record on dev.
func findRecord(dev blockdev.Device, shift int64) (*foundEncryption, error) {
	size := dev.Size() - 2*shift
	if size < shift {
		return nil, nil
	}
	record := make([]byte, headersSize)
	if _, err := dev.ReadAt(record, size+shift-headersSize); err != nil {
		return nil, err
	}
	h, err := luks.Read(bytes.NewReader(record), dev.Size())
	if err != nil || 2*h.Size() != headersSize {
		return nil, nil
	}
	e, underWay, err := h.Encryption()
	if err != nil || !underWay || e.Size != size || e.Shift != shift || e.Boundary != size {
		return nil, nil
	}
	return &foundEncryption{header: h, state: e, fromRecord: true}, nil
}
