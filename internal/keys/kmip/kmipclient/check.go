package kmipclient

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/internal/errs"
)

// Problem says why a server cannot be used, in a word for programs.
type Problem string

// The problems, in the order in which they are met.
const (
	AddressUnknown    Problem = "AddressUnknown"    // its name cannot be resolved
	Unreachable       Problem = "Unreachable"       // no connection: refused, or nothing answers
	ProxyFailed       Problem = "ProxyFailed"       // the proxy does not let us through
	NoAnswer          Problem = "NoAnswer"          // it accepts connections and never answers
	NotTLS            Problem = "NotTLS"            // it does not speak our TLS
	ServerUntrusted   Problem = "ServerUntrusted"   // its certificate is another than was trusted
	ServerCertExpired Problem = "ServerCertExpired" // its certificate is the one, but its time is over, or to come
	ClientRefused     Problem = "ClientRefused"     // it does not accept our certificate
	WrongCredentials  Problem = "WrongCredentials"  // it does not know our certificate, or our user name and password
	NotKMIP           Problem = "NotKMIP"           // it answers something else than KMIP
)

// Condition is how a server was found.
type Condition struct {
	Server  string
	Problem Problem // empty if it can be used
	Err     error   // what happened; nil if it can be used

	Connected         bool              // TCP, and the proxy, work
	ClientTrustServer bool              // we trust its certificate
	ServerTrustClient bool              // it accepts our certificate and credential
	Certificate       *x509.Certificate // that it showed, trusted or not; nil if it came to none
}

// Fingerprint is the SHA-256 of a certificate (DER), as people compare it.
type Fingerprint [sha256.Size]byte

// FingerprintOf returns the fingerprint of a certificate.
func FingerprintOf(c *x509.Certificate) Fingerprint { return sha256.Sum256(c.Raw) }

// String returns "sha256:" and 64 hexadecimal digits.
func (f Fingerprint) String() string { return fmt.Sprintf("sha256:%x", f[:]) }

// ParseFingerprint is the reverse of [Fingerprint.String]; it also takes capital
// letters and colons, as other programs print them.
func ParseFingerprint(text string) (Fingerprint, error) {
	var f Fingerprint
	digits, ok := strings.CutPrefix(strings.ToLower(text), "sha256:")
	digits = strings.ReplaceAll(digits, ":", "")
	ok = ok && len(digits) == 2*len(f)
	for i := range f {
		if !ok {
			break
		}
		b, err := strconv.ParseUint(digits[2*i:2*i+2], 16, 8)
		f[i], ok = byte(b), err == nil
	}
	if !ok {
		return f, errs.New(errs.Invalid, "%.100q is no fingerprint of a certificate: it is sha256: and 64 hexadecimal digits", text)
	}
	return f, nil
}

// errUntrusted is a certificate that was not trusted before.
var errUntrusted = errors.New("its certificate is not the one that was trusted")

// Pinned returns a TLS configuration that trusts servers with one of these
// very certificates, within their validity, and no other: what a person
// confirmed is what counts, whoever issued it and for whatever name.
func Pinned(pins ...Fingerprint) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true, // replaced by VerifyConnection
		VerifyConnection: func(cs tls.ConnectionState) error {
			leaf := cs.PeerCertificates[0]
			for _, pin := range pins {
				if pin == FingerprintOf(leaf) {
					return validNow(leaf)
				}
			}
			return fmt.Errorf("%w: it is %s", errUntrusted, FingerprintOf(leaf))
		},
	}
}

func validNow(c *x509.Certificate) error {
	if now := time.Now(); now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return x509.CertificateInvalidError{Cert: c, Reason: x509.Expired, Detail: fmt.Sprintf("it is valid from %s to %s", c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))}
	}
	return nil
}

// Check finds out whether a server, one of Config.Servers, can be used, over a
// connection of its own and within the deadlines of the configuration. It makes
// no key and uses none.
func (c *Client) Check(ctx context.Context, addr string) Condition {
	found := Condition{Server: addr}
	for _, s := range c.servers {
		if s.addr == addr {
			problem, err := c.check(ctx, s, &found)
			found.Problem, found.Err = problem, tell(err)
			return found
		}
	}
	found.Problem, found.Err = AddressUnknown, fmt.Errorf("%s is not a server of key provider %s", addr, c.config.Provider)
	return found
}

func (c *Client) check(ctx context.Context, s *server, found *Condition) (Problem, error) {
	raw, err := c.connect(ctx, s)
	if err != nil {
		return c.connectProblem(err), err
	}
	found.Connected = true
	k, err := c.handshake(ctx, s, raw, c.showing(s, found))
	if err != nil {
		return handshakeProblem(err, found.Certificate != nil), err
	}
	defer k.Close()
	found.ClientTrustServer = true
	// The version is asked for anew, so that something is said in any case.
	fresh := &server{addr: s.addr, host: s.host}
	if _, err = c.negotiate(ctx, fresh, k); err == nil {
		_, err = c.roundTrip(ctx, fresh, k, fresh.version, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionOperations}}, "")
	}
	if err != nil {
		if problem := requestProblem(err); problem != "" {
			return problem, err
		}
	}
	found.ServerTrustClient = true
	return "", nil
}

// showing returns the TLS configuration with a look at the certificate that
// the server shows, before it is judged.
func (c *Client) showing(s *server, found *Condition) *tls.Config {
	config := c.config.TLS.Clone()
	verify, unchained, name := config.VerifyConnection, config.InsecureSkipVerify, config.ServerName
	if name == "" {
		name = s.host
	}
	config.InsecureSkipVerify = true // the chain is verified below
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		found.Certificate = cs.PeerCertificates[0]
		if !unchained {
			others := x509.NewCertPool()
			for _, cert := range cs.PeerCertificates[1:] {
				others.AddCert(cert)
			}
			if _, err := found.Certificate.Verify(x509.VerifyOptions{Roots: config.RootCAs, Intermediates: others, DNSName: name}); err != nil {
				return err
			}
		}
		if verify != nil {
			return verify(cs)
		}
		return nil
	}
	return config
}

func (c *Client) connectProblem(err error) Problem {
	var dns *net.DNSError
	switch {
	case c.config.Proxy != "":
		return ProxyFailed
	case errors.As(err, &dns):
		return AddressUnknown
	}
	return Unreachable
}

func handshakeProblem(err error, shown bool) Problem {
	var invalid x509.CertificateInvalidError
	var authority x509.UnknownAuthorityError
	var hostname x509.HostnameError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return ServerCertExpired
	case errors.Is(err, errUntrusted), errors.As(err, &invalid), errors.As(err, &authority), errors.As(err, &hostname):
		return ServerUntrusted
	case refusedByAlert(err) && shown:
		return ClientRefused
	case timedOut(err):
		return NoAnswer
	}
	return NotTLS
}

// requestProblem returns what an answer, or its lack, says; empty if the
// server is well: it may refuse our question for reasons of its own.
func requestProblem(err error) Problem {
	var refused *KMIPError
	switch {
	case errors.As(err, &refused) && refused.Reason == kmip.ResultReasonAuthenticationNotSuccessful:
		return WrongCredentials
	case errors.As(err, &refused):
		return ""
	case timedOut(err):
		return NoAnswer
	case refusedByAlert(err), brokenOff(err):
		return ClientRefused
	}
	return NotKMIP
}

// refusedByAlert reports whether the peer ended the connection with an alert.
// Once it has shown its own certificate, ours is what it dislikes; in TLS 1.3
// that comes with the first answer.
func refusedByAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// brokenOff reports whether the peer closed the connection instead of
// answering, as some do that do not accept a certificate.
func brokenOff(err error) bool {
	var op *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &op) && !op.Timeout()
}

func timedOut(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}
