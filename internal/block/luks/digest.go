package luks

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"

	"strongroom/internal/crypto/keymem"
)

const (
	// digestIterations is the least that cryptsetup accepts. More would only
	// slow down each opening: a DEK of 512 random bits cannot be guessed.
	digestIterations = 1000
	digestSize       = 32 // bytes, of digests made here
	digestSaltSize   = 32 // bytes; cryptsetup takes no other

	// iterationsMax bounds the time that a PBKDF2 in a header can make us
	// spend: well under a minute.
	iterationsMax = 50_000_000
)

// VerifyKey returns nil if dek is the key of the volume's data, an error
// wrapping [ErrWrongKey] if it is not, and one wrapping [ErrUnsupported] if
// that cannot be told.
func (h *Header) VerifyKey(dek *keymem.Key) error {
	match, err := verifyAny(h.meta.digestsOf(0), dek)
	if err != nil {
		return fmt.Errorf("cannot verify the key of LUKS2 volume %s: %w", h.bin.uuid, err)
	}
	if !match {
		return fmt.Errorf("%w %s", ErrWrongKey, h.bin.uuid)
	}
	return nil
}

// verifyAny reports whether one of the digests is key's.
func verifyAny(digests []digest, key *keymem.Key) (bool, error) {
	for _, g := range digests {
		if match, err := g.verify(key); match || err != nil {
			return match, err
		}
	}
	return false, nil
}

func (g digest) verify(key *keymem.Key) (bool, error) {
	if g.kind != "pbkdf2" {
		return false, fmt.Errorf("%w: digest of type %.40q", ErrUnsupported, g.kind)
	}
	newHash, err := hashByName(g.hash)
	if err != nil {
		return false, err
	}
	if g.iterations > iterationsMax {
		return false, fmt.Errorf("%w: digest with %d iterations, at most %d are accepted", ErrUnsupported, g.iterations, iterationsMax)
	}
	got := make([]byte, len(g.value))
	if err := pbkdf2(newHash, got, key, g.salt, g.iterations); err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(got, g.value) == 1, nil
}

// newDigest returns the digest of dek, the key of the segment with that name.
func newDigest(dek *keymem.Key, segment string) (object, error) {
	value, salt := make([]byte, digestSize), make([]byte, digestSaltSize)
	rand.Read(salt)
	newHash, err := hashByName("sha256")
	if err != nil {
		return nil, err
	}
	if err := pbkdf2(newHash, value, dek, salt, digestIterations); err != nil {
		return nil, err
	}
	return object{
		"type": "pbkdf2", "hash": "sha256", "iterations": number(digestIterations),
		"salt": toBase64(salt), "digest": toBase64(value),
		"keyslots": []any{}, "segments": []any{segment},
	}, nil
}
