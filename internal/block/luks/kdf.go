package luks

import (
	"fmt"

	"golang.org/x/crypto/argon2"

	"strongroom/internal/crypto/keymem"
)

// Limits of what a header can make us spend. cryptsetup itself never chooses
// more unless told to.
const (
	argon2MemoryMax = 1 << 20 // KiB: 1 GiB
	argon2WorkMax   = 1 << 26 // KiB times passes: about a minute
	argon2LanesMax  = 4
)

// Argon2id is the cost of trying one passphrase. The zero value means 4
// passes over 256 MiB in 4 lanes.
type Argon2id struct {
	Passes int // over the memory, at least 1; cryptsetup wants 4
	Memory int // KiB, from 8 a lane to 1048576 (1 GiB)
	Lanes  int // 1 to 4
}

func (c Argon2id) orDefault() Argon2id {
	if c == (Argon2id{}) {
		return Argon2id{Passes: 4, Memory: 256 << 10, Lanes: 4}
	}
	return c
}

// kdf derives the key of a keyslot area from a passphrase.
type kdf interface {
	derive(passphrase *keymem.Key, size int) (*keymem.Key, error)
}

type argon2KDF struct {
	kind string // "argon2id" or "argon2i"
	cost Argon2id
	salt []byte
}

type pbkdf2KDF struct {
	hash       string
	iterations int
	salt       []byte
}

// decodeKDF returns nil after a failure. It looks at no cost: derive does.
func decodeKDF(f field) kdf {
	salt := f.get("salt").base64(8, 64)
	switch kind := f.get("type").text(); kind {
	case "argon2id", "argon2i":
		return argon2KDF{kind: kind, salt: salt, cost: Argon2id{
			Passes: f.get("time").integer(1, argon2WorkMax),
			Memory: f.get("memory").integer(1, 1<<31-1),
			Lanes:  f.get("cpus").integer(1, 1<<24),
		}}
	case "pbkdf2":
		return pbkdf2KDF{salt: salt, hash: f.get("hash").text(), iterations: f.get("iterations").integer(1, 1<<31-1)}
	default:
		f.d.fail(f.path+".type", fmt.Sprintf("is %.40q, which is not known here", kind))
		return nil
	}
}

func (k argon2KDF) encode() object {
	return object{
		"type": k.kind, "time": number(k.cost.Passes), "memory": number(k.cost.Memory),
		"cpus": number(k.cost.Lanes), "salt": toBase64(k.salt),
	}
}

func (k argon2KDF) derive(passphrase *keymem.Key, size int) (*keymem.Key, error) {
	c := k.cost
	if c.Lanes < 1 || c.Lanes > argon2LanesMax || c.Passes < 1 || c.Memory < 8*c.Lanes ||
		c.Memory > argon2MemoryMax || c.Passes > argon2WorkMax/c.Memory {
		return nil, fmt.Errorf("%w: Argon2 with %d passes over %d KiB in %d lanes is outside the limits", ErrUnsupported, c.Passes, c.Memory, c.Lanes)
	}
	run := argon2.IDKey
	if k.kind == "argon2i" {
		run = argon2.Key
	}
	return keymem.Take(run(passphrase.Bytes(), k.salt, uint32(c.Passes), uint32(c.Memory), uint8(c.Lanes), uint32(size)))
}

func (k pbkdf2KDF) derive(passphrase *keymem.Key, size int) (*keymem.Key, error) {
	if k.iterations > iterationsMax {
		return nil, fmt.Errorf("%w: PBKDF2 with %d iterations, at most %d are accepted", ErrUnsupported, k.iterations, iterationsMax)
	}
	newHash, err := hashByName(k.hash)
	if err != nil {
		return nil, err
	}
	key, err := keymem.New(size)
	if err != nil {
		return nil, err
	}
	if err := pbkdf2(newHash, key.Bytes(), passphrase, k.salt, k.iterations); err != nil {
		key.Close()
		return nil, err
	}
	return key, nil
}
