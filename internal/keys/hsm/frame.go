package hsm

import (
	"encoding/binary"
	"fmt"
	"io"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// A frame is a length of 4 bytes and then fields, each behind a length of 2
// bytes; all big-endian. A request has the fields operation, module, token, key,
// PIN and data; an answer has kind of error (empty: none), its text, and data.
const (
	frameMax       = 8192 // bytes of fields
	requestFields  = 6
	answerFields   = 3
	operationWrap  = "wrap"
	operationOpen  = "unwrap"
	fieldOperation = 0
	fieldModule    = 1
	fieldToken     = 2
	fieldKey       = 3
	fieldPIN       = 4
	fieldData      = 5
)

// writeFrame writes fields as one frame. It keeps no copy of them.
func writeFrame(w io.Writer, fields ...[]byte) error {
	n := 0
	for _, f := range fields {
		n += 2 + len(f)
	}
	if n > frameMax {
		return errs.New(errs.Invalid, "a message of %d bytes is longer than %d", n, frameMax)
	}
	frame, err := keymem.New(4 + n)
	if err != nil {
		return err
	}
	defer frame.Close()
	b := binary.BigEndian.AppendUint32(frame.Bytes()[:0], uint32(n))
	for _, f := range fields {
		b = binary.BigEndian.AppendUint16(b, uint16(len(f)))
		b = append(b, f...)
	}
	_, err = w.Write(b)
	return err
}

// readFrame reads one frame of so many fields. They lie in the key, which the
// caller closes.
func readFrame(r io.Reader, count int) (*keymem.Key, [][]byte, error) {
	var header [4]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, nil, err
	}
	n := binary.BigEndian.Uint32(header[:])
	if n == 0 || n > frameMax {
		return nil, nil, fmt.Errorf("a message of %d bytes", n)
	}
	frame, err := keymem.Read(r, int(n))
	if err != nil {
		return nil, nil, err
	}
	fields := make([][]byte, 0, count)
	b := frame.Bytes()
	for range count {
		if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
			frame.Close()
			return nil, nil, fmt.Errorf("a message that ends in field %d", len(fields))
		}
		end := 2 + int(binary.BigEndian.Uint16(b))
		fields = append(fields, b[2:end:end])
		b = b[end:]
	}
	if len(b) > 0 {
		frame.Close()
		return nil, nil, fmt.Errorf("a message with %d bytes too many", len(b))
	}
	return frame, fields, nil
}
