// Package keyfile reads and makes files that hold one key and nothing else: raw
// bytes, of an exact length, readable by their owner only.
//
// Such a file is the root of what a machine without a TPM can keep secret:
// whoever can read it has the key. All functions are safe for concurrent use.
package keyfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/durable"
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
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO is refused, not waited for
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

// newPattern is what a file is called while it is written.
const newPattern = ".key-*.new"

// Create makes the file at path with a new random key of n bytes, durably, and
// returns the key. The key is written under another name, flushed and read back
// before the file gets its own, so that there is never a part of a key at path.
//
// It returns an error wrapping [fs.ErrExist] if there is something at path, and
// leaves that alone. After another error there is no file; after a crash there is
// none, or one that [Read] accepts and whose key nobody has used, and a
// ".key-*.new" beside it may be deleted.
func Create(path string, n int) (*keymem.Key, error) {
	key, err := create(path, n)
	return key, errs.Wrap(err, "cannot make key file %s", path)
}

func create(path string, n int) (*keymem.Key, error) {
	key, err := keymem.Random(n)
	if err != nil {
		return nil, err
	}
	if err := write(path, key); err != nil {
		return nil, errors.Join(err, key.Close())
	}
	return key, nil
}

// Write makes the file at path with a key that there is already, in the same
// way and with the same errors as [Create]. The key stays the caller's.
func Write(path string, key *keymem.Key) error {
	return errs.Wrap(write(path, key), "cannot make key file %s", path)
}

func write(path string, key *keymem.Key) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fs.ErrExist
		}
		return err
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, newPattern) // mode 0600
	if err != nil {
		return err
	}
	if err := errors.Join(fill(f, key), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := place(f.Name(), path); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := syncDir(dir); err != nil {
		return errors.Join(fmt.Errorf("cannot make its name durable: %w", err), os.Remove(path))
	}
	return nil
}

// syncDir is changed by tests.
var syncDir = durable.SyncDir

// fill writes the key to f, makes it durable and reads it back.
func fill(f *os.File, key *keymem.Key) error {
	if _, err := f.Write(key.Bytes()); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	written, err := keymem.Read(io.NewSectionReader(f, 0, int64(key.Len())), key.Len())
	if err != nil {
		return fmt.Errorf("cannot read back: %w", err)
	}
	defer written.Close()
	if !written.Equal(key) {
		return errors.New("cannot read back: it holds something else")
	}
	return nil
}

// place gives the file at from the name to, unless there is one of that name.
func place(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// Some file systems, NFS for one, cannot; a link does not replace either.
		if err = os.Link(from, to); err == nil {
			err = os.Remove(from)
		}
	}
	return err
}
