package main

import (
	"context"
	"fmt"
	"net"
	"os"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
)

// serve is the server under test, until ctx ends, over NBD and over vhost-user.
func serve(ctx context.Context, kind, open, file, keyFile, socket, vhost string) error {
	dev, err := openDevice(kind, open, file, keyFile)
	if err != nil {
		return err
	}
	defer dev.Close()
	s := nbd.NewServer(nbd.Config{})
	if err := s.AddExport(nbd.Export{Device: dev}); err != nil {
		return err
	}
	v, err := vhostuser.NewServer(vhostuser.Config{Device: dev})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for path, serve := range map[string]func(context.Context, net.Listener) error{socket: s.Serve, vhost: v.Serve} {
		l, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		g.Go(func() error { return serve(ctx, l) })
	}
	return g.Wait()
}

func openDevice(kind, open, file, keyFile string) (blockdev.Device, error) {
	f, err := blockdev.OpenFile(file, blockdev.FileOptions{Direct: open == "direct"})
	if err != nil {
		return nil, err
	}
	switch kind {
	case "plain":
		return f, nil
	case "nothing":
		return nothing{f}, nil
	case "encrypted":
		dek, err := readKey(keyFile)
		if err != nil {
			f.Close()
			return nil, err
		}
		defer dek.Close()
		v, err := volume.Open(f, dek, volume.Options{})
		if err != nil {
			f.Close()
			return nil, err
		}
		return v, nil
	}
	f.Close()
	return nil, fmt.Errorf("cannot serve a device of kind %q", kind)
}

func readKey(file string) (*keymem.Key, error) {
	k, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	return keymem.Read(k, luks.KeySize)
}

// nothing does no work: what is measured with it is the way there and back.
type nothing struct{ *blockdev.File }

func (nothing) ReadAt(p []byte, _ int64) (int, error) {
	p[0] = 1 // zeros would not be sent
	return len(p), nil
}

func (nothing) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// makePlain makes an image of size bytes; makeEncrypted one with a volume in
// it, whose DEK goes to keyFile. The key protects nothing but the measurement.
func makePlain(file string, size int64) error {
	f, err := blockdev.OpenFile(file, blockdev.FileOptions{Create: true})
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Resize(size)
}

func makeEncrypted(file, keyFile string, size int64) error {
	dek, err := keymem.Random(luks.KeySize)
	if err != nil {
		return err
	}
	defer dek.Close()
	if err := os.WriteFile(keyFile, dek.Bytes(), 0o600); err != nil {
		return err
	}
	f, err := blockdev.OpenFile(file, blockdev.FileOptions{Create: true})
	if err != nil {
		return err
	}
	defer f.Close()
	return volume.Format(f, volume.FormatOptions{Size: size, DEK: dek})
}
