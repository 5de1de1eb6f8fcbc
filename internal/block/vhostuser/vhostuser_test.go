package vhostuser_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/vhostuser/vhostusertest"
)

// childEnv makes this program a back end: it serves the file "disk" in the
// folder that it names, until it is killed.
const childEnv = "STRONGROOM_VHOST_USER_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		fmt.Fprintln(os.Stderr, serveChild(dir))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func serveChild(dir string) error {
	dev, err := blockdev.OpenFile(filepath.Join(dir, "disk"), blockdev.FileOptions{})
	if err != nil {
		return err
	}
	s, err := vhostuser.NewServer(vhostuser.Config{Device: &slowDevice{Device: dev, rng: rand.New(rand.NewPCG(1, 1))}})
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, "socket")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	return s.Serve(context.Background(), l)
}

// TestKilled kills the back end under load with SIGKILL, again and again: no
// request fails, and each reads what was written last.
func TestKilled(t *testing.T) {
	t.Parallel()
	seed := blockdevtest.Seed(t)
	dir := t.TempDir()
	dev, err := blockdev.OpenFile(filepath.Join(dir, "disk"), blockdev.FileOptions{Create: true})
	check(t, err)
	check(t, dev.Resize(16<<20))
	check(t, dev.Close())
	var child *exec.Cmd
	kill := func() {
		if child != nil {
			check(t, child.Process.Kill())
			_ = child.Wait() // it was killed
		}
	}
	spawn := func() {
		child = exec.CommandContext(t.Context(), os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+dir)
		child.Stderr = os.Stderr
		check(t, child.Start())
	}
	spawn()
	defer func() { kill() }()
	socket := filepath.Join(dir, "socket")
	var f *vhostusertest.Frontend
	opts := vhostusertest.Options{Slots: 16, DataSize: 16 << 10}
	blockdevtest.Eventually(t, "the back end serves", func() bool {
		f, err = vhostusertest.Dial(socket, opts)
		return err == nil
	})
	t.Cleanup(f.Close)
	stress(t, f.Queues[0], seed, 600, func(done int) {
		if done%100 != 99 {
			return
		}
		kill()
		check(t, os.Remove(socket))
		spawn()
		blockdevtest.Eventually(t, "the back end serves again", func() bool { return f.Connect(socket) == nil })
		check(t, f.Start())
	})
}

// deadline is how long a test waits for what must happen.
const deadline = time.Minute

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// start serves c on a new socket until the test ends, and returns its path.
func start(t testing.TB, c vhostuser.Config) (*vhostuser.Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vhost.sock")
	return serveAt(t, c, path), path
}

func serveAt(t testing.TB, c vhostuser.Config, path string) *vhostuser.Server {
	t.Helper()
	if c.Log == nil {
		c.Log = quiet()
	}
	s, err := vhostuser.NewServer(c)
	check(t, err)
	l, err := net.Listen("unix", path)
	check(t, err)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		check(t, s.Close())
		select {
		case err := <-ended:
			if err != nil && !errors.Is(err, vhostuser.ErrClosed) {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(deadline):
			t.Error("Serve does not end")
		}
	})
	return s
}

func dial(t testing.TB, path string, o vhostusertest.Options) *vhostusertest.Frontend {
	t.Helper()
	f, err := vhostusertest.Dial(path, o)
	check(t, err)
	t.Cleanup(f.Close)
	return f
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// do does a request and checks its status.
func do(t testing.TB, q *vhostusertest.Queue, op uint32, sector uint64, p []byte, want byte) {
	t.Helper()
	got, err := q.Do(op, sector, p)
	check(t, err)
	if got != want {
		t.Errorf("request %d of %d bytes at sector %d: status %d, want %d", op, len(p), sector, got, want)
	}
}

func pattern(n int) []byte {
	rng := rand.New(rand.NewPCG(uint64(n), 3))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

func TestConformance(t *testing.T) {
	tests := map[string]vhostusertest.Options{
		"Plain":      {Queues: 2, DataSize: 1 << 20},
		"Scattered":  {Queues: 2, DataSize: 512 << 10, Scatter: true},
		"NoEventIdx": {Queues: 2, DataSize: 64 << 10, Without: vhostusertest.FeatureEventIdx},
		"NoIndirect": {Queues: 2, DataSize: 64 << 10, Slots: 2, Scatter: true, Without: vhostusertest.FeatureIndirect},
		"MemorySlots": {
			Queues: 1, DataSize: 256 << 10, Slots36: true, Without: vhostusertest.FeatureEventIdx | vhostusertest.FeatureIndirect,
		},
	}
	for name, opts := range tests {
		t.Run(name, func(t *testing.T) {
			below := map[blockdev.Device]blockdev.Device{}
			open := func(t testing.TB, mem blockdev.Device, readOnly bool) blockdev.Device {
				_, path := start(t, vhostuser.Config{Device: mem, ReadOnly: readOnly})
				f, err := vhostusertest.Dial(path, opts)
				check(t, err)
				d, err := vhostusertest.NewDevice(f)
				check(t, err)
				t.Cleanup(func() { d.Close() })
				below[d] = mem
				return d
			}
			blockdevtest.Run(t, blockdevtest.Suite{
				New: func(t testing.TB, size int64) blockdev.Device {
					return open(t, blockdev.NewMemory(size, 4096), false)
				},
				Reopen: func(t testing.TB, dev blockdev.Device) blockdev.Device {
					dev.Close()
					return open(t, below[dev], false)
				},
				ReadOnly: func(t testing.TB, dev blockdev.Device) blockdev.Device {
					dev.Close()
					return open(t, below[dev], true)
				},
				Allocates: true, // the front end; TestNoAllocations is for the server
			})
		})
	}
}

func TestGetID(t *testing.T) {
	t.Parallel()
	_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512), Serial: "web-1/disk-0"})
	q := dial(t, path, vhostusertest.Options{}).Queues[0]
	p := bytes.Repeat([]byte{0xEE}, 20)
	do(t, q, vhostusertest.GetID, 0, p, vhostusertest.OK)
	if want := "web-1/disk-0\x00\x00\x00\x00\x00\x00\x00\x00"; string(p) != want {
		t.Errorf("serial number is %q, want %q", p, want)
	}
	do(t, q, vhostusertest.GetID, 0, p[:3], vhostusertest.OK)
	if string(p[:3]) != "web" {
		t.Errorf("the start of the serial number is %q", p[:3])
	}
}

// TestRefused: requests that a device refuses, and the queue goes on.
func TestRefused(t *testing.T) {
	t.Parallel()
	rng := func(sector uint64, sectors, flags uint32) []byte {
		return fmt.Appendf(nil, "%s%s%s", le64(sector), le32(sectors), le32(flags))
	}
	tests := []struct {
		name   string
		ro     bool
		op     uint32
		sector uint64
		data   []byte
		want   byte
	}{
		{"read in the middle of a sector", false, vhostusertest.Read, 0, make([]byte, 700), vhostusertest.Failed},
		{"read beyond the end", false, vhostusertest.Read, 2047, make([]byte, 1024), vhostusertest.Failed},
		{"read at no int64", false, vhostusertest.Read, 1 << 63, make([]byte, 512), vhostusertest.Failed},
		{"read whose end wraps", false, vhostusertest.Read, 1<<55 - 1, make([]byte, 1024), vhostusertest.Failed},
		{"write beyond the end", false, vhostusertest.Write, 2048, make([]byte, 512), vhostusertest.Failed},
		{"write to a read-only disk", true, vhostusertest.Write, 0, make([]byte, 512), vhostusertest.Failed},
		{"discard of a read-only disk", true, vhostusertest.Discard, 0, rng(0, 8, 0), vhostusertest.Failed},
		{"zeroes to a read-only disk", true, vhostusertest.WriteZeroes, 0, rng(0, 8, 0), vhostusertest.Failed},
		{"discard of nothing", false, vhostusertest.Discard, 0, nil, vhostusertest.Failed},
		{"discard of half a range", false, vhostusertest.Discard, 0, make([]byte, 24), vhostusertest.Failed},
		{"discard of too many ranges", false, vhostusertest.Discard, 0, make([]byte, 17*16), vhostusertest.Failed},
		{"discard beyond the end", false, vhostusertest.Discard, 0, rng(2040, 9, 0), vhostusertest.Failed},
		{"discard with unmap", false, vhostusertest.Discard, 0, rng(0, 8, 1), vhostusertest.Unsupported},
		{"zeroes beyond the end, second", false, vhostusertest.WriteZeroes, 0, append(rng(0, 8, 0), rng(1<<40, 8, 0)...), vhostusertest.Failed},
		{"zeroes of too much", false, vhostusertest.WriteZeroes, 0, rng(0, 1<<31, 0), vhostusertest.Failed},
		{"zeroes with unknown flags", false, vhostusertest.WriteZeroes, 0, rng(0, 8, 2), vhostusertest.Unsupported},
		{"unknown request", false, 77, 0, make([]byte, 512), vhostusertest.Unsupported},
		{"flush of a read-only disk", true, vhostusertest.Flush, 0, nil, vhostusertest.OK},
		{"empty read", false, vhostusertest.Read, 0, nil, vhostusertest.OK},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			mem := blockdev.NewMemory(1<<20, 512)
			want := pattern(1 << 20)
			_, err := mem.WriteAt(want, 0)
			check(t, err)
			_, path := start(t, vhostuser.Config{Device: mem, ReadOnly: test.ro})
			q := dial(t, path, vhostusertest.Options{Slots: 2}).Queues[0]
			do(t, q, test.op, test.sector, test.data, test.want)
			got := make([]byte, 1<<20)
			do(t, q, vhostusertest.Read, 0, got, vhostusertest.OK)
			if !bytes.Equal(got, want) {
				t.Error("the disk has changed")
			}
		})
	}
}

func le64(v uint64) []byte {
	return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24), byte(v >> 32), byte(v >> 40), byte(v >> 48), byte(v >> 56)}
}
func le32(v uint32) []byte { return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)} }

// TestResize: the guest learns of a new size, also if it comes while the back end
// is away.
func TestResize(t *testing.T) {
	t.Parallel()
	dev := blockdev.NewMemory(1<<20, 512)
	path := filepath.Join(t.TempDir(), "vhost.sock")
	s := serveAt(t, vhostuser.Config{Device: dev}, path)
	f := dial(t, path, vhostusertest.Options{})
	resized := func(want int64) {
		t.Helper()
		check(t, f.AwaitConfigChange())
		size, err := f.Size()
		check(t, err)
		if size != want {
			t.Errorf("size is %d, want %d", size, want)
		}
		do(t, f.Queues[0], vhostusertest.Write, uint64(want/512-1), make([]byte, 512), vhostusertest.OK)
	}
	_, err := f.Size()
	check(t, err)
	check(t, dev.Resize(2<<20))
	s.Resized()
	resized(2 << 20)
	check(t, s.Close())
	check(t, dev.Resize(3<<20))
	serveAt(t, vhostuser.Config{Device: dev}, path)
	check(t, f.Connect(path))
	check(t, f.Start())
	resized(3 << 20)
}

// TestRestart ends and starts the back end many times under load: no request
// fails and none is done twice with other data than its own.
func TestRestart(t *testing.T) {
	t.Parallel()
	seed := blockdevtest.Seed(t)
	dev := &slowDevice{Device: blockdev.NewMemory(16<<20, 4096), rng: rand.New(rand.NewPCG(seed, 1))}
	path := filepath.Join(t.TempDir(), "vhost.sock")
	s := serveAt(t, vhostuser.Config{Device: dev}, path)
	f := dial(t, path, vhostusertest.Options{Slots: 16, DataSize: 16 << 10})
	stress(t, f.Queues[0], seed, 1500, func(done int) {
		if done%50 != 49 {
			return
		}
		check(t, s.Close())
		s = serveAt(t, vhostuser.Config{Device: dev}, path)
		check(t, f.Connect(path))
		check(t, f.Start())
	})
}

// TestReconfigure changes the guest's memory and stops and starts queues under
// load.
func TestReconfigure(t *testing.T) {
	t.Parallel()
	seed := blockdevtest.Seed(t)
	_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(16<<20, 4096)})
	f := dial(t, path, vhostusertest.Options{Slots: 16, DataSize: 16 << 10})
	q := f.Queues[0]
	stress(t, q, seed, 2000, func(done int) {
		switch done % 40 {
		case 0:
			check(t, f.SetMemory())
		case 10:
			check(t, f.SendState(vhostusertest.SetVringEnable, 0, 0))
			check(t, f.SendState(vhostusertest.SetVringEnable, 0, 1))
		case 20:
			_, err := q.Stop()
			check(t, err)
			check(t, q.Start())
		}
	})
}

// TestNextFrontEnd: the second front end is served when the first has gone.
func TestNextFrontEnd(t *testing.T) {
	t.Parallel()
	_, path := start(t, vhostuser.Config{Device: blockdev.NewMemory(1<<20, 512)})
	first := dial(t, path, vhostusertest.Options{})
	do(t, first.Queues[0], vhostusertest.Write, 5, bytes.Repeat([]byte{7}, 512), vhostusertest.OK)
	got := make(chan error, 1)
	go func() {
		second, err := vhostusertest.Dial(path, vhostusertest.Options{})
		if err == nil {
			defer second.Close()
			p := make([]byte, 512)
			if _, err = second.Queues[0].Do(vhostusertest.Read, 5, p); err == nil && p[511] != 7 {
				err = errors.New("it reads something else")
			}
		}
		got <- err
	}()
	do(t, first.Queues[0], vhostusertest.Read, 5, make([]byte, 512), vhostusertest.OK)
	first.Disconnect()
	check(t, <-got)
}

func TestNewServerRefuses(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(1<<20, 512)
	for _, c := range []vhostuser.Config{
		{}, {Device: mem, Queues: 257}, {Device: mem, Queues: -1}, {Device: mem, Workers: -1}, {Device: mem, Serial: "123456789012345678901"},
	} {
		if _, err := vhostuser.NewServer(c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	s, err := vhostuser.NewServer(vhostuser.Config{Device: mem})
	check(t, err)
	check(t, s.Close())
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	check(t, err)
	if err := s.Serve(context.Background(), l); !errors.Is(err, vhostuser.ErrClosed) {
		t.Errorf("Serve after Close: %v", err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	if err := s.Serve(context.Background(), tcp); err == nil {
		t.Error("TCP is served")
	}
}

// tempFile makes memory that cannot be sealed.
func tempFile(t testing.TB) func(int64) (*os.File, error) {
	return func(size int64) (*os.File, error) {
		f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
		if err != nil {
			return nil, err
		}
		return f, f.Truncate(size)
	}
}
