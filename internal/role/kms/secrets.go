package kms

import (
	"crypto"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/vault"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
)

// The KMS's vault: docs/spec/vault.md.
const (
	vaultName      = "kms.vault"
	vaultContext   = "strongroom/kms-store/v1"
	secretKeyring  = "keyring"
	secretAuditKey = "audit-key"
	secretSealKey  = "seal-key"
	sealContext    = "strongroom/kms-sealed/v1/" // and a name
)

// secrets is what the root key opens: the vault with the key ring, the key that
// signs the audit log and the one that seals the private keys of certificates.
// It is safe for concurrent use.
type secrets struct {
	vault *vault.Vault
	ring  *keyring.Ring
	seal  *keymem.Key
}

// openSecrets opens the vault with its root key, or makes it the first time: with
// a new key ring, or that of the KMS which this node joins. Both keys stay the
// caller's.
func openSecrets(cfg Config, root, joined *keymem.Key) (_ *secrets, err error) {
	path := filepath.Join(cfg.DataDir, vaultName)
	s := &secrets{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if s.vault, err = vault.New(path, root, vaultContext); err != nil {
			return nil, err
		}
		if joined == nil {
			s.ring, err = keyring.New(s.saveRing)
		} else if s.ring, err = keyring.Load(joined, 0, s.saveRing); err == nil {
			err = s.saveRing(joined)
		}
		if err != nil {
			return nil, err
		}
		return s, s.openSeal()
	}
	if s.vault, err = vault.Open(path, root, vaultContext); err != nil {
		return nil, err
	}
	encoded, err := s.vault.Get(secretKeyring)
	if err != nil {
		return nil, err
	}
	defer encoded.Close()
	if s.ring, err = keyring.Load(encoded, 0, s.saveRing); err != nil {
		return nil, errs.Wrap(err, "cannot read the key ring")
	}
	return s, s.openSeal()
}

// openSeal gets the key that seals certificates' keys, made the first time.
func (s *secrets) openSeal() (err error) {
	s.seal, err = s.vault.Get(secretSealKey)
	if errs.KindOf(err) != errs.NotFound {
		return err
	}
	if s.seal, err = keymem.Random(sealed.KeySize); err != nil {
		return err
	}
	return s.vault.Update(map[string]*keymem.Key{secretSealKey: s.seal})
}

func (s *secrets) saveRing(encoded *keymem.Key) error {
	return s.vault.Update(map[string]*keymem.Key{secretKeyring: encoded})
}

// Close wipes all keys from memory.
func (s *secrets) Close() {
	if s.ring != nil {
		s.ring.Close()
	}
	if s.vault != nil {
		s.vault.Close()
	}
	s.seal.Close()
}

// auditSigner returns the key that signs the audit log, made at the first start.
func (s *secrets) auditSigner() (crypto.Signer, error) { return s.vault.SigningKey(secretAuditKey) }

// Seal implements [pki.Sealer].
func (s *secrets) Seal(name string, plaintext []byte) ([]byte, error) {
	return sealed.Seal(s.seal, sealContext+name, plaintext)
}

// Open implements [pki.Sealer].
func (s *secrets) Open(name string, text []byte) ([]byte, error) {
	return sealed.Open(s.seal, sealContext+name, text)
}
