package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// process is a QEMU process, our child or not, held by a pidfd, so that a PID
// that was given to another program is never signalled or waited for.
type process struct {
	pid   int
	pidfd *os.File
}

// openProcess takes hold of pid.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open process %d: %w", pid, err)
	}
	// Non-blocking, so that Go's poller waits for its end and Close interrupts.
	return &process{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// wait returns when the process has ended, or [os.ErrClosed] after close.
func (p *process) wait() error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(isReadable)
}

// hasEnded tells whether the process has ended.
func (p *process) hasEnded() bool {
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

// kill ends the process. It is not an error if it has ended.
func (p *process) kill() error {
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

func (p *process) close() { p.pidfd.Close() }

// peer returns the process and user at the other end of a unix socket: for a
// server socket, those that called listen.
func peer(conn net.Conn) (*unix.Ucred, error) {
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
