package sealed

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"strongroom/internal/crypto/keymem"
)

// newSuffix is what a file is called until it takes the place of the old one.
const newSuffix = ".new"

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
	return replace(fsys, path, func(f file) error {
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

// replace lets fill write and flush a new file beside path and puts it in
// path's place, durably. On an error before that, the new file is removed; what
// is left of it after a crash is removed by the next call.
func replace(fsys fileSystem, path string, fill func(file) error) error {
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
		err = fsys.rename(temporary, path)
	}
	if err != nil {
		_ = fsys.remove(temporary) // the first error is the one to report
		return err
	}
	return fsys.syncDir(filepath.Dir(path))
}
