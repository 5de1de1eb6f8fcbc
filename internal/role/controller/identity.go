package controller

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"strongroom/internal/control/pki"
)

// controllerName is the name in a controller's certificate: hosts know all
// controllers of an installation by it.
const controllerName = "controller"

// openIdentity opens or makes the CA and issues the controller's certificate.
func (c *Controller) openIdentity() (err error) {
	if c.ca, err = pki.OpenCA(filepath.Join(c.cfg.DataDir, pkiName), "Strongroom", c.keys); err != nil {
		return err
	}
	if c.credential, err = c.ca.Issue(c.identity(), c.names()); err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.ca.Certificate().Raw})
	return os.WriteFile(filepath.Join(c.cfg.DataDir, caCertName), text, 0o644)
}

// writePublicKey leaves the public half of a signing key for whoever verifies.
func writePublicKey(path string, key crypto.PublicKey) error {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644)
}

// identity is what stands in the controller's certificate. The installation is
// known by its CA.
func (c *Controller) identity() pki.Identity {
	fingerprint := pki.FingerprintOf(c.ca.Certificate())
	return pki.Identity{Cluster: fmt.Sprintf("%x", fingerprint[:8]), Role: pki.Controller, Name: controllerName}
}

// names are the addresses under which the API is reached.
func (c *Controller) names() []string {
	host, _, _ := net.SplitHostPort(c.cfg.Advertise) // checked by the configuration
	names := []string{host}
	for _, local := range []string{"localhost", "127.0.0.1"} {
		if local != host {
			names = append(names, local)
		}
	}
	return names
}

func (c *Controller) renew(_ context.Context, csr []byte) (*x509.Certificate, error) {
	return c.ca.IssueFromCSR(csr, c.identity(), c.names())
}

// ensureAdministrator makes the first user and leaves its password in a file
// that only the controller's own user may read.
func (c *Controller) ensureAdministrator(ctx context.Context) error {
	path := filepath.Join(c.cfg.DataDir, firstPasswordName)
	created, err := c.access.EnsureAdministrator(ctx, func(_ string, password []byte) error {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(password)
		return errors.Join(err, f.Sync(), f.Close())
	})
	if created {
		c.log.LogAttrs(ctx, slog.LevelInfo, "first administrator made; change the password and delete the file", slog.String("user", "administrator"), slog.String("file", path))
	}
	return err
}
