package luks

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"hash"
	"runtime"

	"strongroom/internal/crypto/keymem"
)

// hashByName returns a hash that headers may name, for PBKDF2 and for the
// anti-forensic splitter. Neither needs collision resistance, so SHA-1 is safe
// to read; nothing is written with it.
func hashByName(name string) (func() hash.Hash, error) {
	switch name {
	case "sha1":
		return sha1.New, nil
	case "sha256":
		return sha256.New, nil
	case "sha512":
		return sha512.New, nil
	}
	return nil, fmt.Errorf("%w: hash %.40q", ErrUnsupported, name)
}

// pbkdf2 fills out with PBKDF2-HMAC (RFC 8018, section 5.2) of password.
//
// crypto/pbkdf2 takes the password as a string and crypto/hmac keeps it, padded,
// in ordinary memory that nobody wipes; the password here is a DEK or opens
// one. This one keeps it in keymem, and in the hash's chaining value, from which
// it cannot be computed.
func pbkdf2(newHash func() hash.Hash, out []byte, password *keymem.Key, salt []byte, iterations int) error {
	inner, outer, err := hmacStates(newHash, password)
	if err != nil {
		return err
	}
	var (
		work    = newHash()
		size    = work.Size()
		u       = make([]byte, 0, size)
		t       = make([]byte, size)
		counter [4]byte
	)
	defer keymem.Wipe(t)
	defer keymem.Wipe(u[:size])
	// prf replaces u by HMAC(password, messages).
	prf := func(messages ...[]byte) error {
		if err := restore(work, inner); err != nil {
			return err
		}
		for _, m := range messages {
			work.Write(m)
		}
		u = work.Sum(u[:0])
		if err := restore(work, outer); err != nil {
			return err
		}
		work.Write(u)
		u = work.Sum(u[:0])
		return nil
	}
	for block := uint32(1); len(out) > 0; block++ {
		binary.BigEndian.PutUint32(counter[:], block)
		if err := prf(salt, counter[:]); err != nil {
			return err
		}
		copy(t, u)
		for range iterations - 1 {
			if err := prf(u); err != nil {
				return err
			}
			for i := range t {
				t[i] ^= u[i]
			}
		}
		out = out[copy(out, t):]
	}
	return nil
}

// hmacStates returns the states of the hash after HMAC's inner and outer
// padded key.
func hmacStates(newHash func() hash.Hash, key *keymem.Key) (inner, outer []byte, err error) {
	h := newHash()
	pad, err := keymem.New(h.BlockSize())
	if err != nil {
		return nil, nil, err
	}
	defer pad.Close()
	if key.Len() > h.BlockSize() {
		h.Write(key.Bytes())
		h.Sum(pad.Bytes()[:0])
	} else {
		copy(pad.Bytes(), key.Bytes())
	}
	runtime.KeepAlive(key)

	state := func(mask byte) ([]byte, error) {
		p := pad.Bytes()
		for i := range p {
			p[i] ^= mask
		}
		h.Reset()
		h.Write(p)
		return h.(appender).AppendBinary(nil)
	}
	if inner, err = state(0x36); err != nil {
		return nil, nil, err
	}
	outer, err = state(0x36 ^ 0x5c)
	return inner, outer, err
}

// The hashes of the standard library save and restore their state.
type (
	appender interface {
		AppendBinary(b []byte) ([]byte, error)
	}
	unmarshaler interface{ UnmarshalBinary(b []byte) error }
)

func restore(h hash.Hash, state []byte) error { return h.(unmarshaler).UnmarshalBinary(state) }
