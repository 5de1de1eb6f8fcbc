// Package sandboxtest tries from inside a process what its sandbox must refuse,
// for the tests of the sandbox and of the process that enters it.
package sandboxtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Attempt is something that a sandboxed process must fail at, with EPERM, and go
// on.
type Attempt struct {
	Name string
	Do   func() error
}

// raw returns an attempt at a system call.
func raw(name string, call uintptr, arguments ...uintptr) Attempt {
	return Attempt{name, func() error {
		a := append(arguments, make([]uintptr, 6)...)
		if _, _, errno := unix.Syscall6(call, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}}
}

func socket(name string, family, kind int) Attempt {
	return Attempt{"socket of " + name, func() error { _, err := unix.Socket(family, kind, 0); return err }}
}

func ofPath(name string, do func(path string) error) Attempt {
	return Attempt{name, func() error { return do("/etc/hostname") }}
}

// Attempts returns what is tried. own is a descriptor that the process may use.
func Attempts(own int) []Attempt {
	pid := os.Getpid()
	return []Attempt{
		ofPath("open a file", func(path string) error { _, err := os.Open(path); return err }),
		ofPath("create a file", func(string) error { return os.WriteFile("/tmp/strongroom-sandbox", nil, 0o600) }),
		ofPath("statx", func(path string) error {
			return unix.Statx(unix.AT_FDCWD, path, unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, new(unix.Statx_t))
		}),
		ofPath("stat", func(path string) error { return unix.Stat(path, new(unix.Stat_t)) }),
		ofPath("list a folder", func(string) error { _, err := os.ReadDir("/proc"); return err }),
		ofPath("read a link", func(string) error { _, err := os.Readlink("/proc/self/exe"); return err }),
		ofPath("remove a file", func(string) error { return unix.Unlink("/nonexistent") }),
		ofPath("make a folder", func(string) error { return unix.Mkdir("/nonexistent/folder", 0o700) }),
		ofPath("rename", func(string) error { return unix.Rename("/nonexistent", "/nowhere") }),
		ofPath("change a mode", func(string) error { return unix.Chmod("/nonexistent", 0o777) }),
		ofPath("watch a file", func(string) error { _, err := unix.InotifyInit1(0); return err }),
		{"read its own memory", func() error { _, err := os.ReadFile("/proc/self/mem"); return err }},
		{"reopen a descriptor", func() error { _, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", own)); return err }},
		{"connect by TCP", func() error { _, err := net.Dial("tcp", "127.0.0.1:1"); return err }},
		{"listen on TCP", func() error { _, err := net.Listen("tcp", "127.0.0.1:0"); return err }},
		{"connect to a unix socket", func() error { _, err := net.Dial("unix", "/run/nothing"); return err }},
		socket("IPv4", unix.AF_INET, unix.SOCK_STREAM), socket("IPv6", unix.AF_INET6, unix.SOCK_DGRAM), socket("unix", unix.AF_UNIX, unix.SOCK_STREAM),
		socket("netlink", unix.AF_NETLINK, unix.SOCK_RAW), socket("packets", unix.AF_PACKET, unix.SOCK_RAW), socket("vsock", unix.AF_VSOCK, unix.SOCK_STREAM),
		socket("kernel crypto", unix.AF_ALG, unix.SOCK_SEQPACKET),
		{"socket pair", func() error { _, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0); return err }},
		raw("bind", unix.SYS_BIND, uintptr(own)), raw("connect", unix.SYS_CONNECT, uintptr(own)),
		{"send to an address", func() error { return unix.Sendto(own, []byte{1}, 0, &unix.SockaddrUnix{Name: "/run/nothing"}) }},
		{"signal init", func() error { return unix.Kill(1, 0) }},
		{"signal itself", func() error { return unix.Kill(pid, 0) }},
		{"signal a thread of init", func() error { return unix.Tgkill(1, 1, 0) }},
		{"signal by descriptor", func() error { return unix.PidfdSendSignal(own, 0, nil, 0) }},
		{"hold a process", func() error { _, err := unix.PidfdOpen(pid, 0); return err }},
		raw("clone a process", unix.SYS_CLONE, uintptr(unix.SIGCHLD)),
		raw("clone into a user namespace", unix.SYS_CLONE, unix.CLONE_THREAD|unix.CLONE_NEWUSER),
		{"executable mapping", func() error {
			_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			return err
		}},
		{"make memory executable", func() error {
			b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				return fmt.Errorf("no memory: %w", err)
			}
			defer unix.Munmap(b)
			return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
		}},
		{"become dumpable", func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) }},
		{"raise a limit", func() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) }},
		{"get signals of a descriptor", func() error { _, err := unix.FcntlInt(uintptr(own), unix.F_SETOWN, pid); return err }},
		{"terminal input", func() error { return unix.IoctlSetPointerInt(own, unix.TIOCSTI, 0) }},
		{"option of another protocol", func() error { return unix.SetsockoptInt(own, unix.SOL_TCP, unix.TCP_NODELAY, 1) }},
		raw("timer", unix.SYS_TIMERFD_CREATE), raw("message queue", unix.SYS_MQ_OPEN), raw("shared memory", unix.SYS_SHMGET),
		raw("another filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER), raw("Landlock", unix.SYS_LANDLOCK_CREATE_RULESET),
		raw("a call that does not exist", 0xffff),
	}
}

// Failures makes all attempts and returns what was not refused.
func Failures(own int) []string {
	var failures []string
	for _, a := range Attempts(own) {
		var errno syscall.Errno
		if err := a.Do(); !errors.As(err, &errno) || errno != unix.EPERM {
			failures = append(failures, fmt.Sprintf("%s: %v", a.Name, err))
		}
	}
	return failures
}
