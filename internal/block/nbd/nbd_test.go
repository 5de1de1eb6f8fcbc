package nbd_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/nbd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// deadline is how long a test waits for what must happen.
const deadline = time.Minute

// testContext ends before the test would hang.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

// config is of a server whose complaints nobody reads.
func config() nbd.Config {
	return nbd.Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
}

// start serves exports on a new socket until the test ends, and returns the
// socket's path.
func start(t testing.TB, c nbd.Config, exports ...nbd.Export) (*nbd.Server, string) {
	t.Helper()
	s := nbd.NewServer(c)
	for _, e := range exports {
		check(t, s.AddExport(e))
	}
	return s, serve(t, s)
}

func serve(t testing.TB, s *nbd.Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", path)
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(deadline):
			t.Error("Serve does not end")
		}
	})
	return path
}

func dial(t testing.TB, path, export string) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(testContext(t), "unix", path, export)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	return c
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
		t.Errorf("error is %v, want %v", err, want)
	}
}

// dull hides what a device can do beyond the contract.
type dull struct{ blockdev.Device }

func TestConformance(t *testing.T) {
	tests := []struct {
		name string
		make func(dev blockdev.Device) blockdev.Device
	}{
		{"Extenter", func(dev blockdev.Device) blockdev.Device { return dev }},
		{"Dull", func(dev blockdev.Device) blockdev.Device { return dull{dev} }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			below := map[blockdev.Device]blockdev.Device{}
			open := func(t testing.TB, mem blockdev.Device, readOnly bool) blockdev.Device {
				_, path := start(t, config(), nbd.Export{Name: "disk", Device: test.make(mem), ReadOnly: readOnly})
				c := dial(t, path, "disk")
				below[c] = mem
				return c
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
			})
		})
	}
}

// openToAll lets every user reach a socket, and returns its path.
func openToAll(t testing.TB, path string) string {
	t.Helper()
	check(t, os.Chmod(path, 0o777))
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		check(t, os.Chmod(dir, 0o755))
	}
	return path
}
