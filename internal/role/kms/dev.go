package kms

import (
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"time"

	"strongroom/internal/control/directory"
	"strongroom/internal/crypto/clientcert"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

// What [KMS.EnsureFirstApplication] makes.
const (
	FirstGroup       = "default"
	FirstApplication = "first"
	clientLife       = 365 * 24 * time.Hour
)

// EnsureFirstApplication makes, the first time, a group and an application with
// a client certificate, and leaves client.pem and client.key in the data folder.
// Files that are there are left alone.
func (k *KMS) EnsureFirstApplication(ctx context.Context) error {
	certPath, keyPath := filepath.Join(k.cfg.DataDir, "client.pem"), filepath.Join(k.cfg.DataDir, "client.key")
	if _, err := os.Lstat(certPath); err == nil {
		return nil
	}
	if err := k.directory.CreateGroup(ctx, directory.Group{Name: FirstGroup, Title: "First group"}); err != nil && errs.KindOf(err) != errs.Exists {
		return err
	}
	err := k.directory.CreateApplication(ctx, directory.Application{Name: FirstApplication, Title: "First application", Group: FirstGroup})
	if err != nil && errs.KindOf(err) != errs.Exists {
		return err
	}
	der, cert, key, err := clientcert.New(FirstApplication, clientLife)
	if err != nil {
		return err
	}
	defer clear(key)
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if _, err := k.directory.AddCertificate(ctx, FirstApplication, parsed); err != nil {
		return err
	}
	// The certificate's file is written last: it tells that all is done.
	if err := durable.WriteFile(keyPath, key); err != nil {
		return err
	}
	return durable.WriteFile(certPath, cert)
}
