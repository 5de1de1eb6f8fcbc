package standard

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// PEMMax bounds a file of certificates or a private key, in bytes.
const PEMMax = 64 << 10

// clientLife is how long a certificate lasts that we make: long, because it is
// carried to the KMS by hand; 30 days before its end an alarm begins.
const clientLife = 3 * 365 * 24 * time.Hour

// NewClientKey returns a new private key (ECDSA P-256) in PKCS #8, which the
// caller closes.
func NewClientKey() (*keymem.Key, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	return keymem.Take(der)
}

func signer(key *keymem.Key) (crypto.Signer, error) {
	private, err := x509.ParsePKCS8PrivateKey(key.Bytes())
	if err != nil {
		return nil, errs.New(errs.Invalid, "the private key is not PKCS #8")
	}
	s, ok := private.(crypto.Signer)
	if !ok {
		return nil, errs.New(errs.Invalid, "the private key cannot sign")
	}
	return s, nil
}

// SelfSigned returns a certificate (DER) of key for the client called name.
func SelfSigned(name string, key *keymem.Key, now time.Time) ([]byte, error) {
	s, err := signer(key)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(clientLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	return x509.CreateCertificate(rand.Reader, template, template, s.Public(), s)
}

// Request returns a certificate request (PKCS #10, DER) of key for the client
// called name.
func Request(name string, key *keymem.Key) ([]byte, error) {
	s, err := signer(key)
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, s)
}

// Pair returns the chain (DER, the client's own first) with its key, or an error
// if they do not belong together.
func Pair(chain [][]byte, key *keymem.Key) (tls.Certificate, error) {
	if len(chain) == 0 {
		return tls.Certificate{}, errs.New(errs.Invalid, "there is no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return tls.Certificate{}, errs.New(errs.Invalid, "the certificate cannot be read: %w", err)
	}
	s, err := signer(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	public, ok := s.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return tls.Certificate{}, errs.New(errs.Invalid, "certificate and private key do not belong together").
			WithHint("give the certificate that was made for this key")
	}
	return tls.Certificate{Certificate: chain, PrivateKey: s, Leaf: leaf}, nil
}

// ParseChain returns the certificates (DER) in a PEM file, one or more.
func ParseChain(text []byte) ([][]byte, error) {
	if len(text) > PEMMax {
		return nil, errs.New(errs.Invalid, "the certificate file has %d bytes, more than %d", len(text), PEMMax)
	}
	var chain [][]byte
	for len(text) > 0 {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, errs.New(errs.Invalid, "the certificate cannot be read: %w", err)
		}
		chain = append(chain, block.Bytes)
	}
	if len(chain) == 0 {
		return nil, errs.New(errs.Invalid, "there is no certificate in PEM").WithHint("it begins with -----BEGIN CERTIFICATE-----")
	}
	return chain, nil
}

// ParseKey returns the private key in a PEM file as PKCS #8, which the caller
// closes. The text stays the caller's, who wipes it. It takes PKCS #8, PKCS #1
// and SEC 1, none of them under a password.
func ParseKey(text []byte) (*keymem.Key, error) {
	invalid := errs.New(errs.Invalid, "there is no private key in PEM, or it is protected by a password").
		WithHint("openssl pkcs8 -topk8 -nocrypt -in KEY -out KEY.pem")
	if len(text) > PEMMax {
		return nil, invalid
	}
	for rest := text; len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		defer keymem.Wipe(block.Bytes)
		private, err := parsePrivate(block)
		if err != nil {
			continue
		}
		der, err := x509.MarshalPKCS8PrivateKey(private)
		if err != nil {
			return nil, invalid
		}
		return keymem.Take(der)
	}
	return nil, invalid
}

func parsePrivate(block *pem.Block) (any, error) {
	switch block.Type {
	case "PRIVATE KEY":
		return x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		return x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		return x509.ParseECPrivateKey(block.Bytes)
	}
	return nil, errors.New("another kind of block")
}
