// Package keyfile reads and makes files that hold one key and nothing else: raw
// bytes, of an exact length, readable by their owner only.
//
// Such a file is the root of what a machine without a TPM can keep secret:
// whoever can read it has the key. All functions are safe for concurrent use.
package keyfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// Read returns the key of exactly n bytes in the file at path. It refuses
// anything but a regular file, another length, and a file that others than its
// owner may read.
func Read(path string, n int) (*keymem.Key, error) {
	key, err := read(path, n)
	return key, errs.Wrap(err, "cannot read key file %s", path)
}

func read(path string, n int) (*keymem.Key, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.NotFound, "%w", fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, errs.New(errs.Invalid, "it is not a regular file")
	case info.Mode().Perm()&0o077 != 0:
		return nil, errs.New(errs.Denied, "others than its owner may use it (mode %04o)", info.Mode().Perm()).
			WithHint("chmod 600 %s", path)
	case info.Size() != int64(n):
		return nil, errs.New(errs.Invalid, "it has %d bytes, a key of this kind has %d", info.Size(), n)
	}
	return keymem.Read(f, n)
}

// Create makes the file at path with a new random key of n bytes, durably, and
// returns the key. It returns an error wrapping [fs.ErrExist] if there is a
// file.
func Create(path string, n int) (*keymem.Key, error) {
	key, err := create(path, n)
	return key, errs.Wrap(err, "cannot make key file %s", path)
}

func create(path string, n int) (_ *keymem.Key, err error) {
	key, err := keymem.Random(n)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			key.Close()
		}
	}()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(key.Bytes())
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return nil, fmt.Errorf("cannot make its name durable: %w", err)
	}
	return key, nil
}
