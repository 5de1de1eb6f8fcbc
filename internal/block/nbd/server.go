// Package nbd serves block devices by the NBD protocol and is a client of it:
// [Server] is how QEMU reaches a volume, [Client] and [Pipeline] are how tests,
// the load generator and storage engines reach one.
//
// It implements the fixed newstyle protocol as doc/proto.md of the
// NetworkBlockDevice/nbd project has it: LIST, INFO, GO, EXPORT_NAME, ABORT, STARTTLS,
// structured replies, base:allocation, and all commands but RESIZE.
//
// How a connection is served: a few workers take turns at reading its requests.
// The one whose turn it is serves what it has read itself as long as that is
// quick, and gathers the replies into one write; where the device is slow, or
// a request long, it first passes the turn on, so that requests run in
// parallel. Nothing is allocated per request and no goroutine started.
//
// Invariants: what a client sends never costs more than its connection's own
// workers and buffers; a connection always has one of each, so that no client
// can starve another; a reply is sent only after the device has done what it
// says, and after a Flush where FUA asked for it.
//
// All exported types are safe for concurrent use, except Pipeline.
package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config holds the limits of a Server. Zero fields have the stated defaults.
type Config struct {
	// Log receives one line for each connection that ends otherwise than by
	// the client's wish, and for the first failed request of each. Default:
	// slog.Default().
	Log *slog.Logger
	// AllowedUIDs are the users who may connect to a unix socket, besides root
	// and the user of this process.
	AllowedUIDs []uint32
	// TLS is for clients on TCP, who must show a certificate that it verifies:
	// [tls.RequireAndVerifyClientCert], and TLS 1.3. Without it there is no service
	// on TCP.
	TLS *tls.Config
	// MaxConnections is the number of connections at a time. Of those that have not
	// yet chosen an export, and so not yet shown a certificate, one address on TCP
	// has at most a quarter. Default 64.
	MaxConnections int
	// MaxWorkers is the number of requests that one connection has in work at
	// a time. Default 16.
	MaxWorkers int
	// MaxBuffers limits the bytes of data in work on all connections together.
	// Every connection has 256 KiB nevertheless. Default 64 MiB.
	MaxBuffers int64
	// HandshakeTimeout limits the time from accepting a connection until its
	// client has chosen an export. Default 10 s.
	HandshakeTimeout time.Duration
}

func (c *Config) setDefaults() {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 64
	}
	if c.MaxWorkers == 0 {
		c.MaxWorkers = 16
	}
	if c.MaxBuffers == 0 {
		c.MaxBuffers = 64 << 20
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
}

// ErrStopped: the server was shut down.
var ErrStopped = errors.New("server was shut down")

// Server serves exports to NBD clients.
type Server struct {
	config Config
	pool   pool

	mu      sync.Mutex // guards the fields below
	exports map[string]*export
	conns   map[*conn]struct{}
	serving map[net.Listener]struct{}
	stopped bool
	idle    chan struct{} // closed when stopped and without connections
}

// NewServer returns a server without exports. It uses nothing until Serve.
func NewServer(c Config) *Server {
	c.setDefaults()
	return &Server{
		config:  c,
		pool:    pool{limit: int(c.MaxBuffers / pieceSize)},
		exports: map[string]*export{},
		conns:   map[*conn]struct{}{},
		serving: map[net.Listener]struct{}{},
		idle:    make(chan struct{}),
	}
}

// Serve accepts clients from l until Shutdown is called or ctx ends, then
// returns nil; it returns the error if accepting fails. When ctx ends, it breaks
// the connections that it accepted. In each case it closes l and returns after
// these connections and all their requests have ended. It returns [ErrStopped]
// after a Shutdown.
//
// l is a unix socket's, which tells who is at the other end, or TCP's, where
// clients need a certificate and so the server needs Config.TLS. They begin TLS by
// the STARTTLS option and are offered nothing before that.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	identify, err := s.identify(l)
	if err != nil {
		return fmt.Errorf("cannot serve NBD on %s %s: %w", l.Addr().Network(), l.Addr(), err)
	}
	if !s.addListener(l) {
		return ErrStopped
	}
	defer s.removeListener(l)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()

	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		sock, err := l.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil || s.isStopped():
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED):
			// Running out of descriptors passes; those who are connected
			// must not suffer from it.
			s.config.Log.LogAttrs(ctx, slog.LevelWarn, "cannot accept an NBD client", slog.Any("err", err))
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		default:
			cancel()
			return fmt.Errorf("cannot accept NBD clients on %s: %w", l.Addr(), err)
		}
		conns.Go(func() {
			if err := s.serveConn(ctx, sock, identify); err != nil {
				s.config.Log.LogAttrs(ctx, slog.LevelWarn, "NBD connection ended", slog.Any("err", err))
			}
		})
	}
}

// identify returns the configuration by which clients of l prove who they are, or
// nil where the socket tells.
func (s *Server) identify(l net.Listener) (*tls.Config, error) {
	switch l.(type) {
	case *net.UnixListener:
		return nil, nil
	case *net.TCPListener:
	default:
		return nil, errors.New("it is neither a unix socket nor TCP")
	}
	switch c := s.config.TLS; {
	case c == nil:
		return nil, errors.New("TCP needs TLS, because nothing else tells who connects")
	case c.ClientAuth != tls.RequireAndVerifyClientCert || c.ClientCAs == nil || c.MinVersion < tls.VersionTLS13:
		return nil, errors.New("the TLS configuration does not ask for TLS 1.3 and a client's certificate of a known authority")
	default:
		return c, nil
	}
}

// serveConn owns sock from the first byte to the last.
func (s *Server) serveConn(ctx context.Context, sock net.Conn, identify *tls.Config) error {
	defer sock.Close()
	if identify == nil {
		if err := s.checkPeer(sock); err != nil {
			return err
		}
	}
	c := newConn(s, sock)
	if err := s.addConn(c); err != nil {
		return err
	}
	defer s.removeConn(c)
	stop := context.AfterFunc(ctx, c.abort)
	defer stop()

	if err := sock.SetDeadline(time.Now().Add(s.config.HandshakeTimeout)); err != nil {
		return err
	}
	agreed, err := negotiate(ctx, c, identify)
	switch {
	case errors.Is(err, errAborted), err != nil && c.stopping.Load():
		return nil
	case err != nil:
		return fmt.Errorf("cannot negotiate with an NBD client: %w", err)
	}
	defer agreed.export.leave(c)
	if agreed.tls != nil {
		defer agreed.tls.Close()
	}
	if err := sock.SetDeadline(time.Time{}); err != nil {
		return err
	}
	s.settle(c)
	if err := c.serve(agreed); err != nil && !c.stopping.Load() {
		return fmt.Errorf("export %q: %w", agreed.export.Name, err)
	}
	return nil
}

// checkPeer refuses users who have no business here, whatever the mode of the
// socket's file.
func (s *Server) checkPeer(sock net.Conn) error {
	var cred *unix.Ucred
	err := control(sock, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot tell who connects: %w", err)
	}
	if s.mayConnect(cred.Uid) {
		return nil
	}
	return fmt.Errorf("user %d (process %d) is not allowed to connect", cred.Uid, cred.Pid)
}

func (s *Server) mayConnect(uid uint32) bool {
	return uid == 0 || uid == uint32(os.Geteuid()) || slices.Contains(s.config.AllowedUIDs, uid)
}

// Shutdown ends the service in good order: no further client is accepted, no
// further request read, those in work are finished and answered, then the
// connections are closed. When ctx ends before that, it breaks the connections
// and returns ctx's error without waiting on. Serve returns when all is done.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.stopped {
		s.stopped = true
		if len(s.conns) == 0 {
			close(s.idle)
		}
	}
	for l := range s.serving {
		l.Close()
	}
	for c := range s.conns {
		c.drain()
	}
	s.mu.Unlock()

	select {
	case <-s.idle:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range s.conns {
		c.abort()
	}
	s.mu.Unlock()
	return ctx.Err()
}

func (s *Server) isStopped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.serving[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.serving, l)
}

func (s *Server) addConn(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrStopped
	}
	if len(s.conns) >= s.config.MaxConnections {
		return fmt.Errorf("cannot serve another NBD client: %d are connected already", len(s.conns))
	}
	if c.address != "" {
		same := 0
		for other := range s.conns {
			if !other.settled && other.address == c.address {
				same++
			}
		}
		if same >= max(1, s.config.MaxConnections/4) {
			return fmt.Errorf("cannot serve another NBD client from %s: %d are negotiating", c.address, same)
		}
	}
	s.conns[c] = struct{}{}
	return nil
}

// settle notes that c has chosen its export.
func (s *Server) settle(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.settled = true
}

func (s *Server) removeConn(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.stopped && len(s.conns) == 0 {
		close(s.idle)
	}
}
