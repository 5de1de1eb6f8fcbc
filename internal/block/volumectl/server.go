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
	"strongroom/internal/errs"
)

// Handler does what hosts ask for. Its methods may be called concurrently;
// errors cross with text, kind, reason and hint.
type Handler interface {
	// AddDisk opens and serves a disk. file, dek (nil for a raw disk) and next (nil
	// if no deep rekey is under way) belong to the handler, also if it fails.
	AddDisk(ctx context.Context, d Disk, file *os.File, dek, next *keymem.Key) error
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
	// Rekey begins a deep rekey of a disk, goes on with one (next is nil, and safe
	// may be), or changes the rate of one that is at work, in bytes a second (0: not
	// bounded). next belongs to the handler, also if it fails.
	Rekey(ctx context.Context, disk string, next *keymem.Key, safe *keysafe.Safe, rate int64) error
	// StopRekey stops a deep rekey at a safe point, and undoes one that has moved
	// nothing.
	StopRekey(ctx context.Context, disk string) error
	// Convert begins to move a disk to file, which is in a format and under dek (nil
	// for a raw one). file and dek belong to the handler, also if it fails.
	Convert(ctx context.Context, disk string, format Format, file *os.File, dek *keymem.Key, rate int64) error
	// HoldConversion, SwitchDisk and StopConversion are as in [Client].
	HoldConversion(ctx context.Context, disk string) error
	SwitchDisk(ctx context.Context, disk string) error
	StopConversion(ctx context.Context, disk string) error
	// Resize sets the size of a disk, in bytes, a multiple of 512.
	Resize(ctx context.Context, disk string, size int64) error
	// Flush makes all writes of a disk durable.
	Flush(ctx context.Context, disk string) error
	// Suspend is as in [Client]. resume ends it, and returns an error if it had ended
	// by itself. No other method but Status is called between the two.
	Suspend(ctx context.Context, limit time.Duration) (resume func() error, err error)
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

	// changing is read-held while anything is done that a suspension must not meet,
	// and held while one begins.
	changing sync.RWMutex

	mu        sync.Mutex
	suspended *suspended // guarded by mu: nil while the disks are not
}

// suspended is a suspension of the disks, which belongs to a connection.
type suspended struct {
	by     *link
	resume func() error
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
	defer s.end(l)
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
		r, keys, err := s.complete(ctx, l, message, fds)
		if err == nil && greeted == (r.Op == opHello) {
			keys.close()
			err = fmt.Errorf("%w: hello must come first and once", ErrProtocol)
		}
		if err != nil {
			closeAll(fds)
			return err
		}
		greeted = true
		// Done whether or not the host waits: half a rekey helps nobody.
		answer := s.handle(context.WithoutCancel(ctx), l, r, fds, keys)
		conn.SetWriteDeadline(time.Now().Add(stepTimeout))
		if err := l.send(answer, nil); err != nil {
			return fmt.Errorf("cannot answer %s: %w", r.Op, err)
		}
	}
}

// keys are those that came with a request; nil: none.
type keys struct{ dek, next *keymem.Key }

func (k keys) close() {
	k.dek.Close()
	k.next.Close()
}

// complete parses a request and receives the keys that it announces.
func (s *Server) complete(ctx context.Context, l *link, message []byte, fds []int) (_ *request, k keys, err error) {
	r, err := parseRequest(message)
	if err != nil {
		return nil, keys{}, err
	}
	if len(fds) != r.descriptors() {
		return nil, keys{}, fmt.Errorf("%w: %s with %d descriptors", ErrProtocol, r.Op, len(fds))
	}
	if r.KeyBytes == 0 && r.NextKeyBytes == 0 {
		return r, keys{}, nil
	}
	defer func() {
		if err != nil {
			k.close()
			k = keys{}
		}
	}()
	l.conn.SetReadDeadline(time.Now().Add(stepTimeout))
	for _, key := range []struct {
		n  int
		to **keymem.Key
	}{{r.KeyBytes, &k.dek}, {r.NextKeyBytes, &k.next}} {
		if key.n == 0 {
			continue
		}
		if *key.to, err = l.receiveKey(key.n); err != nil {
			return nil, k, err
		}
	}
	l.conn.SetReadDeadline(time.Time{})
	return r, k, ctx.Err() // its interrupt may have been overwritten just now
}

// suspend suspends the disks for the host on l.
func (s *Server) suspend(ctx context.Context, l *link, limit time.Duration) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	_ = s.resume(nil) // an earlier one ends
	resume, err := s.Handler.Suspend(ctx, limit)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.suspended = &suspended{l, resume}
	return nil
}

// resume ends the suspension, or only one of the host on by, if that is not nil. It
// returns an error if there is none, or it had ended by itself.
func (s *Server) resume(by *link) error {
	s.mu.Lock()
	now := s.suspended
	if now == nil || by != nil && by != now.by {
		s.mu.Unlock()
		return errs.New(errs.InvalidState, "the disks are not suspended")
	}
	s.suspended = nil
	s.mu.Unlock()
	return now.resume()
}

// end ends the suspension of a host that has left.
func (s *Server) end(l *link) {
	if err := s.resume(l); err == nil {
		s.Log.LogAttrs(context.Background(), slog.LevelWarn, "the host that suspended the disks is gone: they go on")
	}
}

func (s *Server) handle(ctx context.Context, l *link, r *request, fds []int, k keys) *reply {
	switch r.Op {
	case opHello, opSuspend, opResume, opStatus:
	default:
		s.changing.RLock()
		defer s.changing.RUnlock()
		_ = s.resume(nil)
	}
	var answer reply
	var err error
	switch r.Op {
	case opHello:
		answer = reply{Version: min(r.Version, Version), VM: s.VM, PID: os.Getpid()}
	case opAddDisk:
		d := Disk{Name: r.Disk, Format: r.Format, ReadOnly: r.ReadOnly, SizeMin: r.Size}
		err = s.Handler.AddDisk(ctx, d, os.NewFile(uintptr(fds[0]), "disk "+d.Name), k.dek, k.next)
	case opRemoveDisk:
		err = s.Handler.RemoveDisk(ctx, r.Disk)
	case opListen:
		err = s.Handler.Listen(ctx, os.NewFile(uintptr(fds[0]), "NBD socket"))
	case opListenVhost:
		err = s.Handler.ListenVhostUser(ctx, r.Disk, os.NewFile(uintptr(fds[0]), "vhost-user socket"))
	case opReplaceSafe:
		err = s.Handler.ReplaceSafe(ctx, r.Disk, r.Safe)
	case opRekey:
		err = s.Handler.Rekey(ctx, r.Disk, k.next, r.Safe, r.Rate)
	case opStopRekey:
		err = s.Handler.StopRekey(ctx, r.Disk)
	case opConvert:
		err = s.Handler.Convert(ctx, r.Disk, r.Format, os.NewFile(uintptr(fds[0]), "new file of disk "+r.Disk), k.dek, r.Rate)
	case opHold:
		err = s.Handler.HoldConversion(ctx, r.Disk)
	case opSwitch:
		err = s.Handler.SwitchDisk(ctx, r.Disk)
	case opStopConvert:
		err = s.Handler.StopConversion(ctx, r.Disk)
	case opResize:
		err = s.Handler.Resize(ctx, r.Disk, r.Size)
	case opFlush:
		err = s.Handler.Flush(ctx, r.Disk)
	case opSuspend:
		err = s.suspend(ctx, l, time.Duration(r.Limit)*time.Millisecond)
	case opResume:
		err = s.resume(l)
	case opStatus:
		answer.Status, err = s.Handler.Status(ctx)
	case opShutdown:
		err = s.Handler.Shutdown(ctx)
	}
	if err != nil {
		answer = reply{Error: FailureOf(err)}
	}
	attrs := []slog.Attr{slog.String("op", r.Op), slog.String("disk", r.Disk)}
	if err != nil {
		s.Log.LogAttrs(ctx, slog.LevelError, "request of host failed", append(attrs, slog.Any("err", err))...)
	} else {
		level := slog.LevelInfo
		if r.Op == opStatus { // asked again and again
			level = slog.LevelDebug
		}
		s.Log.LogAttrs(ctx, level, "request of host done", attrs...)
	}
	return &answer
}
