// Package pki is the certificate authority of an installation: it knows who is
// a controller, a host or a client by certificates that it issued itself, and
// brings in new hosts by one-time join tokens.
//
// Identity is a URI in the certificate, strongroom://CLUSTER/ROLE/NAME, and
// nothing else: names and addresses may change. TLS is 1.3 only, and between
// roles always mutual. All keys are ECDSA P-256.
//
// The CA's private key is in a file of mode 0600, sealed by the [Sealer] that
// the role supplies; in memory it is a plain Go value, as crypto/x509 needs it.
// It is no data key: who has it can pretend to be a host, not read a disk.
//
// All types are safe for concurrent use. Formats: docs/spec/join-token.md.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

// Role is what the holder of a certificate is.
type Role string

// The roles.
const (
	Controller Role = "controller"
	Host       Role = "host"
	Client     Role = "client" // a program or person that uses the API
	KMS        Role = "kms"
)

// Identity is who the holder of a certificate is.
type Identity struct {
	Cluster string // the installation's or the cluster's id
	Role    Role
	Name    string // a host's id, a client's name
}

// String returns the identity's URI.
func (id Identity) String() string {
	return "strongroom://" + id.Cluster + "/" + string(id.Role) + "/" + id.Name
}

// Check reports an unknown role, or a part that cannot stand in a URI.
func (id Identity) Check() error {
	switch id.Role {
	case Controller, Host, Client, KMS:
	default:
		return errs.New(errs.Invalid, "no role %q", id.Role)
	}
	if !isLabel(id.Cluster) || !isLabel(id.Name) {
		return errs.New(errs.Invalid, "%q is no identity: its parts take letters, digits, '.', '_' and '-'", id.String())
	}
	return nil
}

// isLabel reports whether s can stand in an identity's URI without escapes.
func isLabel(s string) bool {
	if s == "" || len(s) > 80 || s == "." || s == ".." {
		return false
	}
	for _, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !letter && !strings.ContainsRune("._-", r) {
			return false
		}
	}
	return true
}

// ParseIdentity is the reverse of [Identity.String].
func ParseIdentity(uri string) (Identity, error) {
	rest, ok := strings.CutPrefix(uri, "strongroom://")
	parts := strings.Split(rest, "/")
	if !ok || len(uri) > 300 || len(parts) != 3 {
		return Identity{}, errs.New(errs.Denied, "%.300q is no identity", uri)
	}
	id := Identity{Cluster: parts[0], Role: Role(parts[1]), Name: parts[2]}
	if id.Check() != nil {
		return Identity{}, errs.New(errs.Denied, "%q is no identity", uri)
	}
	return id, nil
}

// IdentityOf returns the identity in a certificate, which must have exactly one
// URI. It does not verify the certificate.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, errs.New(errs.Denied, "the certificate has %d URIs, not one identity", len(cert.URIs))
	}
	return ParseIdentity(cert.URIs[0].String())
}

// Sealer protects the CA's private key at rest. Name says what is sealed and is
// authenticated: what was sealed under another name does not open.
type Sealer interface {
	Seal(name string, plaintext []byte) ([]byte, error)
	Open(name string, sealed []byte) ([]byte, error)
}

const (
	caLife = 20 * 365 * 24 * time.Hour
	// CertLife is the life of issued certificates; they are renewed when two
	// thirds have passed.
	CertLife = 90 * 24 * time.Hour
	// backdate tolerates clocks that are behind.
	backdate = 10 * time.Minute

	caCertFile = "ca.pem"
	caKeyFile  = "ca.key.sealed"
	caKeyName  = "strongroom/ca-key"
	maxCAFile  = 64 << 10
	maxCSR     = 16 << 10
)

// CA is a certificate authority.
type CA struct {
	cert *x509.Certificate
	key  crypto.Signer
	now  func() time.Time
}

// OpenCA opens the CA in dir, or makes one called name if there is none. A
// directory that has a certificate but no key, or a key that does not open or
// fit, is an error: a CA is never replaced.
func OpenCA(dir, name string, sealer Sealer) (*CA, error) {
	certPath, keyPath := filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile)
	_, certErr := os.Stat(certPath)
	if errors.Is(certErr, os.ErrNotExist) {
		// The certificate is written last: without it there is no CA yet, and a
		// key that a crash left is no use to anybody.
		if err := makeCA(dir, name, sealer); err != nil {
			return nil, fmt.Errorf("cannot make certificate authority: %w", err)
		}
	}
	ca, err := loadCA(certPath, keyPath, sealer)
	if err != nil {
		return nil, fmt.Errorf("cannot open certificate authority in %s: %w", dir, err)
	}
	return ca, nil
}

func makeCA(dir, name string, sealer Sealer) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "Strongroom CA " + name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return err
	}
	plain, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	defer clear(plain)
	return writeCA(dir, der, plain, sealer)
}

// InstallCA puts a CA that is another node's too into dir, which has none: its
// certificate, DER, and its key, PKCS #8, which stays the caller's.
func InstallCA(dir string, certificate, key []byte, sealer Sealer) (*CA, error) {
	certPath, keyPath := filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile)
	if _, err := os.Stat(certPath); !errors.Is(err, os.ErrNotExist) {
		return nil, errs.New(errs.Exists, "cannot install certificate authority: %s is there already", certPath)
	}
	err := writeCA(dir, certificate, key, sealer)
	if err != nil {
		return nil, fmt.Errorf("cannot install certificate authority: %w", err)
	}
	ca, err := loadCA(certPath, keyPath, sealer)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot install certificate authority: %w", err), os.Remove(certPath))
	}
	return ca, nil
}

// PrivateKey returns the CA's key, PKCS #8, for another node that is to have the
// same CA: see [InstallCA]. The caller wipes it.
func (ca *CA) PrivateKey() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(ca.key) }

// writeCA writes the certificate last: without it there is no CA yet, and a key
// that a crash left is no use to anybody.
func writeCA(dir string, certificate, key []byte, sealer Sealer) error {
	sealed, err := sealer.Seal(caKeyName, key)
	if err != nil {
		return fmt.Errorf("cannot seal key: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, caKeyFile), sealed); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, caCertFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}))
}

func loadCA(certPath, keyPath string, sealer Sealer) (*CA, error) {
	certPEM, err := readFile(certPath)
	if err != nil {
		return nil, err
	}
	cert, err := ParseCertificatePEM(certPEM)
	if err != nil {
		return nil, err
	}
	sealed, err := readFile(keyPath)
	if err != nil {
		return nil, err
	}
	plain, err := sealer.Open(caKeyName, sealed)
	if err != nil {
		return nil, fmt.Errorf("cannot unseal key: %w", err)
	}
	defer clear(plain)
	k, err := x509.ParsePKCS8PrivateKey(plain)
	if err != nil {
		return nil, errs.New(errs.Corrupt, "the key is damaged")
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) || !cert.IsCA {
		return nil, errs.New(errs.Corrupt, "key and certificate do not fit")
	}
	return &CA{cert: cert, key: key, now: time.Now}, nil
}

// Certificate returns the CA's certificate.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Pool returns a pool with the CA's certificate alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Fingerprint is how a joining host knows the CA: SHA-256 of the certificate's
// SubjectPublicKeyInfo, so that it outlives a renewal of the certificate.
type Fingerprint [sha256.Size]byte

// FingerprintOf returns the fingerprint of a certificate.
func FingerprintOf(cert *x509.Certificate) Fingerprint {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

// IssueFromCSR signs the public key in a certificate request (PKCS#10, DER),
// for id. Of the request only the key counts, and that it was signed with it:
// subject, names and extensions are the CA's to say. names are DNS names and IP
// addresses, which a server needs for clients that know it by address.
func (ca *CA) IssueFromCSR(csr []byte, id Identity, names []string) (*x509.Certificate, error) {
	pub, err := requested(csr)
	if err != nil {
		return nil, errs.Wrap(err, "cannot issue certificate")
	}
	return ca.issue(pub, id, names, CertLife)
}

// requested returns the public key of a certificate request, which was signed with it.
func requested(csr []byte) (crypto.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, errs.New(errs.Invalid, "the request has %d bytes, limit %d", len(csr), maxCSR)
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err == nil {
		err = req.CheckSignature()
	}
	if err != nil {
		return nil, errs.New(errs.Invalid, "request: %w", err)
	}
	return req.PublicKey, nil
}

// SignClient signs the public key in a certificate request, RSA with 2048 bits or more,
// ECDSA or Ed25519, for a client that is no part of an installation: it has no
// [Identity], and no part takes it for another. name is its common name; of the request
// nothing else counts.
func (ca *CA) SignClient(csr []byte, name string, life time.Duration) (*x509.Certificate, error) {
	pub, err := requested(csr)
	if key, ok := pub.(*rsa.PublicKey); ok && (key.N.BitLen() < 2048 || key.N.BitLen() > 8192) {
		err = errs.New(errs.Invalid, "an RSA key of %d bits: it has 2048 to 8192", key.N.BitLen())
	}
	if err != nil {
		return nil, errs.Wrap(err, "cannot issue certificate")
	}
	return ca.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, pub, life)
}

// IssueLong signs pub for id with a life of its own, for servers whose clients
// keep the very certificate and ask a person when it changes. names as in
// [CA.IssueFromCSR].
func (ca *CA) IssueLong(pub crypto.PublicKey, id Identity, names []string, life time.Duration) (*x509.Certificate, error) {
	return ca.issue(pub, id, names, life)
}

func (ca *CA) issue(pub crypto.PublicKey, id Identity, names []string, life time.Duration) (*x509.Certificate, error) {
	if key, ok := pub.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return nil, errs.New(errs.Invalid, "cannot issue certificate: its key must be ECDSA P-256")
	}
	if err := id.Check(); err != nil {
		return nil, errs.Wrap(err, "cannot issue certificate")
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, errs.New(errs.Invalid, "cannot issue certificate: %w", err)
	}
	tmpl := &x509.Certificate{
		Subject:     pkix.Name{CommonName: string(id.Role) + " " + id.Name},
		URIs:        []*url.URL{uri},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if id.Role != Client {
		tmpl.ExtKeyUsage = append(tmpl.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		for _, n := range names {
			if ip := net.ParseIP(n); ip != nil {
				tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
			} else {
				tmpl.DNSNames = append(tmpl.DNSNames, n)
			}
		}
	}
	return ca.sign(tmpl, pub, life)
}

// sign completes tmpl, whose subject, names and extended usages are set, and signs it.
func (ca *CA) sign(tmpl *x509.Certificate, pub crypto.PublicKey, life time.Duration) (*x509.Certificate, error) {
	now := ca.now()
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = serial(), now.Add(-backdate), now.Add(life)
	if tmpl.NotAfter.After(ca.cert.NotAfter) {
		tmpl.NotAfter = ca.cert.NotAfter
	}
	tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("cannot issue certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

func serial() *big.Int {
	// 127 bits: positive in DER, and never met twice.
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return n.Add(n, big.NewInt(1))
}

// NewKey returns a new private key for a certificate.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// NewCSR returns a certificate request for key, PKCS#10 DER.
func NewCSR(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// ParseCertificatePEM returns the one certificate in b.
func ParseCertificatePEM(b []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" || len(strings.TrimSpace(string(rest))) != 0 {
		return nil, errs.New(errs.Corrupt, "not one PEM certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, errs.New(errs.Corrupt, "certificate: %w", err)
	}
	return cert, nil
}

// readFile reads a small file.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxCAFile {
		return nil, errs.New(errs.Corrupt, "%s has %d bytes, limit %d", path, info.Size(), maxCAFile)
	}
	return os.ReadFile(path)
}
