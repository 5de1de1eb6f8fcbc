package volume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

// startLength is how much of a device's beginning tells it from others while it is
// encrypted, in bytes.
const startLength = 64 << 10

// BeginEncryption writes the detached header of a plain device that is about to be
// encrypted in place, as docs/spec/in-place-encryption.md describes. The header's
// device is empty, and as long as header, keyslots and journal shall be together,
// at most all of 144 MiB; the data are only read. [EncryptDetached] does the rest.
//
// Errors: [ErrNotEmpty] if something is where the header was to be, [ErrEncrypted]
// if the data begin with a LUKS header, [ErrWrongSafe], [luks.ErrNoSpace] if there
// is no room for a journal, [blockdev.ErrBadSize], those of the two devices. After
// an error the header's device may hold a part of a header, and is to be thrown
// away.
func BeginEncryption(dev *Detached, opts EncryptOptions) error {
	if err := beginEncryption(dev, opts); err != nil {
		return fmt.Errorf("cannot make the header of a disk to be encrypted in place: %w", err)
	}
	return nil
}

func beginEncryption(dev *Detached, opts EncryptOptions) error {
	size, block := dev.data.Size(), int64(max(dev.BlockSize(), diskSector))
	if size == 0 || size > SizeMax || size%block != 0 {
		return fmt.Errorf("%w: %d is not a multiple of %d up to %d", blockdev.ErrBadSize, size, block, int64(SizeMax))
	}
	if opts.Size != 0 && opts.Size != size {
		return fmt.Errorf("%w: it has %d bytes instead of %d", ErrChanged, size, opts.Size)
	}
	if err := emptyHeader(dev.header); err != nil {
		return err
	}
	if opts.Size == 0 {
		if _, err := luks.Read(dev.data, size); !errors.Is(err, ErrNotVolume) && !errors.Is(err, ErrTruncated) {
			return errors.Join(ErrEncrypted, err)
		}
	}
	thin, err := hasHole(dev.data, size)
	if err != nil {
		return err
	}
	cipher, err := xts.New(opts.DEK)
	if err != nil {
		return err
	}
	defer cipher.Close()
	start, err := hashStart(dev, 0, cipher, !thin)
	if err != nil {
		return err
	}
	unit := max(block, 4096)
	h, err := luks.NewDetachedEncryption(luks.Options{
		UUID: opts.UUID, Label: opts.Label, DataOffset: dev.header.Size(), DEK: opts.DEK, Safe: opts.Safe, AllowDiscards: opts.AllowDiscards, Thin: thin,
		Detached: true, Device: luks.DataDevice{Size: size, Start: start},
	}, unit, max(zoneIdle, unit))
	if err != nil {
		return err
	}
	if err := checkSafe(opts.Safe, h.UUID()); err != nil {
		return err
	}
	return withHeaderLock(dev, blockdev.Exclusive, func() error { return h.Commit(dev) })
}

// emptyHeader returns [ErrNotEmpty] unless dev, as far as header copies reach, holds
// only zeros.
func emptyHeader(dev blockdev.Device) error {
	b := make([]byte, min(headersSize, dev.Size()))
	if _, err := dev.ReadAt(b, 0); err != nil {
		return err
	}
	if !isZero(b) {
		return ErrNotEmpty
	}
	return nil
}

// hashStart returns what the beginning of the data will hash to when it is encrypted.
// Below boundary it is already. Empty sectors are encrypted too if every.
func hashStart(dev *Detached, boundary int64, cipher *xts.Cipher, every bool) ([]byte, error) {
	b := make([]byte, min(startLength, dev.data.Size()))
	if _, err := dev.data.ReadAt(b, 0); err != nil {
		return nil, err
	}
	from := min(boundary, int64(len(b)))
	err := runs(b[from:], diskSector, len(b), every, func(at int, run []byte) error {
		cipher.Encrypt(run, run, tweak(from+int64(at)), diskSector)
		return nil
	})
	sum := sha256.Sum256(b)
	return sum[:], err
}

// EncryptDetached encrypts the device whose detached header [BeginEncryption] has
// written, in place, or goes on where an earlier call has stopped, also if that was
// killed; if the earlier one was finished, it only sees to the header. Nobody else
// uses the device.
//
// If it returns nil, dev is a volume that the DEK opens, and holds no plain data,
// in the header neither. If it returns an error, ctx's included, the data are all
// there, part of them encrypted: nothing opens the volume ([ErrEncrypting]) until a
// later call has succeeded, or [CancelDetached]. Header and key have to be kept
// safe from the first call on.
//
// Errors: [ErrNotVolume] if there is no header, [ErrEncrypted] if there is another
// one, [ErrOtherDevice], [ErrWrongKey], [ErrWrongSafe], [ErrChanged], those of the
// two devices.
func EncryptDetached(ctx context.Context, dev *Detached, opts EncryptOptions) error {
	if err := encryptDetached(ctx, dev, opts); err != nil {
		return fmt.Errorf("cannot encrypt disk in place: %w", err)
	}
	return nil
}

func encryptDetached(ctx context.Context, dev *Detached, opts EncryptOptions) error {
	h, err := readHeader(dev)
	if err != nil {
		return err
	}
	state, underWay, err := h.Reencryption()
	switch {
	case err != nil:
		return errors.Join(ErrEncrypted, err)
	case !underWay:
		if err := finishedBefore(dev, h, opts); err != nil {
			return err
		}
		return withHeaderLock(dev, blockdev.Exclusive, func() error { return wipeFree(dev, dev, h) })
	case !state.Plain:
		return fmt.Errorf("%w, and is being rekeyed", ErrEncrypted)
	}
	r, err := newDetachedEncryption(dev, h, opts.DEK)
	if err != nil {
		return err
	}
	defer r.v.dropKeys()
	if err := r.resume(opts); err != nil {
		return err
	}
	if err := r.run(ctx, RekeyOptions{Rate: opts.Rate, Progress: opts.Progress}); err != nil {
		// The header's second copy is not left to the next call.
		if late := r.header.Settle(r.storage); late != nil && !errors.Is(err, late) {
			err = errors.Join(err, late)
		}
		return err
	}
	return r.finish()
}

// newDetachedEncryption returns the rekey that takes dev, whose header is h, from
// plain data to those under dek, which it verifies. The caller drops its keys.
func newDetachedEncryption(dev *Detached, h *luks.Header, dek *keymem.Key) (*rekey, error) {
	if err := h.VerifyEncryption(dek); err != nil {
		return nil, err
	}
	state, _, err := h.Reencryption()
	if err != nil {
		return nil, err
	}
	segment := state.Segment
	segment.Offset += detachedBase
	size, err := segment.Length(dev.Size())
	if err != nil {
		return nil, err
	}
	v := &Volume{dev: dev, uuid: h.UUID(), segment: segment, blockSize: max(segment.SectorSize, dev.BlockSize())}
	v.size.Store(size)
	v.boundary.Store(state.Boundary)
	if v.nextDEK, err = dek.Clone(); err == nil {
		v.next, err = xts.New(v.nextDEK)
	}
	if err != nil {
		v.dropKeys()
		return nil, err
	}
	return &rekey{v: v, storage: watchedStorage{v}, header: h, every: !h.Thin()}, nil
}

// resume brings header and disk into a state to go on from.
func (r *rekey) resume(opts EncryptOptions) error {
	if err := checkSafe(opts.Safe, r.v.uuid); err != nil {
		return err
	}
	safes, err := r.header.Safes()
	if err != nil {
		return err
	}
	if err := r.recover(); err != nil {
		return err
	}
	same := opts.Safe == nil || len(safes) == 1 && bytes.Equal(safes[0].Encode(), opts.Safe.Encode())
	if !same || len(r.header.Damaged()) > 0 {
		err := r.locked(func() error {
			if !same {
				if err := r.header.SetSafe(opts.Safe); err != nil {
					return err
				}
			}
			return r.header.Commit(r.storage)
		})
		if err != nil {
			return err
		}
	}
	state, _, err := r.header.Reencryption()
	if err != nil {
		return err
	}
	return r.setUp(state.Journal, opts.Zone)
}

// recover makes good a zone that was interrupted, on the device that the header
// belongs to.
func (r *rekey) recover() error {
	state, _, err := r.header.Reencryption()
	if err != nil {
		return err
	}
	dev := r.v.dev.(*Detached)
	device, err := r.header.DataDevice()
	if err != nil {
		return err
	}
	if inStart := state.Hot > 0 && state.Boundary < startLength; !inStart && device.Start != nil {
		start, err := hashStart(dev, state.Boundary, r.v.next, r.every)
		if err != nil {
			return err
		}
		if !bytes.Equal(start, device.Start) {
			return fmt.Errorf("%w, or that has been used since its encryption in place began", ErrOtherDevice)
		}
	}
	if state.Hot == 0 {
		return nil
	}
	return r.locked(func() error { return recoverZone(dev, r.header, state, r.every) })
}

// CancelDetached undoes an encryption in place under a detached header that has
// encrypted nothing yet: the disk is then plain, as it was, the journal empty, and
// the header of no use any more. It returns [ErrEncrypting] if part of the disk is
// encrypted, which only [EncryptDetached] can bring to an end, and does nothing if
// there is no header.
func CancelDetached(dev *Detached, dek *keymem.Key) error {
	if err := cancelDetached(dev, dek); err != nil {
		return fmt.Errorf("cannot undo the encryption of a disk in place: %w", err)
	}
	return nil
}

func cancelDetached(dev *Detached, dek *keymem.Key) error {
	h, err := readHeader(dev)
	if errors.Is(err, ErrNotVolume) && emptyHeader(dev.header) == nil {
		return nil
	}
	if err != nil {
		return err
	}
	state, underWay, err := h.Reencryption()
	switch {
	case err != nil:
		return err
	case !underWay || !state.Plain || state.Boundary > 0:
		return fmt.Errorf("%w: part of its data is encrypted", ErrEncrypting)
	}
	r, err := newDetachedEncryption(dev, h, dek)
	if err != nil {
		return err
	}
	defer r.v.dropKeys()
	if err := r.recover(); err != nil {
		return err
	}
	return r.locked(func() error {
		if _, err := wipe(dev, dev, state.Journal); err != nil {
			return err
		}
		return dev.Flush()
	})
}
