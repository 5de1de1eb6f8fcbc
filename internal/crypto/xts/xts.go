// Package xts is AES-XTS for disks: XTS-AES-128 and XTS-AES-256 of IEEE Std
// 1619-2018 and NIST SP 800-38E, on whole sectors, many of them in one call.
// What exactly it computes is written down in docs/spec/aes-xts.md.
//
// There are several implementations of the same function: [New] takes the
// fastest that the processor has, [NewWith] a given one. All of them are
// tested against the same vectors and against each other.
//
// Ciphertext stealing is not implemented and not needed: every sector size is
// a multiple of the block of 16 bytes.
//
// Invariants: the expanded key is in [keymem] for the whole life of a
// [Cipher]; no branch and no address depends on key or data; the output of a
// call is a function of key, tweak and input only, whatever the implementation.
// XTS hides data and does not authenticate it.
//
// A Cipher is safe for concurrent use; see [Cipher.Close].
package xts

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"strongroom/internal/crypto/keymem"
)

// Sizes in bytes.
const (
	KeySize128 = 32 // XTS-AES-128: two keys of 128 bits
	KeySize256 = 64 // XTS-AES-256: two keys of 256 bits

	SectorSizeMin = 512
	SectorSizeMax = 65536

	// TweakUnit is the number of bytes that raise the tweak by one, whatever
	// the sector size: dm-crypt counts so unless told otherwise (iv_large_sectors).
	TweakUnit = 512
)

const blockSize = 16 // bytes in an AES block

var (
	// ErrKeySize is reported for a key that has neither [KeySize128] nor
	// [KeySize256] bytes.
	ErrKeySize = errors.New("key is neither 32 nor 64 bytes long")

	// ErrEqualHalves is reported for a key whose two halves are equal, which
	// FIPS 140-3 IG C.I forbids: it would make XTS open to a chosen-ciphertext
	// attack.
	ErrEqualHalves = errors.New("the two halves of the key are equal")

	// ErrImplementation is reported by [NewWith] for a name that is not in
	// [Implementations].
	ErrImplementation = errors.New("no such implementation on this processor")

	// ErrClosed is the panic value when a closed Cipher is used.
	ErrClosed = errors.New("xts: cipher is closed")
)

// Cipher encrypts and decrypts sectors under one key.
//
// Encrypt and Decrypt may be called by any number of goroutines at once. Close
// must not run while one of them does.
type Cipher struct {
	impl   implementation
	key    *keymem.Key // the expanded key, in the form that impl needs
	closed atomic.Bool
}

const maxRoundKeys = 15

// New returns a Cipher for key, which has [KeySize128] or [KeySize256] bytes:
// the key for the data and then the key for the tweak. It keeps no reference
// to key. Errors: [ErrKeySize], [ErrEqualHalves], or that no memory could be
// locked.
func New(key *keymem.Key) (*Cipher, error) {
	return newCipher(implementations()[0], key)
}

// NewWith is [New] with the implementation of that name, for tests and
// benchmarks. It adds [ErrImplementation] to New's errors.
func NewWith(name string, key *keymem.Key) (*Cipher, error) {
	for _, impl := range implementations() {
		if impl.String() == name {
			return newCipher(impl, key)
		}
	}
	return nil, fmt.Errorf("cannot use AES-XTS %q: %w", name, ErrImplementation)
}

// Implementations returns the names of the implementations that this processor
// and this build have, the fastest first, which is the one that [New] takes.
func Implementations() []string {
	var names []string
	for _, impl := range implementations() {
		names = append(names, impl.String())
	}
	return names
}

func newCipher(impl implementation, key *keymem.Key) (*Cipher, error) {
	k := key.Bytes()
	if len(k) != KeySize128 && len(k) != KeySize256 {
		return nil, fmt.Errorf("cannot use %d bytes as an AES-XTS key: %w", len(k), ErrKeySize)
	}
	half := len(k) / 2
	if subtle.ConstantTimeCompare(k[:half], k[half:]) == 1 {
		return nil, fmt.Errorf("cannot use AES-XTS key: %w", ErrEqualHalves)
	}
	expanded, err := keymem.New(impl.scheduleSize())
	if err != nil {
		return nil, fmt.Errorf("cannot expand AES-XTS key: %w", err)
	}
	c := &Cipher{impl: impl, key: expanded}
	c.expand(k)
	runtime.KeepAlive(key)
	return c, nil
}

// Implementation returns the name of the implementation in use.
func (c *Cipher) Implementation() string { return c.impl.String() }

// Encrypt encrypts src, which is a whole number of sectors, into dst, which
// has at least the length of src. The two may start at the same byte;
// otherwise they must not overlap. The tweak of the sector at byte offset o of
// src is the 64-bit number iv + o/[TweakUnit] (modulo 2^64), as little-endian
// bytes. sectorSize is a power of two from [SectorSizeMin] to [SectorSizeMax].
//
// Encrypt panics if a length or an overlap is not so, and on a closed Cipher.
// It allocates nothing.
func (c *Cipher) Encrypt(dst, src []byte, iv uint64, sectorSize int) {
	dst = c.check(dst, src, sectorSize)
	if len(src) > 0 {
		c.encrypt(dst, src, iv, sectorSize)
	}
	runtime.KeepAlive(c)
}

// Decrypt is the inverse of [Cipher.Encrypt], with the same arguments and
// panics.
func (c *Cipher) Decrypt(dst, src []byte, iv uint64, sectorSize int) {
	dst = c.check(dst, src, sectorSize)
	if len(src) > 0 {
		c.decrypt(dst, src, iv, sectorSize)
	}
	runtime.KeepAlive(c)
}

// Close wipes the expanded key. It is idempotent and never fails.
func (c *Cipher) Close() error {
	c.closed.Store(true)
	return c.key.Close()
}

// bitsliced returns the expanded key of the portable implementation.
func (c *Cipher) bitsliced() *bitsliced {
	return (*bitsliced)(unsafe.Pointer(unsafe.SliceData(c.key.Bytes())))
}

// check panics if the arguments break the contract, and returns dst cut to the
// length of src.
func (c *Cipher) check(dst, src []byte, sectorSize int) []byte {
	if c.closed.Load() {
		panic(ErrClosed)
	}
	if sectorSize < SectorSizeMin || sectorSize > SectorSizeMax || sectorSize&(sectorSize-1) != 0 {
		panic("xts: sector size is not a power of two from 512 to 65536")
	}
	if len(src)&(sectorSize-1) != 0 {
		panic("xts: input is not a whole number of sectors")
	}
	if len(dst) < len(src) {
		panic("xts: output is shorter than input")
	}
	dst = dst[:len(src)]
	if inexactOverlap(dst, src) {
		panic("xts: output and input overlap, and do not start at the same byte")
	}
	return dst
}

// inexactOverlap reports whether a and b, of equal length, share memory at
// different offsets.
func inexactOverlap(a, b []byte) bool {
	if len(a) == 0 {
		return false
	}
	pa, pb := uintptr(unsafe.Pointer(unsafe.SliceData(a))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return pa != pb && pa < pb+uintptr(len(b)) && pb < pa+uintptr(len(a))
}
