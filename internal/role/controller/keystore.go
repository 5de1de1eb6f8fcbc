package controller

import (
	"crypto"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/vault"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
)

// The controller's sealed key store: docs/spec/vault.md.
const (
	vaultName       = "controller.vault"
	vaultContext    = "strongroom/controller-store/v1"
	secretProviders = "providers"
	secretAuditKey  = "audit-key"
	secretServers   = "key-servers"
	sealContext     = "strongroom/controller-sealed/v1/" // and a name
)

// keystore holds the native providers with their KDKs, in locked memory and
// sealed on disk, and the credentials for key servers. It also seals small
// secrets of the control plane (the CA's private key). It is safe for
// concurrent use.
type keystore struct {
	key   *keymem.Key
	vault *vault.Vault

	mu        sync.Mutex // one change of providers at a time
	providers *keyprovider.Set
}

func openKeystore(cfg Config) (_ *keystore, err error) {
	path := filepath.Join(cfg.DataDir, vaultName)
	_, statErr := os.Lstat(path)
	fresh := errors.Is(statErr, fs.ErrNotExist)
	if fresh && hasRun(cfg) {
		return nil, errs.New(errs.Corrupt, "cannot open the key store: %s is missing, although this controller has run before", path).
			WithHint("put %s back from a backup; or start in an empty data_dir and import the providers' .p12 backups", vaultName)
	}
	key, err := keyfile.Read(cfg.KeyFile, sealed.KeySize)
	if fresh && errs.KindOf(err) == errs.NotFound {
		key, err = keyfile.Create(cfg.KeyFile, sealed.KeySize)
	}
	if errs.KindOf(err) == errs.NotFound {
		return nil, errs.New(errs.NotFound, "cannot open the key store: %w", err).WithHint("put the key file back from a backup; without it %s cannot be read", vaultName)
	}
	if err != nil {
		return nil, errs.Wrap(err, "cannot open the key store")
	}
	k := &keystore{key: key, providers: keyprovider.NewSet()}
	defer func() {
		if err != nil {
			k.Close()
		}
	}()
	if fresh {
		if k.vault, err = vault.New(path, key, vaultContext); err != nil {
			return nil, err
		}
		return k, k.save() // a key file without a vault would look like a loss at the next start
	}
	if k.vault, err = vault.Open(path, key, vaultContext); err != nil {
		return nil, errs.New(errs.Corrupt, "cannot open the key store: %w", err).
			WithHint("see that %s is the key file that belongs to %s, or put both back from a backup", cfg.KeyFile, path)
	}
	blob, err := k.vault.Get(secretProviders)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	set, err := keyprovider.UnmarshalSecrets(blob)
	if err != nil {
		return nil, errs.Wrap(err, "cannot read the key store")
	}
	k.providers.Close()
	k.providers = set
	return k, nil
}

// hasRun reports whether the CA was made, which comes after the key store.
func hasRun(cfg Config) bool {
	_, err := os.Lstat(filepath.Join(cfg.DataDir, pkiName))
	return !errors.Is(err, fs.ErrNotExist)
}

// Close wipes all keys from memory.
func (k *keystore) Close() {
	k.providers.Close()
	if k.vault != nil {
		k.vault.Close()
	}
	k.key.Close()
}

// replace is add for a name that the inventory does not know: a key that an
// interrupted call left under it was never handed out, and gives way.
func (k *keystore) replace(p *keyprovider.Native) error {
	old, err := k.native(p.Name())
	if err == nil && !old.SameKeys(p) {
		if err := k.remove(p.Name()); err != nil {
			return errors.Join(err, p.Close())
		}
	}
	return k.add(p)
}

// add stores a provider; it is durable when add returns. The store owns p then,
// also after an error.
func (k *keystore) add(p *keyprovider.Native) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	name := p.Name()
	_, lookupErr := k.providers.Lookup(name)
	if err := k.providers.Add(p); err != nil {
		return errors.Join(err, p.Close())
	}
	err := k.save()
	if err != nil && lookupErr != nil {
		err = errors.Join(err, k.providers.Remove(name))
	}
	return err
}

// remove forgets a provider and its KDK, here and on disk. One that is not here
// is no error.
func (k *keystore) remove(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.providers.Remove(name); err != nil {
		if errors.Is(err, keyprovider.ErrUnknownProvider) {
			return nil
		}
		return err
	}
	return k.save()
}

// native returns the provider of that name, which stays the store's.
func (k *keystore) native(name string) (*keyprovider.Native, error) {
	p, err := k.providers.Lookup(name)
	if err != nil {
		return nil, err
	}
	native, ok := p.(*keyprovider.Native)
	if !ok {
		return nil, errs.New(errs.InvalidState, "provider %s is not a native one", name)
	}
	return native, nil
}

// credentials returns the secrets for a standard provider's key servers, which
// the caller closes. A provider without any is no error.
func (k *keystore) credentials(name string) (standard.Credentials, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	all, err := k.allCredentials()
	if err != nil {
		return standard.Credentials{}, err
	}
	own := all[name]
	delete(all, name)
	closeCredentials(all)
	return own, nil
}

// setCredentials has change set the secrets for a standard provider; they are
// durable when it returns. Secrets that change gives are the store's from then
// on. With a nil change the provider has none any more.
func (k *keystore) setCredentials(name string, change func(*standard.Credentials) error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	all, err := k.allCredentials()
	if err != nil {
		return err
	}
	own := all[name]
	defer func() { own.Close(); closeCredentials(all) }()
	delete(all, name)
	if change != nil {
		if err := change(&own); err != nil {
			return err
		}
		all[name] = own
	}
	blob, err := standard.MarshalCredentials(all)
	if err != nil {
		return err
	}
	defer blob.Close()
	return k.vault.Update(map[string]*keymem.Key{secretServers: blob})
}

func (k *keystore) allCredentials() (map[string]standard.Credentials, error) {
	blob, err := k.vault.Get(secretServers)
	if errs.KindOf(err) == errs.NotFound {
		return map[string]standard.Credentials{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	all, err := standard.UnmarshalCredentials(blob)
	return all, errs.Wrap(err, "cannot read the key store")
}

func closeCredentials(all map[string]standard.Credentials) {
	for _, c := range all {
		c.Close()
	}
}

func (k *keystore) save() error {
	blob, err := keyprovider.MarshalSecrets(k.providers)
	if err != nil {
		return err
	}
	defer blob.Close()
	return k.vault.Update(map[string]*keymem.Key{secretProviders: blob})
}

// auditSigner returns the key that signs the audit log, made at the first start.
func (k *keystore) auditSigner() (crypto.Signer, error) { return k.vault.SigningKey(secretAuditKey) }

// Seal implements [pki.Sealer].
func (k *keystore) Seal(name string, plaintext []byte) ([]byte, error) {
	return sealed.Seal(k.key, sealContext+name, plaintext)
}

// Open implements [pki.Sealer].
func (k *keystore) Open(name string, text []byte) ([]byte, error) {
	return sealed.Open(k.key, sealContext+name, text)
}
