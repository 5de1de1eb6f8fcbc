package kms

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"hash"
	"io"
	"strings"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/role/kms/backup"
	"strongroom/internal/role/kms/objectstore"
)

// Verified is what a backup holds that is whole.
type Verified struct {
	Header backup.Header
	About  backup.About
	End    backup.End
}

// VerifyBackup opens every record and every key of a backup, and compares them with
// what the KMS had. It writes nothing.
func VerifyBackup(ctx context.Context, file string, key backup.Key) (Verified, error) {
	f, size, err := backup.Open(file)
	if err != nil {
		return Verified{}, errs.Wrap(err, "cannot open %s", file)
	}
	defer f.Close()
	v, err := verifyBackup(ctx, f, size, key)
	return v, errs.Wrap(err, "cannot vouch for %s", file)
}

func verifyBackup(ctx context.Context, src io.ReaderAt, size int64, key backup.Key) (_ Verified, err error) {
	b, err := backup.NewReader(ctx, src, size, key)
	if err != nil {
		return Verified{}, err
	}
	defer b.Close()
	var ring *keyring.Ring
	defer func() {
		if ring != nil {
			ring.Close()
		}
	}()
	found := map[string]bool{}
	for ctx.Err() == nil {
		item, err := b.Next()
		if errors.Is(err, io.EOF) {
			for _, name := range []string{backup.SecretRing, backup.SecretCA, backup.SecretServer} {
				if !found[name] {
					return Verified{}, errs.New(errs.Corrupt, "secret %q is missing", name)
				}
			}
			return Verified{Header: b.Header, About: b.About, End: b.End()}, nil
		}
		if err != nil {
			return Verified{}, err
		}
		if item.Secret != "" {
			err := checkSecret(item, b.About)
			if err == nil && item.Secret == backup.SecretRing && ring == nil {
				ring, err = keyring.Load(item.Key, 0, func(*keymem.Key) error { return nil })
			}
			item.Key.Close()
			if err != nil {
				return Verified{}, errs.Wrap(err, "secret %.64q", item.Secret)
			}
			found[item.Secret] = true
			continue
		}
		if err := checkRecord(ring, item.Record, b.Count, b.Digest()); err != nil {
			return Verified{}, err
		}
	}
	return Verified{}, context.Cause(ctx)
}

// checkRecord opens a record as a restore does.
func checkRecord(ring *keyring.Ring, r backup.Record, count func(key bool), digest hash.Hash) error {
	if ring == nil {
		return errs.New(errs.Corrupt, "it has no key ring")
	}
	key, ok := strings.CutPrefix(r.Name, objectstore.Objects+"/")
	if !ok {
		return nil
	}
	_, had, _, err := objectstore.Unpack(ring, key, r.Value, time.Time{}, digest)
	if err == nil {
		count(had)
	}
	return err
}

// checkSecret tells whether a secret that is no key ring is what it should be.
func checkSecret(item backup.Item, about backup.About) error {
	ca, err := x509.ParseCertificate(about.CA)
	if err != nil {
		return errs.New(errs.Corrupt, "the CA's certificate: %w", err)
	}
	var der []byte
	var certificate *x509.Certificate
	switch item.Secret {
	case backup.SecretRing:
		return nil
	case backup.SecretCA:
		der, certificate = item.Key.Bytes(), ca
	case backup.SecretServer:
		block, rest := pem.Decode(item.Key.Bytes())
		key, _ := pem.Decode(rest)
		if block == nil || key == nil {
			return errs.New(errs.Corrupt, "it does not hold a certificate and its key")
		}
		defer clear(key.Bytes)
		der = key.Bytes
		if certificate, err = x509.ParseCertificate(block.Bytes); err != nil {
			return errs.New(errs.Corrupt, "the server's certificate: %w", err)
		}
		if err := certificate.CheckSignatureFrom(ca); err != nil {
			return errs.New(errs.Corrupt, "the server's certificate: %w", err)
		}
	default:
		return errs.New(errs.InvalidState, "it is of a newer release")
	}
	private, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return errs.New(errs.Corrupt, "it holds no private key")
	}
	signer, ok := private.(crypto.Signer)
	if !ok {
		return errs.New(errs.Corrupt, "it holds no private key that signs")
	}
	if public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(certificate.PublicKey) {
		return errs.New(errs.Corrupt, "its private key is not the certificate's")
	}
	return nil
}
