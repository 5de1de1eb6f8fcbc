package localvolume

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"strongroom/internal/errs"
)

// listen makes the socket at path, mode 0600; its address is the absolute path.
// A socket that nobody listens on any more is replaced, anything else is left
// alone.
func listen(path string) (*net.UnixListener, error) {
	socket, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	addr := &net.UnixAddr{Name: socket, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		if !abandoned(addr) {
			return nil, errs.New(errs.Exists, "cannot listen on %s: it exists", socket)
		}
		if err := os.Remove(socket); err != nil {
			return nil, explain(err)
		}
		l, err = net.ListenUnix("unix", addr)
	}
	if err != nil {
		return nil, explain(err)
	}
	// Until here the umask decides who may connect; the server also checks who
	// is at the other end.
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, explain(err)
	}
	return l, nil
}

// abandoned reports whether addr is a socket that nobody listens on.
func abandoned(addr *net.UnixAddr) bool {
	// Connecting to a file that is no socket is refused in the same way.
	if info, err := os.Lstat(addr.Name); err != nil || info.Mode().Type() != os.ModeSocket {
		return false
	}
	c, err := net.DialUnix("unix", nil, addr)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}
