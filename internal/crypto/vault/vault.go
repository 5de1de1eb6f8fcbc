// Package vault keeps a small set of named secrets in one sealed file: a host's
// sealed configuration, a controller's key store. The format is
// docs/spec/vault.md, inside a sealed file (docs/spec/sealed-file.md).
//
// An update replaces the whole file: after a crash at any instant it holds the
// old set or the new one. Secrets that are no secret (names, addresses) may lie
// in a vault too, to be authenticated and kept from view.
//
// Invariants: contents are in keymem only; what [Vault.Get] returned does not
// change with later updates. A Vault is safe for concurrent use by one process.
package vault

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
)

// Limits of the format.
const (
	NameMax    = 64      // bytes of a secret's name
	SecretsMax = 64      // secrets in a vault
	SizeMax    = 1 << 20 // bytes of all contents together
)

const (
	magic      = "SRvault\x00"
	version    = 1
	headerSize = len(magic) + 4 + 2
)

// ErrCorrupt is reported for contents that are no vault.
var ErrCorrupt = errors.New("vault is damaged")

// Vault is an open vault. It must be closed, which wipes it from memory.
type Vault struct {
	path, context string
	write         func(path string, key *keymem.Key, context string, data *keymem.Key) error // sealed.WriteFile

	mu      sync.RWMutex // guards key and secrets
	key     *keymem.Key
	secrets map[string]*keymem.Key
}

// Open reads the vault at path, which was sealed under key for context (see
// [sealed.ReadFile]). It takes a copy of key.
func Open(path string, key *keymem.Key, context string) (*Vault, error) {
	v, err := open(path, key, context)
	if err != nil {
		return nil, fmt.Errorf("cannot open vault %s: %w", path, err)
	}
	return v, nil
}

func open(path string, key *keymem.Key, context string) (*Vault, error) {
	content, err := sealed.ReadFile(path, key, context)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	secrets, err := decode(content.Bytes())
	if err != nil {
		return nil, err
	}
	return newVault(path, key, context, secrets)
}

// New returns an empty vault that [Vault.Update] will write to path.
func New(path string, key *keymem.Key, context string) (*Vault, error) {
	return newVault(path, key, context, map[string]*keymem.Key{})
}

func newVault(path string, key *keymem.Key, context string, secrets map[string]*keymem.Key) (*Vault, error) {
	own, err := key.Clone()
	if err != nil {
		closeAll(secrets)
		return nil, err
	}
	return &Vault{path: path, context: context, write: sealed.WriteFile, key: own, secrets: secrets}, nil
}

// Get returns a copy of the secret of that name, which the caller closes. It
// returns an error of kind [errs.NotFound] if there is none.
func (v *Vault) Get(name string) (*keymem.Key, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	secret, ok := v.secrets[name]
	if !ok {
		return nil, errs.New(errs.NotFound, "vault %s has no %q", v.path, name)
	}
	return secret.Clone()
}

// Update sets the secrets in change, removes those that are nil in it, and
// returns when the file is durable. The secrets in change stay the caller's.
//
// On an error the file holds the old set or the new one, whole: the last step,
// making its name durable, can fail too. The vault then has what the file has,
// or the old set if that cannot be read. Repeating the call is safe.
func (v *Vault) Update(change map[string]*keymem.Key) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	next := maps.Clone(v.secrets)
	for name, secret := range change {
		if secret == nil {
			delete(next, name)
			continue
		}
		next[name] = secret
	}
	content, err := encode(next)
	if err != nil {
		return fmt.Errorf("cannot update vault %s: %w", v.path, err)
	}
	defer content.Close()
	// Own copies are made first, so that nothing can fail after the write.
	own, err := decode(content.Bytes())
	if err != nil {
		return fmt.Errorf("cannot update vault %s: %w", v.path, err)
	}
	err = v.write(v.path, v.key, v.context, content)
	if err != nil && !v.stored(content) {
		closeAll(own)
		return fmt.Errorf("cannot update vault %s: %w", v.path, err)
	}
	closeAll(v.secrets)
	v.secrets = own
	if err != nil {
		return fmt.Errorf("cannot make the update of vault %s durable: %w", v.path, err)
	}
	return nil
}

// stored reports whether the file holds content.
func (v *Vault) stored(content *keymem.Key) bool {
	now, err := sealed.ReadFile(v.path, v.key, v.context)
	if err != nil {
		return false
	}
	defer now.Close()
	return now.Equal(content)
}

// Rekey seals the vault under another key, of which it takes a copy, and returns
// when the file is durable. On an error the file is sealed under the old key or
// under the new one, as a whole, and the vault goes on with the key that the file
// has. Repeating the call is safe.
func (v *Vault) Rekey(key *keymem.Key) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	content, err := encode(v.secrets)
	if err != nil {
		return fmt.Errorf("cannot seal vault %s anew: %w", v.path, err)
	}
	defer content.Close()
	own, err := key.Clone()
	if err != nil {
		return err
	}
	err = v.write(v.path, own, v.context, content)
	former := v.key
	v.key = own
	if err != nil && !v.stored(content) {
		v.key = former
		own.Close()
		return fmt.Errorf("cannot seal vault %s anew: %w", v.path, err)
	}
	former.Close()
	if err != nil {
		return fmt.Errorf("cannot make it durable that vault %s is sealed anew: %w", v.path, err)
	}
	return nil
}

// SigningKey returns the Ed25519 key of that name, which is made and stored at the
// first call. It must not be called for one name at the same time.
func (v *Vault) SigningKey(name string) (ed25519.PrivateKey, error) {
	seed, err := v.Get(name)
	if errs.KindOf(err) == errs.NotFound {
		if seed, err = keymem.Random(ed25519.SeedSize); err == nil {
			err = v.Update(map[string]*keymem.Key{name: seed})
		}
	}
	if seed != nil {
		defer seed.Close()
	}
	if err != nil {
		return nil, err
	}
	if seed.Len() != ed25519.SeedSize {
		return nil, fmt.Errorf("%w: %s is no signing key", ErrCorrupt, name)
	}
	return ed25519.NewKeyFromSeed(seed.Bytes()), nil
}

// Close wipes the vault from memory. It is idempotent and never fails.
func (v *Vault) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	closeAll(v.secrets)
	v.secrets = nil
	return v.key.Close()
}

func closeAll(secrets map[string]*keymem.Key) {
	for _, s := range secrets {
		s.Close()
	}
}

// encode returns the content of a file with these secrets, names in order.
func encode(secrets map[string]*keymem.Key) (*keymem.Key, error) {
	size := headerSize
	for name, s := range secrets {
		if len(name) < 1 || len(name) > NameMax {
			return nil, errs.New(errs.Invalid, "name %.*q has not 1 to %d bytes", NameMax, name, NameMax)
		}
		size += 1 + len(name) + 4 + s.Len()
	}
	if len(secrets) > SecretsMax || size > SizeMax {
		return nil, errs.New(errs.NoSpace, "%d secrets of %d bytes do not fit: a vault holds %d of %d", len(secrets), size, SecretsMax, SizeMax)
	}
	content, err := keymem.New(size)
	if err != nil {
		return nil, err
	}
	b := append(content.Bytes()[:0], magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint16(b, uint16(len(secrets)))
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		b = append(b, byte(len(name)))
		b = append(b, name...)
		b = binary.BigEndian.AppendUint32(b, uint32(secrets[name].Len()))
		b = append(b, secrets[name].Bytes()...)
	}
	return content, nil
}

// decode is the reverse of encode. It accepts exactly what encode makes, and
// keeps nothing of content.
func decode(content []byte) (_ map[string]*keymem.Key, err error) {
	if len(content) < headerSize || !bytes.HasPrefix(content, []byte(magic)) {
		return nil, fmt.Errorf("%w: it does not begin like one", ErrCorrupt)
	}
	if v := binary.BigEndian.Uint32(content[len(magic):]); v != version {
		return nil, errs.New(errs.InvalidState, "vault of unknown version %d", v)
	}
	count := int(binary.BigEndian.Uint16(content[len(magic)+4:]))
	if count > SecretsMax || len(content) > SizeMax {
		return nil, fmt.Errorf("%w: it holds more than a vault can", ErrCorrupt)
	}
	secrets := make(map[string]*keymem.Key, count)
	defer func() {
		if err != nil {
			closeAll(secrets)
		}
	}()
	rest, last := content[headerSize:], ""
	for range count {
		name, ok := cut(&rest, 1)
		if !ok || string(name) <= last || len(name) > NameMax {
			return nil, fmt.Errorf("%w: bad name after %q", ErrCorrupt, last)
		}
		last = string(name)
		data, ok := cut(&rest, 4)
		if !ok || len(data) == 0 {
			return nil, fmt.Errorf("%w: bad length of %q", ErrCorrupt, last)
		}
		secret, err := keymem.New(len(data))
		if err != nil {
			return nil, err
		}
		copy(secret.Bytes(), data)
		secrets[last] = secret
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("%w: %d bytes too many", ErrCorrupt, len(rest))
	}
	return secrets, nil
}

// cut takes a length of prefix bytes (1 or 4) and so many bytes off rest.
func cut(rest *[]byte, prefix int) ([]byte, bool) {
	b := *rest
	if len(b) < prefix {
		return nil, false
	}
	n := uint64(b[0])
	if prefix == 4 {
		n = uint64(binary.BigEndian.Uint32(b))
	}
	b = b[prefix:]
	if n > uint64(len(b)) {
		return nil, false
	}
	*rest = b[n:]
	return b[:n:n], true
}
