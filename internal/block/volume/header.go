package volume

import (
	"errors"
	"fmt"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// SizeMax is the largest size of a volume in bytes: IEEE Std 1619-2018 allows
// 2^44 cipher blocks under one key.
const SizeMax = 1 << 48

// Owner returns the owner of the key safe of the volume with that UUID, which a
// safe names and authenticates.
func Owner(uuid string) string { return "disk:" + uuid }

// FormatOptions say what volume [Format] makes.
type FormatOptions struct {
	// Size is the size of the disk that the guest sees, in bytes, at most
	// [SizeMax]: a multiple of the sector size and of the block size of the
	// storage. The storage is resized to hold it. 0: as much as fits on the
	// storage as it is, such as a block device.
	Size int64
	// SectorSize is the unit of encryption in bytes: 512 (0 means that too), or
	// 4096 for a disk with logical blocks of 4096 bytes only.
	SectorSize int
	// DataOffset is where the data start, as in [luks.Options].
	DataOffset int64
	// UUID as in [luks.Options]. The owner of Safe contains it.
	UUID string
	// Label is a name for people, 0 to 47 bytes of UTF-8 without NUL.
	Label string
	// DEK is the volume key, [luks.KeySize] bytes. It stays the caller's.
	DEK *keymem.Key
	// Safe holds the DEK. Its owner is [Owner] of UUID. Nil: the key is kept
	// elsewhere.
	Safe *keysafe.Safe
	// AllowDiscards gives storage back that the guest discards. It shows which
	// sectors are in use.
	AllowDiscards bool
	// Thin notes in the header that sectors which are never written stand for
	// zeros that somebody relies on: see [Volume.Fill].
	Thin bool
	// Overwrite allows storage that is not empty; all it holds is lost. A block
	// device is never empty.
	Overwrite bool
}

// Format makes a volume on dev that reads as zeros, and makes it durable; dev
// stays the caller's, for [Open]. The header is written last: cut short, Format
// leaves the new volume or none; if it overwrites, also what it left of the old
// contents.
//
// It returns [ErrNotEmpty] if dev has a size and Overwrite is false, and then
// changes nothing; [ErrWrongSafe]; [blockdev.ErrNoSpace]; or other errors of
// dev. After those dev may hold anything.
func Format(dev blockdev.Resizer, opts FormatOptions) error {
	if err := format(dev, opts); err != nil {
		return fmt.Errorf("cannot make volume: %w", err)
	}
	return nil
}

func format(dev blockdev.Resizer, opts FormatOptions) error {
	h, err := luks.New(luks.Options{
		UUID:          opts.UUID,
		Label:         opts.Label,
		SectorSize:    opts.SectorSize,
		DataOffset:    opts.DataOffset,
		DEK:           opts.DEK,
		Safe:          opts.Safe,
		AllowDiscards: opts.AllowDiscards,
		Thin:          opts.Thin,
	})
	if err != nil {
		return err
	}
	if err := checkSafe(opts.Safe, h.UUID()); err != nil {
		return err
	}
	segment, err := h.Segment()
	if err != nil {
		return err
	}
	unit := int64(max(segment.SectorSize, dev.BlockSize()))
	if opts.Size < 0 || opts.Size > SizeMax || opts.Size%unit != 0 {
		return fmt.Errorf("size %d is not a multiple of %d up to %d", opts.Size, unit, int64(SizeMax))
	}
	if segment.Offset%int64(dev.BlockSize()) != 0 {
		return fmt.Errorf("data offset %d is not a multiple of the block size %d of the storage", segment.Offset, dev.BlockSize())
	}
	if dev.Size() > 0 && !opts.Overwrite {
		return ErrNotEmpty
	}
	return withHeaderLock(dev, blockdev.Exclusive, func() error {
		if err := makeRoom(dev, segment, opts.Size); err != nil {
			return err
		}
		return h.Commit(dev)
	})
}

// makeRoom gives dev the size that a volume of size bytes needs, zeroed.
func makeRoom(dev blockdev.Resizer, segment luks.Segment, size int64) error {
	if size == 0 {
		if dev.Size() < segment.Offset+int64(segment.SectorSize) {
			return fmt.Errorf("%w: it has %d bytes, the header alone needs %d", blockdev.ErrNoSpace, dev.Size(), segment.Offset)
		}
		if err := dev.WriteZeroes(0, dev.Size(), true); err != nil {
			return err
		}
	} else {
		if err := dev.Resize(0); err != nil {
			return err
		}
		if err := dev.Resize(segment.Offset + size); err != nil {
			return err
		}
	}
	return dev.Flush() // before there is a header that vouches for it
}

// Info is what a header tells without a key.
type Info struct {
	UUID          string
	Label         string
	Size          int64 // of the disk that the guest sees, in bytes
	SectorSize    int   // in bytes
	DataOffset    int64 // in bytes from the start of the storage, or of the data's device
	Detached      bool  // the header is on another device than the data
	AllowDiscards bool
	Thin          bool            // [Volume.Fill] must run before dm-crypt opens it
	Safes         []*keysafe.Safe // usually one; none if the key is kept elsewhere; during a deep rekey two, the new one last
	Damage        []luks.Damage   // the header copy that is bad, if one is
	Rekey         *RekeyInfo      // nil if no deep rekey is under way
	Encryption    *RekeyInfo      // how far an encryption in place has come; nil if none is under way
}

// Inspect reads the header of the volume on dev. It needs no key, writes
// nothing, and works while another process has the volume open. Errors are
// those of [Open] but [ErrWrongKey], and those of [luks.Header.Safes].
func Inspect(dev blockdev.Device) (Info, error) {
	info, err := inspect(dev)
	if err != nil {
		return Info{}, fmt.Errorf("cannot inspect volume: %w", err)
	}
	return info, nil
}

func inspect(dev blockdev.Device) (Info, error) {
	h, err := readHeader(dev)
	if err != nil {
		return Info{}, err
	}
	safes, err := h.Safes()
	if err != nil {
		return Info{}, err
	}
	var (
		segment           luks.Segment
		size              int64
		rekey, encryption *RekeyInfo
	)
	if e, underWay, encErr := h.Encryption(); encErr == nil && underWay {
		segment, size = luks.Segment{Offset: e.Shift, SectorSize: diskSector}, e.Size
		encryption = &RekeyInfo{Done: e.Size - e.Boundary, Total: e.Size}
	} else {
		state, underWay, err := h.Reencryption()
		if err != nil {
			return Info{}, err
		}
		if state.Plain {
			segment = state.Segment
			size, err = segment.Length(dev.Size() - dataBase(dev))
			encryption = rekeyInfo(state, size)
		} else {
			segment, size, err = layout(dev, h)
			segment.Offset -= dataBase(dev)
			if underWay {
				rekey = rekeyInfo(state, size)
			}
		}
		if err != nil {
			return Info{}, err
		}
	}
	return Info{
		Rekey:         rekey,
		Encryption:    encryption,
		UUID:          h.UUID(),
		Label:         h.Label(),
		Size:          size,
		SectorSize:    segment.SectorSize,
		DataOffset:    segment.Offset,
		Detached:      h.Detached(),
		AllowDiscards: h.AllowDiscards(),
		Thin:          h.Thin(),
		Safes:         safes,
		Damage:        h.Damaged(),
	}, nil
}

// Inspect returns the same as the function [Inspect] for an open volume.
func (v *Volume) Inspect() (Info, error) {
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return Info{}, fmt.Errorf("cannot inspect volume %s: %w", v.uuid, err)
	}
	defer v.guard.Leave(pass)
	v.header.Lock()
	defer v.header.Unlock()
	return Inspect(v.dev)
}

// ReplaceSafe replaces the key safe of a volume that is not open: the shallow
// rekey of one disk. It also repairs a damaged header copy.
//
// When it returns without error, both header copies have the new safe, durably,
// and the old KEK is not needed any more. When it returns an error either safe
// may be the one that is found next: both KEKs must be kept until a later call
// has succeeded. It returns [ErrWrongSafe] if the safe is nil or its owner is
// not the volume's, [ErrRekeying] during a deep rekey, and then changes nothing.
func ReplaceSafe(dev blockdev.Device, safe *keysafe.Safe) error {
	return replaceSafe(dev, dev, safe, func(*luks.Header) error { return nil })
}

// Reidentify makes of a copy of a volume, which is not open, a volume of its own:
// with another UUID and, in place of the original's, a key safe for it. The DEK,
// the data and passphrases stay. It commits both header copies, durably; after an
// error the header may be either. It returns [ErrWrongSafe] if the safe is nil or
// its owner is not [Owner] of uuid, [ErrRekeying] during a deep rekey, and then
// changes nothing.
func Reidentify(dev blockdev.Device, uuid string, safe *keysafe.Safe) error {
	return replaceSafe(dev, dev, safe, func(h *luks.Header) error { return h.SetUUID(uuid) })
}

// ReplaceSafe does the same for an open volume, which goes on working
// meanwhile. It also returns [ErrChanged] if the header is not that of the
// volume which was opened.
func (v *Volume) ReplaceSafe(safe *keysafe.Safe) error {
	if v.readOnly {
		return fmt.Errorf("cannot replace key safe of volume %s: %w", v.uuid, blockdev.ErrReadOnly)
	}
	pass, err := v.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return fmt.Errorf("cannot replace key safe of volume %s: %w", v.uuid, err)
	}
	defer v.guard.Leave(pass)
	v.header.Lock()
	defer v.header.Unlock()
	return replaceSafe(v.dev, watchedStorage{v}, safe, v.unchanged)
}

// unchanged returns an error if h is not the header of the volume that was
// opened.
func (v *Volume) unchanged(h *luks.Header) error {
	segment, err := h.Segment()
	if errors.Is(err, ErrRekeying) {
		return err
	}
	segment.Offset += dataBase(v.dev)
	if err != nil || segment != v.segment || h.UUID() != v.uuid {
		return fmt.Errorf("%w: it was %s", ErrChanged, v.uuid)
	}
	return nil
}

// replaceSafe commits a header with the safe to storage, which is dev's, if the header
// passes check, which may change it. The header is read anew each time: a failed
// commit leaves what only the storage knows.
func replaceSafe(dev blockdev.Device, storage luks.Storage, safe *keysafe.Safe, check func(*luks.Header) error) error {
	if safe == nil {
		return fmt.Errorf("cannot replace key safe: %w: there is none", ErrWrongSafe)
	}
	err := withHeaderLock(dev, blockdev.Exclusive, func() error {
		h, err := readLUKS(dev)
		if err != nil {
			return err
		}
		if err := check(h); err != nil {
			return err
		}
		if err := checkSafe(safe, h.UUID()); err != nil {
			return err
		}
		if err := h.SetSafe(safe); err != nil {
			return err
		}
		return h.Commit(storage)
	})
	if err != nil {
		return fmt.Errorf("cannot replace key safe: %w", err)
	}
	return nil
}

// checkSafe refuses a safe that would not open on the volume with that UUID.
func checkSafe(safe *keysafe.Safe, uuid string) error {
	if safe != nil && safe.Owner != Owner(uuid) {
		return fmt.Errorf("%w: its owner is %q, not %q", ErrWrongSafe, safe.Owner, Owner(uuid))
	}
	return nil
}

// readHeader reads the header while nobody writes it.
func readHeader(dev blockdev.Device) (h *luks.Header, err error) {
	err = withHeaderLock(dev, blockdev.Shared, func() error {
		h, err = readLUKS(dev)
		return err
	})
	return h, err
}

// withHeaderLock runs f under dev's header lock, if it has one.
func withHeaderLock(dev blockdev.Device, access blockdev.Access, f func() error) error {
	if l, ok := dev.(blockdev.HeaderLocker); ok {
		return l.WithHeaderLock(access, f)
	}
	return f()
}
