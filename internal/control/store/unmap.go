package store

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// unmapAfter is how many bytes of records are read by scans until it is worth to
// unmap them.
const unmapAfter = 64 << 20

// scannedMore notes that a scan has read so many bytes.
func (db *DB) scannedMore(bytes int64) {
	if db.scanned.Add(bytes) > unmapAfter {
		db.scanned.Store(0)
		unmap(db.file)
	}
}

// unmap takes the pages of a database's file out of this process. A start has put
// them all there, for bbolt maps the file populated, to read it in one go, and so
// does who reads all records. They stay in the kernel's cache, and come back one by
// one as they are used; meanwhile they are the first that it takes back for others.
// It is no error if that is not possible.
func unmap(file string) {
	absolute, err := filepath.Abs(file)
	if err != nil {
		return
	}
	if absolute, err = filepath.EvalSymlinks(absolute); err != nil {
		return
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range bytes.Lines(maps) {
		if begin, end, ok := mapping(string(line), absolute); ok {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, begin, end-begin, unix.MADV_DONTNEED)
		}
	}
}

// mapping returns where a line of /proc/PID/maps says that file is mapped, to be
// read and shared: what is dropped of such a mapping is in the file.
func mapping(line, file string) (begin, end uintptr, ok bool) {
	at := strings.IndexByte(line, '/')
	fields := strings.Fields(line)
	if at < 0 || len(fields) < 6 || strings.TrimSuffix(line[at:], "\n") != file || fields[1] != "r--s" {
		return 0, 0, false
	}
	from, to, _ := strings.Cut(fields[0], "-")
	b, err := strconv.ParseUint(from, 16, 64)
	e, err2 := strconv.ParseUint(to, 16, 64)
	if err != nil || err2 != nil || b >= e {
		return 0, 0, false
	}
	return uintptr(b), uintptr(e), true
}
