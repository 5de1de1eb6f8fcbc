package blockfuse_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/blockfuse"
)

// fixed hides Resize, which the file refuses.
type fixed struct{ blockdev.Extenter }

// TestDevice runs the conformance suite on the mounted file.
func TestDevice(t *testing.T) {
	needFUSE(t)
	for name, make := range map[string]func(t testing.TB, size int64) blockdev.Device{
		"Volume":  func(t testing.TB, size int64) blockdev.Device { return newVolume(t, size, 4096, true) },
		"NoHoles": func(_ testing.TB, size int64) blockdev.Device { return plain{blockdev.NewMemory(size, 512)} },
	} {
		opened := func(t testing.TB, path string, opts blockdev.FileOptions) blockdev.Device {
			f, err := blockdev.OpenFile(path, opts)
			check(t, err)
			t.Cleanup(func() { f.Close() }) // before the unmount
			return fixed{f}
		}
		reopen := func(opts blockdev.FileOptions) func(t testing.TB, dev blockdev.Device) blockdev.Device {
			return func(t testing.TB, dev blockdev.Device) blockdev.Device {
				path := dev.(fixed).Extenter.(*blockdev.File).Name()
				check(t, dev.Close())
				return opened(t, path, opts)
			}
		}
		t.Run(name, func(t *testing.T) {
			blockdevtest.Run(t, blockdevtest.Suite{
				New: func(t testing.TB, size int64) blockdev.Device {
					_, path := show(t, make(t, size), blockfuse.Options{})
					return opened(t, path, blockdev.FileOptions{})
				},
				Reopen:    reopen(blockdev.FileOptions{}),
				ReadOnly:  reopen(blockdev.FileOptions{ReadOnly: true}),
				Allocates: true, // go-fuse does; see TestAllocations
			})
		})
	}
}

// plain hides what a Device may have beyond the contract.
type plain struct{ blockdev.Device }

// TestEnds reads and writes across the end, which is where it is.
func TestEnds(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	dev := blockdev.NewMemory(1<<20, 512)
	_, path := show(t, dev, blockfuse.Options{})
	fd := openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	p := bytes.Repeat([]byte{3}, 5000)
	n, err := unix.Pwrite(fd, p, 1<<20-1000)
	if n != 1000 || err != nil {
		t.Errorf("write across the end: %d, %v", n, err)
	}
	if n, err = unix.Pread(fd, p, 1<<20-700); n != 700 || err != nil {
		t.Errorf("read across the end: %d, %v", n, err)
	}
	if n, err = unix.Pread(fd, p, 1<<20); n != 0 || err != nil {
		t.Errorf("read at the end: %d, %v", n, err)
	}
	_, err = unix.Pwrite(fd, p, 1<<20)
	wantError(t, "write at the end", err, unix.ENOSPC)
	wantError(t, "truncate", unix.Ftruncate(fd, 0), unix.EPERM)
	check(t, unix.Ftruncate(fd, 1<<20))
	wantError(t, "chmod", unix.Fchmod(fd, 0o666), unix.EPERM)
	wantError(t, "allocate", unix.Fallocate(fd, 0, 0, 4096), unix.EOPNOTSUPP)
	wantError(t, "zero across the end", unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 1<<20-4096, 8192), unix.ENOSPC)
	check(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20-4096, 8192))
	_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	wantError(t, "shared mapping", err, unix.ENODEV)

	// A new size is seen by those who have the file open.
	check(t, dev.Resize(3<<20))
	if end, err := unix.Seek(fd, 0, unix.SEEK_END); end != 3<<20 || err != nil {
		t.Errorf("end after the resize: %d, %v", end, err)
	}
	if n, err = unix.Pwrite(fd, p, 3<<20-5000); n != 5000 || err != nil {
		t.Errorf("write to the end after the resize: %d, %v", n, err)
	}
	check(t, dev.Resize(512))
	var st unix.Stat_t
	check(t, unix.Stat(path, &st))
	if st.Size != 512 {
		t.Errorf("size after the resize: %d", st.Size)
	}
	if n, err = unix.Pread(fd, p, 0); n != 512 || err != nil {
		t.Errorf("read after the resize: %d, %v", n, err)
	}
}

// TestSeek looks for holes as qemu-img and cp do.
func TestSeek(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	v := newVolume(t, 8<<20, 4096, true)
	_, path := show(t, v, blockfuse.Options{})
	fd := openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	_, err := unix.Pwrite(fd, make([]byte, 64<<10), 1<<20)
	check(t, err)
	for _, c := range []struct {
		off    int64
		whence int
		want   int64
		err    error
	}{
		{0, unix.SEEK_DATA, 1 << 20, nil},
		{0, unix.SEEK_HOLE, 0, nil},
		{1<<20 + 5, unix.SEEK_DATA, 1<<20 + 5, nil},
		{1 << 20, unix.SEEK_HOLE, 1<<20 + 64<<10, nil},
		{2 << 20, unix.SEEK_DATA, -1, unix.ENXIO},
		{8 << 20, unix.SEEK_HOLE, -1, unix.ENXIO},
	} {
		if got, err := unix.Seek(fd, c.off, c.whence); err != c.err || err == nil && got != c.want {
			t.Errorf("seek(%d, %d) = %d, %v, want %d, %v", c.off, c.whence, got, err, c.want, c.err)
		}
	}
	// What is punched is a hole again, and reads as zeros.
	check(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 64<<10))
	if got, err := unix.Seek(fd, 0, unix.SEEK_DATA); err != unix.ENXIO {
		t.Errorf("data at %d after the punch, %v", got, err)
	}
}

// TestPunch: zeros are there afterwards, also where a discard does nothing.
func TestPunch(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	for _, discards := range []bool{false, true} {
		v := newVolume(t, 1<<20, 4096, discards)
		_, path := show(t, v, blockfuse.Options{})
		fd := openFile(t, path, unix.O_RDWR)
		want := bytes.Repeat([]byte{9}, 1<<20)
		_, err := unix.Pwrite(fd, want, 0)
		check(t, err)
		check(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1000, 100_000))
		clear(want[1000:101_000])
		got := make([]byte, 1<<20)
		if n, err := unix.Pread(fd, got, 0); n != len(got) || err != nil || !bytes.Equal(got, want) {
			t.Errorf("discards %v: %d bytes, %v, as they should be: %v", discards, n, err, bytes.Equal(got, want))
		}
		check(t, unix.Close(fd))
	}
}

// TestSync counts the flushes that reach the device.
func TestSync(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	dev := faultdev.New(blockdev.NewMemory(1<<20, 512), nil)
	_, path := show(t, dev, blockfuse.Options{})
	p := make([]byte, 4096)
	for _, c := range []struct {
		name  string
		flags int
		run   func(fd int) error
		ops   int
	}{
		{"write", 0, func(fd int) error { _, err := unix.Pwrite(fd, p, 0); return err }, 1},
		{"O_DSYNC", unix.O_DSYNC, func(fd int) error { _, err := unix.Pwrite(fd, p, 0); return err }, 2},
		{"O_SYNC", unix.O_SYNC, func(fd int) error { _, err := unix.Pwrite(fd, p, 0); return err }, 2},
		{"RWF_DSYNC", 0, func(fd int) error { _, err := unix.Pwritev2(fd, [][]byte{p}, 0, unix.RWF_DSYNC); return err }, 2},
		{"fsync", 0, unix.Fsync, 1},
		{"fdatasync", 0, unix.Fdatasync, 1},
		{"close", 0, func(int) error { return nil }, 0},
	} {
		dev.Inject(nil)
		fd := openFile(t, path, unix.O_RDWR|c.flags)
		check(t, c.run(fd))
		check(t, unix.Close(fd))
		if ops := dev.Ops(); ops != c.ops {
			t.Errorf("%s: %d operations on the device, want %d", c.name, ops, c.ops)
		}
	}
}

// TestFailures has the device fail, and go away: each request gets its error at
// once, and the file works on after a failure that passes.
func TestFailures(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	dev := faultdev.New(blockdev.NewMemory(1<<20, 512), nil)
	m, path := show(t, dev, blockfuse.Options{})
	fd := openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	p := make([]byte, 64<<10)
	requests := map[string]func() error{
		"read":  func() error { _, err := unix.Pread(fd, p, 1000); return err },
		"write": func() error { _, err := unix.Pwrite(fd, p, 1000); return err },
		"fsync": func() error { return unix.Fsync(fd) },
		"punch": func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 8192)
		},
		"zero": func() error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 0, 8192) },
	}
	for name, request := range requests {
		for _, mode := range faultdev.Modes() {
			dev.Inject(&faultdev.Fault{Mode: mode})
			wantError(t, name, request(), unix.EIO)
			check(t, request())
		}
	}
	check(t, dev.Close()) // the key is gone
	for name, request := range requests {
		wantError(t, name+" after the key is gone", request(), unix.EIO)
	}
	_, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
	wantError(t, "seek after the key is gone", err, unix.EIO)
	select {
	case <-m.Done():
		t.Error("the file went away with the device")
	default:
	}
}

// TestFull tells a full storage apart from a broken one.
func TestFull(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	_, path := show(t, full{blockdev.NewMemory(1<<20, 512)}, blockfuse.Options{})
	fd := openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	_, err := unix.Pwrite(fd, make([]byte, 512), 0)
	wantError(t, "write", err, unix.ENOSPC)
}

type full struct{ blockdev.Device }

func (full) WriteAt([]byte, int64) (int, error) { return 0, blockdev.ErrNoSpace }

func TestReadOnly(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	dev := blockdev.NewMemory(1<<20, 512)
	_, path := show(t, dev, blockfuse.Options{ReadOnly: true})
	_, err := unix.Open(path, unix.O_RDWR, 0)
	wantError(t, "open for writing", err, unix.EROFS)
	fd := openFile(t, path, unix.O_RDONLY)
	defer unix.Close(fd)
	if n, err := unix.Pread(fd, make([]byte, 4096), 0); n != 4096 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
	check(t, unix.Fsync(fd))
	var st unix.Stat_t
	check(t, unix.Fstat(fd, &st))
	if st.Mode != unix.S_IFREG|0o400 || st.Uid != uint32(os.Geteuid()) {
		t.Errorf("mode %#o, owner %d", st.Mode, st.Uid)
	}
}

// TestOthers has another user try to open the file, in a folder that is open to
// all.
func TestOthers(t *testing.T) {
	needFUSE(t)
	needRoot(t)
	t.Parallel()
	dir, err := os.MkdirTemp("", "blockfuse")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755))
	showAt(t, dir+"/disk", blockdev.NewMemory(1<<20, 512), blockfuse.Options{})
	for _, args := range [][]string{{"head", "-c", "1", dir + "/disk"}, {"stat", dir + "/disk"}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "ermission denied") {
			t.Errorf("%q as another user: %v\n%s", args, err, out)
		}
	}
}
