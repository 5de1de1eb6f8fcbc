// Package sealed encrypts files: the segment-wise AES-256-GCM stream of
// docs/spec/sealed-file.md.
//
// A sealed file can be written in one pass ([Writer]), read in one pass or at
// any offset ([Reader]), and shows every alteration: a flipped bit, segments
// left out, repeated or in another order, bytes missing or added at the end, a
// file sealed for another purpose (its context). Small secrets go between
// [keymem] and a file by [WriteFile] and [ReadFile], which keep the old content
// when anything fails.
//
// Invariants: no byte is released that was not authenticated; plaintext is
// buffered in [keymem] only and wiped; a file's key is derived anew for each
// file and never written. Its AES key schedule is made by the standard library
// in ordinary memory that cannot be wiped, and lives as long as the Writer or
// Reader.
//
// A [Reader] is safe for concurrent use, a [Writer] is not.
package sealed

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"

	"strongroom/internal/crypto/keymem"
)

// Sizes and limits of docs/spec/sealed-file.md, in bytes.
const (
	Version     = 1
	KeySize     = 32       // of the key that files are sealed under
	SegmentSize = 64 << 10 // plaintext of all segments but the last
	HeaderSize  = 80
	SizeMax     = 1 << 46 // plaintext of one file: 2^30 segments
	ContextMax  = 1024

	magic        = "SRsealed"
	saltOffset   = 16
	verifyOffset = 48
	saltSize     = 32
	verifySize   = 32
	nonceSize    = 12
	tagSize      = 16
	sealedSize   = SegmentSize + tagSize
)

// domain separates files' keys from all other uses of a key.
const domain = "strongroom/sealed-file/v1"

var (
	// ErrNotSealed is reported for a file that does not begin like a sealed
	// file.
	ErrNotSealed = errors.New("not a sealed file")
	// ErrVersion is reported for a sealed file of a version that this program
	// does not know.
	ErrVersion = errors.New("sealed file of an unknown version")
	// ErrWrongKey is reported when the key or the context is not the one that
	// the file was sealed with, or its header was altered. Nothing of the
	// content was read.
	ErrWrongKey = errors.New("sealed file does not open: wrong key, or sealed for another purpose, or altered header")
	// ErrCorrupt is reported when the content was altered, cut or extended.
	ErrCorrupt = errors.New("sealed file is damaged")
	// ErrTooLarge is reported beyond [SizeMax], or where [ReadFile] is given a
	// file larger than a key can be.
	ErrTooLarge = errors.New("sealed file is too large")
	// ErrInvalid is reported for keys and contexts of a wrong length.
	ErrInvalid = errors.New("invalid argument")
	// ErrClosed is reported when a closed [Reader] or [Writer] is used.
	ErrClosed = errors.New("sealed file is closed")
)

// newHeader returns the header of a file, without its verifier.
func newHeader(salt [saltSize]byte) []byte {
	h := make([]byte, HeaderSize)
	copy(h, magic)
	binary.BigEndian.PutUint32(h[8:], Version)
	binary.BigEndian.PutUint32(h[12:], SegmentSize)
	copy(h[saltOffset:], salt[:])
	return h
}

// checkHeader checks what can be checked without the key.
func checkHeader(h []byte) error {
	if !bytes.HasPrefix(h, []byte(magic)) {
		return ErrNotSealed
	}
	if v := binary.BigEndian.Uint32(h[8:]); v != Version {
		return fmt.Errorf("%w: %d", ErrVersion, v)
	}
	if n := binary.BigEndian.Uint32(h[12:]); n != SegmentSize {
		return fmt.Errorf("%w: segments of %d bytes", ErrCorrupt, n)
	}
	return nil
}

// derive returns the cipher of the file with this header and the verifier that
// the header must have.
func derive(key *keymem.Key, context string, header []byte) (cipher.AEAD, []byte, error) {
	if n := key.Len(); n != KeySize {
		return nil, nil, fmt.Errorf("%w: key has %d bytes, not %d", ErrInvalid, n, KeySize)
	}
	if len(context) < 1 || len(context) > ContextMax {
		return nil, nil, fmt.Errorf("%w: context has %d bytes, not 1 to %d", ErrInvalid, len(context), ContextMax)
	}
	info := domain + "\x00" + string(header[:saltOffset]) + context
	okm, err := hkdf.Key(sha256.New, key.Bytes(), header[saltOffset:verifyOffset], info, KeySize+verifySize)
	if err != nil {
		return nil, nil, err
	}
	defer keymem.Wipe(okm[:KeySize])
	block, err := aes.NewCipher(okm[:KeySize])
	if err != nil {
		return nil, nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, nil, err
	}
	return aead, okm[KeySize:], nil
}

// verifies compares verifiers in constant time.
func verifies(header, verifier []byte) bool {
	return subtle.ConstantTimeCompare(header[verifyOffset:], verifier) == 1
}

// nonce returns the nonce of segment i.
func nonce(i int64, last bool) []byte {
	n := make([]byte, nonceSize)
	binary.BigEndian.PutUint64(n[3:], uint64(i))
	if last {
		n[nonceSize-1] = 1
	}
	return n
}

// segments returns how many segments a plaintext of size bytes has: one at
// least.
func segments(size int64) int64 { return max(1, (size+SegmentSize-1)/SegmentSize) }

// plainSize returns the plaintext's length of a file of fileSize bytes, or
// false if no sealed file has that length.
func plainSize(fileSize int64) (int64, bool) {
	body := fileSize - HeaderSize
	if body < tagSize {
		return 0, false
	}
	full, rest := body/sealedSize, body%sealedSize
	switch {
	case rest == 0:
		return full * SegmentSize, true
	case rest < tagSize, rest == tagSize && full > 0:
		return 0, false
	}
	return full*SegmentSize + rest - tagSize, true
}
