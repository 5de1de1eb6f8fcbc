package luks

import (
	"fmt"
	"slices"
	"strings"
)

// Segment is the encrypted data of a volume.
type Segment struct {
	// Offset is where the data starts, in bytes from the start of the storage.
	Offset int64
	// Size is the length of the data in bytes; 0: to the end of the storage.
	Size int64
	// SectorSize is the unit of encryption in bytes: 512, 1024, 2048 or 4096.
	// The tweak of the sector at byte offset o of the data is o/512, whatever
	// the sector size.
	SectorSize int
}

// Length returns the length in bytes of the data on storage of size bytes, a
// multiple of the sector size. It returns an error wrapping [ErrTruncated] if
// the storage ends before the data do.
func (s Segment) Length(size int64) (int64, error) {
	room := size - s.Offset
	if room < 0 || s.Size > room {
		return 0, fmt.Errorf("%w: it has %d bytes, the data needs %d", ErrTruncated, size, s.Offset+s.Size)
	}
	if s.Size > 0 {
		return s.Size, nil
	}
	return room - room%int64(s.SectorSize), nil
}

// Segment returns where the data is and how it is encrypted. It returns an
// error wrapping [ErrUnsupported] that says why if the data cannot be opened
// as one run of AES-XTS sectors under one key.
func (h *Header) Segment() (Segment, error) {
	s, err := h.segment()
	if err != nil {
		return Segment{}, fmt.Errorf("cannot open the data of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return s, nil
}

func (h *Header) segment() (Segment, error) {
	refuse := func(format string, args ...any) (Segment, error) {
		return Segment{}, fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
	}
	if err := h.checkRequirements(); err != nil {
		return Segment{}, err
	}
	if n := len(h.meta.segments); n != 1 {
		return refuse("it has %d segments instead of one", n)
	}
	s := h.meta.segments[0]
	switch {
	case s.kind != "crypt":
		return refuse("its segment is of type %.40q, not crypt", s.kind)
	case len(s.flags) != 0:
		return refuse("its segment has the flag %.40q", s.flags[0])
	case s.integrity:
		return refuse("it has dm-integrity tags")
	case s.encryption != Cipher:
		return refuse("its cipher is %.40q, not %s", s.encryption, Cipher)
	case s.ivTweak != 0:
		// cryptsetup ignores it when it opens a volume, so data written with it
		// would be lost to everybody else.
		return refuse("its iv_tweak is %d, not 0", s.ivTweak)
	}
	if digests := h.meta.digestsOf(0); len(digests) != 1 {
		return refuse("its segment has %d digests instead of one", len(digests))
	}
	for _, k := range h.meta.keyslots {
		if slices.Contains(h.meta.digestsOf(0)[0].keyslots, fmt.Sprint(k.id)) && k.keySize != KeySize {
			return refuse("its volume key has %d bytes, not %d", k.keySize, KeySize)
		}
	}
	return Segment{Offset: s.offset, Size: max(s.size, 0), SectorSize: s.sectorSize}, nil
}

// checkRequirements returns an error for a header that says that only programs
// which know a certain feature may touch it.
func (h *Header) checkRequirements() error {
	names := h.meta.mandatory
	if len(names) > 0 && h.meta.encrypting() {
		return ErrEncrypting
	}
	if i := slices.IndexFunc(names, isReencryption); i >= 0 {
		return fmt.Errorf("%w (requirement %.40q)", ErrReencrypting, names[i])
	}
	if len(names) > 0 {
		return fmt.Errorf("%w: it has the requirement %.40q", ErrUnsupported, names[0])
	}
	return nil
}

// encrypting reports whether an encryption in place is under way, of either kind.
func (m *metadata) encrypting() bool {
	if r, err := m.reencryption(); err == nil {
		return r.Plain
	}
	_, err := m.encryptionInPlace()
	return err == nil
}

func isReencryption(requirement string) bool { return strings.Contains(requirement, "reencrypt") }
