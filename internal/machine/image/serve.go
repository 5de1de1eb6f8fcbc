package image

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
	"strongroom/internal/errs"
)

// pinned is an image of which the start stays what it was.
type pinned struct {
	*blockdev.File
	start []byte
}

// ReadAt implements [blockdev.Device].
func (p pinned) ReadAt(b []byte, off int64) (int, error) {
	n, err := p.File.ReadAt(b, off)
	if err == nil && off < int64(len(p.start)) {
		copy(b, p.start[off:])
	}
	return n, err
}

// serve serves the image, pinned and read-only, on a socket that only we can reach. It
// returns how qemu-img finds it, and what ends that and closes the image. A file that
// somebody is writing to is refused.
func (o *opened) serve() (source map[string]any, stop func() error, err error) {
	device, err := blockdev.NewFile(o.file, blockdev.FileOptions{ReadOnly: true})
	if err != nil {
		err = errs.New(errs.Invalid, "cannot use image %s: %w", o.path, err)
		return nil, nil, errors.Join(err, o.file.Close())
	}
	dir, err := os.MkdirTemp("", "strongroom-image-")
	if err != nil {
		return nil, nil, errors.Join(err, device.Close())
	}
	socket := filepath.Join(dir, "nbd.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir), device.Close())
	}
	server := nbd.NewServer(nbd.Config{})
	if err := server.AddExport(nbd.Export{Name: "image", Device: pinned{device, o.start}, ReadOnly: true}); err != nil {
		return nil, nil, errors.Join(err, listener.Close(), os.RemoveAll(dir), device.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, listener) }()
	return over(socket, "image"), func() error {
		cancel()
		return errors.Join(<-ended, os.RemoveAll(dir), device.Close())
	}, nil
}
