package volumectl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// Handler does what hosts ask for. Its methods may be called concurrently;
// errors cross with text, kind, reason and hint.
type Handler interface {
	// AddDisk opens and serves a disk. file and dek (nil for a raw disk) belong
	// to the handler, also if it fails.
	AddDisk(ctx context.Context, d Disk, file *os.File, dek *keymem.Key) error
	// RemoveDisk flushes and closes a disk.
	RemoveDisk(ctx context.Context, disk string) error
	// Listen serves NBD on a socket, which belongs to the handler, also if it
	// fails.
	Listen(ctx context.Context, listener *os.File) error
	// ListenVhostUser serves a disk over vhost-user on a socket, which belongs
	// to the handler, also if it fails.
	ListenVhostUser(ctx context.Context, disk string, listener *os.File) error
	// ReplaceSafe replaces the key safe of a disk.
	ReplaceSafe(ctx context.Context, disk string, safe *keysafe.Safe) error
	// Resize sets the size of a disk, in bytes, a multiple of 512.
	Resize(ctx context.Context, disk string, size int64) error
	// Flush makes all writes of a disk durable.
	Flush(ctx context.Context, disk string) error
	// Status describes the process and its disks.
	Status(ctx context.Context) (*Status, error)
	// Shutdown ends all service, durably. The handler makes Serve return soon
	// after, by its ctx; not before Shutdown returned.
	Shutdown(ctx context.Context) error
}

// Server is the volume process's side.
type Server struct {
	VM      string // name of the VM, told to hosts
	Handler Handler
	Log     *slog.Logger
}

// Serve answers hosts on l, a unix socket of type SOCK_SEQPACKET, until ctx
// ends; then it closes l and all connections, waits for the requests in work, whose
// replies still go out, and returns nil. It returns an error if accepting fails.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	var connections sync.WaitGroup
	defer connections.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()

	slots := make(chan struct{}, ConnectionsMax)
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot accept control connections: %w", err)
		}
		select {
		case slots <- struct{}{}:
		default:
			s.Log.LogAttrs(ctx, slog.LevelWarn, "too many control connections")
			conn.Close()
			continue
		}
		connections.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			if err := s.serve(ctx, conn); err != nil {
				s.Log.LogAttrs(ctx, slog.LevelWarn, "control connection ended", slog.Any("err", err))
			}
		})
	}
}

// serve answers one host until it leaves.
func (s *Server) serve(ctx context.Context, conn *net.UnixConn) error {
	if _, err := checkPeer(conn); err != nil {
		return err
	}
	// Interrupts the wait for the next request, not the reply to this one.
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()
	l := newLink(conn)
	greeted := false
	for {
		message, fds, err := l.receive()
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			closeAll(fds)
			return nil
		}
		if err != nil {
			return err
		}
		r, key, err := s.complete(ctx, l, message, fds)
		if err == nil && greeted == (r.Op == opHello) {
			key.Close()
			err = fmt.Errorf("%w: hello must come first and once", ErrProtocol)
		}
		if err != nil {
			closeAll(fds)
			return err
		}
		greeted = true
		// Done whether or not the host waits: half a rekey helps nobody.
		answer := s.handle(context.WithoutCancel(ctx), r, fds, key)
		conn.SetWriteDeadline(time.Now().Add(stepTimeout))
		if err := l.send(answer, nil); err != nil {
			return fmt.Errorf("cannot answer %s: %w", r.Op, err)
		}
	}
}

// complete parses a request and receives its key, if it has one.
func (s *Server) complete(ctx context.Context, l *link, message []byte, fds []int) (*request, *keymem.Key, error) {
	r, err := parseRequest(message)
	if err != nil {
		return nil, nil, err
	}
	if len(fds) != r.descriptors() {
		return nil, nil, fmt.Errorf("%w: %s with %d descriptors", ErrProtocol, r.Op, len(fds))
	}
	if r.KeyBytes == 0 {
		return r, nil, nil
	}
	l.conn.SetReadDeadline(time.Now().Add(stepTimeout))
	key, err := l.receiveKey(r.KeyBytes)
	if err != nil {
		return nil, nil, err
	}
	l.conn.SetReadDeadline(time.Time{})
	if ctx.Err() != nil { // its interrupt may have been overwritten just now
		key.Close()
		return nil, nil, ctx.Err()
	}
	return r, key, nil
}

func (s *Server) handle(ctx context.Context, r *request, fds []int, key *keymem.Key) *reply {
	var answer reply
	var err error
	switch r.Op {
	case opHello:
		answer = reply{Version: min(r.Version, Version), VM: s.VM, PID: os.Getpid()}
	case opAddDisk:
		d := Disk{Name: r.Disk, Format: r.Format, ReadOnly: r.ReadOnly, SizeMin: r.Size}
		err = s.Handler.AddDisk(ctx, d, os.NewFile(uintptr(fds[0]), "disk "+d.Name), key)
	case opRemoveDisk:
		err = s.Handler.RemoveDisk(ctx, r.Disk)
	case opListen:
		err = s.Handler.Listen(ctx, os.NewFile(uintptr(fds[0]), "NBD socket"))
	case opListenVhost:
		err = s.Handler.ListenVhostUser(ctx, r.Disk, os.NewFile(uintptr(fds[0]), "vhost-user socket"))
	case opReplaceSafe:
		err = s.Handler.ReplaceSafe(ctx, r.Disk, r.Safe)
	case opResize:
		err = s.Handler.Resize(ctx, r.Disk, r.Size)
	case opFlush:
		err = s.Handler.Flush(ctx, r.Disk)
	case opStatus:
		answer.Status, err = s.Handler.Status(ctx)
	case opShutdown:
		err = s.Handler.Shutdown(ctx)
	}
	if err != nil {
		answer = reply{Error: failureOf(err)}
	}
	attrs := []slog.Attr{slog.String("op", r.Op), slog.String("disk", r.Disk)}
	if err != nil {
		s.Log.LogAttrs(ctx, slog.LevelError, "request of host failed", append(attrs, slog.Any("err", err))...)
	} else {
		s.Log.LogAttrs(ctx, slog.LevelInfo, "request of host done", attrs...)
	}
	return &answer
}
