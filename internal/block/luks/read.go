package luks

import (
	"errors"
	"fmt"
	"io"
	"slices"
)

// Damage is what is wrong with one copy of a header that was read. The next
// [Header.Commit] repairs it.
type Damage struct {
	Copy Copy
	Err  error // never nil
}

// String returns a sentence for people.
func (d Damage) String() string { return fmt.Sprintf("%s header: %v", d.Copy, d.Err) }

// Read reads the header of a volume on storage of size bytes, and writes
// nothing. Of two good copies the one with the higher seqid counts; if one is
// bad the other does, and [Header.Damaged] tells.
//
// Errors: [ErrNotLUKS], [ErrVersion], [ErrCorrupt], [ErrTruncated],
// [ErrUnsupported], or those of r. A secondary copy alone is a volume only if
// the start of the storage is unreadable, zero or recognisably this volume's
// primary copy: otherwise somebody has put something else there, and that is
// [ErrNotLUKS].
//
// Of a detached header ([Header.Detached]) only the header is on r.
func Read(r io.ReaderAt, size int64) (*Header, error) {
	h, err := read(r, size)
	if err == nil && !h.Detached() {
		err = h.checkStorage(size)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read LUKS2 header: %w", err)
	}
	return h, nil
}

// ReadDetached is [Read] of a header on storage of size bytes whose data are on
// another device, of dataSize bytes. It returns an error wrapping
// [ErrUnsupported] if the data follow the header, and [ErrOtherDevice] if the
// header says that its device has another size.
func ReadDetached(r io.ReaderAt, size, dataSize int64) (*Header, error) {
	h, err := read(r, size)
	if err == nil {
		err = h.checkDetached(size, dataSize)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read detached LUKS2 header: %w", err)
	}
	return h, nil
}

// checkStorage returns an error if the data are not all on storage of size bytes.
func (h *Header) checkStorage(size int64) error {
	for i, s := range h.meta.segments {
		if slices.Contains(s.flags, flagMoved) {
			continue // cut off before the last commit of an encryption
		}
		if s.offset > size || s.size != dynamicSize && s.size > size-s.offset {
			return fmt.Errorf("%w: segment %d reaches beyond the %d bytes of the storage", ErrTruncated, i, size)
		}
	}
	return nil
}

// candidate is a header copy as it was found.
type candidate struct {
	raw  []byte
	bin  binaryHeader
	salt salt
	doc  object
	meta *metadata
	err  error // the rest is valid only if nil
}

func read(r io.ReaderAt, size int64) (*Header, error) {
	start, startErr := readStart(r, size)
	primary := readCopy(r, size, Primary, 0)
	if errors.Is(primary.err, errLUKS1) || errors.Is(primary.err, ErrUnsupported) {
		return nil, primary.err
	}
	secondary := readSecondary(r, size, primary)
	if errors.Is(secondary.err, ErrUnsupported) {
		return nil, secondary.err
	}

	h := &Header{salts: [2]salt{primary.salt, secondary.salt}}
	chosen := primary
	switch {
	case primary.err == nil && secondary.err == nil:
		if secondary.bin.seqid > primary.bin.seqid {
			chosen = secondary
			h.damage[Primary] = staleError{primary.bin.seqid, secondary.bin.seqid}
		} else if secondary.bin.seqid < primary.bin.seqid {
			h.damage[Secondary] = staleError{secondary.bin.seqid, primary.bin.seqid}
		}
	case primary.err == nil:
		h.damage[Secondary] = secondary.err
	case secondary.err == nil:
		if startErr == nil && !mayBePrimary(start, secondary.bin) {
			return nil, fmt.Errorf("%w: something else was written over the start of LUKS2 volume %s", ErrNotLUKS, secondary.bin.uuid)
		}
		chosen = secondary
		h.damage[Primary] = primary.err
	case startErr != nil:
		return nil, startErr
	case errors.Is(primary.err, errMagic):
		return nil, ErrNotLUKS
	case errors.Is(primary.err, ErrTruncated), errors.Is(primary.err, ErrVersion):
		return nil, primary.err
	default:
		return nil, fmt.Errorf("%w: primary copy: %w; secondary copy: %w", ErrCorrupt, primary.err, secondary.err)
	}
	h.bin, h.doc, h.meta = chosen.bin, chosen.doc, chosen.meta
	if h.unsure = secondary.raw; h.damage[Secondary] != nil {
		h.unsure = primary.raw
	}
	return h, nil
}

// readStart returns what is where the primary's binary header should be.
func readStart(r io.ReaderAt, size int64) ([]byte, error) {
	b := make([]byte, min(size, binarySize))
	return b, readFull(r, b, 0)
}

// readCopy reads the header copy c that should be at offset off.
func readCopy(r io.ReaderAt, size int64, c Copy, off int64) candidate {
	b := make([]byte, binarySize)
	n := min(max(size-off, 0), binarySize)
	if err := readFull(r, b[:n], off); err != nil {
		return candidate{err: err}
	}
	headerSize, err := decodeSize(b, c)
	if err != nil {
		return candidate{err: err}
	}
	if headerSize > size-off {
		return candidate{err: fmt.Errorf("%w: the storage ends inside the %s header", ErrTruncated, c)}
	}
	if c == Secondary && headerSize != off {
		return candidate{err: fmt.Errorf("header of %d bytes found at offset %d", headerSize, off)}
	}
	b = append(b, make([]byte, headerSize-binarySize)...)
	if err := readFull(r, b[binarySize:], off+binarySize); err != nil {
		return candidate{err: err}
	}
	found := candidate{raw: b}
	if found.bin, found.salt, found.doc, err = decodeCopy(b, c); err != nil {
		return candidate{err: err}
	}
	if found.meta, err = decodeMetadata(found.doc, headerSize); err != nil {
		return candidate{err: fmt.Errorf("metadata: %w", err)}
	}
	return found
}

// readSecondary reads the secondary copy from behind the primary, or, if that
// is bad, from wherever one can be.
func readSecondary(r io.ReaderAt, size int64, primary candidate) candidate {
	if primary.err == nil {
		return readCopy(r, size, Secondary, primary.bin.size)
	}
	found := candidate{err: errMagic}
	for _, off := range headerSizes {
		c := readCopy(r, size, Secondary, off)
		if c.err == nil {
			return c
		}
		if !errors.Is(c.err, errMagic) {
			found = c
		}
	}
	return found
}

// mayBePrimary reports whether start, the first bytes of the storage, can be
// the remains of the primary copy that belongs to a good secondary.
func mayBePrimary(start []byte, secondary binaryHeader) bool {
	if len(start) < binarySize {
		return false
	}
	id, err := decodeText(start, offUUID, uuidSize)
	return isZero(start) ||
		string(start[offMagic:offMagic+magicSize]) == magicPrimary ||
		err == nil && id == secondary.uuid && id != ""
}

// staleError is the damage of a copy that is sound and behind the other one.
type staleError struct{ stale, current uint64 } // numbers of the commits

func (e staleError) Error() string {
	return fmt.Sprintf("it is from commit %d, the other copy from commit %d", e.stale, e.current)
}

// Behind reports whether one copy is sound and of an earlier commit than the other.
// That may be in the kernel's memory only, as whoever wrote it was killed or has failed
// there: until the next [Header.Commit], a power loss may make the earlier one count.
func (h *Header) Behind() bool {
	return slices.ContainsFunc(h.damage[:], func(err error) bool {
		_, stale := errors.AsType[staleError](err)
		return stale
	})
}

// Damaged returns the header copy that is bad or out of date, if one is.
func (h *Header) Damaged() []Damage {
	var list []Damage
	for c, err := range h.damage {
		if err != nil {
			list = append(list, Damage{Copy(c), err})
		}
	}
	return list
}

// readFull fills b from off. Unlike [io.ReaderAt], it takes io.EOF with all
// bytes for a success.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("cannot read %d bytes at offset %d: %w", len(b), off, err)
}
