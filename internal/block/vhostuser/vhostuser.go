// Package vhostuser serves a block device to a virtual machine as
// vhost-user-blk: the guest's driver and this process share the guest's memory,
// and no byte of data goes through QEMU or a socket.
//
// It implements a back end of the vhost-user protocol (docs/interop/vhost-user.rst
// of QEMU) for the block device of virtio 1.2, section 5.2, with split
// virtqueues: several queues, indirect descriptors, event indexes, flush and
// cache mode, discard, write zeroes, resize, and in-flight tracking, by which a
// virtual machine survives the restart of the back end without a failed request.
//
// Reads land in the guest's memory, where an encrypted volume decrypts them;
// short scattered ones go through a buffer of 64 KiB, as do writes of that
// kind. A device never changes the buffer of a write, so nothing is ever
// encrypted where the guest could see it.
//
// Invariants: all that a guest writes is hostile. What decides on memory is read
// once and checked before it is used; nothing outside of the regions that the
// front end has passed is read or written; a ring that breaks the rules, or
// whose memory goes away (SIGBUS), stops that queue with a line in the log, and
// harms nobody else. A request is given back only after the device has done it.
// Nothing is allocated per request and no goroutine started.
//
// Only little-endian machines are supported, as guests and hosts of all others
// have died out.
//
// All exported types are safe for concurrent use.
package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

// Config says what a Server serves, and its limits. Zero fields have the stated
// defaults.
type Config struct {
	// Device is not closed by the server. It must stay open until Serve has
	// returned. It must touch the buffers of a request only in the goroutine
	// that called it, or by system calls: they are guest memory, which may go
	// away at any time.
	Device blockdev.Device
	// Name is the disk's in log lines.
	Name string
	// ReadOnly refuses every request that changes the device.
	ReadOnly bool
	// Serial is what the guest's driver gets as the disk's serial number: at
	// most 20 bytes.
	Serial string
	// Log receives a line for every session that ends otherwise than by the
	// front end's wish, for every broken ring, and for the first failed request
	// of a session. Default: slog.Default().
	Log *slog.Logger
	// AllowedUIDs are the users who may connect, besides root and the user of
	// this process.
	AllowedUIDs []uint32
	// Queues is how many virtqueues a front end may use, 1 to 256. Default 8.
	Queues int
	// Workers is how many requests are in work at a time. The queues that the
	// front end uses share them evenly; each has at least two. Default 16.
	Workers int
}

// MaxSerial is the longest serial number, in bytes.
const MaxSerial = sizeID

// ErrClosed: the server was closed.
var ErrClosed = errors.New("server was closed")

// Server serves one device to one front end at a time.
type Server struct {
	config Config

	mu      sync.Mutex // guards the fields below
	session *session   // that has a front end now, or nil
	closed  bool
	stops   map[int]context.CancelFunc // of running Serves
	serves  int                        // Serves so far
	running sync.WaitGroup
}

// NewServer returns a server of a device.
func NewServer(c Config) (*Server, error) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Queues == 0 {
		c.Queues = 8
	}
	if c.Workers == 0 {
		c.Workers = 16
	}
	switch {
	case c.Device == nil:
		return nil, errors.New("cannot serve vhost-user: no device")
	case len(c.Serial) > MaxSerial:
		return nil, fmt.Errorf("cannot serve vhost-user: serial number %.24q has more than %d bytes", c.Serial, MaxSerial)
	case c.Queues < 1 || c.Queues > 256 || c.Workers < 1:
		return nil, fmt.Errorf("cannot serve vhost-user with %d queues and %d workers", c.Queues, c.Workers)
	}
	return &Server{config: c, stops: map[int]context.CancelFunc{}}, nil
}

// Serve accepts front ends from l until Close is called or ctx ends, then returns
// nil; it returns the error if accepting fails. When it ends, requests in work are
// finished and given back before the front end is disconnected. It closes l. It
// returns [ErrClosed] after a Close.
//
// One front end is served at a time; the next one waits until it has gone. l must
// be a unix socket's, for descriptors come through it.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	unixListener, ok := l.(*net.UnixListener)
	if !ok {
		return fmt.Errorf("cannot serve vhost-user on %s %s: it needs a unix socket", l.Addr().Network(), l.Addr())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	id, ok := s.enter(cancel)
	if !ok {
		return ErrClosed
	}
	defer s.leave(id)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()

	for {
		conn, err := unixListener.AcceptUnix()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED):
			// Running out of descriptors passes.
			s.config.Log.LogAttrs(ctx, slog.LevelWarn, "cannot accept a vhost-user front end", slog.Any("err", err))
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		default:
			return fmt.Errorf("cannot accept vhost-user front ends on %s: %w", l.Addr(), err)
		}
		if err := s.serveConn(ctx, conn); err != nil && ctx.Err() == nil {
			s.config.Log.LogAttrs(ctx, slog.LevelWarn, "vhost-user session ended", slog.String("disk", s.config.Name), slog.Any("err", err))
		}
	}
}

// serveConn owns conn from the first message to the last.
func (s *Server) serveConn(ctx context.Context, conn *net.UnixConn) error {
	defer conn.Close()
	if err := s.checkPeer(conn); err != nil {
		return err
	}
	session := newSession(&s.config, conn)
	// The connection is closed only when the queues have stopped.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s.setSession(session)
	defer s.setSession(nil)
	return session.serve()
}

// checkPeer refuses users who have no business here, whatever the mode of the
// socket's file.
func (s *Server) checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("cannot tell who connects: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("cannot tell who connects: %w", err)
	}
	if !s.mayConnect(cred.Uid) {
		return fmt.Errorf("user %d (process %d) is not allowed to connect", cred.Uid, cred.Pid)
	}
	return nil
}

func (s *Server) mayConnect(uid uint32) bool {
	return uid == 0 || uid == uint32(os.Geteuid()) || slices.Contains(s.config.AllowedUIDs, uid)
}

// Resized tells the guest that the device's size has changed. It never waits; a
// guest that is not connected learns of it when it is.
func (s *Server) Resized() {
	s.mu.Lock()
	session := s.session
	s.mu.Unlock()
	if session != nil {
		session.configChanged()
	}
}

// Close ends all Serves, as the end of their ctx does, and waits for them. It is
// idempotent.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, stop := range s.stops {
		stop()
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

func (s *Server) enter(cancel context.CancelFunc) (id int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, false
	}
	s.serves++
	s.stops[s.serves] = cancel
	s.running.Add(1)
	return s.serves, true
}

func (s *Server) leave(id int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.stops, id)
	s.running.Done()
}

func (s *Server) setSession(session *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.session = session
}
