package luks

import (
	"fmt"
	"slices"
	"strconv"
)

// ErrEncrypting: the volume was a plain disk whose encryption in place is not
// finished. It is also an [ErrUnsupported] for those who want to open it.
var ErrEncrypting = fmt.Errorf("%w: its encryption in place is not finished", ErrUnsupported)

// Names in the metadata of an encryption in place; see
// docs/spec/in-place-encryption.md.
const (
	modeEncrypt         = "encrypt"
	directionBackward   = "backward"
	resilienceDatashift = "datashift"

	flagMoved = "backup-moved-segment"

	// encryptionSector is the unit of encryption in bytes: a larger one would
	// change the block size of a disk that is in use already.
	encryptionSector = 512
)

// Encryption is how far a plain disk is encrypted in place. All is in bytes.
type Encryption struct {
	// Size is that of the disk.
	Size int64
	// Shift is how far its data are moved, and the offset of the encrypted ones.
	Shift int64
	// Boundary is where the encrypted data begin, from the start of the disk: Size
	// at first, 0 when all are.
	Boundary int64
	// area is the place of the keyslot, which holds nothing.
	area Area
	// hot is the length of a zone below Boundary that cryptsetup was at work on.
	hot int64
}

// StorageMin returns how long the storage is at least.
func (e Encryption) StorageMin() int64 { return e.Shift + e.Size }

// StorageMax returns how long the storage is while there are plain data.
func (e Encryption) StorageMax() int64 { return e.StorageMin() + e.Shift }

// encryption is Encryption with the numbers of what belongs to it.
type encryption struct {
	Encryption
	keyslot   int
	key, seal digest
}

// encryptionSegment is a segment and whether it is under the key.
type encryptionSegment struct {
	segment
	encrypted bool
}

// plan returns the segments that are e's on disk.
func (e Encryption) plan() []encryptionSegment {
	linear := func(off, size int64, flags ...string) encryptionSegment {
		return encryptionSegment{segment{kind: "linear", offset: off, size: size, flags: flags}, false}
	}
	crypt := func(off, size int64, flags ...string) encryptionSegment {
		return encryptionSegment{segment{
			kind: "crypt", offset: e.Shift + off, size: size, flags: flags,
			ivTweak: off / 512, encryption: Cipher, sectorSize: encryptionSector,
		}, true}
	}
	var list []encryptionSegment
	plain := e.Boundary - e.hot
	if plain > 0 {
		list = append(list, linear(e.Size+e.Shift, e.Shift))
	}
	if plain > e.Shift {
		list = append(list, linear(e.Shift, plain-e.Shift))
	}
	if e.hot > 0 {
		list = append(list, crypt(plain, e.hot, flagHot))
	}
	if e.Boundary < e.Size {
		list = append(list, crypt(e.Boundary, e.Size-e.Boundary))
	}
	return append(list, linear(0, e.Size, flagPrevious), crypt(0, dynamicSize, flagFinal), linear(e.Size+e.Shift, e.Shift, flagMoved))
}

// check returns an error for numbers that no encryption has.
func (e Encryption) check() error {
	switch {
	case e.Shift < DataOffsetMin+areaAlign || e.Shift%areaAlign != 0 || e.Shift > 1<<40:
		return fmt.Errorf("its data are moved by %d bytes", e.Shift)
	case e.Size < e.Shift || e.Size%encryptionSector != 0 || e.Size > 1<<60:
		return fmt.Errorf("its disk has %d bytes", e.Size)
	case e.Boundary < 0 || e.Boundary > e.Size || e.Boundary%encryptionSector != 0 || e.Boundary != 0 && e.Boundary < e.Shift:
		return fmt.Errorf("its boundary is at %d of %d bytes", e.Boundary, e.Size)
	case e.hot < 0 || e.hot > e.Shift || e.hot > e.Boundary || e.hot%encryptionSector != 0:
		return fmt.Errorf("its zone has %d bytes", e.hot)
	}
	return nil
}

// Encryption returns the state of an encryption in place, and false if none is
// under way. It returns an error wrapping [ErrUnsupported] for a header with
// other requirements.
func (h *Header) Encryption() (Encryption, bool, error) {
	if len(h.meta.mandatory) == 0 {
		return Encryption{}, false, nil
	}
	e, err := h.meta.encryptionInPlace()
	if err != nil {
		return Encryption{}, false, fmt.Errorf("cannot go on with the encryption of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	return e.Encryption, true, nil
}

func (m *metadata) encryptionInPlace() (encryption, error) {
	refuse := func(format string, args ...any) (encryption, error) {
		return encryption{}, fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
	}
	if !slices.Equal(m.mandatory, []string{requirementReencrypt}) {
		return refuse("it has the requirements %.80q", m.mandatory)
	}
	var e encryption
	found := 0
	for _, k := range m.keyslots {
		if k.kind != keyslotReencrypt {
			continue
		}
		mode, direction := k.member("mode"), k.member("direction")
		if mode != modeEncrypt || direction != directionBackward || k.areaKind != resilienceDatashift {
			return refuse("it is of mode %.20q, direction %.20q, resilience %.20q", mode, direction, k.areaKind)
		}
		shift, err := k.areaNumber("shift_size")
		if err != nil {
			return refuse("its shift %v", err)
		}
		e.keyslot, e.area, e.Shift = k.id, Area{k.area.offset, k.area.size}, shift
		found++
	}
	if found != 1 {
		return refuse("it has %d keyslots of type %s", found, keyslotReencrypt)
	}

	backups := len(m.segments) - 3
	if backups < 1 {
		return refuse("it has %d segments", len(m.segments))
	}
	previous := backups
	movedFirst := slices.Equal(m.segments[backups].flags, []string{flagMoved}) // as cryptsetup has it
	if movedFirst {
		previous++
	}
	keys := m.digestsOf(previous + 1)
	seals := slices.DeleteFunc(slices.Clone(m.digests), func(g digest) bool { return !slices.Contains(g.keyslots, strconv.Itoa(e.keyslot)) })
	if len(keys) != 1 || len(seals) != 1 || len(seals[0].segments) != 0 || keys[0].id == seals[0].id {
		return refuse("its digests are not one for the key and a seal")
	}
	e.key, e.seal = keys[0], seals[0]
	for _, k := range m.keyslots {
		if slices.Contains(e.key.keyslots, strconv.Itoa(k.id)) && k.keySize != KeySize {
			return refuse("its volume key has %d bytes, not %d", k.keySize, KeySize)
		}
	}

	// All plain data, and those in work, tell where the boundary is.
	e.Size = m.segments[previous].size
	for _, s := range m.segments[:backups] {
		switch {
		case s.size < 0:
			return refuse("one of its segments has no end")
		case s.kind == "linear":
			e.Boundary += s.size
		case slices.Equal(s.flags, []string{flagHot}):
			e.hot = s.size
		}
		if e.Boundary < 0 {
			return refuse("its segments are too long")
		}
	}
	e.Boundary += e.hot
	if err := e.check(); err != nil {
		return refuse("%v", err)
	}
	plan := e.plan()
	if n := len(plan); movedFirst {
		plan = append(plan[:n-3:n-3], plan[n-1], plan[n-3], plan[n-2])
	}
	if len(plan) != len(m.segments) {
		return refuse("its segments are of no known state")
	}
	for i, p := range plan {
		if !p.equal(m.segments[i]) || m.segments[i].integrity || m.names(e.key, i) != p.encrypted {
			return refuse("its segment %d is of no known state", i)
		}
	}
	return e, nil
}
