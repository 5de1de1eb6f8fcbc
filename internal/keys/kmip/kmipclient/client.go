// Package kmipclient asks the KMIP servers of one standard key provider for
// keys (KMIP 1.0 to 1.4, the highest that a server and we have in common).
//
// The servers of a provider hold the same keys. Each request goes to the first
// in order that works: one that could not be reached is passed over for
// Config.Retry, then preferred again. All failures are reported together.
//
// A request whose answer was lost may have been done. What only reads is asked
// again; what changes is settled first, by asking what is: a key is created
// under a Name of its own by which it is found again, so that no second one is
// made and none is left over unknown. If no server can tell, the error is an
// [UnknownOutcome].
//
// Key material and the password are in keymem; buffers they passed through are
// wiped. A [Client] is safe for concurrent use.
package kmipclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// Config is a provider's way to its servers. A zero duration means its
// default.
type Config struct {
	Provider string      // name, for errors
	Servers  []string    // "host:port" in order of preference, one or more
	TLS      *tls.Config // authorities and client certificate; cloned, TLS 1.2 at least
	// LegacySuite also offers TLS_RSA_WITH_AES_128_CBC_SHA256, without forward
	// secrecy, for old appliances.
	LegacySuite bool
	User        string      // of the user name and password credential; empty for none
	Password    *keymem.Key // cloned; may be nil
	Proxy       string      // "host:port" of an HTTP proxy that allows CONNECT; empty for none

	Connect   time.Duration // for TCP and proxy, 5 s
	Handshake time.Duration // for TLS, 5 s
	Request   time.Duration // from sending to the whole answer, 10 s
	Retry     time.Duration // how long a failed server is passed over, 30 s
	Idle      time.Duration // how long an unused connection is kept, 30 s
}

// Client is a pool of connections to a provider's servers. Make it with [New]
// and close it.
type Client struct {
	config   Config
	password *keymem.Key
	servers  []*server
}

// server is what is known of one server.
type server struct {
	addr string
	host string

	mu      sync.Mutex
	failed  time.Time            // when it could last not be reached; zero if it works
	version kmip.ProtocolVersion // negotiated; zero if not yet
	idle    []*conn
	closed  bool
}

const idleMax = 8 // connections kept per server

// New returns a client. No connection is made yet.
func New(c Config) (*Client, error) {
	if c.TLS == nil || len(c.Servers) == 0 {
		return nil, errors.New("cannot make a KMIP client: servers and a TLS configuration must be given")
	}
	if strings.ContainsRune(c.User, 0) {
		return nil, errors.New("cannot make a KMIP client: the user name holds a zero byte")
	}
	for d, def := range map[*time.Duration]time.Duration{
		&c.Connect: 5 * time.Second, &c.Handshake: 5 * time.Second, &c.Request: 10 * time.Second,
		&c.Retry: 30 * time.Second, &c.Idle: 30 * time.Second,
	} {
		if *d == 0 {
			*d = def
		}
	}
	c.TLS = c.TLS.Clone()
	c.TLS.MinVersion = max(c.TLS.MinVersion, tls.VersionTLS12)
	if c.LegacySuite {
		for _, suite := range tls.CipherSuites() {
			c.TLS.CipherSuites = append(c.TLS.CipherSuites, suite.ID)
		}
		c.TLS.CipherSuites = append(c.TLS.CipherSuites, tls.TLS_RSA_WITH_AES_128_CBC_SHA256)
	}
	client := &Client{config: c}
	for _, addr := range c.Servers {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, fmt.Errorf("cannot make a KMIP client: server %q: %w", addr, err)
		}
		client.servers = append(client.servers, &server{addr: addr, host: host})
	}
	if c.Password != nil {
		var err error
		if client.password, err = c.Password.Clone(); err != nil {
			return nil, err
		}
	}
	return client, nil
}

// Close closes all idle connections and releases the password. Requests must
// have ended. It is idempotent.
func (c *Client) Close() error {
	for _, s := range c.servers {
		s.mu.Lock()
		s.closed = true
		for _, conn := range s.idle {
			conn.Close()
		}
		s.idle = nil
		s.mu.Unlock()
	}
	return c.password.Close()
}

// KMIPError is a server's refusal.
type KMIPError struct {
	Server    string
	Operation kmip.Operation
	Key       string // the key's identifier or name; may be empty
	Reason    kmip.ResultReason
	Message   string // the server's own words
}

// Error implements error.
func (e *KMIPError) Error() string {
	key := ""
	if e.Key != "" {
		key = " of key " + e.Key
	}
	return fmt.Sprintf("%s: %s%s: %s: %s", e.Server, ttlv.EnumStr(e.Operation), key, ttlv.EnumStr(e.Reason), e.Message)
}

// kind is the class of the error for callers across roles.
func (e *KMIPError) kind() errs.Kind {
	switch e.Reason {
	case kmip.ResultReasonItemNotFound:
		return errs.NotFound
	case kmip.ResultReasonPermissionDenied, kmip.ResultReasonAuthenticationNotSuccessful:
		return errs.Denied
	case kmip.ResultReasonObjectArchived, kmip.ResultReasonIllegalOperation:
		return errs.InvalidState
	}
	return errs.Other
}

// UnknownOutcome is a change whose answer was lost and that no server could
// tell about since. Key is the identifier, or the Name of a key that may have
// been created; who repeats the request, or looks for Key later, finds out.
type UnknownOutcome struct {
	Operation kmip.Operation
	Key       string
	Err       error
}

// Error implements error.
func (e *UnknownOutcome) Error() string {
	return fmt.Sprintf("%s of key %s may have been done: its answer was lost: %v", ttlv.EnumStr(e.Operation), e.Key, e.Err)
}

// Unwrap returns why nobody could tell.
func (e *UnknownOutcome) Unwrap() error { return e.Err }

// errLost is a transport failure after a request was sent.
var errLost = errors.New("the answer was lost")

// lostError is an errLost with its cause.
type lostError struct{ cause error }

func lose(cause error) error { return &lostError{cause: cause} }

func (e *lostError) Error() string        { return errLost.Error() + ": " + e.cause.Error() }
func (e *lostError) Unwrap() error        { return e.cause }
func (e *lostError) Is(target error) bool { return target == errLost }

// order returns the servers to try: those that work in order of preference,
// then the others, so that a request never fails for being early.
func (c *Client) order() []*server {
	var working, passed []*server
	for _, s := range c.servers {
		s.mu.Lock()
		down := !s.failed.IsZero() && time.Since(s.failed) < c.config.Retry
		s.mu.Unlock()
		if down {
			passed = append(passed, s)
		} else {
			working = append(working, s)
		}
	}
	return append(working, passed...)
}

// try sends one request to the servers in order until one answers. With lost,
// it stops at the first whose answer was lost and returns an error that is
// errLost; else the request only reads, and is sent again.
func (c *Client) try(ctx context.Context, p kmip.OperationPayload, key string, lost bool) (kmip.OperationPayload, error) {
	var failures []error
	for _, s := range c.order() {
		out, err := c.exchange(ctx, s, p, key, lost)
		var refused *KMIPError
		if err == nil || errors.As(err, &refused) {
			return out, err
		}
		failures = append(failures, fmt.Errorf("%s: %w", s.addr, err))
		if ctx.Err() != nil || lost && errors.Is(err, errLost) {
			break
		}
	}
	return nil, errors.Join(failures...)
}

// describe puts an operation's name in front of err and gives it a kind.
func (c *Client) describe(doing string, err error) error {
	if err == nil {
		return nil
	}
	kind := errs.Unavailable
	reason := ""
	var refused *KMIPError
	if errors.As(err, &refused) {
		kind, reason = refused.kind(), ttlv.EnumStr(refused.Reason)
	}
	if errors.Is(err, context.Canceled) {
		kind = errs.Canceled
	}
	return errs.New(kind, "cannot %s at key provider %s: %w", doing, c.config.Provider, tell(err)).WithReason(reason)
}

// tell returns err on one line of printable characters, of at most errorMax: servers,
// their certificates, and proxies have a say in it.
func tell(err error) error {
	if err == nil {
		return nil
	}
	return &told{text: printable(strings.ReplaceAll(err.Error(), "\n", "; "), errorMax), err: err}
}

// told is what tell returns.
type told struct {
	text string
	err  error
}

func (t *told) Error() string { return t.text }
func (t *told) Unwrap() error { return t.err }
