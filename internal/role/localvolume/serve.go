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
	"time"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/block/nbd"
	"strongroom/internal/errs"
)

// drainTimeout is how long requests in work may take after the end was asked
// for; then connections are broken.
const drainTimeout = 10 * time.Second

// ServeOptions say how a volume is served.
type ServeOptions struct {
	File     string
	KeyFile  string
	Socket   string // path of the unix socket; removed at the end
	ReadOnly bool
	// Ready, if not nil, is called with the NBD URI when clients can connect.
	Ready func(uri string)
}

// Serve serves the plain data of the volume over NBD until ctx ends. It then
// finishes the requests in work and makes what was written durable.
func Serve(ctx context.Context, opts ServeOptions) (err error) {
	v, err := open(opts.File, opts.KeyFile, opts.ReadOnly)
	if err != nil {
		return err
	}
	defer v.Close()
	socket, err := filepath.Abs(opts.Socket)
	if err != nil {
		return err
	}
	l, err := listen(socket)
	if err != nil {
		return err
	}
	server := nbd.NewServer(nbd.Config{})
	if err := server.AddExport(nbd.Export{Device: v, ReadOnly: opts.ReadOnly, Description: filepath.Base(opts.File)}); err != nil {
		l.Close()
		return err
	}
	var g errgroup.Group
	served := make(chan struct{})
	g.Go(func() error {
		defer close(served)
		return server.Serve(context.WithoutCancel(ctx), l)
	})
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-served:
			return nil
		}
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if err := server.Shutdown(drain); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		return nil
	})
	if opts.Ready != nil {
		opts.Ready(uri(socket))
	}
	err = g.Wait()
	if !opts.ReadOnly {
		err = errors.Join(err, v.Flush())
	}
	return explain(err)
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
