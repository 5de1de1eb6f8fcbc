package volumed

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// program are the mappings of the program's file, of which other processes of
// this program have the same pages.
type program []mapping

// findProgram finds the program in memory. It must come before the sandbox, which
// opens no file.
func findProgram() (program, error) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil, fmt.Errorf("cannot look at the program's memory: %w", err)
	}
	defer f.Close()
	p, err := cleanMappings(f)
	if err != nil {
		return nil, fmt.Errorf("cannot look at the program's memory: %w", err)
	}
	return p, nil
}

// drop lets go of all pages. Most were needed only to start the packages that
// other roles are made of, or to open a disk; what is used comes back from the page
// cache.
func (p program) drop() {
	for _, m := range p {
		// Best effort: what it keeps is only more than it needs.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// cleanMappings reads smaps (proc_pid_smaps(5)) and returns the mappings of
// files that cannot be written and of which no page differs from the file.
func cleanMappings(smaps io.Reader) (program, error) {
	var clean program
	var m mapping
	var ofFile bool // m is of a file, and private and read-only
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		fields := bytes.Fields(lines.Bytes())
		switch {
		case len(fields) >= 5 && !bytes.HasSuffix(fields[0], []byte(":")):
			start, end, _ := bytes.Cut(fields[0], []byte("-"))
			from, err1 := strconv.ParseUint(string(start), 16, strconv.IntSize)
			to, err2 := strconv.ParseUint(string(end), 16, strconv.IntSize)
			if err1 != nil || err2 != nil || from >= to {
				return nil, fmt.Errorf("mapping %.64q is not understood", fields[0])
			}
			m = mapping{uintptr(from), uintptr(to)}
			mode := string(fields[1])
			ofFile = len(fields) >= 6 && fields[5][0] == '/' && (mode == "r--p" || mode == "r-xp")
		case len(fields) == 3 && string(fields[0]) == "Anonymous:":
			// A changed page of a private mapping is no longer the file's.
			if ofFile && string(fields[1]) == "0" {
				clean = append(clean, m)
			}
			ofFile = false
		}
	}
	return clean, lines.Err()
}
