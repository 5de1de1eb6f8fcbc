package volume

import (
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

// afterRekey makes good what an interrupted deep rekey has left of the volume
// whose header is h, and returns the header that it has then.
func afterRekey(dev blockdev.Device, h *luks.Header, dek *keymem.Key, opts Options) (*luks.Header, error) {
	state, underWay, err := h.Reencryption()
	switch {
	case err != nil:
		return nil, err
	case state.Plain:
		return nil, ErrEncrypting
	case underWay && state.Hot > 0 && opts.ReadOnly:
		return nil, fmt.Errorf("%w, and was interrupted: it has to be opened for writing once", ErrRekeying)
	case opts.ReadOnly || opts.NextDEK == nil:
		return h, nil
	case underWay && state.Hot == 0:
		return h, nil
	}
	err = withHeaderLock(dev, blockdev.Exclusive, func() error {
		if h, err = readLUKS(dev); err != nil {
			return err
		}
		if state, underWay, err = h.Reencryption(); err != nil {
			return err
		}
		if _, _, err := sortKeys(h, dek, opts.NextDEK); err != nil {
			return err
		}
		if !underWay {
			// It may have been cut short at its end: a stale header copy holds the
			// old key safe, and the free areas what was not wiped.
			if len(h.Damaged()) > 0 {
				if err := h.Commit(dev); err != nil {
					return err
				}
			}
			return wipeFree(dev, dev, h)
		}
		if state.Hot == 0 {
			return nil
		}
		return recoverZone(dev, h, state, false)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot recover from an interrupted rekey: %w", err)
	}
	return h, nil
}

// recoverZone makes good a zone in which a rekey was interrupted, from the journal,
// and commits that. every: its empty sectors too. The header is locked.
func recoverZone(dev blockdev.Device, h *luks.Header, state luks.Reencryption, every bool) error {
	old := make([]byte, state.Hot)
	if _, err := dev.ReadAt(old, state.Journal.Offset); err != nil {
		return err
	}
	off := dataBase(dev) + state.Segment.Offset + state.Boundary
	if err := restore(dev, off, old, state.Segment.SectorSize, every); err != nil {
		return err
	}
	if err := dev.Flush(); err != nil {
		return err
	}
	if err := h.MarkClean(state.Boundary); err != nil {
		return err
	}
	return h.Commit(dev)
}

// sortKeys tells which of two keys, of which the second may be nil, is that of
// the data and which, during a deep rekey, the next one, else nil.
func sortKeys(h *luks.Header, a, b *keymem.Key) (dek, next *keymem.Key, err error) {
	_, underWay, err := h.Reencryption()
	if err != nil {
		return nil, nil, err
	}
	if underWay && b == nil {
		return nil, nil, fmt.Errorf("%w: both of its DEKs are needed", ErrRekeying)
	}
	if underWay {
		if err = h.VerifyReencryption(a, b); errors.Is(err, ErrWrongKey) && h.VerifyReencryption(b, a) == nil {
			return b, a, nil
		}
		return a, b, err
	}
	if err = h.VerifyKey(a); errors.Is(err, ErrWrongKey) && b != nil && h.VerifyKey(b) == nil {
		return b, nil, nil
	}
	return a, nil, err
}

// takeKeys verifies and copies the keys of a volume that is being opened.
func (v *Volume) takeKeys(h *luks.Header, a, b *keymem.Key) error {
	dek, next, err := sortKeys(h, a, b)
	if err != nil {
		return err
	}
	if v.dek, err = dek.Clone(); err != nil {
		return err
	}
	if v.cipher, err = xts.New(v.dek); err != nil || next == nil {
		return err
	}
	if v.nextDEK, err = next.Clone(); err != nil {
		return err
	}
	if v.next, err = xts.New(v.nextDEK); err != nil {
		return err
	}
	state, _, err := h.Reencryption()
	v.boundary.Store(state.Boundary)
	return err
}

// dropKeys wipes all keys.
func (v *Volume) dropKeys() {
	v.dek.Close()
	v.nextDEK.Close()
	for _, c := range []*xts.Cipher{v.cipher, v.next} {
		if c != nil {
			c.Close()
		}
	}
}

// dataSegment returns where on dev the data are, also during a deep rekey.
func dataSegment(dev blockdev.Device, h *luks.Header) (luks.Segment, error) {
	state, underWay, err := h.Reencryption()
	switch {
	case err == nil && !underWay:
		state.Segment, err = h.Segment()
	case err == nil && state.Plain:
		err = ErrEncrypting
	}
	state.Segment.Offset += dataBase(dev)
	return state.Segment, err
}

// rekeyInfo returns how far the rekey of a volume of size bytes has come.
func rekeyInfo(state luks.Reencryption, size int64) *RekeyInfo {
	return &RekeyInfo{Done: min(state.Boundary, size), Total: size, InZone: state.Hot > 0}
}
