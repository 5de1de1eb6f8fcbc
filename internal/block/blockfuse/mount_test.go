package blockfuse_test

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockfuse"
)

// TestMountPoint: a missing file is made and removed, an empty one is used and
// stays, all else is refused and stays too.
func TestMountPoint(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	dir := t.TempDir()
	dev := blockdev.NewMemory(1<<20, 512)
	unmount := func(m *blockfuse.Mount) {
		t.Helper()
		check(t, m.Unmount(context.Background()))
		check(t, m.Unmount(context.Background()))
		<-m.Done()
	}
	size := func(path string) int64 {
		t.Helper()
		st, err := os.Lstat(path)
		check(t, err)
		return st.Size()
	}

	check(t, os.Mkdir(dir+"/with blank", 0o700))
	path := dir + "/with blank/disk\\040"
	m := showAt(t, path, dev, blockfuse.Options{Source: "a,b c"})
	if m.Path() != path || size(path) != 1<<20 {
		t.Errorf("shown at %s, %d bytes", m.Path(), size(path))
	}
	_, err := blockfuse.New(path, dev, blockfuse.Options{})
	wantError(t, "second mount", err, blockfuse.ErrMounted)
	if size(path) != 1<<20 {
		t.Error("the second mount took the first one away")
	}
	unmount(m)
	if exists(path) {
		t.Error("the file that was made is there still")
	}

	path = dir + "/empty"
	check(t, os.WriteFile(path, nil, 0o644))
	unmount(showAt(t, path, dev, blockfuse.Options{}))
	if size(path) != 0 {
		t.Error("the file is not as it was")
	}

	check(t, os.WriteFile(dir+"/data", []byte("data"), 0o600))
	check(t, os.Symlink("empty", dir+"/link"))
	for _, path := range []string{dir, dir + "/data", dir + "/link"} {
		_, err := blockfuse.New(path, dev, blockfuse.Options{})
		wantError(t, path, err, blockfuse.ErrMountPoint)
	}
	_, err = blockfuse.New(dir+"/none/disk", dev, blockfuse.Options{})
	wantError(t, "no folder", err, os.ErrNotExist)
	if b, err := os.ReadFile(dir + "/data"); string(b) != "data" || err != nil {
		t.Errorf("the file that was there: %q, %v", b, err)
	}
}

// TestUnmountBusy: a file that is open is waited for; at the end of patience its
// users get errors.
func TestUnmountBusy(t *testing.T) {
	needFUSE(t)
	needRoot(t)
	t.Parallel()
	dev := blockdev.NewMemory(1<<20, 512)
	m, path := show(t, dev, blockfuse.Options{})
	fd := openFile(t, path, unix.O_RDWR)
	left := make(chan error)
	go func() { left <- m.Unmount(context.Background()) }()
	_, err := unix.Pwrite(fd, make([]byte, 512), 0)
	check(t, err)
	check(t, unix.Close(fd))
	check(t, <-left)

	m, path = show(t, dev, blockfuse.Options{})
	fd = openFile(t, path, unix.O_RDWR)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	check(t, m.Unmount(ctx))
	if _, err = unix.Pwrite(fd, make([]byte, 512), 0); err != unix.ECONNABORTED && err != unix.ENOTCONN {
		t.Errorf("write to a file that is gone: %v", err)
	}
	check(t, unix.Close(fd))

	// Somebody else unmounts it.
	m, path = show(t, dev, blockfuse.Options{})
	check(t, unix.Unmount(path, 0))
	<-m.Done()
	check(t, m.Unmount(context.Background()))
}

// hung is a device whose reads are not answered until end is closed.
type hung struct {
	blockdev.Device
	asked, end chan struct{}
}

func (h *hung) ReadAt(b []byte, off int64) (int, error) {
	close(h.asked)
	<-h.end
	return h.Device.ReadAt(b, off)
}

// TestUnmountHung: who waits for a device that does not answer is broken off by the
// end of the service, and does not wait for the device any more.
func TestUnmountHung(t *testing.T) {
	needFUSE(t)
	needRoot(t)
	t.Parallel()
	dev := &hung{blockdev.NewMemory(1<<20, 512), make(chan struct{}), make(chan struct{})}
	m, path := show(t, dev, blockfuse.Options{})
	fd := openFile(t, path, unix.O_RDONLY)
	read := make(chan error, 1)
	go func() {
		_, err := unix.Pread(fd, make([]byte, 512), 0)
		read <- err
	}()
	<-dev.asked
	select {
	case err := <-read:
		t.Errorf("a read that the device has not done ended: %v", err)
	default:
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	left := make(chan error, 1)
	go func() { left <- m.Unmount(ctx) }()
	select {
	case err := <-read:
		if err != unix.ECONNABORTED && err != unix.ENOTCONN {
			t.Errorf("the read ended with %v", err)
		}
	case <-time.After(deadline):
		t.Error("the read waits for the device")
	}
	close(dev.end)
	check(t, <-left)
	check(t, unix.Close(fd))
}

// server is a process that shows a file, and that the test may kill.
type server struct {
	cmd  *exec.Cmd
	stop func() error
}

func startServer(t *testing.T, cmd *exec.Cmd, path string) server {
	t.Helper()
	cmd.Env = append(os.Environ(), serveVariable+"="+path)
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	check(t, cmd.Start())
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		cmd.Wait()
		t.Fatalf("the server did not start: %q, %v\n%s", line, err, stderr.String())
	}
	return server{cmd, func() error { in.Close(); return cmd.Wait() }}
}

// TestKill kills the process that serves the file. Its users get errors at once,
// and the next one clears the mount away.
func TestKill(t *testing.T) {
	needFUSE(t)
	needRoot(t)
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk")
	s := startServer(t, exec.Command(os.Args[0]), path)
	fd := openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	_, err := unix.Pwrite(fd, make([]byte, 512), 0)
	check(t, err)
	check(t, s.cmd.Process.Kill())
	s.cmd.Wait()
	_, err = unix.Pwrite(fd, make([]byte, 512), 0)
	wantError(t, "write after the kill", err, unix.ENOTCONN)
	_, err = os.Lstat(path)
	wantError(t, "stat after the kill", err, unix.ENOTCONN)

	showAt(t, path, blockdev.NewMemory(2<<20, 512), blockfuse.Options{})
	if st, err := os.Stat(path); err != nil || st.Size() != 2<<20 {
		t.Errorf("after the next start: %v, %v", st, err)
	}
	if cleared, err := blockfuse.Clear(path); cleared {
		t.Error("a mount that is served was cleared away")
	} else {
		wantError(t, "clear", err, blockfuse.ErrMounted)
	}
}

// TestUnprivileged shows the file as a user who is not root, who alone may then
// open it, and clears away with fusermount3 what a killed process has left. It runs
// itself in a mount name space of its own, where /dev/fuse is open to all, which udev does
// elsewhere.
func TestUnprivileged(t *testing.T) {
	needFUSE(t)
	needRoot(t)
	t.Parallel()
	const nobody, variable = 65534, "STRONGROOM_TEST_UNPRIVILEGED_DIR"
	dir := os.Getenv(variable)
	if dir == "" {
		dir, err := os.MkdirTemp("", "blockfuse") // t.TempDir is closed to others
		check(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
		cmd := exec.Command(os.Args[0], "-test.run=^TestUnprivileged$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	var fuse unix.Stat_t
	check(t, unix.Stat("/dev/fuse", &fuse))
	check(t, unix.Mknod(dir+"/fuse", unix.S_IFCHR|0o666, int(fuse.Rdev)))
	check(t, os.Chmod(dir+"/fuse", 0o666))
	check(t, unix.Mount(dir+"/fuse", "/dev/fuse", "", unix.MS_BIND, ""))
	program, path := dir+"/server", dir+"/own/disk"
	run(t, "cp", os.Args[0], program)
	check(t, os.Mkdir(dir+"/own", 0o755))
	check(t, os.Chown(dir+"/own", nobody, nobody))
	check(t, os.Chmod(dir, 0o755))
	as := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		return cmd
	}

	s := startServer(t, as(program), path)
	if out, err := as("stat", "--format=%s %a %u", path).CombinedOutput(); err != nil || string(out) != "1048576 600 65534\n" {
		t.Errorf("stat as the owner: %v\n%s", err, out)
	}
	_, err := os.Lstat(path)
	wantError(t, "stat by root", err, unix.EACCES)
	check(t, s.stop())
	if exists(path) {
		t.Error("the mount point is there after the end")
	}

	s = startServer(t, as(program), path)
	check(t, s.cmd.Process.Kill())
	s.cmd.Wait()
	if out, err := as("env", serveVariable+"="+path, program).CombinedOutput(); err == nil || !strings.Contains(string(out), blockfuse.ErrDead.Error()) {
		t.Errorf("start over a dead mount: %v\n%s", err, out)
	}
	// Root cannot see whether it is dead, and so leaves it alone.
	_, err = blockfuse.Clear(path)
	wantError(t, "clear by root", err, blockfuse.ErrMounted)
	if out, err := as("fusermount3", "-u", path).CombinedOutput(); err != nil {
		t.Errorf("fusermount3: %v\n%s", err, out)
	}
	check(t, startServer(t, as(program), path).stop())
}
