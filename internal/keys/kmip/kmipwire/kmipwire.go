// Package kmipwire reads KMIP messages from a connection and checks them before
// a codec sees them (KMIP 1.4 section 9.1).
//
// Invariant: what [Read] and [Check] pass is one well-formed TTLV structure
// within limits, on which the codec neither panics nor allocates more than a
// small multiple of its length. All functions are safe for concurrent use.
package kmipwire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ovh/kmip-go/ttlv"
)

// ErrMalformed is a message that is not TTLV, or that exceeds a limit.
var ErrMalformed = errors.New("malformed message")

// Malformed returns an [ErrMalformed] that says how.
func Malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// ErrUnframed is reported with [ErrMalformed] if the message's first eight
// bytes do not tell where it ends: nothing more can be read from there.
var ErrUnframed = errors.New("its end is not known")

const headerSize = 8 // tag (3), type (1), length (4)

// Limits bounds a message.
type Limits struct {
	Message int // bytes with its header
	Depth   int // nested structures
	Values  int // values of any type
}

// Read reads one message with the tag want and of at most limits.Message bytes
// from r and checks it with [Check]. The caller wipes it. It allocates for what has arrived, not for
// what the header promises.
func Read(r io.Reader, want int, limits Limits) ([]byte, error) {
	header := make([]byte, headerSize, 512)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	tag, kind, length := parseHeader(header)
	if tag != want || kind != ttlv.TypeStructure {
		return nil, fmt.Errorf("%w, %w", Malformed("it starts with tag %06x", tag), ErrUnframed)
	}
	if length%8 != 0 || uint64(length)+headerSize > uint64(limits.Message) {
		return nil, fmt.Errorf("%w, %w", Malformed("a length of %d bytes", length), ErrUnframed)
	}
	message := header
	for need := headerSize + int(length); len(message) < need; {
		chunk := min(need-len(message), max(len(message), 4096))
		grown := make([]byte, len(message)+chunk)
		copy(grown, message)
		clear(message) // it may hold half a key
		if _, err := io.ReadFull(r, grown[len(message):]); err != nil {
			clear(grown)
			return nil, fmt.Errorf("cannot read a whole message: %w", err)
		}
		message = grown
	}
	if err := Check(message, limits); err != nil {
		clear(message)
		return nil, err
	}
	return message, nil
}

func parseHeader(b []byte) (tag int, kind ttlv.Type, length uint32) {
	return int(b[0])<<16 | int(b[1])<<8 | int(b[2]), ttlv.Type(b[3]), binary.BigEndian.Uint32(b[4:8])
}

// Check reports whether message is one well-formed TTLV structure
// within limits (KMIP 1.4 section 9.1): every length fits its type and its
// parent, padding is zero, booleans are 0 or 1. The codec relies on it: it
// reads fixed-size values without looking at their length.
func Check(message []byte, limits Limits) error {
	values := 0
	rest, err := checkValue(message, limits, 0, &values)
	if err != nil {
		return err
	}
	if len(rest) != 0 {
		return Malformed("%d bytes after its end", len(rest))
	}
	return nil
}

func checkValue(b []byte, limits Limits, depth int, values *int) (rest []byte, err error) {
	if len(b) < headerSize {
		return nil, Malformed("a value of %d bytes", len(b))
	}
	if *values++; *values > limits.Values {
		return nil, Malformed("over %d values", limits.Values)
	}
	tag, kind, length := parseHeader(b)
	b = b[headerSize:]
	if tag>>16 != 0x42 && tag>>16 != 0x54 {
		return nil, Malformed("tag %06x", tag)
	}
	padded := (uint64(length) + 7) &^ 7
	if padded > uint64(len(b)) {
		return nil, Malformed("tag %06x ends outside its parent", tag)
	}
	value, padding, rest := b[:length], b[length:padded], b[padded:]
	for _, p := range padding {
		if p != 0 {
			return nil, Malformed("tag %06x has padding that is not zero", tag)
		}
	}
	ok := true
	switch kind {
	case ttlv.TypeStructure:
		if depth++; depth > limits.Depth {
			return nil, Malformed("over %d nested structures", limits.Depth)
		}
		ok = length%8 == 0
		for len(value) > 0 && ok {
			if value, err = checkValue(value, limits, depth, values); err != nil {
				return nil, err
			}
		}
	case ttlv.TypeInteger, ttlv.TypeEnumeration, ttlv.TypeInterval:
		ok = length == 4
	case ttlv.TypeLongInteger, ttlv.TypeDateTime:
		ok = length == 8
	case ttlv.TypeBoolean:
		ok = length == 8 && binary.BigEndian.Uint64(value) <= 1
	case ttlv.TypeBigInteger:
		ok = length > 0 && length%8 == 0
	case ttlv.TypeTextString, ttlv.TypeByteString:
	default:
		return nil, Malformed("tag %06x has type %d", tag, kind)
	}
	if !ok {
		return nil, Malformed("tag %06x has a value that its type does not allow", tag)
	}
	return rest, nil
}
