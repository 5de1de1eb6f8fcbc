// Package keysafe holds a DEK wrapped under a KEK: the key safe of
// docs/spec/key-safe.md.
//
// A [Safe] says in the clear which KEK opens it ([Ref]), to which object it
// belongs (its owner) and how often it was rewrapped (its generation). All of
// that is authenticated together with the DEK, so a safe that was moved to
// another owner, pointed at another KEK or altered in any bit does not open.
//
// Invariants: a Safe is immutable once made, and holds no key that is not
// encrypted, so it may be stored, logged and sent anywhere; the DEK exists in
// [keymem] only. AES key schedules are made by the standard library in
// ordinary memory that cannot be wiped: they live for one call.
//
// Everything here is safe for concurrent use.
package keysafe

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"

	"strongroom/internal/crypto/keymem"
)

// Sizes and limits of docs/spec/key-safe.md, in bytes unless noted.
const (
	Version       = 1         // the format written and the only one read
	KEKSize       = 32        // AES-256
	DEKSize       = 64        // XTS-AES-256: two AES-256 keys; for disks
	DEKSizeFile   = 32        // AES-256; for sealed files
	OwnerMax      = 128       // longest owner
	GenerationMax = 1<<53 - 1 // count; JSON numbers are exact up to here
	EncodedMax    = 2048      // no safe is encoded in more bytes

	nonceSize = 12
	tagSize   = 16
)

// domain separates the AAD of a key safe from all other uses of a KEK.
const domain = "strongroom/key-safe/v1"

var (
	// ErrWrongOwner is reported when a safe belongs to another object than the
	// one it was found with.
	ErrWrongOwner = errors.New("key safe belongs to another owner")
	// ErrDoesNotOpen is reported when a safe fails authentication: the KEK is
	// another one, or the safe was altered. Which of both cannot be told.
	ErrDoesNotOpen = errors.New("key safe does not open: wrong KEK, or altered")
	// ErrInvalid is reported for a safe, or for the parts of one, that no
	// version of the format allows.
	ErrInvalid = errors.New("invalid key safe")
	// ErrVersion is reported for a safe of a version that this program does not
	// know. The safe may be good: a newer program can open it.
	ErrVersion = errors.New("key safe of an unknown version")
)

// Safe is a wrapped DEK. Its fields must not be changed: it would not open any
// more. The zero Safe is invalid.
type Safe struct {
	KEK        Ref    // the KEK that opens it
	Owner      string // the object it belongs to, such as "disk:<LUKS UUID>"
	Generation uint64 // 1 when the DEK was made; one more with every rewrap

	nonce   [nonceSize]byte
	wrapped []byte // DEK and tag
}

// Wrap returns dek wrapped under kek for owner. ref is the address of kek.
//
// kek must have [KEKSize] bytes and dek [DEKSize] or [DEKSizeFile]; owner is 1
// to [OwnerMax] bytes of printable ASCII; generation is 1 to [GenerationMax].
// It returns an error wrapping [ErrInvalid] otherwise. Both keys stay the
// caller's.
//
// The nonce is random: one KEK may wrap up to 2³² DEKs.
func Wrap(kek, dek *keymem.Key, ref Ref, owner string, generation uint64) (*Safe, error) {
	s := &Safe{KEK: ref, Owner: owner, Generation: generation}
	if err := s.validateClear(); err != nil {
		return nil, fmt.Errorf("cannot wrap DEK of %q: %w", owner, err)
	}
	if n := dek.Len(); n != DEKSize && n != DEKSizeFile {
		return nil, fmt.Errorf("cannot wrap DEK of %q: %w: DEK has %d bytes, not %d or %d", owner, ErrInvalid, n, DEKSize, DEKSizeFile)
	}
	aead, err := newAEAD(kek)
	if err != nil {
		return nil, fmt.Errorf("cannot wrap DEK of %q: %w", owner, err)
	}
	rand.Read(s.nonce[:]) // never fails: it ends the process instead
	s.wrapped = aead.Seal(nil, s.nonce[:], dek.Bytes(), s.aad())
	return s, nil
}

// Unwrap returns the DEK, which the caller must close. owner is the object
// with which the safe was found.
//
// It returns an error wrapping [ErrWrongOwner] if the safe is another
// object's, and one wrapping [ErrDoesNotOpen] if kek is not the one that it was
// wrapped under or the safe was altered.
func (s *Safe) Unwrap(kek *keymem.Key, owner string) (*keymem.Key, error) {
	if s.Owner != owner {
		return nil, fmt.Errorf("cannot unwrap DEK of %q: %w: %q", owner, ErrWrongOwner, s.Owner)
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("cannot unwrap DEK of %q: %w", owner, err)
	}
	aead, err := newAEAD(kek)
	if err != nil {
		return nil, fmt.Errorf("cannot unwrap DEK of %q: %w", owner, err)
	}
	dek, err := keymem.New(len(s.wrapped) - tagSize)
	if err != nil {
		return nil, fmt.Errorf("cannot unwrap DEK of %q: %w", owner, err)
	}
	if _, err := aead.Open(dek.Bytes()[:0], s.nonce[:], s.wrapped, s.aad()); err != nil {
		dek.Close()
		return nil, fmt.Errorf("cannot unwrap DEK of %q with KEK %s: %w", owner, s.KEK, ErrDoesNotOpen)
	}
	return dek, nil
}

// Rewrap returns a safe with the same DEK and owner under newKEK, whose address
// is ref, and with the next generation: the shallow rekey of one DEK. The new
// safe was opened and its DEK compared before it is returned. s is unchanged;
// it must be kept until the new one is stored.
//
// Errors are those of [Safe.Unwrap] and [Wrap].
func (s *Safe) Rewrap(oldKEK, newKEK *keymem.Key, ref Ref) (*Safe, error) {
	dek, err := s.Unwrap(oldKEK, s.Owner)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	next, err := Wrap(newKEK, dek, ref, s.Owner, s.Generation+1)
	if err != nil {
		return nil, err
	}
	check, err := next.Unwrap(newKEK, s.Owner)
	if err != nil {
		return nil, fmt.Errorf("cannot verify rewrapped DEK: %w", err)
	}
	defer check.Close()
	if !check.Equal(dek) {
		return nil, fmt.Errorf("cannot verify rewrapped DEK of %q: it differs from the original", s.Owner)
	}
	return next, nil
}

// DEKLen returns the length of the wrapped DEK in bytes.
func (s *Safe) DEKLen() int { return len(s.wrapped) - tagSize }

// aad encodes the clear fields injectively.
func (s *Safe) aad() []byte {
	b := make([]byte, 0, 512)
	for _, field := range []string{domain, s.KEK.Provider, s.KEK.KeyID, s.Owner} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(field)))
		b = append(b, field...)
	}
	return binary.BigEndian.AppendUint64(b, s.Generation)
}

// validate checks all that can be checked without the KEK.
func (s *Safe) validate() error {
	if err := s.validateClear(); err != nil {
		return err
	}
	if n := s.DEKLen(); n != DEKSize && n != DEKSizeFile {
		return fmt.Errorf("%w: wrapped DEK has %d bytes", ErrInvalid, len(s.wrapped))
	}
	return nil
}

func (s *Safe) validateClear() error {
	if err := s.KEK.Validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if !printable(s.Owner, OwnerMax) {
		return fmt.Errorf("%w: owner %.*q is not 1 to %d bytes of printable ASCII", ErrInvalid, OwnerMax, s.Owner, OwnerMax)
	}
	if s.Generation < 1 || s.Generation > GenerationMax {
		return fmt.Errorf("%w: generation %d is not 1 to %d", ErrInvalid, s.Generation, uint64(GenerationMax))
	}
	return nil
}

func newAEAD(kek *keymem.Key) (cipher.AEAD, error) {
	if n := kek.Len(); n != KEKSize {
		return nil, fmt.Errorf("%w: KEK has %d bytes, not %d", ErrInvalid, n, KEKSize)
	}
	block, err := aes.NewCipher(kek.Bytes())
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
