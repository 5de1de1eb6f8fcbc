package image_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/nbd"
	"strongroom/internal/errs"
	"strongroom/internal/machine/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// qemuImg runs the real qemu-img in dir.
func qemuImg(t testing.TB, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("qemu-img", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// newContent returns what a disk may hold: data, zeros and holes.
func newContent(t testing.TB, size int) []byte {
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	p := make([]byte, size)
	for off := 0; off < size; off += 64 << 10 {
		if rng.IntN(2) == 0 {
			for i := off; i < min(size, off+64<<10); i++ {
				p[i] = byte(rng.Uint32())
			}
		}
	}
	copy(p, "the beginning")
	return p
}

// newImage makes a qcow2 image with that content.
func newImage(t testing.TB, content []byte, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "raw"), content, 0o600))
	qemuImg(t, dir, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, options...), "raw", "image.qcow2")...)
	return filepath.Join(dir, "image.qcow2")
}

// export serves disk until the test ends and returns the socket.
func export(t testing.TB, disk blockdev.Device) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "a:b,c ü.sock") // what a name could be read as
	listener, err := net.Listen("unix", socket)
	check(t, err)
	server := nbd.NewServer(nbd.Config{Log: slog.New(slog.DiscardHandler)})
	check(t, server.AddExport(nbd.Export{Name: "disk", Device: disk}))
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("NBD server: %v", err)
		}
	})
	return socket
}

func TestConvert(t *testing.T) {
	t.Parallel()
	content := newContent(t, 3<<20+4096)
	for _, options := range [][]string{
		{"-o", "compat=1.1"}, {"-o", "compat=0.10"}, {"-c"}, {"-c", "-o", "compression_type=zstd"}, {"-o", "extended_l2=on"}, {"-o", "cluster_size=512"},
	} {
		t.Run(strings.Join(options, " "), func(t *testing.T) {
			t.Parallel()
			path := newImage(t, content, options...)
			size, err := image.VirtualSize(path)
			if err != nil || size != int64(len(content)) {
				t.Fatalf("VirtualSize = %d, %v; want %d", size, err, len(content))
			}
			before, err := os.ReadFile(path)
			check(t, err)
			disk := blockdev.NewMemory(size+1<<20, 512)
			junk := bytes.Repeat([]byte{0xa5}, int(disk.Size()))
			_, err = disk.WriteAt(junk, 0) // zeros of the image must be written, or the junk shows
			check(t, err)
			var parts []float64
			check(t, image.Convert(t.Context(), path, export(t, disk), "disk", false, func(part float64) { parts = append(parts, part) }))
			got := make([]byte, disk.Size())
			_, err = disk.ReadAt(got, 0)
			check(t, err)
			if !bytes.Equal(got[:size], content) {
				t.Error("the disk does not hold what the image holds")
			}
			if !bytes.Equal(got[size:], junk[size:]) {
				t.Error("what is beyond the image was written to")
			}
			for i, part := range parts {
				if part < 0 || part > 1 || i > 0 && part < parts[i-1] {
					t.Errorf("progress %v", parts)
				}
			}
			if len(parts) == 0 || parts[len(parts)-1] != 1 {
				t.Errorf("progress ended at %v", parts)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
				t.Errorf("the image was changed (error %v)", err)
			}
		})
	}
}

// TestRefuses: each image is refused by both functions before qemu-img opens
// what it refers to.
func TestRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "good", "1M")
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "-b", "good", "-F", "qcow2", "backing")
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "-o", "data_file=data", "data-file", "1M")
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc",
		"-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.hash-alg=sha512,encrypt.iter-time=10", "encrypted", "1M")
	check(t, os.WriteFile(path("raw"), make([]byte, 1<<20), 0o600))
	check(t, os.WriteFile(path("empty"), nil, 0o600))
	check(t, unix.Mkfifo(path("fifo"), 0o600))
	good, err := os.ReadFile(path("good"))
	check(t, err)
	change := func(name string, do func(b []byte) []byte) {
		check(t, os.WriteFile(path(name), do(bytes.Clone(good)), 0o600))
	}
	change("short", func(b []byte) []byte { return b[:80] })
	change("version", func(b []byte) []byte { b[7] = 4; return b })
	change("corrupt", func(b []byte) []byte { b[79] |= 2; return b })
	change("future", func(b []byte) []byte { b[72] = 1; return b })
	change("clusters", func(b []byte) []byte { b[23] = 30; return b })
	change("nothing", func(b []byte) []byte { binary.BigEndian.PutUint64(b[24:], 0); return b })
	change("negative", func(b []byte) []byte { binary.BigEndian.PutUint64(b[24:], 1<<63); return b })

	for name, want := range map[string]string{
		"backing": "backing file", "data-file": "another file", "encrypted": "encrypted", "raw": "no qcow2", "empty": "no qcow2",
		"fifo": "regular file", "short": "cut short", "version": "version 4", "corrupt": "damaged", "future": "newer",
		"clusters": "clusters", "nothing": "0 bytes", "negative": "bytes", ".": "regular file",
	} {
		size, err := image.VirtualSize(path(name))
		if size != 0 || errs.KindOf(err) != errs.Invalid || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("VirtualSize of %s = %d, %v; want an error with %q", name, size, err, want)
		}
		if err := image.Convert(t.Context(), path(name), path("no.sock"), "disk", false, nil); errs.KindOf(err) != errs.Invalid || !strings.Contains(err.Error(), want) {
			t.Errorf("Convert of %s: %v; want %q", name, err, want)
		}
	}
	if _, err := image.VirtualSize(path("missing")); errs.KindOf(err) != errs.NotFound {
		t.Errorf("a missing image: %v", err)
	}
}

// TestDamaged: an image whose header is good and whose tables lead nowhere, one
// that claims a disk of an exabyte, and one that is cut short.
func TestDamaged(t *testing.T) {
	t.Parallel()
	content := newContent(t, 1<<20)
	good, err := os.ReadFile(newImage(t, content))
	check(t, err)
	for name, c := range map[string]struct {
		change func(b []byte) []byte
		size   int64
	}{
		"tables beyond the end": {func(b []byte) []byte { binary.BigEndian.PutUint64(b[40:], 1<<40); return b }, 1 << 20},
		"an exabyte":            {func(b []byte) []byte { binary.BigEndian.PutUint64(b[24:], 1<<60); return b }, 1 << 60},
		"truncated":             {func(b []byte) []byte { return b[:100<<10] }, 1 << 20},
	} {
		path := filepath.Join(t.TempDir(), "image")
		check(t, os.WriteFile(path, c.change(bytes.Clone(good)), 0o600))
		if size, err := image.VirtualSize(path); err != nil || size != c.size {
			t.Errorf("%s: VirtualSize = %d, %v", name, size, err)
		}
		disk := blockdev.NewMemory(1<<20, 512)
		err := image.Convert(t.Context(), path, export(t, disk), "disk", false, nil)
		if errs.KindOf(err) != errs.Invalid || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: Convert: %v", name, err)
		}
	}
}

// fullDevice is a device whose storage is full.
type fullDevice struct{ *blockdev.Memory }

func (d fullDevice) WriteAt([]byte, int64) (int, error)   { return 0, blockdev.ErrNoSpace }
func (d fullDevice) WriteZeroes(_, _ int64, _ bool) error { return blockdev.ErrNoSpace }
func (d fullDevice) NextExtent(int64) (blockdev.Extent, error) {
	return blockdev.Extent{}, errors.ErrUnsupported
}

func TestFull(t *testing.T) {
	t.Parallel()
	path := newImage(t, newContent(t, 1<<20))
	disk := fullDevice{blockdev.NewMemory(1<<20, 512)}
	if err := image.Convert(t.Context(), path, export(t, disk), "disk", false, nil); errs.KindOf(err) != errs.NoSpace {
		t.Errorf("Convert to a full device: %v", err)
	}
}

// blockedDevice is a device whose writes wait for the test's end.
type blockedDevice struct {
	*blockdev.Memory
	reached chan struct{} // gets a value with the first write
	release chan struct{}
}

func (d *blockedDevice) WriteAt(p []byte, off int64) (int, error) {
	select {
	case d.reached <- struct{}{}:
	default:
	}
	<-d.release
	return d.Memory.WriteAt(p, off)
}

// TestCancel: qemu-img ends with the context, also while it waits for the disk.
func TestCancel(t *testing.T) {
	t.Parallel()
	path := newImage(t, newContent(t, 8<<20))
	disk := &blockedDevice{blockdev.NewMemory(8<<20, 512), make(chan struct{}, 1), make(chan struct{})}
	socket := export(t, disk)
	t.Cleanup(func() { close(disk.release) })
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the operator has changed his mind")
	ended := make(chan error, 1)
	go func() { ended <- image.Convert(ctx, path, socket, "disk", false, nil) }()
	<-disk.reached
	cancel(reason)
	if err := <-ended; !errors.Is(err, reason) {
		t.Errorf("Convert ended with %v", err)
	}
}

func TestNoServer(t *testing.T) {
	t.Parallel()
	path := newImage(t, newContent(t, 64<<10))
	err := image.Convert(t.Context(), path, filepath.Join(t.TempDir(), "none.sock"), "disk", false, nil)
	if err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("Convert to nobody: %v", err)
	}
}
