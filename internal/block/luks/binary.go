package luks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Copy is one of the two copies of a header.
type Copy int

// The copies.
const (
	Primary   Copy = iota // at offset 0
	Secondary             // right behind the primary
)

// String returns "primary" or "secondary".
func (c Copy) String() string {
	if c == Primary {
		return "primary"
	}
	return "secondary"
}

// Layout of the binary header, big-endian; offsets and lengths in bytes.
const (
	binarySize = 4096 // the JSON area starts here

	offMagic     = 0x000
	offVersion   = 0x006
	offSize      = 0x008
	offSeqid     = 0x010
	offLabel     = 0x018
	offAlgorithm = 0x048
	offSalt      = 0x068
	offUUID      = 0x0a8
	offSubsystem = 0x0d0
	offOffset    = 0x100
	offReserved1 = 0x108
	offChecksum  = 0x1c0
	offReserved2 = 0x200

	magicSize     = 6
	labelSize     = 48
	algorithmSize = 32
	saltSize      = 64
	uuidSize      = 40
	checksumSize  = 64
)

const (
	magicPrimary   = "LUKS\xba\xbe"
	magicSecondary = "SKUL\xba\xbe"
	checksumName   = "sha256"
)

const headerSizeDefault = 16 << 10

// headerSizes are the lengths that a header copy may have, and so the offsets
// where the secondary may be.
var headerSizes = [...]int64{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20}

type salt [saltSize]byte

// binaryHeader is what both copies' binary headers have in common.
type binaryHeader struct {
	size      int64 // bytes of one copy, binary header and JSON area
	seqid     uint64
	label     string
	uuid      string
	subsystem string
}

// Errors of one copy; Read turns them into an error of the volume.
var (
	errMagic = errors.New("magic number is missing")
	errLUKS1 = fmt.Errorf("%w: 1", ErrVersion)
)

func (c Copy) magic() string {
	if c == Primary {
		return magicPrimary
	}
	return magicSecondary
}

func (c Copy) offset(size int64) int64 {
	if c == Primary {
		return 0
	}
	return size
}

// decodeSize returns the length of the header copy c that begins with b, at
// least binarySize bytes, after checking the fields that say what it is.
func decodeSize(b []byte, c Copy) (int64, error) {
	if string(b[offMagic:offMagic+magicSize]) != c.magic() {
		return 0, errMagic
	}
	switch v := binary.BigEndian.Uint16(b[offVersion:]); v {
	case 2:
	case 1:
		return 0, errLUKS1
	default: // of the future, or damaged
		return 0, fmt.Errorf("%w: %d", ErrVersion, v)
	}
	size := binary.BigEndian.Uint64(b[offSize:])
	for _, known := range headerSizes {
		if size == uint64(known) {
			return known, nil
		}
	}
	return 0, fmt.Errorf("header size %d is not one of those defined", size)
}

// decodeCopy parses a whole header copy. The checksum is verified before
// anything that it covers is used.
func decodeCopy(b []byte, c Copy) (binaryHeader, salt, object, error) {
	fail := func(err error) (binaryHeader, salt, object, error) {
		return binaryHeader{}, salt{}, nil, err
	}
	if len(b) < binarySize {
		return fail(fmt.Errorf("header has %d bytes", len(b)))
	}
	size, err := decodeSize(b, c)
	if err != nil {
		return fail(err)
	}
	if int64(len(b)) != size {
		return fail(fmt.Errorf("header has %d bytes, not %d", len(b), size))
	}
	if name, err := decodeText(b, offAlgorithm, algorithmSize); err != nil || name != checksumName {
		return fail(fmt.Errorf("checksum algorithm is not %q", checksumName))
	}
	if !bytes.Equal(b[offChecksum:offChecksum+checksumSize], checksum(b)) {
		return fail(errors.New("checksum is wrong"))
	}

	h := binaryHeader{size: size, seqid: binary.BigEndian.Uint64(b[offSeqid:])}
	if at := binary.BigEndian.Uint64(b[offOffset:]); at != uint64(c.offset(size)) {
		return fail(fmt.Errorf("header says that it belongs at offset %d", at))
	}
	for _, field := range []struct {
		name string
		to   *string
		off  int
		size int
	}{
		{"label", &h.label, offLabel, labelSize},
		{"UUID", &h.uuid, offUUID, uuidSize},
		{"subsystem", &h.subsystem, offSubsystem, labelSize},
	} {
		if *field.to, err = decodeText(b, field.off, field.size); err != nil {
			return fail(fmt.Errorf("%s: %w", field.name, err))
		}
	}
	if !isZero(b[offReserved1:offChecksum]) || !isZero(b[offReserved2:binarySize]) {
		return fail(fmt.Errorf("%w: reserved bytes of the header are in use", ErrUnsupported))
	}

	text, err := trimPadding(b[binarySize:])
	if err != nil {
		return fail(err)
	}
	doc, err := decodeJSON(text)
	if err != nil {
		return fail(fmt.Errorf("metadata: %w", err))
	}
	return h, salt(b[offSalt : offSalt+saltSize]), doc, nil
}

// encodeCopy is the reverse of decodeCopy. doc fits; see Header.replace.
func encodeCopy(h binaryHeader, s salt, doc object, c Copy) []byte {
	b := make([]byte, h.size)
	copy(b[offMagic:], c.magic())
	binary.BigEndian.PutUint16(b[offVersion:], 2)
	binary.BigEndian.PutUint64(b[offSize:], uint64(h.size))
	binary.BigEndian.PutUint64(b[offSeqid:], h.seqid)
	copy(b[offLabel:], h.label)
	copy(b[offAlgorithm:], checksumName)
	copy(b[offSalt:], s[:])
	copy(b[offUUID:], h.uuid)
	copy(b[offSubsystem:], h.subsystem)
	binary.BigEndian.PutUint64(b[offOffset:], uint64(c.offset(h.size)))
	copy(b[binarySize:], encodeJSON(doc))
	copy(b[offChecksum:], checksum(b))
	return b
}

// checksum returns the checksum field that belongs to header copy b: SHA-256
// over all of b with that field zero, then zeros.
func checksum(b []byte) []byte {
	hash := sha256.New()
	hash.Write(b[:offChecksum])
	hash.Write(make([]byte, checksumSize))
	hash.Write(b[offReserved2:])
	return append(hash.Sum(nil), make([]byte, checksumSize-sha256.Size)...)
}

// decodeText returns the text in the size bytes at off: everything behind it
// is NUL, and at least one byte is.
func decodeText(b []byte, off, size int) (string, error) {
	text, padding, found := bytes.Cut(b[off:off+size], []byte{0})
	if !found || !isZero(padding) {
		return "", errors.New("text is not padded with NUL bytes")
	}
	return string(text), checkText(string(text), size)
}

// checkText returns an error unless s can be held in a field of size bytes.
func checkText(s string, size int) error {
	switch {
	case len(s) >= size:
		return fmt.Errorf("text has %d bytes, at most %d are allowed", len(s), size-1)
	case !utf8.ValidString(s) || strings.ContainsRune(s, 0):
		return errors.New("text is not UTF-8 without NUL")
	}
	return nil
}

// trimPadding returns the JSON text of a JSON area: an object from the first
// byte on, then NUL bytes, at least one, to the end.
func trimPadding(area []byte) ([]byte, error) {
	text, padding, found := bytes.Cut(area, []byte{0})
	if !found || !isZero(padding) {
		return nil, errors.New("metadata is not padded with NUL bytes")
	}
	if len(text) < 2 || text[0] != '{' || text[len(text)-1] != '}' {
		return nil, errors.New("metadata is not a JSON object")
	}
	return text, nil
}

func isZero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}
