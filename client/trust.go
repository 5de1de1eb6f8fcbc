package client

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"net"
	"strings"

	"strongroom/internal/errs"
)

// fingerprintPrefix names the hash, so that another one can follow some day.
const fingerprintPrefix = "sha256:"

// Fingerprint returns the name by which a person or a join token knows a
// certificate authority: "sha256:" and, in hex, the SHA-256 of its
// SubjectPublicKeyInfo, so that it outlives a renewal of the certificate.
func Fingerprint(ca *x509.Certificate) string {
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	return fingerprintPrefix + hex.EncodeToString(sum[:])
}

// FetchCA asks the https server for its certificate authority: the last
// certificate of the chain that it presents, which must have issued the rest.
// Nothing proves that it is the right one: the caller must compare its
// [Fingerprint] with one from a trusted source, or ask a person to.
//
// It returns the certificate and its PEM.
func FetchCA(ctx context.Context, server string) (*x509.Certificate, []byte, error) {
	host, err := serverHost(server)
	if err != nil {
		return nil, nil, err
	}
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "server %q: %w", server, err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: name,
		// Whom to trust is what this asks for; nothing is sent over the
		// connection, and VerifyCA below checks the chain.
		InsecureSkipVerify: true, //nolint:gosec
		NextProtos:         []string{"h2"},
	}}
	conn, err := d.DialContext(ctx, "tcp", host)
	if err != nil {
		return nil, nil, errs.New(errs.Unavailable, "cannot reach %s: %w", server, err)
	}
	chain := conn.(*tls.Conn).ConnectionState().PeerCertificates
	conn.Close()

	ca := chain[len(chain)-1] // a TLS 1.3 server always presents one
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	opts := x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: name}
	if !ca.IsCA {
		return nil, nil, errs.New(errs.Denied, "server %s does not present its certificate authority", server).
			WithHint("copy the controller's ca.pem and use: strongroom login --server %s --ca ca.pem", server)
	}
	if _, err := chain[0].Verify(opts); err != nil {
		return nil, nil, errs.New(errs.Denied, "cannot trust %s: %w", server, err)
	}
	if err := checkRole(chain[0]); err != nil {
		return nil, nil, errs.Wrap(err, "cannot trust %s", server)
	}
	return ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), nil
}

// ParseFingerprint checks that s is a fingerprint and returns it in the form
// of [Fingerprint]: capital letters and colons between bytes are accepted.
func ParseFingerprint(s string) (string, error) {
	text, ok := strings.CutPrefix(strings.ToLower(s), fingerprintPrefix)
	sum, err := hex.DecodeString(strings.ReplaceAll(text, ":", ""))
	if !ok || err != nil || len(sum) != sha256.Size {
		return "", errs.New(errs.Invalid, "fingerprint %q: want %q and 64 hex digits", s, fingerprintPrefix)
	}
	return fingerprintPrefix + hex.EncodeToString(sum), nil
}

// checkRole refuses a server that proves to be something other than a
// controller or a key management server: hosts have certificates of the
// controller's authority, and a host must not be able to pose as the controller.
// A certificate that names no role is from an authority that the user chose to
// trust.
func checkRole(cert *x509.Certificate) error {
	for _, id := range cert.URIs {
		if id.Scheme == "strongroom" && !strings.HasPrefix(id.Path, "/controller/") && !strings.HasPrefix(id.Path, "/kms/") {
			return errs.New(errs.Denied, "it is %s, not a controller or a key management server", id)
		}
	}
	return nil
}
