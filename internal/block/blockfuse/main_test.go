package blockfuse_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockfuse"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
)

// serveVariable makes this program a server: it shows 1 MiB of memory at the path
// in the variable until its input ends.
const serveVariable = "STRONGROOM_TEST_SERVE"

func TestMain(m *testing.M) {
	if path := os.Getenv(serveVariable); path != "" {
		if err := serve(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func serve(path string) error {
	m, err := blockfuse.New(path, blockdev.NewMemory(1<<20, 512), blockfuse.Options{})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	return m.Unmount(ctx)
}

// deadline is how long a test waits for what must happen.
const deadline = time.Minute

// needFUSE fails a test where nothing can be mounted, which a machine that runs
// the tests must be able to do.
func needFUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("the fuse module of the kernel is needed: %v", err)
	}
	f.Close()
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices and mounting by oneself need root")
	}
}

// show mounts dev until the test ends, and returns the file's path.
func show(t testing.TB, dev blockdev.Device, opts blockfuse.Options) (*blockfuse.Mount, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	return showAt(t, path, dev, opts), path
}

func showAt(t testing.TB, path string, dev blockdev.Device, opts blockfuse.Options) *blockfuse.Mount {
	t.Helper()
	if opts.Log == nil {
		opts.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	m, err := blockfuse.New(path, dev, opts)
	check(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		check(t, m.Unmount(ctx))
	})
	// The package comment tells why: from now on the kernel answers polls itself.
	fd := openFile(t, path, unix.O_RDONLY)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	check(t, err)
	check(t, unix.Close(fd))
	return m
}

// openFile opens the mounted file. It belongs to the caller.
func openFile(t testing.TB, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	check(t, err)
	return fd
}

// newVolume makes an encrypted volume of size bytes in a new file.
func newVolume(t testing.TB, size int64, sectorSize int, discards bool) *volume.Volume {
	t.Helper()
	dek, err := keymem.Random(64)
	check(t, err)
	defer dek.Close()
	dev, err := blockdev.OpenFile(filepath.Join(t.TempDir(), "volume"), blockdev.FileOptions{Create: true})
	check(t, err)
	check(t, volume.Format(dev, volume.FormatOptions{Size: size, SectorSize: sectorSize, DEK: dek, AllowDiscards: discards}))
	v, err := volume.Open(dev, dek, volume.Options{})
	check(t, err)
	t.Cleanup(func() { v.Close() })
	return v
}

// run runs a program to its end.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path := filepath.Join(dir, name); exists(path) {
			name = path
			break
		}
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(bytes.TrimSpace(out))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}
