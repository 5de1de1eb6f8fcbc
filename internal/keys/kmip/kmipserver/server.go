// Package kmipserver answers KMIP 1.0 to 1.4 requests over TLS (OASIS Key
// Management Interoperability Protocol Specification, versions 1.0 to 1.4) for
// the objects of a [Store].
//
// Codec, messages and most payloads are those of github.com/ovh/kmip-go.
// Listener, limits, batches, versions and the meaning of every operation are
// this package's own.
//
// Invariants: nothing is handed to the codec that [kmipwire.Check] has not found
// well formed and within limits; a panic ends one request, never the server; a
// client sees its own account's objects only; key material is in keymem, and
// what the codec copies elsewhere is wiped when the answer has been sent.
//
// A [Server] is safe for concurrent use.
package kmipserver

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"golang.org/x/time/rate"

	"strongroom/internal/admission"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/kmip/kmipwire"
)

// Limits bounds what clients can make a server do. A zero field means its
// default.
type Limits struct {
	Connections int           // open at once, 512; one more is closed unanswered
	PerAddress  int           // of these from one network address, 256
	Handshake   time.Duration // for the TLS handshake, 10 s
	Idle        time.Duration // between two requests of a connection, 15 min
	Request     time.Duration // from a request's first byte to its last, for sending the answer, and for a client to show who it is, 30 s
	Message     int           // bytes of a message with its header, 1 MiB
	Depth       int           // nested structures, 16
	Values      int           // values in a message, 8192
	Batch       int           // items of a batch, 64
	Answer      int           // bytes of an answer, 4 MiB
}

func (l Limits) withDefaults() Limits {
	orElse := func(n *int, d int) {
		if *n == 0 {
			*n = d
		}
	}
	orWait := func(n *time.Duration, d time.Duration) {
		if *n == 0 {
			*n = d
		}
	}
	orElse(&l.Connections, 512)
	orElse(&l.PerAddress, 256)
	orWait(&l.Handshake, 10*time.Second)
	orWait(&l.Idle, 15*time.Minute)
	orWait(&l.Request, 30*time.Second)
	orElse(&l.Message, 1<<20)
	orElse(&l.Depth, 16)
	orElse(&l.Values, 8192)
	orElse(&l.Batch, 64)
	orElse(&l.Answer, 4<<20)
	return l
}

func (l Limits) wire() kmipwire.Limits {
	return kmipwire.Limits{Message: l.Message, Depth: l.Depth, Values: l.Values}
}

// Authenticator tells who sends a request: the client with this TLS state and
// these credentials, which may be none. It is called once a request. An error
// refuses the request with Authentication Not Successful; its text is logged and
// not sent. With a [Refusal], which is sent, it may return the client, for the
// record.
type Authenticator func(ctx context.Context, state tls.ConnectionState, credentials []kmip.Credential) (Client, error)

// Config is what a server needs.
type Config struct {
	Store        Store
	Authenticate Authenticator
	TLS          *tls.Config // cloned; see [TLSConfig]
	Limits       Limits
	Log          *slog.Logger
	Now          func() time.Time // the clock; nil means [time.Now]
	Vendor       string           // Vendor Identification of Query; empty means "strongroom"
	// Observe is told of each operation before its answer is sent, of some of a batch
	// together; an error fails the operations, which may have been done by then. Nil
	// observes nothing.
	Observe func(ctx context.Context, events ...Event) error
}

// Server answers KMIP requests. Make it with [New].
type Server struct {
	store        Store
	authenticate Authenticator
	tls          *tls.Config
	limits       Limits
	log          *slog.Logger
	now          func() time.Time
	vendor       string
	observe      func(ctx context.Context, events ...Event) error
	operations   map[kmip.Operation]operation
}

// New returns a server of c. Store, Authenticate, TLS and Log must be set.
func New(c Config) (*Server, error) {
	if c.Store == nil || c.Authenticate == nil || c.TLS == nil || c.Log == nil {
		return nil, errors.New("cannot make a KMIP server: store, authenticator, TLS configuration and log must be given")
	}
	s := &Server{
		store: c.Store, authenticate: c.Authenticate, tls: c.TLS.Clone(), limits: c.Limits.withDefaults(),
		log: c.Log, now: c.Now, vendor: c.Vendor, observe: c.Observe, operations: operations(),
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.observe == nil {
		s.observe = func(context.Context, ...Event) error { return nil }
	}
	if s.vendor == "" {
		s.vendor = "strongroom"
	}
	return s, nil
}

// acceptPause is how long the server waits for a descriptor when it has none.
const acceptPause = 50 * time.Millisecond

// Serve accepts connections from l until ctx is done, then closes l and all
// connections, waits for their requests and returns nil. It returns an error
// if accepting fails for another reason. l must be a plain TCP or unix
// listener: Serve does the TLS handshakes, within their deadline.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	var connections sync.WaitGroup
	defer connections.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
	}()
	say := rate.Sometimes{Interval: time.Second} // a flood must not fill the log
	slots := admission.NewSlots(s.limits.Connections, s.limits.PerAddress)
	for {
		raw, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			// Descriptors and memory come back; a server that ended would not.
			if passing := (interface{ Temporary() bool })(nil); errors.As(err, &passing) && passing.Temporary() {
				say.Do(func() { s.log.LogAttrs(ctx, slog.LevelError, "kmip connections not accepted", slog.Any("err", err)) })
				select {
				case <-ctx.Done():
				case <-time.After(acceptPause):
				}
				continue
			}
			return fmt.Errorf("cannot accept KMIP connections: %w", err)
		}
		leave, ok := slots.Enter(raw.RemoteAddr().String())
		if !ok {
			say.Do(func() {
				s.log.LogAttrs(ctx, slog.LevelWarn, "kmip connection refused: too many are open", slog.String("peer", raw.RemoteAddr().String()))
			})
			raw.Close()
			continue
		}
		connections.Go(func() {
			defer leave()
			s.serveConnection(ctx, raw)
		})
	}
}

// serveConnection does the handshake and answers requests one after another.
// A peer that closes, before or after the handshake, is not worth a warning:
// clients test reachability that way.
func (s *Server) serveConnection(ctx context.Context, raw net.Conn) {
	log := s.log.With(slog.String("peer", raw.RemoteAddr().String()))
	conn := tls.Server(raw, s.tls)
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer func() {
		if p := recover(); p != nil {
			log.LogAttrs(ctx, slog.LevelError, "kmip connection closed: the server panicked", slog.Any("err", p), slog.String("stack", string(debug.Stack())))
		}
		stop()
		conn.NetConn().SetDeadline(time.Now().Add(time.Second)) // for the closing alert
		conn.Close()
	}()

	handshake, cancel := context.WithTimeout(ctx, s.limits.Handshake)
	err := conn.HandshakeContext(handshake)
	cancel()
	if err != nil {
		log.LogAttrs(ctx, slog.LevelDebug, "kmip handshake failed", slog.Any("err", err))
		return
	}
	c := &connection{state: conn.ConnectionState(), peer: conn.RemoteAddr().String()}
	in := bufio.NewReaderSize(conn, 4096)
	until := time.Now().Add(s.limits.Request)
	for ctx.Err() == nil {
		idle := until
		if c.known {
			now := time.Now()
			idle, until = now.Add(s.limits.Idle), now.Add(s.limits.Request)
		}
		conn.SetReadDeadline(idle)
		if _, err := in.Peek(1); err != nil {
			return
		}
		conn.SetReadDeadline(time.Now().Add(s.limits.Request))
		message, err := kmipwire.Read(in, kmip.TagRequestMessage, s.limits.wire())
		if err == nil {
			err = s.exchange(ctx, c, conn, message)
			keymem.Wipe(message)
		} else if answer, ok := s.answerMalformed(err); ok {
			conn.SetWriteDeadline(time.Now().Add(s.limits.Request))
			conn.Write(answer)
			if !errors.Is(err, kmipwire.ErrUnframed) {
				err = nil // the next message can be read
			}
		}
		if err != nil {
			log.LogAttrs(ctx, slog.LevelDebug, "kmip connection closed", slog.Any("err", err))
			return
		}
	}
}

// connection is who a client's connection is from, and what is kept for it.
type connection struct {
	state tls.ConnectionState
	peer  string // network address, for the record
	known bool   // who sent the last request; strangers do not keep connections
	next  page   // of its last Locate; used by one request at a time
}

var errUnavailable = errors.New("the server cannot answer now")

// exchange answers one message, unless that is impossible now.
func (s *Server) exchange(ctx context.Context, c *connection, conn *tls.Conn, message []byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.limits.Request)
	defer cancel()
	answer := s.answer(ctx, c, message)
	if answer == nil {
		return errUnavailable
	}
	defer keymem.Wipe(answer)
	conn.SetWriteDeadline(time.Now().Add(s.limits.Request))
	_, err := conn.Write(answer)
	return err
}

// TLSConfig returns the configuration of a KMIP server with certificate and
// the authorities of its clients in clients (KMIP Profiles 1.4, section 3.1):
// TLS 1.2 and 1.3, client certificates required. With legacy, it also offers
// TLS_RSA_WITH_AES_128_CBC_SHA256, without forward secrecy, which old clients
// need because it is the one suite mandatory for KMIP 1.0 to 1.2.
func TLSConfig(certificate tls.Certificate, clients *x509.CertPool, legacy bool) *tls.Config {
	c := &tls.Config{
		Certificates: []tls.Certificate{certificate},
		ClientCAs:    clients,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS12,
	}
	if legacy {
		for _, suite := range tls.CipherSuites() {
			c.CipherSuites = append(c.CipherSuites, suite.ID)
		}
		c.CipherSuites = append(c.CipherSuites, tls.TLS_RSA_WITH_AES_128_CBC_SHA256)
	}
	return c
}
