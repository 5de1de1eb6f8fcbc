// Package process holds on to other processes: QEMUs and volume processes,
// which are our children or were those of an earlier run of this program.
//
// A process is held by a pidfd, so that a PID that was given to another program
// is never signalled or waited for.
//
// Everything here is safe for concurrent use.
package process

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ErrEnded: there is no such process (any more).
var ErrEnded = errors.New("process has ended")

// Process is a process, running or ended. It must be closed.
type Process struct {
	pid   int
	pidfd *os.File
}

// Open takes hold of a process. It returns [ErrEnded] if there is none. The
// caller makes sure that pid still means the process it has in mind: a child
// that nobody has waited for, or one that answers after Open.
func Open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, ErrEnded
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open process %d: %w", pid, err)
	}
	// Non-blocking, so that Go's poller waits for its end and Close interrupts.
	return &Process{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// PID returns the process ID.
func (p *Process) PID() int { return p.pid }

// Wait returns nil when the process has ended, or [os.ErrClosed] after Close.
func (p *Process) Wait() error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return os.ErrClosed
	}
	if conn.Read(isReadable) != nil {
		return os.ErrClosed
	}
	return nil
}

// HasEnded reports whether the process has ended.
func (p *Process) HasEnded() bool {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	return conn.Control(func(fd uintptr) { ended = isReadable(fd) }) == nil && ended
}

// isReadable is true for a pidfd when its process has ended.
func isReadable(fd uintptr) bool {
	ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(ready, 0)
	return err == nil && n == 1
}

// Kill ends the process at once. It is not an error if it has ended. It returns
// [os.ErrClosed] after Close.
func (p *Process) Kill() error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return os.ErrClosed
	}
	var killErr error
	if conn.Control(func(fd uintptr) { killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }) != nil {
		return os.ErrClosed
	}
	if errors.Is(killErr, unix.ESRCH) {
		return nil
	}
	return killErr
}

// Reap collects the process if it has ended and was our child, and returns how
// it ended, such as "exit status 0" or "signal: killed"; else "".
func (p *Process) Reap() string {
	var status unix.WaitStatus
	for {
		n, err := unix.Wait4(p.pid, &status, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil || n != p.pid:
			return ""
		case status.Signaled():
			return "signal: " + status.Signal().String()
		default:
			return fmt.Sprintf("exit status %d", status.ExitStatus())
		}
	}
}

// Close lets go of the process, which runs on. It is idempotent.
func (p *Process) Close() { p.pidfd.Close() }

// Peer returns the process and user at the other end of a unix socket: for a
// server's, those that called listen(2).
func Peer(conn net.Conn) (*unix.Ucred, error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a unix socket")
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}
