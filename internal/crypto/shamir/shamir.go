// Package shamir splits a secret into shares of which a number, the threshold,
// give it back and fewer tell nothing, by Shamir's scheme over GF(2⁸). The
// arithmetic, the binary form and the text of a share are docs/spec/shamir.md;
// KMIP's split keys are of the same scheme over another field.
//
// Invariants: secret and shares are in keymem only; the arithmetic has no
// branch and no table that depends on them. All functions are safe for
// concurrent use.
package shamir

import (
	"crypto/rand"
	"errors"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// Limits of the scheme.
const (
	ThresholdMin = 2   // with one, every share would be the secret
	SharesMax    = 255 // the points of the field but 0
	SecretMax    = 255 // bytes
)

// Field is a representation of GF(2⁸): the polynomial modulo which it multiplies,
// without x⁸.
type Field uint8

// The fields of shares. Shares over one give nothing over the other.
const (
	AES  Field = 0x1b // x⁸+x⁴+x³+x+1: of Strongroom's own shares
	KMIP Field = 0x1d // x⁸+x⁴+x³+x²+1: of KMIP's Polynomial Sharing GF(2⁸), by OASIS TC-SJ-2
)

// ErrMismatch is reported for shares that do not belong together, or of which
// there are too few.
var ErrMismatch = errors.New("shares do not belong together")

// Share is one part of a secret. Its owner closes Value.
type Share struct {
	Set       [4]byte // the same in all shares of one split, random
	Threshold uint8   // how many give the secret
	Point     uint8   // from 1, another in each share
	Value     *keymem.Key
}

// Split returns shares of secret, which stays the caller's; threshold of them
// give it back. The caller closes their values.
func (f Field) Split(secret *keymem.Key, threshold, shares int) (_ []Share, err error) {
	if threshold < ThresholdMin || shares < threshold || shares > SharesMax {
		return nil, errs.New(errs.Invalid, "cannot split a secret so that %d of %d shares give it: at least %d of at most %d can", threshold, shares, ThresholdMin, SharesMax)
	}
	if secret.Len() > SecretMax {
		return nil, errs.New(errs.Invalid, "cannot split a secret of %d bytes: at most %d", secret.Len(), SecretMax)
	}
	// Row i holds the coefficients of xⁱ for all bytes of the secret; row 0, the
	// secret, is not in it.
	n := secret.Len()
	coefficients, err := keymem.Random((threshold - 1) * n)
	if err != nil {
		return nil, err
	}
	defer coefficients.Close()
	var set [4]byte
	rand.Read(set[:]) // never fails: it ends the process instead
	return f.split(secret, coefficients, set, threshold, shares)
}

func (f Field) split(secret, coefficients *keymem.Key, set [4]byte, threshold, shares int) (_ []Share, err error) {
	n := secret.Len()
	out := make([]Share, 0, shares)
	defer func() {
		if err != nil {
			Close(out)
		}
	}()
	for point := 1; point <= shares; point++ {
		value, err := keymem.New(n)
		if err != nil {
			return nil, err
		}
		out = append(out, Share{Set: set, Threshold: uint8(threshold), Point: uint8(point), Value: value})
		y, c := value.Bytes(), coefficients.Bytes()
		for i := threshold - 2; i >= 0; i-- { // Horner
			for j := range y {
				y[j] = f.mul(y[j]^c[i*n+j], uint8(point))
			}
		}
		for j, s := range secret.Bytes() {
			y[j] ^= s
		}
	}
	return out, nil
}

// Combine returns the secret of which shares has at least a threshold; more are
// not used. The shares stay the caller's. The secret is wrong, without an error,
// if a share was altered: whoever has a use for it must check it.
func (f Field) Combine(shares []Share) (*keymem.Key, error) {
	if len(shares) == 0 || len(shares) < int(shares[0].Threshold) || shares[0].Threshold < ThresholdMin {
		return nil, errs.New(errs.Invalid, "%w: there are %d, too few", ErrMismatch, len(shares))
	}
	shares = shares[:shares[0].Threshold]
	seen := map[uint8]bool{}
	for _, s := range shares {
		first := shares[0]
		if s.Set != first.Set || s.Threshold != first.Threshold || s.Value.Len() != first.Value.Len() || s.Point == 0 || seen[s.Point] {
			return nil, errs.New(errs.Invalid, "%w: share %d of set %x beside share %d of set %x", ErrMismatch, s.Point, s.Set, first.Point, first.Set)
		}
		seen[s.Point] = true
	}
	secret, err := keymem.New(shares[0].Value.Len())
	if err != nil {
		return nil, err
	}
	out := secret.Bytes()
	for i, s := range shares {
		// The Lagrange polynomial of this point, at 0. Points are no secret.
		weight := uint8(1)
		for j, other := range shares {
			if i != j {
				weight = f.mul(weight, f.mul(other.Point, f.inverse(other.Point^s.Point)))
			}
		}
		for k, y := range s.Value.Bytes() {
			out[k] ^= f.mul(weight, y)
		}
	}
	return secret, nil
}

// Close wipes the values of shares.
func Close(shares []Share) {
	for _, s := range shares {
		s.Value.Close()
	}
}

// mul multiplies in a time that depends on nothing.
func (f Field) mul(a, b uint8) uint8 {
	var p uint8
	for range 8 {
		p ^= a & -(b & 1)
		a = a<<1 ^ uint8(f)&-(a>>7)
		b >>= 1
	}
	return p
}

// inverse returns a²⁵⁴, which is 1/a for all but 0.
func (f Field) inverse(a uint8) uint8 {
	r := uint8(1)
	for range 7 {
		a = f.mul(a, a)
		r = f.mul(r, a)
	}
	return r
}
