package kms

import (
	"context"
	"crypto"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/vault"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/role/kms/objectstore"
)

// The KMS's vault: docs/spec/vault.md.
const (
	vaultName      = "kms.vault"
	vaultContext   = "strongroom/kms-store/v1"
	secretKeyring  = "keyring"
	secretAuditKey = "audit-key"
	sealContext    = "strongroom/kms-sealed/v1/" // and a name
)

// secrets is what the root key opens: the vault with the key ring and the key
// that signs the audit log. It also seals the private keys of certificates. It
// is safe for concurrent use.
type secrets struct {
	root  *keymem.Key
	vault *vault.Vault
	ring  *keyring.Ring
}

// openSecrets opens the vault, or makes it and the root key the first time.
func openSecrets(ctx context.Context, cfg Config, db *store.DB) (_ *secrets, err error) {
	path := filepath.Join(cfg.DataDir, vaultName)
	_, statErr := os.Lstat(path)
	fresh := errors.Is(statErr, fs.ErrNotExist)
	if fresh && hasRun(cfg) {
		return nil, errs.New(errs.Corrupt, "cannot open the vault: %s is missing, although this KMS has run before", path).
			WithHint("put %s back from a backup: without it no key in the database can be read", vaultName)
	}
	root, err := keyfile.Read(cfg.KeyFile, sealed.KeySize)
	if fresh && errs.KindOf(err) == errs.NotFound {
		root, err = keyfile.Create(cfg.KeyFile, sealed.KeySize)
	}
	if errs.KindOf(err) == errs.NotFound {
		return nil, errs.New(errs.NotFound, "cannot open the vault: %w", err).WithHint("put the key file back from a backup; without it %s cannot be read", vaultName)
	}
	if err != nil {
		return nil, errs.Wrap(err, "cannot open the vault")
	}
	s := &secrets{root: root}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if fresh {
		if s.vault, err = vault.New(path, root, vaultContext); err != nil {
			return nil, err
		}
		s.ring, err = keyring.New(s.saveRing)
		return s, err
	}
	if s.vault, err = vault.Open(path, root, vaultContext); err != nil {
		return nil, errs.New(errs.Corrupt, "cannot open the vault: %w", err).
			WithHint("see that %s is the key file that belongs to %s, or put both back from a backup", cfg.KeyFile, path)
	}
	used, err := objectstore.NewestEpoch(ctx, db)
	if err != nil {
		return nil, err
	}
	encoded, err := s.vault.Get(secretKeyring)
	if err != nil {
		return nil, err
	}
	defer encoded.Close()
	s.ring, err = keyring.Load(encoded, used, s.saveRing)
	return s, errs.Wrap(err, "cannot read the key ring")
}

func (s *secrets) saveRing(encoded *keymem.Key) error {
	return s.vault.Update(map[string]*keymem.Key{secretKeyring: encoded})
}

// hasRun reports whether the CA was made, which comes after the vault.
func hasRun(cfg Config) bool {
	_, err := os.Lstat(filepath.Join(cfg.DataDir, pkiName))
	return !errors.Is(err, fs.ErrNotExist)
}

// Close wipes all keys from memory.
func (s *secrets) Close() {
	if s.ring != nil {
		s.ring.Close()
	}
	if s.vault != nil {
		s.vault.Close()
	}
	s.root.Close()
}

// auditSigner returns the key that signs the audit log, made at the first start.
func (s *secrets) auditSigner() (crypto.Signer, error) { return s.vault.SigningKey(secretAuditKey) }

// Seal implements [pki.Sealer].
func (s *secrets) Seal(name string, plaintext []byte) ([]byte, error) {
	return sealed.Seal(s.root, sealContext+name, plaintext)
}

// Open implements [pki.Sealer].
func (s *secrets) Open(name string, text []byte) ([]byte, error) {
	return sealed.Open(s.root, sealContext+name, text)
}
