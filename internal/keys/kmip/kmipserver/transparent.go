package kmipserver

import (
	"crypto/rsa"
	"math/big"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// The material of an RSA key in a transparent format (KMIP 1.4 section 2.1.7) is the
// TTLV encoding of its Key Material structure: that is what its digest is of, and
// what a client gets back is what it registered.

// transparent reports whether a format is one of a structure in TTLV.
func transparent(f kmip.KeyFormatType) bool {
	return f == kmip.KeyFormatTypeTransparentRSAPrivateKey || f == kmip.KeyFormatTypeTransparentRSAPublicKey
}

// encodeTransparent returns the encoding of a transparent RSA key, or nil if m is
// none.
func encodeTransparent(m *kmip.KeyMaterial) []byte {
	enc := ttlv.NewTTLVEncoder()
	enc.ByteString(kmip.TagKeyMaterial, blank[:]) // room, see encode
	enc.Clear()
	switch {
	case m.TransparentRSAPrivateKey != nil:
		enc.TagAny(kmip.TagKeyMaterial, m.TransparentRSAPrivateKey)
	case m.TransparentRSAPublicKey != nil:
		enc.TagAny(kmip.TagKeyMaterial, m.TransparentRSAPublicKey)
	default:
		return nil
	}
	return enc.Bytes()
}

// decodeTransparent is the reverse of encodeTransparent. The numbers are copies in
// ordinary memory, like those of Go's crypto packages; see [forget].
func decodeTransparent(format kmip.KeyFormatType, encoded []byte) (m kmip.KeyMaterial, err error) {
	defer func() {
		if p := recover(); p != nil { // the codec panics on some values of the wrong type
			err = errUnread
		}
	}()
	d, err := ttlv.NewTTLVDecoder(encoded)
	if err != nil {
		return m, err
	}
	if format == kmip.KeyFormatTypeTransparentRSAPrivateKey {
		m.TransparentRSAPrivateKey = &kmip.TransparentRSAPrivateKey{}
		return m, d.TagAny(kmip.TagKeyMaterial, m.TransparentRSAPrivateKey)
	}
	m.TransparentRSAPublicKey = &kmip.TransparentRSAPublicKey{}
	return m, d.TagAny(kmip.TagKeyMaterial, m.TransparentRSAPublicKey)
}

// forget wipes the secret numbers of m.
func forget(m *kmip.KeyMaterial) {
	k := m.TransparentRSAPrivateKey
	if k == nil {
		return
	}
	for _, n := range []*big.Int{k.PrivateExponent, k.P, k.Q, k.PrimeExponentP, k.PrimeExponentQ, k.CRTCoefficient} {
		if n != nil {
			clear(n.Bits())
		}
	}
}

// transparentPrivate parses a private key in transparent format. Without both primes
// and exponents it is kept and not computed with.
func transparentPrivate(encoded []byte) (*rsa.PrivateKey, error) {
	m, err := decodeTransparent(kmip.KeyFormatTypeTransparentRSAPrivateKey, encoded)
	if err != nil {
		return nil, err
	}
	k := m.TransparentRSAPrivateKey
	if k.P == nil || k.Q == nil || k.PrivateExponent == nil || k.PublicExponent == nil {
		return nil, errUnread
	}
	public, err := rsaPublic(&k.Modulus, k.PublicExponent)
	if err != nil {
		return nil, err
	}
	for _, n := range []*big.Int{k.P, k.Q, k.PrivateExponent} {
		if n.Sign() <= 0 || n.BitLen() > public.N.BitLen() {
			return nil, errUnread
		}
	}
	key := &rsa.PrivateKey{PublicKey: *public, D: k.PrivateExponent, Primes: []*big.Int{k.P, k.Q}}
	if err := key.Validate(); err != nil {
		return nil, err
	}
	key.Precompute()
	return key, nil
}

// transparentPublic parses a public key in transparent format.
func transparentPublic(encoded []byte) (*rsa.PublicKey, error) {
	m, err := decodeTransparent(kmip.KeyFormatTypeTransparentRSAPublicKey, encoded)
	if err != nil {
		return nil, err
	}
	return rsaPublic(&m.TransparentRSAPublicKey.Modulus, &m.TransparentRSAPublicKey.PublicExponent)
}

func rsaPublic(modulus, exponent *big.Int) (*rsa.PublicKey, error) {
	if modulus.Sign() <= 0 || modulus.BitLen() > numberMax || exponent.Sign() <= 0 || exponent.BitLen() > 31 {
		return nil, errUnread
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, nil
}

// showPrivate is the reverse of transparentPrivate.
func showPrivate(key *rsa.PrivateKey) ([]byte, error) {
	if len(key.Primes) != 2 {
		return nil, errFormat
	}
	key.Precompute()
	return encodeTransparent(&kmip.KeyMaterial{TransparentRSAPrivateKey: &kmip.TransparentRSAPrivateKey{
		Modulus: *key.N, PrivateExponent: key.D, PublicExponent: big.NewInt(int64(key.E)), P: key.Primes[0], Q: key.Primes[1],
		PrimeExponentP: key.Precomputed.Dp, PrimeExponentQ: key.Precomputed.Dq, CRTCoefficient: key.Precomputed.Qinv,
	}}), nil
}

// showPublic is the reverse of transparentPublic.
func showPublic(key *rsa.PublicKey) []byte {
	return encodeTransparent(&kmip.KeyMaterial{TransparentRSAPublicKey: &kmip.TransparentRSAPublicKey{Modulus: *key.N, PublicExponent: *big.NewInt(int64(key.E))}})
}
