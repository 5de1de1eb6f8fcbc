// Package durable replaces small files so that a crash or a power loss at any
// instant leaves the old contents or the new ones, and makes names durable. Sealed
// contents are package sealed's.
//
// All functions are safe for concurrent use, but two writers of one file are not: who
// writes a file does so alone.
package durable

import (
	"errors"
	"os"
	"path/filepath"
)

// WriteFile makes b, which stays the caller's, the contents of the file at path,
// mode 0600, and returns when file and name are on disk. On the way there is a file
// path+".new"; one that a crash left is overwritten. After an error the file has
// the old contents or the new ones. Two writers of one path must not meet.
func WriteFile(path string, b []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir returns when the names in the directory at path, as they are now, are on
// disk: those of new, renamed and removed files.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
