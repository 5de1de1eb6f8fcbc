package keysafe

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// fields are the members of the JSON object, in canonical order.
var fields = [...]string{"version", "provider", "key_id", "owner", "generation", "nonce", "wrapped"}

// base64Strict refuses padding bits that are not zero: one encoding a value.
var base64Strict = base64.StdEncoding.Strict()

// Parse reads a safe from its canonical JSON, at most [EncodedMax] bytes:
// exactly what [Safe.Encode] writes, and nothing before or after it. It does
// not retain data.
//
// It returns an error wrapping [ErrInvalid], or [ErrVersion] for an unknown
// version.
func Parse(data []byte) (*Safe, error) {
	s := new(Safe)
	if err := s.UnmarshalJSON(data); err != nil {
		return nil, err
	}
	if !bytes.Equal(s.Encode(), data) {
		return nil, fmt.Errorf("%w: it is not in canonical form", ErrInvalid)
	}
	return s, nil
}

// Encode returns the canonical JSON of s, without a newline.
func (s *Safe) Encode() []byte {
	b := make([]byte, 0, 512)
	b = append(b, `{"version":`...)
	b = strconv.AppendUint(b, Version, 10)
	b = append(b, `,"provider":`...)
	b = appendString(b, s.KEK.Provider)
	b = append(b, `,"key_id":`...)
	b = appendString(b, s.KEK.KeyID)
	b = append(b, `,"owner":`...)
	b = appendString(b, s.Owner)
	b = append(b, `,"generation":`...)
	b = strconv.AppendUint(b, s.Generation, 10)
	b = append(b, `,"nonce":"`...)
	b = base64Strict.AppendEncode(b, s.nonce[:])
	b = append(b, `","wrapped":"`...)
	b = base64Strict.AppendEncode(b, s.wrapped)
	return append(b, `"}`...)
}

// appendString appends a string of printable ASCII as JSON.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for i := range len(s) {
		if s[i] == '"' || s[i] == '\\' {
			b = append(b, '\\')
		}
		b = append(b, s[i])
	}
	return append(b, '"')
}

// MarshalJSON implements [json.Marshaler]. It refuses an invalid safe.
func (s Safe) MarshalJSON() ([]byte, error) {
	if err := s.validate(); err != nil {
		return nil, err
	}
	return s.Encode(), nil
}

// UnmarshalJSON implements [json.Unmarshaler]. It reads a safe inside another
// document (a LUKS2 token, vm.json), which may have been written again by a
// program with its own idea of spaces, member order and escapes; these may
// differ from the canonical form, all else may not. On an error s is unchanged.
func (s *Safe) UnmarshalJSON(data []byte) error {
	parsed, err := decode(data)
	if errors.Is(err, ErrVersion) {
		return err
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := parsed.validate(); err != nil {
		return err
	}
	*s = *parsed
	return nil
}

// decode reads the JSON object token by token, because [json.Unmarshal] lets
// duplicate members, other letter cases and null pass.
func decode(data []byte) (*Safe, error) {
	// Escapes and spaces may make a safe longer than its canonical form.
	if len(data) > 8*EncodedMax {
		return nil, fmt.Errorf("%d bytes are too long", len(data))
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if token, err := d.Token(); err != nil || token != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	members := make(map[string]any, len(fields))
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		value, err := d.Token()
		if err != nil {
			return nil, err
		}
		if _, nested := value.(json.Delim); nested {
			return nil, fmt.Errorf("member %q is not a plain value", name)
		}
		if _, seen := members[name.(string)]; seen { // a member's name is a string
			return nil, fmt.Errorf("member %q occurs twice", name)
		}
		members[name.(string)] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("bytes follow the JSON object")
	}

	s := new(Safe)
	r := memberReader{members: members}
	version := r.number("version")
	if r.err == nil && version != Version {
		return nil, fmt.Errorf("%w: %d", ErrVersion, version)
	}
	s.KEK.Provider = r.string("provider")
	s.KEK.KeyID = r.string("key_id")
	s.Owner = r.string("owner")
	s.Generation = r.number("generation")
	nonce := r.base64("nonce")
	s.wrapped = r.base64("wrapped")
	if r.err != nil {
		return nil, r.err
	}
	if len(members) != len(fields) {
		return nil, errors.New("unknown members")
	}
	if len(nonce) != nonceSize {
		return nil, fmt.Errorf("nonce has %d bytes, not %d", len(nonce), nonceSize)
	}
	copy(s.nonce[:], nonce)
	return s, nil
}

// memberReader takes values out of a JSON object and keeps the first error.
type memberReader struct {
	members map[string]any
	err     error
}

func (r *memberReader) fail(name, problem string) {
	if r.err == nil {
		r.err = fmt.Errorf("member %q %s", name, problem)
	}
}

func (r *memberReader) string(name string) string {
	s, ok := r.members[name].(string)
	if !ok {
		r.fail(name, "is missing or not a string")
	}
	return s
}

func (r *memberReader) number(name string) uint64 {
	literal, _ := r.members[name].(json.Number)
	n, err := strconv.ParseUint(literal.String(), 10, 64)
	if err != nil {
		r.fail(name, "is missing or not a whole number")
	}
	return n
}

func (r *memberReader) base64(name string) []byte {
	// The decoder of encoding/base64 skips newlines.
	encoded := r.string(name)
	b, err := base64Strict.DecodeString(encoded)
	if err != nil || base64Strict.EncodeToString(b) != encoded {
		r.fail(name, "is not canonical base64")
	}
	return b
}
