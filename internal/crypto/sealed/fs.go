package sealed

import (
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"strongroom/internal/durable"
)

// fileSystem is what this package needs of one. Tests put a failing one in
// place of the operating system's.
type fileSystem interface {
	create(path string) (file, error) // new, mode 0600, for reading and writing
	open(path string) (file, error)   // for reading
	rename(oldPath, newPath string) error
	remove(path string) error
	syncDir(path string) error
}

// file is an open file of a fileSystem.
type file interface {
	io.Writer
	io.ReaderAt
	Stat() (fs.FileInfo, error)
	Sync() error
	Close() error
}

// osFS is the operating system's.
type osFS struct{}

func (osFS) create(path string) (file, error) {
	return orNil(os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600))
}

func (osFS) open(path string) (file, error) { return orNil(os.Open(path)) }

// orNil keeps a nil *os.File from becoming a file that is not nil.
func orNil(f *os.File, err error) (file, error) {
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (osFS) rename(oldPath, newPath string) error { return os.Rename(oldPath, newPath) }
func (osFS) remove(path string) error             { return os.Remove(path) }

func (osFS) syncDir(path string) error { return durable.SyncDir(path) }
