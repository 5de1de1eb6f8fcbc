package sealed

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"time"
)

// faultMode is how a call of a faultFS fails.
type faultMode int

const (
	notDone       faultMode = iota // nothing happened
	doneButFailed                  // it happened, and an error is reported
	torn                           // of a write, half happened; else as notDone
)

var errInjected = errors.New("injected fault")

// faultFS is a file system in memory that fails one call, and that knows what
// of it a power loss would keep: file contents that were flushed, and names
// whose directory was.
type faultFS struct {
	names   map[string]*inode // as seen now
	durable map[string]*inode // as on the disk

	countdown int // calls until the fault; negative without one
	mode      faultMode
	injected  bool
	history   string // the failed call, for messages
}

// inode is a file's content. All versions of it since the last flush may be on
// the disk.
type inode struct {
	content []byte
	flushed []byte
}

func newFaultFS() *faultFS {
	return &faultFS{names: map[string]*inode{}, durable: map[string]*inode{}, countdown: -1}
}

func (fsys *faultFS) arm(call int, mode faultMode) { fsys.countdown, fsys.mode = call, mode }
func (fsys *faultFS) disarm()                      { fsys.countdown = -1 }

// powerLosses returns the file systems that may be found after a power loss
// now. Directory changes since the last flush may have reached the disk or
// not, and so may the unflushed content of files: none, half or all of it.
func (fsys *faultFS) powerLosses() []*faultFS {
	var all []*faultFS
	for _, names := range []map[string]*inode{fsys.names, fsys.durable} {
		for kept := range 3 {
			after := newFaultFS()
			after.history = fmt.Sprintf("%s, power loss (names %d, content %d)", fsys.history, len(names), kept)
			for name, node := range names {
				content := node.flushed
				if string(node.content) != string(node.flushed) {
					content = [][]byte{node.flushed, node.content[:len(node.content)/2], node.content}[kept]
				}
				after.names[name] = &inode{content: content, flushed: content}
			}
			after.durable = maps.Clone(after.names)
			all = append(all, after)
		}
	}
	return all
}

// call runs apply, unless it is this call's turn to fail. half is what happens
// of a torn call.
func (fsys *faultFS) call(name string, half func(), apply func() error) error {
	fsys.countdown--
	if fsys.countdown != -1 {
		return apply()
	}
	fsys.injected = true
	fsys.history = fmt.Sprintf("%s failed (mode %d)", name, fsys.mode)
	switch fsys.mode {
	case doneButFailed:
		_ = apply()
	case torn:
		half()
	}
	return errInjected
}

func nothing() {}

func (fsys *faultFS) create(path string) (file, error) {
	var f *faultFile
	err := fsys.call("create "+path, nothing, func() error {
		if fsys.names[path] != nil {
			return fs.ErrExist
		}
		fsys.names[path] = &inode{}
		f = &faultFile{fsys: fsys, node: fsys.names[path]}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (fsys *faultFS) open(path string) (file, error) {
	if fsys.names[path] == nil {
		return nil, fs.ErrNotExist
	}
	return &faultFile{fsys: fsys, node: fsys.names[path]}, nil
}

func (fsys *faultFS) rename(oldPath, newPath string) error {
	return fsys.call("rename", nothing, func() error {
		fsys.names[newPath] = fsys.names[oldPath]
		delete(fsys.names, oldPath)
		return nil
	})
}

func (fsys *faultFS) remove(path string) error {
	return fsys.call("remove "+path, nothing, func() error {
		if fsys.names[path] == nil {
			return fs.ErrNotExist
		}
		delete(fsys.names, path)
		return nil
	})
}

func (fsys *faultFS) syncDir(string) error {
	return fsys.call("flush directory", nothing, func() error {
		fsys.durable = maps.Clone(fsys.names)
		return nil
	})
}

type faultFile struct {
	fsys *faultFS
	node *inode
}

func (f *faultFile) Write(p []byte) (int, error) {
	n := 0
	write := func(p []byte) { // a new slice: powerLosses keeps the old one
		f.node.content = append(append([]byte(nil), f.node.content...), p...)
		n = len(p)
	}
	err := f.fsys.call("write", func() { write(p[:len(p)/2]) }, func() error {
		write(p)
		return nil
	})
	return n, err
}

func (f *faultFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	err := f.fsys.call("read", nothing, func() error {
		if off < int64(len(f.node.content)) {
			n = copy(p, f.node.content[off:])
		}
		if n < len(p) {
			return io.EOF
		}
		return nil
	})
	return n, err
}

func (f *faultFile) Stat() (fs.FileInfo, error) {
	if err := f.fsys.call("stat", nothing, func() error { return nil }); err != nil {
		return nil, err
	}
	return fileInfo{int64(len(f.node.content))}, nil
}

func (f *faultFile) Sync() error {
	return f.fsys.call("flush", nothing, func() error {
		f.node.flushed = f.node.content
		return nil
	})
}

func (f *faultFile) Close() error {
	return f.fsys.call("close", nothing, func() error { return nil })
}

type fileInfo struct{ size int64 }

func (i fileInfo) Name() string       { return "f" }
func (i fileInfo) Size() int64        { return i.size }
func (i fileInfo) Mode() fs.FileMode  { return 0o600 }
func (i fileInfo) ModTime() time.Time { return time.Time{} }
func (i fileInfo) IsDir() bool        { return false }
func (i fileInfo) Sys() any           { return nil }
