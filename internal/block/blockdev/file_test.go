package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

// newFile makes a file of size bytes and returns its path.
func newFile(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	check(t, os.WriteFile(path, nil, 0o600))
	check(t, os.Truncate(path, size))
	return path
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

func TestFileCreate(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk")
	f := open(t, path, blockdev.FileOptions{Create: true})
	st, err := os.Stat(path)
	check(t, err)
	if st.Mode() != 0o600 || f.Size() != 0 {
		t.Errorf("created with mode %v and size %d", st.Mode(), f.Size())
	}
	check(t, f.Close())
	_, err = blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	wantError(t, err, fs.ErrExist)
	_, err = blockdev.OpenFile(filepath.Join(filepath.Dir(path), "none", "disk"), blockdev.FileOptions{Create: true})
	wantError(t, err, fs.ErrNotExist)
	_, err = blockdev.OpenFile(path+"2", blockdev.FileOptions{})
	wantError(t, err, fs.ErrNotExist)
}

func TestFileRefusesOtherKinds(t *testing.T) {
	t.Parallel()
	for _, path := range []string{t.TempDir(), "/dev/zero"} {
		if f, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true}); err == nil {
			f.Close()
			t.Errorf("%s was opened", path)
		}
	}
	if _, err := blockdev.OpenFile(newFile(t, 0), blockdev.FileOptions{Unlocked: true}); err == nil {
		t.Error("a file was opened for writing without a lock")
	}
	path := newFile(t, 4096)
	appending, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	check(t, err)
	defer appending.Close()
	if _, err := blockdev.NewFile(appending, blockdev.FileOptions{}); err == nil {
		t.Error("a file open for appending was taken")
	}
	reading, err := os.Open(path)
	check(t, err)
	defer reading.Close()
	_, err = blockdev.NewFile(reading, blockdev.FileOptions{})
	wantError(t, err, blockdev.ErrReadOnly)
}

// TestFileLink: a link is followed or refused, as asked; a FIFO is refused and
// not waited for.
func TestFileLink(t *testing.T) {
	t.Parallel()
	path := newFile(t, 4096)
	link := path + ".link"
	check(t, os.Symlink(path, link))
	f := open(t, link, blockdev.FileOptions{})
	check(t, f.Close())
	fifo := path + ".fifo"
	check(t, unix.Mkfifo(fifo, 0o600))
	for _, opts := range []blockdev.FileOptions{{}, {ReadOnly: true}, {ReadOnly: true, Unlocked: true}} {
		opts.NoFollow = true
		for _, path := range []string{link, fifo} {
			if f, err := blockdev.OpenFile(path, opts); err == nil {
				f.Close()
				t.Errorf("%s was opened with %+v", path, opts)
			}
		}
		f := open(t, path, opts)
		check(t, f.Close())
	}
}

func TestFileInUse(t *testing.T) {
	t.Parallel()
	path := newFile(t, 4096)
	write, read, look := blockdev.FileOptions{}, blockdev.FileOptions{ReadOnly: true}, blockdev.FileOptions{ReadOnly: true, Unlocked: true}
	for _, c := range []struct {
		name          string
		first, second blockdev.FileOptions
		want          error
	}{
		{"two writers", write, write, blockdev.ErrInUse},
		{"reader beside writer", write, read, blockdev.ErrInUse},
		{"writer beside reader", read, write, blockdev.ErrInUse},
		{"two readers", read, read, nil},
		{"a look beside writer", write, look, nil},
		{"writer beside a look", look, write, nil},
	} {
		first := open(t, path, c.first)
		second, err := blockdev.OpenFile(path, c.second)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.want)
		}
		if err == nil {
			check(t, second.Close())
		}
		check(t, first.Close())
	}
	check(t, open(t, path, write).Close()) // nothing is left behind
}

// TestFileLockTravels passes a descriptor on, as the host does to the process
// that serves the disk: the lock lives as long as the descriptor.
func TestFileLockTravels(t *testing.T) {
	t.Parallel()
	path := newFile(t, 4096)
	host := open(t, path, blockdev.FileOptions{})
	passed, err := host.Dup()
	check(t, err)
	volume, err := blockdev.NewFile(passed, blockdev.FileOptions{})
	check(t, err)
	check(t, host.Close())
	_, err = blockdev.OpenFile(path, blockdev.FileOptions{})
	wantError(t, err, blockdev.ErrInUse)
	check(t, volume.Close())
	check(t, open(t, path, blockdev.FileOptions{}).Close())
}

// TestFileAgainstQEMU has QEMU open an image that we hold.
func TestFileAgainstQEMU(t *testing.T) {
	t.Parallel()
	path := newFile(t, 1<<20)
	qemu := func(command string) (string, error) {
		out, err := exec.Command("qemu-io", "-f", "raw", "-c", command, path).CombinedOutput()
		return string(out), err
	}
	f := open(t, path, blockdev.FileOptions{})
	if out, err := qemu("read 0 512"); err == nil || !strings.Contains(out, "lock") {
		t.Errorf("QEMU opened a disk that we write: %v\n%s", err, out)
	}
	check(t, f.Close())
	f = open(t, path, blockdev.FileOptions{ReadOnly: true})
	if out, err := qemu("write 0 512"); err == nil || !strings.Contains(out, "lock") {
		t.Errorf("QEMU opened a disk for writing that we read: %v\n%s", err, out)
	}
	check(t, f.Close())
	if out, err := qemu("write 0 512"); err != nil {
		t.Errorf("QEMU cannot open the disk after we closed it: %v\n%s", err, out)
	}

	// The other way round: QEMU holds it until its input ends.
	cmd := exec.Command("qemu-io", "-f", "raw", path)
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	_, err = io.ReadAtLeast(out, make([]byte, 64), 1) // the prompt: it has the image open
	check(t, err)
	for _, opts := range []blockdev.FileOptions{{}, {ReadOnly: true}} {
		_, err := blockdev.OpenFile(path, opts)
		wantError(t, err, blockdev.ErrInUse)
	}
	check(t, in.Close())
	_, err = io.Copy(io.Discard, out)
	check(t, err)
	check(t, cmd.Wait())
	check(t, open(t, path, blockdev.FileOptions{}).Close())
}

// TestFileHeaderLock looks at the flock as cryptsetup does.
func TestFileHeaderLock(t *testing.T) {
	t.Parallel()
	path := newFile(t, 4096)
	other, err := os.Open(path)
	check(t, err)
	defer other.Close()
	try := func(how int) error {
		err := unix.Flock(int(other.Fd()), how|unix.LOCK_NB)
		unix.Flock(int(other.Fd()), unix.LOCK_UN)
		return err
	}
	f := open(t, path, blockdev.FileOptions{})
	resting := func() {
		t.Helper()
		check(t, try(unix.LOCK_SH))
		wantError(t, try(unix.LOCK_EX), unix.EWOULDBLOCK)
	}
	resting()
	failure := errors.New("failure")
	wantError(t, f.WithHeaderLock(blockdev.Exclusive, func() error {
		wantError(t, try(unix.LOCK_SH), unix.EWOULDBLOCK)
		return failure
	}), failure)
	resting()
	check(t, f.WithHeaderLock(blockdev.Shared, func() error { resting(); return nil }))
	resting()
	check(t, f.Close())
	check(t, try(unix.LOCK_EX))
	wantError(t, f.WithHeaderLock(blockdev.Shared, func() error { return nil }), blockdev.ErrClosed)

	look := open(t, path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	check(t, try(unix.LOCK_EX))
	check(t, look.WithHeaderLock(blockdev.Shared, func() error { resting(); return nil }))
	check(t, try(unix.LOCK_EX))
}

// TestFileHeaderLockWaits has another program hold the lock for a while.
func TestFileHeaderLockWaits(t *testing.T) {
	t.Parallel()
	path := newFile(t, 4096)
	f := open(t, path, blockdev.FileOptions{})
	other, err := os.Open(path)
	check(t, err)
	check(t, unix.Flock(int(other.Fd()), unix.LOCK_SH))
	done := make(chan error)
	entered := make(chan struct{})
	go func() {
		done <- f.WithHeaderLock(blockdev.Exclusive, func() error { close(entered); return nil })
	}()
	select {
	case <-entered:
		t.Error("the exclusive lock was had while another program held its own")
	case err := <-done:
		t.Fatal(err)
	default:
	}
	check(t, other.Close())
	check(t, <-done)
}

func TestFileBecameShorter(t *testing.T) {
	t.Parallel()
	path := newFile(t, 64<<10)
	f := open(t, path, blockdev.FileOptions{})
	check(t, os.Truncate(path, 1000))
	_, err := f.ReadAt(make([]byte, 4096), 0)
	wantError(t, err, io.ErrUnexpectedEOF)
}

// TestFileSparse checks that space is given back and taken.
func TestFileSparse(t *testing.T) {
	t.Parallel()
	path := newFile(t, 8<<20)
	f := open(t, path, blockdev.FileOptions{})
	allocated := func() int64 {
		var st unix.Stat_t
		check(t, f.Flush())
		check(t, unix.Stat(path, &st))
		return st.Blocks * 512
	}
	if n := allocated(); n > 64<<10 {
		t.Fatalf("an empty file has %d bytes allocated", n)
	}
	_, err := f.WriteAt(bytes.Repeat([]byte{1}, 8<<20), 0)
	check(t, err)
	check(t, f.Discard(0, 4<<20))
	check(t, f.WriteZeroes(4<<20, 2<<20, true))
	if n := allocated(); n > 3<<20 {
		t.Errorf("%d bytes are allocated after 6 of 8 MiB were given back", n)
	}
	check(t, f.WriteZeroes(0, 2<<20, false))
	if n := allocated(); n < 4<<20 {
		t.Errorf("%d bytes are allocated after zeros that must not be holes", n)
	}
	// Never written space is a hole, allocated or not.
	if e, err := f.NextExtent(3 << 20); err != nil || !e.Hole || e.Length != 3<<20 {
		t.Errorf("NextExtent(3 MiB) = %+v, %v", e, err)
	}
	if e, err := f.NextExtent(6<<20 + 17); err != nil || e.Hole || e.Length != 2<<20-17 {
		t.Errorf("NextExtent(6 MiB + 17) = %+v, %v", e, err)
	}
}

// TestFileFull runs itself in a name space of its own, where it mounts a file
// system of 256 KiB.
func TestFileFull(t *testing.T) {
	t.Parallel()
	const variable = "STRONGROOM_TEST_FULL_DIR"
	dir := os.Getenv(variable)
	if dir == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFileFull$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"="+t.TempDir())
		cmd.SysProcAttr = ownNamespace()
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("the storage was full")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"))
	f := open(t, filepath.Join(dir, "disk"), blockdev.FileOptions{Create: true})
	check(t, f.Resize(1<<20))
	before := bytes.Repeat([]byte{7}, 64<<10)
	_, err := f.WriteAt(before, 0)
	check(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte{8}, 512<<10), 128<<10)
	wantError(t, err, blockdev.ErrNoSpace)
	wantError(t, f.WriteZeroes(512<<10, 512<<10, false), blockdev.ErrNoSpace)
	after := make([]byte, len(before))
	_, err = f.ReadAt(after, 0)
	check(t, err)
	if !bytes.Equal(after, before) {
		t.Error("bytes outside the failed requests have changed")
	}
	check(t, f.Discard(128<<10, 896<<10))
	_, err = f.WriteAt(before, 128<<10) // there is room again
	check(t, err)
	check(t, f.Close())
	fmt.Println("the storage was full")
}

// TestFileFlushFailure checks that a failed flush is never forgotten.
func TestFileFlushFailure(t *testing.T) {
	t.Parallel()
	f := open(t, newFile(t, 4096), blockdev.FileOptions{})
	check(t, f.Flush())
	restore, err := blockdev.BreakFlush(f)
	check(t, err)
	first := f.Flush()
	restore()
	if second := f.Flush(); first == nil || second == nil {
		t.Errorf("flush of a broken file: %v, and afterwards: %v", first, second)
	}
}

// ownNamespace runs a process as root of a user and mount name space of its own.
func ownNamespace() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
}

// TestFlushEarly: the hint changes nothing that can be seen, on any kind of File.
func TestFlushEarly(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("data"), 1<<18)
	if err := f.Resize(int64(len(want))); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	f.FlushEarly(0, int64(len(want)))
	f.FlushEarly(1<<40, -1) // nonsense is ignored
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("contents differ, error %v", err)
	}
	if err := f.Flush(); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f.FlushEarly(0, 1)
	if f, err = blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.FlushEarly(0, 1)
}
