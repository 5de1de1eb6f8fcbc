package localvolume

import (
	"context"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
	"strongroom/internal/errs"
)

// newNBD serves the volume as the default export on a unix socket.
func newNBD(v *volume.Volume, opts ServeOptions) (front, error) {
	socket, err := filepath.Abs(opts.Socket)
	if err != nil {
		return front{}, err
	}
	l, err := listen(socket)
	if err != nil {
		return front{}, err
	}
	server := nbd.NewServer(nbd.Config{})
	if err := server.AddExport(nbd.Export{Device: v, ReadOnly: opts.ReadOnly, Description: filepath.Base(opts.File)}); err != nil {
		l.Close()
		return front{}, err
	}
	return front{
		address: uri(socket),
		serve: func() error {
			if err := server.Serve(context.Background(), l); !errors.Is(err, nbd.ErrStopped) {
				return err
			}
			return nil
		},
		stop: func(ctx context.Context) error {
			defer l.Close() // if it was never served
			if err := server.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
				return err
			}
			return nil // clients that did not finish were broken off
		},
	}, nil
}

// uri is the NBD URI of the default export on a unix socket.
func uri(socket string) string {
	// A slash needs no escape in a query, and the URI is for people to copy.
	return "nbd+unix:///?socket=" + strings.ReplaceAll(url.QueryEscape(socket), "%2F", "/")
}

// listen makes the socket, mode 0600. A socket that nobody listens on any more
// is replaced, anything else is left alone.
func listen(socket string) (*net.UnixListener, error) {
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
