package rootkey

import (
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/crypto/argon2"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
)

// Limits of a passphrase, in bytes.
const (
	PassphraseMin = 12
	PassphraseMax = 1024
)

// Cost is that of Argon2id (RFC 9106), paid for every try.
type Cost struct {
	Time      uint32 `json:"time"`      // passes
	MemoryKiB uint32 `json:"memoryKiB"` // in KiB
	Threads   uint8  `json:"threads"`
}

// DefaultCost takes some tenths of a second.
func DefaultCost() Cost { return Cost{Time: 3, MemoryKiB: 256 << 10, Threads: 4} }

// check keeps a root file that was altered from taking the machine's memory.
func (c Cost) check() error {
	if c.Time < 1 || c.Time > 64 || c.Threads < 1 || c.Threads > 16 || c.MemoryKiB < 8*uint32(c.Threads) || c.MemoryKiB > 2<<20 {
		return fmt.Errorf("Argon2id with %d passes, %d KiB and %d threads", c.Time, c.MemoryKiB, c.Threads)
	}
	return nil
}

// Passphrase is a root key wrapped under a key that Argon2id makes of a
// passphrase.
type Passphrase struct {
	Cost    Cost   `json:"argon2id"`
	Salt    []byte `json:"salt"`
	Wrapped []byte `json:"wrapped"`
}

const (
	saltSize       = 32
	kindPassphrase = "passphrase"
)

// NewPassphrase wraps root under passphrase; both stay the caller's.
func NewPassphrase(passphrase, root *keymem.Key, cost Cost) (Source, error) {
	if n := passphrase.Len(); n < PassphraseMin || n > PassphraseMax {
		return Source{}, errs.New(errs.Invalid, "a passphrase has %d to %d bytes, this one has %d", PassphraseMin, PassphraseMax, n)
	}
	p := &Passphrase{Cost: cost, Salt: make([]byte, saltSize)}
	rand.Read(p.Salt) // never fails: it ends the process instead
	kek, err := p.stretch(passphrase)
	if err != nil {
		return Source{}, err
	}
	defer kek.Close()
	p.Wrapped, err = wrap(kindPassphrase, kek, root)
	return Source{Passphrase: p}, err
}

func (p *Passphrase) stretch(passphrase *keymem.Key) (*keymem.Key, error) {
	return keymem.Take(argon2.IDKey(passphrase.Bytes(), p.Salt, p.Cost.Time, p.Cost.MemoryKiB, p.Cost.Threads, Size))
}

func (p *Passphrase) open(passphrase *keymem.Key) (*keymem.Key, error) {
	if passphrase == nil || passphrase.Len() > PassphraseMax {
		return nil, errs.New(errs.Invalid, "a passphrase of 1 to %d bytes is needed", PassphraseMax)
	}
	kek, err := p.stretch(passphrase)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	root, err := unwrap(kindPassphrase, kek, p.Wrapped)
	if errors.Is(err, sealed.ErrWrongKey) {
		return nil, errs.New(errs.Denied, "the passphrase is wrong")
	}
	return root, err
}

func (p *Passphrase) check() error {
	if len(p.Salt) != saltSize {
		return fmt.Errorf("a salt of %d bytes", len(p.Salt))
	}
	return errors.Join(p.Cost.check(), checkWrapped(p.Wrapped))
}
