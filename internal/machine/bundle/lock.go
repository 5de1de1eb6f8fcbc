package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"strongroom/internal/errs"
	"strongroom/internal/filelock"
)

const (
	lockName = ".lock"
	noFollow = unix.O_NOFOLLOW
)

// Lock is held by the host that runs or changes the VM in a folder, so that no
// two do. It is an flock(2) of ".lock" in the folder: it works between hosts
// where the file system's locks do, and ends with the process.
type Lock struct {
	file *os.File
}

// Acquire takes the lock of the folder at dir. It returns an error of kind
// [errs.InvalidState] if somebody else holds it, and
// one of kind [errs.NotFound] if there is no folder.
func Acquire(dir string) (*Lock, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR|noFollow, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.NotFound, "there is no VM folder %s", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot lock VM folder %s: %w", dir, err)
	}
	if err := filelock.Take(f); err != nil {
		f.Close()
		if errors.Is(err, filelock.ErrHeld) {
			return nil, errs.New(errs.InvalidState, "VM folder %s is in use by another host or process", dir)
		}
		return nil, fmt.Errorf("cannot lock VM folder %s: %w", dir, err)
	}
	return &Lock{f}, nil
}

// Release gives the lock up. It is idempotent; a nil Lock may be released.
func (l *Lock) Release() error {
	if l == nil {
		return nil
	}
	err := l.file.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// File returns the open file that carries the lock: a process that inherits it
// holds the lock too. It stays the Lock's.
func (l *Lock) File() *os.File { return l.file }
