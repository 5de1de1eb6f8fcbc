// Package port reserves TCP ports for servers that tests start, stop and start
// again.
//
// A port that a listener at ":0" was given and gave back may be somebody else's a
// moment later: another server's, or that of an outgoing connection. A reserved one
// is nobody's: a socket is bound to it that does not listen.
package port

import (
	"fmt"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// Reserve returns an address, 127.0.0.1 with a port that the kernel gives to no
// other socket that asks for any, of whatever process, until this one ends. Who
// names the port can listen at it, with SO_REUSEADDR as Go's listeners have it, as
// often as wanted; a connection to it is refused before and in between.
//
// It is safe for concurrent use.
func Reserve() (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("cannot reserve a port: %w", err)
	}
	port, err := bind(fd)
	if err != nil {
		unix.Close(fd)
		return "", fmt.Errorf("cannot reserve a port: %w", err)
	}
	return "127.0.0.1:" + strconv.Itoa(port), nil
}

// For is [Reserve] for a test, which it ends if that fails.
func For(t testing.TB) string {
	t.Helper()
	addr, err := Reserve()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func bind(fd int) (port int, err error) {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	return name.(*unix.SockaddrInet4).Port, nil
}
