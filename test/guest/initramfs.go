package guest

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
)

// tree is a file system for an initramfs.
type tree struct {
	entries map[string]entry // by path without the leading slash
}

type entry struct {
	mode         uint32 // as in stat(2), with the type
	data         []byte
	major, minor uint32 // of a device
}

// File types of stat(2).
const (
	typeDir     = 0o040000
	typeFile    = 0o100000
	typeSymlink = 0o120000
	typeChar    = 0o020000
)

func newTree() *tree { return &tree{entries: map[string]entry{}} }

// put adds an entry and the folders that lead to it. The first one to come
// counts: programs share libraries.
func (t *tree) put(name string, e entry) {
	name = path.Clean(name)[1:]
	if _, ok := t.entries[name]; ok {
		return
	}
	if dir := path.Dir("/" + name); dir != "/" {
		t.mkdir(dir)
	}
	t.entries[name] = e
}

func (t *tree) mkdir(name string) { t.put(name, entry{mode: typeDir | 0o755}) }

func (t *tree) link(name, target string) {
	t.put(name, entry{mode: typeSymlink | 0o777, data: []byte(target)})
}

func (t *tree) device(name string, major, minor uint32) {
	t.put(name, entry{mode: typeChar | 0o600, major: major, minor: minor})
}

func (t *tree) add(name string, mode uint32, data []byte) {
	t.put(name, entry{mode: typeFile | mode, data: data})
}

// addFile copies a file of this machine.
func (t *tree) addFile(name, source string, mode uint32) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	t.add(name, mode, data)
	return nil
}

// archive returns the tree as a cpio archive of format "newc", the same bytes
// for the same tree (Documentation/driver-api/early-userspace/buffer-format.rst
// of the kernel). It is not compressed: the guest would take longer to unpack it
// than QEMU to load it.
func (t *tree) archive() []byte {
	var b bytes.Buffer
	names := slices.Sorted(maps.Keys(t.entries)) // folders come before what is in them
	for i, name := range names {
		writeEntry(&b, uint32(i+1), name, t.entries[name])
	}
	writeEntry(&b, 0, "TRAILER!!!", entry{})
	return b.Bytes()
}

func writeEntry(b *bytes.Buffer, inode uint32, name string, e entry) {
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, e.mode, 0, 0, // uid, gid
		1, 0, // links, modification time
		len(e.data), 0, 0, // size, device of the file system
		e.major, e.minor, len(name)+1, 0, // checksum
		name)
	pad(b)
	b.Write(e.data)
	pad(b)
}

// pad fills up to a multiple of 4 bytes.
func pad(b *bytes.Buffer) { b.Write(make([]byte, -b.Len()&3)) }
