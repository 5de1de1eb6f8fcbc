package recrypt_test

import (
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/machine/recrypt"
)

// faultFolder is a VM folder in memory that fails one operation, counted over
// the folder and all its files, and that knows what a power loss would leave:
// of a file's content what package faultdev says, of the names those since the
// last sync of the folder each or not. It changes names and syncs them as
// [recrypt.Dir] does.
type faultFolder struct {
	mu      sync.Mutex
	fault   *faultdev.Fault
	ops     int
	hit     string           // the operation that failed; empty as long as none has
	names   map[string]*node // as seen now
	durable map[string]*node // as of the last sync
	pending []func(map[string]*node)
	reflink bool // its files can be clones
}

var _ recrypt.Folder = (*faultFolder)(nil)

// node is a file.
type node struct {
	dev    *faultdev.Device
	opened bool
}

func newFaultFolder() *faultFolder {
	return &faultFolder{names: map[string]*node{}, durable: map[string]*node{}}
}

// clone returns a folder with the same contents, all durable, that fails where
// fault says.
func (f *faultFolder) clone(fault *faultdev.Fault) *faultFolder {
	return f.left(f.names, (*faultdev.Device).Contents, fault)
}

// powerLoss returns what a power loss may leave of the folder.
func (f *faultFolder) powerLoss(rng *rand.Rand) *faultFolder {
	names := maps.Clone(f.durable)
	for _, change := range f.pending {
		if rng.IntN(2) == 0 {
			change(names)
		}
	}
	return f.left(names, func(d *faultdev.Device) *blockdev.Memory { return d.PowerLoss(rng) }, nil)
}

func (f *faultFolder) left(names map[string]*node, content func(*faultdev.Device) *blockdev.Memory, fault *faultdev.Fault) *faultFolder {
	after := newFaultFolder()
	after.fault = fault
	for _, name := range slices.Sorted(maps.Keys(names)) { // so that the seed decides
		after.names[name] = &node{dev: faultdev.New(content(names[name].dev), nil)}
	}
	after.durable = maps.Clone(after.names)
	return after
}

// inject replaces the fault; operations count from 0 again.
func (f *faultFolder) inject(fault *faultdev.Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault, f.ops = fault, 0
}

// opened returns the names of files that are open.
func (f *faultFolder) opened() []string {
	var names []string
	for _, name := range f.list() {
		if f.names[name].opened {
			names = append(names, name)
		}
	}
	return names
}

// list returns the names that are there.
func (f *faultFolder) list() []string { return slices.Sorted(maps.Keys(f.names)) }

// operation counts one operation and says how it goes. f.mu is held.
func (f *faultFolder) operation(what string) (do bool, mode faultdev.Mode, err error) {
	op := f.ops
	f.ops++
	switch {
	case f.fault == nil || op < f.fault.Op:
		return true, faultdev.Done, nil
	case op == f.fault.Op:
		f.hit = what
		return f.fault.Mode != faultdev.Undone, f.fault.Mode, fmt.Errorf("%s: %w (%s)", what, faultdev.ErrInjected, f.fault.Mode)
	case f.fault.Dead:
		return false, faultdev.Undone, fmt.Errorf("%s: %w (dead)", what, faultdev.ErrInjected)
	}
	return true, faultdev.Done, nil
}

// change changes names, which is never torn. f.mu is held.
func (f *faultFolder) change(what string, apply func(map[string]*node)) error {
	do, mode, err := f.operation(what)
	if do && mode != faultdev.Torn {
		apply(f.names)
		f.pending = append(f.pending, apply)
	}
	return err
}

// sync makes the names durable. f.mu is held.
func (f *faultFolder) sync() error {
	do, mode, err := f.operation("sync folder")
	if do && mode != faultdev.Torn {
		f.durable, f.pending = maps.Clone(f.names), nil
	}
	return err
}

func (f *faultFolder) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sync()
}

func (f *faultFolder) Exists(name string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, _, err := f.operation("look for " + name); err != nil {
		return false, err
	}
	return f.names[name] != nil, nil
}

func (f *faultFolder) Open(name string) (blockdev.Resizer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, _, err := f.operation("open " + name); err != nil {
		return nil, err
	}
	n := f.names[name]
	switch {
	case n == nil:
		return nil, fs.ErrNotExist
	case n.opened:
		return nil, blockdev.ErrInUse
	}
	n.opened = true
	return &handle{folder: f, name: name, node: n}, nil
}

// OpenShared opens a file that may be open: what is written to it before its content
// is looked at is there, as with a volume process.
func (f *faultFolder) OpenShared(name string) (blockdev.Device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, _, err := f.operation("look into " + name); err != nil {
		return nil, err
	}
	n := f.names[name]
	if n == nil {
		return nil, fs.ErrNotExist
	}
	return &handle{folder: f, name: name, node: n, shared: true}, nil
}

// Create is two operations, and undoes the first if the second fails.
func (f *faultFolder) Create(name string) (blockdev.Resizer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.names[name] != nil {
		return nil, fs.ErrExist
	}
	n := &node{dev: faultdev.New(blockdev.NewMemory(0, 512), nil), opened: true}
	if err := f.change("create "+name, func(names map[string]*node) { names[name] = n }); err != nil {
		n.opened = false
		return nil, err
	}
	if err := f.sync(); err != nil {
		n.opened = false
		_ = f.change("remove "+name, func(names map[string]*node) { delete(names, name) })
		return nil, err
	}
	return &handle{folder: f, name: name, node: n}, nil
}

func (f *faultFolder) Rename(old, new string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.names[old]
	if n == nil {
		return fs.ErrNotExist
	}
	if err := f.change("rename "+old, func(names map[string]*node) { delete(names, old); names[new] = n }); err != nil {
		return err
	}
	return f.sync()
}

func (f *faultFolder) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.names[name] == nil {
		return f.sync()
	}
	if err := f.change("remove "+name, func(names map[string]*node) { delete(names, name) }); err != nil {
		return err
	}
	return f.sync()
}

// handle is an open file.
type handle struct {
	folder *faultFolder
	name   string
	node   *node
	shared bool // others may have the file open
	closed bool
}

var (
	_ blockdev.Extenter = (*handle)(nil)
	_ blockdev.Cloner   = (*handle)(nil)
)

// do runs a request as one operation of the folder.
func (h *handle) do(what string, request func(*faultdev.Device) error) error {
	h.folder.mu.Lock()
	defer h.folder.mu.Unlock()
	if h.closed {
		return blockdev.ErrClosed
	}
	do, mode, err := h.folder.operation(what + " " + h.name)
	switch {
	case err == nil:
		return request(h.node.dev)
	case !do && !strings.HasPrefix(what, "flush"):
		return err
	}
	// A failed flush too is the device's: it has to know of it.
	h.node.dev.Inject(&faultdev.Fault{Mode: mode})
	defer h.node.dev.Inject(nil)
	_ = request(h.node.dev)
	return err
}

func (h *handle) ReadAt(p []byte, off int64) (n int, err error) {
	err = h.do("read", func(d *faultdev.Device) error { n, err = d.ReadAt(p, off); return err })
	return n, err
}

func (h *handle) WriteAt(p []byte, off int64) (n int, err error) {
	err = h.do("write", func(d *faultdev.Device) error { n, err = d.WriteAt(p, off); return err })
	return n, err
}

func (h *handle) WriteZeroes(off, n int64, mayPunch bool) error {
	return h.do("zero", func(d *faultdev.Device) error { return d.WriteZeroes(off, n, mayPunch) })
}

func (h *handle) Discard(off, n int64) error {
	return h.do("discard", func(d *faultdev.Device) error { return d.Discard(off, n) })
}

func (h *handle) Flush() error { return h.do("flush", (*faultdev.Device).Flush) }

func (h *handle) Resize(size int64) error {
	return h.do("resize", func(d *faultdev.Device) error { return d.Resize(size) })
}

// CloneFrom is one operation, which a fault does in part at most.
func (h *handle) CloneFrom(src blockdev.Device) error {
	if !h.folder.reflink {
		return blockdev.ErrNoClone
	}
	type piece struct {
		off  int64
		data []byte
	}
	var pieces []piece
	for off := int64(0); off < src.Size(); {
		e, err := src.(blockdev.Extenter).NextExtent(off)
		if err != nil {
			return err
		}
		if !e.Hole {
			p := piece{off, make([]byte, e.Length)}
			if _, err := src.ReadAt(p.data, off); err != nil {
				return err
			}
			pieces = append(pieces, p)
		}
		off += e.Length
	}
	return h.do("clone", func(d *faultdev.Device) error {
		if err := d.Resize(src.Size()); err != nil {
			return err
		}
		for _, p := range pieces {
			if _, err := d.WriteAt(p.data, p.off); err != nil {
				return err
			}
		}
		return nil
	})
}

func (h *handle) NextExtent(off int64) (blockdev.Extent, error) { return h.node.dev.NextExtent(off) }
func (h *handle) Size() int64                                   { return h.node.dev.Size() }
func (h *handle) BlockSize() int                                { return h.node.dev.BlockSize() }

func (h *handle) Close() error {
	h.folder.mu.Lock()
	defer h.folder.mu.Unlock()
	if !h.closed {
		h.closed = true
		h.node.opened = h.shared && h.node.opened
	}
	return nil
}
