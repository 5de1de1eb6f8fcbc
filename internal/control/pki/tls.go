package pki

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"strongroom/internal/errs"
)

// Credential is a certificate and its key, which can be exchanged while
// connections are made with it.
type Credential struct {
	mu   sync.RWMutex // guards cert
	cert *tls.Certificate
}

// NewCredential returns a credential of a certificate, its key, and the CA's
// certificate, which goes with it so that a joining host can see it.
func NewCredential(cert *x509.Certificate, key crypto.Signer, ca *x509.Certificate) (*Credential, error) {
	c := &Credential{}
	return c, c.Replace(cert, key, ca)
}

// Replace exchanges the certificate for connections from now on.
func (c *Credential) Replace(cert *x509.Certificate, key crypto.Signer, ca *x509.Certificate) error {
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(cert.PublicKey) {
		return errs.New(errs.Invalid, "key and certificate do not fit")
	}
	if err := cert.CheckSignatureFrom(ca); err != nil {
		return errs.New(errs.Invalid, "certificate is not of this CA: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cert = &tls.Certificate{Certificate: [][]byte{cert.Raw, ca.Raw}, PrivateKey: key, Leaf: cert}
	return nil
}

// Leaf returns the certificate in use.
func (c *Credential) Leaf() *x509.Certificate { return c.current().Leaf }

// Certificate returns certificate and key in use, for a peer that is none of
// ours and trusts the CA. It must not be changed.
func (c *Credential) Certificate() *tls.Certificate { return c.current() }

func (c *Credential) current() *tls.Certificate {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.cert
}

// RenewalDue returns when a certificate is to be renewed: when two thirds of its
// life have passed.
func RenewalDue(cert *x509.Certificate) time.Time {
	return cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) * 2 / 3)
}

// KeepFresh renews the credential whenever it is due, until ctx ends; then it
// returns nil. renew gets a request for a new key and returns the certificate
// for it. If it fails, it is called again after retry, and report (which may be
// nil) gets the error.
func (c *Credential) KeepFresh(ctx context.Context, ca *x509.Certificate, retry time.Duration,
	renew func(ctx context.Context, csr []byte) (*x509.Certificate, error), report func(error),
) error {
	delay := time.Until(RenewalDue(c.Leaf()))
	for {
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		if err := c.renew(ctx, ca, renew); err != nil {
			if report != nil && ctx.Err() == nil {
				report(err)
			}
			delay = retry
			continue
		}
		delay = time.Until(RenewalDue(c.Leaf()))
	}
}

func (c *Credential) renew(ctx context.Context, ca *x509.Certificate, renew func(context.Context, []byte) (*x509.Certificate, error)) error {
	key, err := NewKey()
	if err != nil {
		return err
	}
	csr, err := NewCSR(key)
	if err != nil {
		return err
	}
	cert, err := renew(ctx, csr)
	if err != nil {
		return fmt.Errorf("cannot renew certificate: %w", err)
	}
	return c.Replace(cert, key, ca)
}

// Issue returns a credential with a new key for id. names as in
// [CA.IssueFromCSR].
func (ca *CA) Issue(id Identity, names []string) (*Credential, error) {
	key, err := NewKey()
	if err != nil {
		return nil, fmt.Errorf("cannot issue certificate: %w", err)
	}
	cert, err := ca.issue(key.Public(), id, names, CertLife)
	if err != nil {
		return nil, err
	}
	return NewCredential(cert, key, ca.cert)
}

// ServerConfig returns the TLS configuration of a server with that credential.
// A client's certificate must be of the CA and have an identity that accept
// (which may be nil) accepts; with clientsOptional it may have none, and must
// prove who it is otherwise.
func ServerConfig(c *Credential, ca *x509.Certificate, clientsOptional bool, accept func(Identity) error) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	auth := tls.RequireAndVerifyClientCert
	if clientsOptional {
		auth = tls.VerifyClientCertIfGiven
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current(), nil },
		ClientAuth:     auth,
		ClientCAs:      pool,
		// A resumed session would skip the checks below with a certificate that
		// has expired since.
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 && clientsOptional {
				return nil
			}
			id, err := PeerIdentity(cs)
			if err != nil || accept == nil {
				return err
			}
			return accept(id)
		},
	}
}

// ClientConfig returns the TLS configuration to call a server whose certificate
// is of the CA and has exactly the identity want; its address does not matter.
// With c nil the client shows no certificate.
func ClientConfig(c *Credential, ca *x509.Certificate, want Identity) *tls.Config {
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		// Not the address is checked but the identity, in VerifyConnection, with
		// all else that would be: chain, time and usage.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if err := verifyServer(cs, ca); err != nil {
				return err
			}
			id, err := PeerIdentity(cs)
			if err != nil {
				return err
			}
			if id != want {
				return errs.New(errs.Denied, "the server is %s, not %s", id, want)
			}
			return nil
		},
	}
	if c != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.current(), nil }
	}
	return cfg
}

// JoinConfig returns the TLS configuration for the first call to a server of
// that role, of which only the CA's fingerprint is known. On a connection that it
// made, [PresentedCA] is the CA's certificate.
func JoinConfig(pin Fingerprint, role Role) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"h2", "http/1.1"},
		InsecureSkipVerify: true, // VerifyConnection verifies against the pin
		VerifyConnection: func(cs tls.ConnectionState) error {
			ca, err := PresentedCA(cs, pin)
			if err != nil {
				return err
			}
			if err := verifyServer(cs, ca); err != nil {
				return err
			}
			id, err := PeerIdentity(cs)
			if err == nil && id.Role != role {
				err = errs.New(errs.Denied, "the server is %s, not a %s", id, role)
			}
			return err
		},
	}
}

// PresentedCA returns the certificate with that fingerprint that the peer sent.
func PresentedCA(cs tls.ConnectionState, pin Fingerprint) (*x509.Certificate, error) {
	for _, cert := range cs.PeerCertificates {
		if cert.IsCA && FingerprintOf(cert) == pin {
			return cert, nil
		}
	}
	return nil, errs.New(errs.Denied, "the server does not belong to the CA that the join token names: it is another controller, or somebody between").
		WithReason("CAMismatch")
}

// PeerIdentity returns the identity of the other side of a connection that was
// verified.
func PeerIdentity(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return Identity{}, errs.New(errs.Denied, "the other side has no certificate")
	}
	return IdentityOf(cs.PeerCertificates[0])
}

func verifyServer(cs tls.ConnectionState, ca *x509.Certificate) error {
	if len(cs.PeerCertificates) == 0 {
		return errs.New(errs.Denied, "the server has no certificate")
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots:     roots,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return errs.New(errs.Denied, "the server's certificate: %w", err)
	}
	return nil
}
