package host

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
	"strongroom/internal/machine/image"
)

// convert writes the disk in a qcow2 image to disk. qemu-img writes to an NBD
// export of disk on a socket that only we can reach, so no plain copy is made
// on the way. thin leaves zeros out: the disk reads as zeros.
func convert(ctx context.Context, path string, disk blockdev.Device, thin bool, progress func(part float64)) (err error) {
	dir, err := os.MkdirTemp("", "strongroom-import-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	socket := filepath.Join(dir, "nbd.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := nbd.NewServer(nbd.Config{})
	if err := server.AddExport(nbd.Export{Name: "disk", Device: disk}); err != nil {
		return errors.Join(err, listener.Close())
	}
	serveCtx, stop := context.WithCancel(ctx)
	defer stop()
	var group errgroup.Group
	group.Go(func() error { return server.Serve(serveCtx, listener) })
	err = image.Convert(ctx, path, socket, "disk", thin, progress)
	stop()
	return errors.Join(err, group.Wait())
}
