package kms

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"strongroom/internal/control/pki"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// Files in the data folder.
const (
	storeName     = "store"             // folder of the database
	auditName     = "audit"             // folder of the audit log
	pkiName       = "pki"               // folder of the CA
	serverName    = "server.pem.sealed" // in it: the KMIP server's certificate and key
	caCertName    = "ca.pem"            // for clients
	auditKeyName  = "audit-key.pem"     // public: `strongroom audit verify`
	serverSealing = "kmip-server"
)

const (
	// serverLife is the life of the KMIP server's certificate. Clients such as
	// vCenter keep the certificate itself and have a person confirm a new one,
	// so it is long, and a new one is made at a start only.
	serverLife = 2 * 365 * 24 * time.Hour
	// serverRenew is how long before its end a start replaces it.
	serverRenew = 60 * 24 * time.Hour
)

// openIdentity opens or makes the CA and the KMIP server's certificate.
func (k *KMS) openIdentity() (err error) {
	if k.ca, err = pki.OpenCA(filepath.Join(k.cfg.DataDir, pkiName), "Strongroom KMS", k.secrets); err != nil {
		return err
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.ca.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(k.cfg.DataDir, caCertName), ca, 0o644); err != nil {
		return err
	}
	path := filepath.Join(k.cfg.DataDir, pkiName, serverName)
	k.certificate, err = k.loadServer(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errs.Wrap(err, "cannot open the KMIP server's certificate in %s", path)
	}
	if err == nil && k.serves(k.certificate.Leaf) {
		return nil
	}
	if err == nil {
		k.log.Warn("the KMIP server gets a new certificate; clients that keep it have to confirm it", slog.Time("not_after", k.certificate.Leaf.NotAfter))
	}
	k.certificate, err = k.makeServer(path)
	return errs.Wrap(err, "cannot make the KMIP server's certificate")
}

// serves reports whether cert is good for all names, and for a while.
func (k *KMS) serves(cert *x509.Certificate) bool {
	for _, name := range k.names() {
		if cert.VerifyHostname(name) != nil {
			return false
		}
	}
	return cert.CheckSignatureFrom(k.ca.Certificate()) == nil && time.Until(cert.NotAfter) > serverRenew
}

// names are the addresses under which the KMIP server is reached.
func (k *KMS) names() []string {
	host, _, _ := net.SplitHostPort(k.cfg.Advertise) // checked by the configuration
	return withLocal(host)
}

// withLocal returns host and what this machine calls itself.
func withLocal(host string) []string {
	names := []string{host}
	for _, local := range []string{"localhost", "127.0.0.1"} {
		if local != host {
			names = append(names, local)
		}
	}
	return names
}

func (k *KMS) makeServer(path string) (tls.Certificate, error) {
	key, err := pki.NewKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	fingerprint := pki.FingerprintOf(k.ca.Certificate())
	id := pki.Identity{Cluster: fmt.Sprintf("%x", fingerprint[:8]), Role: pki.KMS, Name: "kms"}
	cert, err := k.ca.IssueLong(key.Public(), id, k.names(), serverLife)
	if err != nil {
		return tls.Certificate{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer clear(der)
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	defer clear(text)
	sealed, err := k.secrets.Seal(serverSealing, text)
	if err != nil {
		return tls.Certificate{}, err
	}
	if err := durable.WriteFile(path, sealed); err != nil {
		return tls.Certificate{}, err
	}
	return k.chain(cert, key), nil
}

func (k *KMS) chain(cert *x509.Certificate, key *ecdsa.PrivateKey) tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{cert.Raw, k.ca.Certificate().Raw}, PrivateKey: key, Leaf: cert}
}

func (k *KMS) loadServer(path string) (tls.Certificate, error) {
	sealed, err := os.ReadFile(path)
	if err != nil {
		return tls.Certificate{}, err
	}
	text, err := k.secrets.Open(serverSealing, sealed)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer clear(text)
	pair, err := tls.X509KeyPair(text, text)
	if err != nil {
		return tls.Certificate{}, errs.New(errs.Corrupt, "it does not hold a certificate and its key")
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return tls.Certificate{}, errs.New(errs.Corrupt, "its key is not ECDSA")
	}
	return k.chain(pair.Leaf, key), nil
}

// tlsConfig is that of the KMIP server. Any client certificate, or none, passes
// the handshake, for clients are known by the directory: by the certificate
// itself, or by a password. The handshake proves that they have its key.
func (k *KMS) tlsConfig() *tls.Config {
	c := kmipserver.TLSConfig(k.certificate, nil, k.cfg.LegacyTLS)
	c.ClientAuth = tls.RequestClientCert
	return c
}
