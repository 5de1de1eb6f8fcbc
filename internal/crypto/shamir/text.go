package shamir

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

const (
	prefix       = "srshare-1-"
	headerSize   = 4 + 1 + 1
	checksumSize = 4
	groupSize    = 8 // letters between dashes
	// TextMax is the longest text of a share, in bytes.
	TextMax = len(prefix) + (headerSize+SecretMax+checksumSize)*9/5 + 8
)

// encoding has no letters that look like another: 0, 1, 8 and 9 are missing.
var encoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// IsText reports whether text begins like that of a share.
func IsText(text []byte) bool {
	text = bytes.TrimSpace(text)
	return len(text) >= len(prefix) && bytes.EqualFold(text[:len(prefix)], []byte(prefix))
}

// Text returns the share as a line of letters, digits and dashes, without a line
// end, which the caller closes. A letter that was mistaken is noticed when it is
// read.
func (s Share) Text() (*keymem.Key, error) {
	raw, err := keymem.New(headerSize + s.Value.Len() + checksumSize)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	b := append(raw.Bytes()[:0], s.Set[:]...)
	b = append(b, s.Threshold, s.Point)
	b = append(b, s.Value.Bytes()...)
	sum := sha256.Sum256(b)
	b = append(b, sum[:checksumSize]...)

	letters, err := keymem.New(encoding.EncodedLen(len(b)))
	if err != nil {
		return nil, err
	}
	defer letters.Close()
	encoding.Encode(letters.Bytes(), b)
	n := letters.Len()
	text, err := keymem.New(len(prefix) + n + (n-1)/groupSize)
	if err != nil {
		return nil, err
	}
	out := append(text.Bytes()[:0], prefix...)
	for i, c := range letters.Bytes() {
		if i > 0 && i%groupSize == 0 {
			out = append(out, '-')
		}
		out = append(out, c)
	}
	return text, nil
}

// Parse reads the text of a share, which stays the caller's. Capitals, dashes
// and blanks do not matter. The caller closes the share's value.
func Parse(text []byte) (Share, error) {
	if len(text) > 2*TextMax || !IsText(text) {
		return Share{}, errs.New(errs.Invalid, "that is no share: one begins with %q", prefix)
	}
	letters, err := keymem.New(len(text))
	if err != nil {
		return Share{}, err
	}
	defer letters.Close()
	l := letters.Bytes()[:0]
	for _, c := range bytes.TrimSpace(text)[len(prefix):] {
		switch {
		case c == '-' || c == ' ':
			continue
		case 'a' <= c && c <= 'z':
			c -= 'a' - 'A'
		}
		l = append(l, c)
	}
	n := encoding.DecodedLen(len(l))
	if n <= headerSize+checksumSize || n > headerSize+SecretMax+checksumSize {
		return Share{}, errs.New(errs.Invalid, "that share has a wrong length: see that it is whole")
	}
	raw, err := keymem.New(n)
	if err != nil {
		return Share{}, err
	}
	defer raw.Close()
	b := raw.Bytes()
	if _, err := encoding.Decode(b, l); err != nil { // the error would show a place in the secret
		return Share{}, errs.New(errs.Invalid, "that share has a letter that none has")
	}
	again, err := keymem.New(len(l))
	if err != nil {
		return Share{}, err
	}
	defer again.Close()
	encoding.Encode(again.Bytes(), b) // the unused bits at the end must be 0
	body := b[:n-checksumSize]
	sum := sha256.Sum256(body)
	if subtle.ConstantTimeCompare(sum[:checksumSize], b[n-checksumSize:])&subtle.ConstantTimeCompare(again.Bytes(), l) != 1 {
		return Share{}, errs.New(errs.Invalid, "that share has a mistake: a letter differs")
	}
	s := Share{Set: [4]byte(body), Threshold: body[4], Point: body[5]}
	if s.Threshold < ThresholdMin || s.Point == 0 {
		return Share{}, errs.New(errs.Invalid, "that share is damaged: point %d, threshold %d", s.Point, s.Threshold)
	}
	if s.Value, err = keymem.New(len(body) - headerSize); err != nil {
		return Share{}, err
	}
	copy(s.Value.Bytes(), body[headerSize:])
	return s, nil
}
