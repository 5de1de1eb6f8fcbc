// Package localvolume is what one does to a single encrypted volume without a
// controller: make it, look at it, serve it over NBD or vhost-user, give it another key, and
// write its data to a plain file. It is the engine of `strongroom volume`, for
// recovery, for measuring, and for someone else's QEMU.
//
// The key of a volume comes from a key file: the 64 raw bytes of its DEK (see
// package keyfile).
//
// Invariants: no existing file is overwritten; what fails leaves the volume as
// it was and no new file. Errors are [errs.Error] values.
//
// All functions are safe for concurrent use; the locks of package blockdev keep
// two of them from one volume.
package localvolume

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// FormatOptions say how a volume is made.
type FormatOptions struct {
	File       string // must not exist
	KeyFile    string
	Size       int64 // of the data, in bytes: a multiple of SectorSize
	SectorSize int   // in bytes: 512 or 4096
}

// Format makes a new volume and returns its header's contents.
func Format(opts FormatOptions) (volume.Info, error) {
	if opts.Size <= 0 || opts.SectorSize <= 0 || opts.Size%int64(opts.SectorSize) != 0 {
		return volume.Info{}, errs.New(errs.Invalid, "size %d is not a multiple of the sector size, %d bytes", opts.Size, opts.SectorSize)
	}
	dek, err := readKey(opts.KeyFile)
	if err != nil {
		return volume.Info{}, err
	}
	defer dek.Close()
	dev, err := blockdev.OpenFile(opts.File, blockdev.FileOptions{Create: true})
	if err != nil {
		return volume.Info{}, explain(err)
	}
	defer dev.Close()
	info, err := format(dev, volume.FormatOptions{Size: opts.Size, SectorSize: opts.SectorSize, DEK: dek, AllowDiscards: true})
	if err != nil {
		os.Remove(opts.File)
		return volume.Info{}, explain(err)
	}
	return info, nil
}

func format(dev *blockdev.File, opts volume.FormatOptions) (volume.Info, error) {
	if err := volume.Format(dev, opts); err != nil {
		return volume.Info{}, err
	}
	return volume.Inspect(dev)
}

// Storage says where a volume is.
type Storage struct {
	File   string // a file or block device with the data
	Header string // the file with its header, if that is detached; "": it is in front of the data
}

// open opens the storage. Only File is read and written past the page cache if
// opts say so. The caller closes it.
func (s Storage) open(opts blockdev.FileOptions) (blockdev.Device, error) {
	data, err := blockdev.OpenFile(s.File, opts)
	if err != nil || s.Header == "" {
		return data, explain(err)
	}
	opts.Direct = false
	header, err := blockdev.OpenFile(s.Header, opts)
	if err != nil {
		return nil, explain(errors.Join(err, data.Close()))
	}
	return volume.NewDetached(header, data), nil
}

// Inspect returns what the header of the volume tells; it needs no key, writes
// nothing, and works while the volume is in use.
func Inspect(s Storage) (volume.Info, error) {
	dev, err := s.open(blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	if err != nil {
		return volume.Info{}, err
	}
	defer dev.Close()
	info, err := volume.Inspect(dev)
	return info, explain(err)
}

// open opens the volume with the key in keyFile. The caller closes it.
func open(s Storage, keyFile string, opts blockdev.FileOptions) (*volume.Volume, error) {
	dek, err := readKey(keyFile)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	return openWith(s, dek, opts)
}

func openWith(s Storage, dek *keymem.Key, opts blockdev.FileOptions) (*volume.Volume, error) {
	dev, err := s.open(opts)
	if err != nil {
		return nil, err
	}
	v, err := volume.Open(dev, dek, volume.Options{ReadOnly: opts.ReadOnly})
	if err != nil {
		dev.Close()
		return nil, explain(err)
	}
	return v, nil
}

func readKey(file string) (*keymem.Key, error) {
	key, err := keyfile.Read(file, luks.KeySize)
	if errors.Is(err, fs.ErrNotExist) {
		err = errs.New(errs.NotFound, "%w", err).WithHint("to make a new key: (umask 077; head -c %d /dev/urandom > %s)", luks.KeySize, file)
	}
	return key, err
}

// explain gives an error of the layers below the kind and the hint that the
// user needs.
func explain(err error) error {
	var known *errs.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case is(volume.ErrWrongKey):
		return errs.New(errs.Denied, "%w", err).WithHint("use the key file that the volume was made with, or rekeyed to")
	case is(volume.ErrRekeying):
		return errs.New(errs.InvalidState, "%w", err).
			WithHint("finish it: strongroom volume rekey FILE --in-place --key-file OLD --new-key-file NEW")
	case is(volume.ErrEncrypting):
		return errs.New(errs.InvalidState, "%w", err).WithHint("finish it: strongroom volume encrypt FILE --key-file KEY")
	case is(volume.ErrDetached):
		return errs.New(errs.Invalid, "%w", err).WithHint("give the device with the data, and this file as --header")
	case is(volume.ErrOtherDevice):
		return errs.New(errs.Invalid, "%w", err).WithHint("look for the header that was made for this device: strongroom volume info DEVICE --header FILE")
	case is(volume.ErrEncrypted):
		return errs.New(errs.InvalidState, "%w", err).WithHint("strongroom volume info FILE")
	case is(volume.ErrUsed):
		return errs.New(errs.InvalidState, "%w", err).WithHint("to begin again with the disk as it is now: truncate -s BYTES FILE")
	case is(volume.ErrNotVolume, volume.ErrTooSmall, volume.ErrUnsupported, luks.ErrVersion, blockdev.ErrBadSize):
		return errs.New(errs.Invalid, "%w", err)
	case is(volume.ErrCorrupt, volume.ErrTruncated, volume.ErrVerify, volume.ErrChanged):
		return errs.New(errs.Corrupt, "%w", err).WithHint("restore the file from a backup")
	case is(blockdev.ErrNoDirect):
		return errs.New(errs.Invalid, "%w", err).WithHint("leave out --direct")
	case is(blockdev.ErrInUse):
		return errs.New(errs.InvalidState, "%w", err).WithHint("power off the VM, or stop the program that uses it")
	case is(blockdev.ErrNoSpace, luks.ErrNoSpace):
		return errs.New(errs.NoSpace, "%w", err)
	case is(fs.ErrExist):
		return errs.New(errs.Exists, "%w", err)
	case is(fs.ErrNotExist):
		return errs.New(errs.NotFound, "%w", err)
	case is(fs.ErrPermission, blockdev.ErrReadOnly):
		return errs.New(errs.Denied, "%w", err)
	case is(context.Canceled, context.DeadlineExceeded):
		return errs.New(errs.Canceled, "interrupted, nothing was changed")
	}
	return err
}
