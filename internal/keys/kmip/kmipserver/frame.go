package kmipserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ovh/kmip-go/ttlv"
)

// errMalformed is a message that is not TTLV, or that exceeds a limit.
var errMalformed = errors.New("malformed message")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
}

const headerSize = 8 // tag (3), type (1), length (4)

// tagRequestMessage starts every message a server may get.
const tagRequestMessage = 0x420078

// readMessage reads one message of at most limits.Message bytes from r and
// checks it with [checkMessage]. It allocates for what has arrived, not for
// what the header promises.
func readMessage(r io.Reader, limits Limits) ([]byte, error) {
	header := make([]byte, headerSize, 512)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	tag, kind, length := parseHeader(header)
	if tag != tagRequestMessage || kind != ttlv.TypeStructure {
		return nil, malformed("it does not start a request")
	}
	if length%8 != 0 || uint64(length)+headerSize > uint64(limits.Message) {
		return nil, malformed("a length of %d bytes", length)
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
	if err := checkMessage(message, limits); err != nil {
		clear(message)
		return nil, err
	}
	return message, nil
}

func parseHeader(b []byte) (tag int, kind ttlv.Type, length uint32) {
	return int(b[0])<<16 | int(b[1])<<8 | int(b[2]), ttlv.Type(b[3]), binary.BigEndian.Uint32(b[4:8])
}

// checkMessage reports whether message is one well-formed TTLV structure
// within limits (KMIP 1.4 section 9.1): every length fits its type and its
// parent, padding is zero, booleans are 0 or 1. The codec relies on it: it
// reads fixed-size values without looking at their length.
func checkMessage(message []byte, limits Limits) error {
	values := 0
	rest, err := checkValue(message, limits, 0, &values)
	if err != nil {
		return err
	}
	if len(rest) != 0 {
		return malformed("%d bytes after its end", len(rest))
	}
	return nil
}

func checkValue(b []byte, limits Limits, depth int, values *int) (rest []byte, err error) {
	if len(b) < headerSize {
		return nil, malformed("a value of %d bytes", len(b))
	}
	if *values++; *values > limits.Values {
		return nil, malformed("over %d values", limits.Values)
	}
	tag, kind, length := parseHeader(b)
	b = b[headerSize:]
	if tag>>16 != 0x42 && tag>>16 != 0x54 {
		return nil, malformed("tag %06x", tag)
	}
	padded := (uint64(length) + 7) &^ 7
	if padded > uint64(len(b)) {
		return nil, malformed("tag %06x ends outside its parent", tag)
	}
	value, padding, rest := b[:length], b[length:padded], b[padded:]
	for _, p := range padding {
		if p != 0 {
			return nil, malformed("tag %06x has padding that is not zero", tag)
		}
	}
	ok := true
	switch kind {
	case ttlv.TypeStructure:
		if depth++; depth > limits.Depth {
			return nil, malformed("over %d nested structures", limits.Depth)
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
		return nil, malformed("tag %06x has type %d", tag, kind)
	}
	if !ok {
		return nil, malformed("tag %06x has a value that its type does not allow", tag)
	}
	return rest, nil
}
