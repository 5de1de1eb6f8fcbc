package luks

import (
	"context"
	"errors"
	"fmt"
	"io"

	"strongroom/internal/crypto/keymem"
)

// Foreign is a LUKS1 or LUKS2 volume that another program made, and whose data
// can be taken over as they are: it is encrypted like a volume of ours.
type Foreign struct {
	Version int // 1 or 2
	UUID    string
	Segment Segment

	header1 *header1 // one of them
	header2 *Header
}

// ReadForeign reads the header of a LUKS1 or LUKS2 volume on storage of size
// bytes, and writes nothing. Errors are those of [Read] but [ErrVersion] for
// LUKS1; [ErrUnsupported] says why if the data are not encrypted with
// [Cipher] under one key of [KeySize] bytes, in sectors of 512 or 4096 bytes.
func ReadForeign(r io.ReaderAt, size int64) (*Foreign, error) {
	h, err := Read(r, size)
	if errors.Is(err, errLUKS1) {
		h1, err := readLUKS1(r, size)
		if err != nil {
			return nil, fmt.Errorf("cannot read LUKS1 header: %w", err)
		}
		return &Foreign{Version: 1, UUID: h1.uuid, Segment: h1.segment, header1: h1}, nil
	}
	if err != nil {
		return nil, err
	}
	if h.Detached() {
		return nil, fmt.Errorf("cannot take over LUKS2 volume %s: %w", h.bin.uuid, ErrDetached)
	}
	return newForeign(h)
}

// ReadForeignDetached is [ReadForeign] of a LUKS2 header on storage of size bytes
// whose data are on another device, of dataSize bytes.
func ReadForeignDetached(r io.ReaderAt, size, dataSize int64) (*Foreign, error) {
	h, err := ReadDetached(r, size, dataSize)
	if err != nil {
		return nil, err
	}
	return newForeign(h)
}

func newForeign(h *Header) (*Foreign, error) {
	segment, err := h.Segment()
	if err != nil {
		return nil, err
	}
	if n := segment.SectorSize; n != 512 && n != 4096 {
		return nil, fmt.Errorf("cannot take over LUKS2 volume %s: %w: its sectors have %d bytes, neither 512 nor 4096", h.bin.uuid, ErrUnsupported, n)
	}
	return &Foreign{Version: 2, UUID: h.bin.uuid, Segment: segment, header2: h}, nil
}

// Unlock returns the volume key, which the caller must close, from the first
// keyslot that passphrase opens; a key file's content is a passphrase too. r is
// what the header was read from.
//
// Errors: [ErrWrongKey] if no keyslot opens, [ErrNoPassphrase] if there is
// none, [ErrUnsupported] if this package can read none of them or one costs
// more than the limits in docs/spec/luks2-header.md; ctx's, between two
// keyslots.
func (f *Foreign) Unlock(ctx context.Context, r io.ReaderAt, passphrase *keymem.Key) (*keymem.Key, error) {
	var dek *keymem.Key
	var err error
	if f.header1 != nil {
		dek, err = f.header1.unlock(ctx, r, passphrase)
	} else {
		dek, err = f.header2.unlockPassphrase(ctx, r, passphrase, f.header2.meta.digestsOf(0))
	}
	if err == nil && dek.Len() != KeySize {
		err = errors.Join(fmt.Errorf("%w: its volume key has %d bytes, not %d", ErrUnsupported, dek.Len(), KeySize), dek.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("cannot unlock LUKS%d volume %s: %w", f.Version, f.UUID, err)
	}
	return dek, nil
}
