package recrypt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/errs"
)

// Dir is a [Folder] on a mounted file system. Path is absolute, and no part of
// it may be changed by others than root and the host.
type Dir struct {
	Path string
}

// path returns the path of a file in the folder. Names come from vm.json, which
// may come from anywhere.
func (d Dir) path(name string) (string, error) {
	if !filepath.IsLocal(name) || filepath.Base(name) != name || name == "." {
		return "", errs.New(errs.Invalid, "%q is not a file name in a VM folder", name)
	}
	return filepath.Join(d.Path, name), nil
}

// Exists implements [Folder].
func (d Dir) Exists(name string) (bool, error) {
	path, err := d.path(name)
	if err != nil {
		return false, err
	}
	_, err = os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Open implements [Folder].
func (d Dir) Open(name string) (blockdev.Resizer, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	return open(path, blockdev.FileOptions{NoFollow: true})
}

// OpenShared implements [Folder].
func (d Dir) OpenShared(name string) (blockdev.Device, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	return open(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true, NoFollow: true})
}

// Create implements [Folder].
func (d Dir) Create(name string) (blockdev.Resizer, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	return open(path, blockdev.FileOptions{Create: true, NoFollow: true})
}

// open keeps a nil *blockdev.File from becoming a device that is not nil.
func open(path string, opts blockdev.FileOptions) (blockdev.Resizer, error) {
	file, err := blockdev.OpenFile(path, opts)
	if err != nil {
		return nil, err
	}
	return file, nil
}

// Rename implements [Folder].
func (d Dir) Rename(old, new string) error {
	from, err := d.path(old)
	if err != nil {
		return err
	}
	to, err := d.path(new)
	if err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("cannot rename %s: %w", old, err)
	}
	return d.Sync()
}

// Remove implements [Folder].
func (d Dir) Remove(name string) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	// A file that is not there may have been removed by a call that failed
	// before that was durable.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove %s: %w", name, err)
	}
	return d.Sync()
}

// Sync implements [Folder].
func (d Dir) Sync() error {
	f, err := os.Open(d.Path)
	if err != nil {
		return fmt.Errorf("cannot make names durable: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("cannot make names durable: %w", err)
	}
	return nil
}
