package blockdev_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

// TestDirectProcessors runs programs of their own, because the number is one of
// the whole process.
func TestDirectProcessors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, env string
		direct    bool
		want      string
	}{
		{"cached", "", false, "as before"},
		{"direct", "", true, "at least 8"},
		{"set by the user", "GOMAXPROCS=3", true, "as before"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProcessorsOfProgram$", "-test.v")
			cmd.Env = append(os.Environ(), fmt.Sprintf("PROCESSORS_OF=%v %s", c.direct, newFile(t, 1<<20)))
			if cmd.Env = append(cmd.Env, "GOMAXPROCS="); c.env != "" {
				cmd.Env = append(cmd.Env, c.env)
			}
			out, err := cmd.CombinedOutput()
			check(t, err)
			if !bytes.Contains(out, []byte("processors: "+c.want)) {
				t.Errorf("want %s:\n%s", c.want, out)
			}
		})
	}
}

// TestProcessorsOfProgram is the program of [TestDirectProcessors].
func TestProcessorsOfProgram(t *testing.T) {
	var direct bool
	var path string
	if n, _ := fmt.Sscan(os.Getenv("PROCESSORS_OF"), &direct, &path); n != 2 {
		t.Skip("not started by another test")
	}
	before := runtime.GOMAXPROCS(0)
	if os.Getenv("GOMAXPROCS") == "" {
		// So the test means the same on a machine that has more.
		before = 2
		runtime.GOMAXPROCS(before)
	}
	open(t, path, blockdev.FileOptions{Direct: direct})
	switch now := runtime.GOMAXPROCS(0); {
	case now == before:
		fmt.Println("processors: as before")
	case now >= 8:
		fmt.Println("processors: at least 8")
	}
}

// TestDirect looks at the descriptor and at the page cache: what was written is
// in the file, and nothing of it in the cache.
func TestDirect(t *testing.T) {
	t.Parallel()
	path := newFile(t, 4<<20)
	f := open(t, path, blockdev.FileOptions{Direct: true})
	fd, err := f.Dup()
	check(t, err)
	flags, err := unix.FcntlInt(fd.Fd(), unix.F_GETFL, 0)
	check(t, err)
	if flags&unix.O_DIRECT == 0 {
		t.Error("the file is not open for direct I/O")
	}
	want := bytes.Repeat([]byte("direct"), 500_000)
	_, err = f.WriteAt(want, 777) // neither offset, length nor memory is aligned
	check(t, err)
	pages, err := unix.Mmap(int(fd.Fd()), 0, 4<<20, unix.PROT_READ, unix.MAP_SHARED)
	check(t, err)
	defer unix.Munmap(pages)
	resident := make([]byte, 4<<20/os.Getpagesize())
	check(t, mincore(pages, resident))
	if n := bytes.Count(resident, []byte{1}); n > 0 {
		t.Errorf("%d pages are in the page cache", n)
	}
	check(t, f.Close())

	// Who gets the descriptor keeps to the alignment, too.
	passed, err := blockdev.NewFile(fd, blockdev.FileOptions{})
	check(t, err)
	p := make([]byte, 5)
	_, err = passed.ReadAt(p, 777)
	check(t, err)
	if string(p) != "direc" {
		t.Errorf("read through the descriptor: %q", p)
	}
	check(t, passed.Close())

	got, err := os.ReadFile(path)
	check(t, err)
	if !bytes.Equal(got[777:777+len(want)], want) || !bytes.Equal(got[:777], make([]byte, 777)) {
		t.Error("the file has other contents")
	}
}

// TestDirectRefused: where it is not possible, the error says so.
func TestDirectRefused(t *testing.T) {
	t.Parallel()
	_, err := blockdev.OpenFile(newFile(t, 4096+100), blockdev.FileOptions{Direct: true})
	wantError(t, err, blockdev.ErrNoDirect)
	check(t, open(t, newFile(t, 4096+100), blockdev.FileOptions{}).Close())

	const variable = "STRONGROOM_TEST_RAMFS_DIR"
	dir := os.Getenv(variable)
	if dir == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDirectRefused$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"="+t.TempDir())
		cmd.SysProcAttr = ownNamespace()
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("ramfs refused")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	check(t, unix.Mount("ramfs", dir, "ramfs", 0, ""))
	path := filepath.Join(dir, "disk")
	check(t, os.WriteFile(path, make([]byte, 8192), 0o600))
	_, err = blockdev.OpenFile(path, blockdev.FileOptions{Direct: true})
	wantError(t, err, blockdev.ErrNoDirect)
	_, err = blockdev.OpenFile(path+"2", blockdev.FileOptions{Create: true, Direct: true})
	wantError(t, err, blockdev.ErrNoDirect)
	if _, err := os.Stat(path + "2"); !os.IsNotExist(err) {
		t.Errorf("the new file is left: %v", err)
	}
	fmt.Println("ramfs refused")
}

// mincore asks which pages of a mapping are in memory: one byte for each.
func mincore(pages, resident []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&pages[0])), uintptr(len(pages)), uintptr(unsafe.Pointer(&resident[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
