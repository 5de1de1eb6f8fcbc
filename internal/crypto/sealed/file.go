package sealed

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"strongroom/internal/crypto/keymem"
)

// newSuffix is what a file is called until it takes the place of the old one.
const newSuffix = ".new"

// ErrKeyFile is reported for a key file that others may read or that has
// another length than [KeySize].
var ErrKeyFile = errors.New("unusable key file")

// WriteFile seals data, which stays the caller's, into the file at path, mode
// 0600; for key and context see [NewWriter]. The new file is written as
// path.new, flushed, read back and compared before it takes the place of the
// old one. When WriteFile returns nil the new content is durable; after an
// error, a crash or a power loss the file has the old or the new content,
// whole.
//
// Calls for the same path must not overlap.
func WriteFile(path string, key *keymem.Key, context string, data *keymem.Key) error {
	if err := writeFile(osFS{}, path, key, context, data); err != nil {
		return fmt.Errorf("cannot write sealed file %s: %w", path, err)
	}
	return nil
}

func writeFile(fsys fileSystem, path string, key *keymem.Key, context string, data *keymem.Key) error {
	return replace(fsys, path, fsys.rename, func(f file) error {
		w, err := NewWriter(f, key, context)
		if err != nil {
			return err
		}
		defer w.Abort()
		if _, err := w.Write(data.Bytes()); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		written, err := read(f, key, context)
		if err != nil {
			return fmt.Errorf("cannot read back: %w", err)
		}
		defer written.Close()
		if !written.Equal(data) {
			return fmt.Errorf("cannot read back: %w", ErrCorrupt)
		}
		return nil
	})
}

// ReadFile returns the content of the sealed file at path, which the caller
// must close. Errors are those of [NewReader] and of the file system, among
// them [fs.ErrNotExist]; a content of no bytes is [ErrCorrupt], one of more than
// keymem.SizeMax bytes [ErrTooLarge].
func ReadFile(path string, key *keymem.Key, context string) (*keymem.Key, error) {
	data, err := readFile(osFS{}, path, key, context)
	if err != nil {
		return nil, fmt.Errorf("cannot read sealed file %s: %w", path, err)
	}
	return data, nil
}

func readFile(fsys fileSystem, path string, key *keymem.Key, context string) (*keymem.Key, error) {
	f, err := fsys.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f, key, context)
}

// read returns the content of the sealed file f.
func read(f file, key *keymem.Key, context string) (*keymem.Key, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	r, err := newReader(f, info.Size(), key, context)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	switch {
	case r.Size() == 0:
		return nil, fmt.Errorf("%w: it is empty", ErrCorrupt)
	case r.Size() > keymem.SizeMax:
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, r.Size())
	}
	return keymem.Read(r, int(r.Size()))
}

// CreateKeyFile makes a new random key, stores it at path, mode 0600, and
// returns it; the caller must close it. The file must not exist: the error
// wraps [fs.ErrExist] then, for a key that is overwritten is lost. The file has
// [KeySize] raw bytes and is there whole or not at all, even after a power loss.
//
// The key protects only as far as the file does: whoever can read the disk that
// it is on can open what is sealed under it.
func CreateKeyFile(path string) (*keymem.Key, error) {
	key, err := createKeyFile(osFS{}, path)
	if err != nil {
		return nil, fmt.Errorf("cannot create key file %s: %w", path, err)
	}
	return key, nil
}

func createKeyFile(fsys fileSystem, path string) (*keymem.Key, error) {
	key, err := keymem.Random(KeySize)
	if err != nil {
		return nil, err
	}
	publish := func(temporary, path string) error {
		if err := fsys.link(temporary, path); err != nil { // fails if path exists
			return err
		}
		return fsys.remove(temporary)
	}
	err = replace(fsys, path, publish, func(f file) error {
		if _, err := f.Write(key.Bytes()); err != nil {
			return err
		}
		return f.Sync()
	})
	if err != nil {
		key.Close()
		return nil, err
	}
	return key, nil
}

// LoadKeyFile returns the key in the file at path, which the caller must close.
// It returns an error wrapping [ErrKeyFile] if the file has another length than
// [KeySize] or if others than its owner may read or write it, or one of the
// file system, among them [fs.ErrNotExist].
func LoadKeyFile(path string) (*keymem.Key, error) {
	key, err := loadKeyFile(osFS{}, path)
	if err != nil {
		return nil, fmt.Errorf("cannot load key file %s: %w", path, err)
	}
	return key, nil
}

func loadKeyFile(fsys fileSystem, path string) (*keymem.Key, error) {
	f, err := fsys.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != KeySize {
		return nil, fmt.Errorf("%w: it has %d bytes, not %d", ErrKeyFile, info.Size(), KeySize)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%w: others than its owner may use it (mode %#o, not 0600)", ErrKeyFile, mode)
	}
	return keymem.Read(io.NewSectionReader(f, 0, KeySize), KeySize)
}

// replace lets fill write and flush a new file beside path, gives it its name by
// publish(temporary, path) and makes that durable. On an error before that, the
// new file is removed; what is left of it after a crash is removed by the next
// call.
func replace(fsys fileSystem, path string, publish func(temporary, path string) error, fill func(file) error) error {
	temporary := path + newSuffix
	if err := fsys.remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := fsys.create(temporary)
	if err != nil {
		return err
	}
	err = fill(f)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = publish(temporary, path)
	}
	if err != nil {
		_ = fsys.remove(temporary) // the first error is the one to report
		return err
	}
	return fsys.syncDir(filepath.Dir(path))
}
