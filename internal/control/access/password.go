package access

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/crypto/argon2"

	"strongroom/internal/errs"
)

// Hashing is how a password is hashed with argon2id (RFC 9106).
type Hashing struct {
	Time      uint32 // passes, 1 to 10
	MemoryKiB uint32 // 8 per thread to 262144
	Threads   uint8  // 1 to 16
}

// DefaultHashing is RFC 9106's second recommended option: 64 MiB.
var DefaultHashing = Hashing{Time: 3, MemoryKiB: 64 << 10, Threads: 4}

const (
	saltBytes = 16
	hashBytes = 32
	// hashesAtOnce bounds memory: attempts beyond wait for their turn.
	hashesAtOnce = 2

	// MinPassword and MaxPassword bound a password's length, in bytes. (NIST SP
	// 800-63B: length is what counts, composition rules are not asked for.)
	MinPassword = 12
	MaxPassword = 1024

	// maxPHC is the longest stored hash that is looked at.
	maxPHC = 256
)

func (h Hashing) check() error {
	if h.Time < 1 || h.Time > 10 || h.Threads < 1 || h.Threads > 16 ||
		h.MemoryKiB < 8*uint32(h.Threads) || h.MemoryKiB > 256<<10 {
		return errs.New(errs.Invalid, "password hashing parameters are out of range: %+v", h)
	}
	return nil
}

// passwordHash is a parsed hash.
type passwordHash struct {
	Hashing
	salt, hash []byte
}

// String is the PHC string: $argon2id$v=19$m=65536,t=3,p=4$SALT$HASH, base64
// without padding.
func (p passwordHash) String() string {
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, p.MemoryKiB, p.Time, p.Threads,
		b64.EncodeToString(p.salt), b64.EncodeToString(p.hash))
}

// parseHash parses what String wrote, and only that: parameters are bounded
// before they cost anything.
func parseHash(s string) (passwordHash, error) {
	bad := errs.New(errs.Corrupt, "stored password hash is damaged")
	if len(s) > maxPHC {
		return passwordHash{}, bad
	}
	f := strings.Split(s, "$")
	if len(f) != 6 || f[0] != "" || f[1] != "argon2id" || f[2] != "v="+strconv.Itoa(argon2.Version) {
		return passwordHash{}, bad
	}
	var p passwordHash
	if _, err := fmt.Sscanf(f[3], "m=%d,t=%d,p=%d", &p.MemoryKiB, &p.Time, &p.Threads); err != nil || p.check() != nil {
		return passwordHash{}, bad
	}
	var err1, err2 error
	b64 := base64.RawStdEncoding.Strict()
	p.salt, err1 = b64.DecodeString(f[4])
	p.hash, err2 = b64.DecodeString(f[5])
	if err1 != nil || err2 != nil || len(p.salt) != saltBytes || len(p.hash) != hashBytes || p.String() != s {
		return passwordHash{}, bad
	}
	return p, nil
}

// hash hashes a new password. It does not wipe it.
func (c *Control) hash(ctx context.Context, password []byte) (string, error) {
	p := passwordHash{Hashing: c.hashing, salt: make([]byte, saltBytes)}
	rand.Read(p.salt)
	var err error
	p.hash, err = c.argon2(ctx, p, password)
	return p.String(), err
}

// argon2 computes the hash of password with p's salt and parameters, waiting for
// its turn.
func (c *Control) argon2(ctx context.Context, p passwordHash, password []byte) ([]byte, error) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-c.slots }()
	return argon2.IDKey(password, p.salt, p.Time, p.MemoryKiB, p.Threads, hashBytes), nil
}

// matches reports whether password is the one of the stored hash.
func (c *Control) matches(ctx context.Context, stored string, password []byte) (bool, error) {
	p, err := parseHash(stored)
	if err != nil {
		return false, err
	}
	got, err := c.argon2(ctx, p, password)
	if err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(got, p.hash) == 1, nil
}

func checkPassword(password []byte) error {
	if len(password) < MinPassword || len(password) > MaxPassword {
		return errs.New(errs.Invalid, "a password takes %d to %d bytes", MinPassword, MaxPassword)
	}
	return nil
}

// newPassword returns a random password of 26 letters and digits (130 bits), in
// memory that the caller wipes.
func newPassword() []byte {
	// No 0, 1, l, o: they are mistaken for each other.
	const letters = "23456789abcdefghijkmnpqrstuvwxyz"
	b := make([]byte, 26)
	rand.Read(b)
	for i := range b {
		b[i] = letters[b[i]%byte(len(letters))] // 32 letters: no bias
	}
	return b
}
