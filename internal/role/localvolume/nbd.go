package localvolume

import (
	"context"
	"errors"
	"net"
	"net/url"
	"path/filepath"
	"strings"

	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
)

// newNBD serves the volume as the default export on a unix socket.
func newNBD(v *volume.Volume, opts ServeOptions) (front, error) {
	l, err := listen(opts.Socket)
	if err != nil {
		return front{}, err
	}
	return serveNBD(v, opts, l, nbd.Config{}, uri(l.Addr().String()))
}

// serveNBD makes the front of an NBD server on l, which it takes over.
func serveNBD(v *volume.Volume, opts ServeOptions, l net.Listener, config nbd.Config, address string) (front, error) {
	server := nbd.NewServer(config)
	if err := server.AddExport(nbd.Export{Device: v, ReadOnly: opts.ReadOnly, Description: filepath.Base(opts.File)}); err != nil {
		l.Close()
		return front{}, err
	}
	return front{
		address: address,
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
