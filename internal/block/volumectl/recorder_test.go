package volumectl

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// recorder is a Handler that writes down what it is asked for.
type recorder struct {
	mu    sync.Mutex
	calls []string
	block chan struct{} // if not nil, Flush waits for it
	err   error         // what Resize returns
	// refuse is what Suspend returns.
	refuse error
	end    func() // called by Shutdown
}

func (r *recorder) record(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf(format, args...))
}

func (r *recorder) seen() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

func (r *recorder) AddDisk(_ context.Context, d Disk, file *os.File, dek, next *keymem.Key) error {
	defer file.Close()
	defer dek.Close()
	defer next.Close()
	content, err := io.ReadAll(file)
	if err != nil {
		return err
	}
	r.record("add %+v with %q and keys of sums %d and %d", d, content, sum(dek), sum(next))
	return nil
}

func sum(key *keymem.Key) (n int) {
	if key != nil {
		for _, b := range key.Bytes() {
			n += int(b)
		}
	}
	return n
}

func (r *recorder) Rekey(_ context.Context, disk string, next *keymem.Key, safe *keysafe.Safe, rate int64) error {
	defer next.Close()
	text := "none"
	if safe != nil {
		text = string(safe.Encode())
	}
	r.record("rekey %s with a key of sum %d in %s at %d", disk, sum(next), text, rate)
	return nil
}

func (r *recorder) StopRekey(_ context.Context, disk string) error {
	r.record("stop the rekey of %s", disk)
	return nil
}

func (r *recorder) RemoveDisk(_ context.Context, disk string) error {
	r.record("remove %s", disk)
	return nil
}

func (r *recorder) Listen(_ context.Context, listener *os.File) error {
	defer listener.Close()
	l, err := net.FileListener(listener)
	if err != nil {
		return err
	}
	r.record("listen %s", l.Addr().Network())
	return l.Close()
}

func (r *recorder) ListenVhostUser(_ context.Context, disk string, listener *os.File) error {
	defer listener.Close()
	l, err := net.FileListener(listener)
	if err != nil {
		return err
	}
	r.record("listen %s for %s", l.Addr().Network(), disk)
	return l.Close()
}

func (r *recorder) ReplaceSafe(_ context.Context, disk string, safe *keysafe.Safe) error {
	r.record("replace %s %s", disk, safe.Encode())
	return nil
}

func (r *recorder) Convert(_ context.Context, disk string, format Format, file *os.File, dek *keymem.Key, rate int64) error {
	defer file.Close()
	defer dek.Close()
	r.record("convert %s to %s with a key: %v, at %d", disk, format, dek != nil, rate)
	return nil
}

func (r *recorder) HoldConversion(_ context.Context, disk string) error {
	r.record("hold %s", disk)
	return nil
}

func (r *recorder) SwitchDisk(_ context.Context, disk string) error {
	r.record("switch %s", disk)
	return nil
}

func (r *recorder) StopConversion(_ context.Context, disk string) error {
	r.record("stop converting %s", disk)
	return nil
}

func (r *recorder) Resize(_ context.Context, disk string, size int64) error {
	r.record("resize %s %d", disk, size)
	return r.err
}

func (r *recorder) Flush(_ context.Context, disk string) error {
	if r.block != nil {
		<-r.block
	}
	r.record("flush %s", disk)
	return nil
}

func (r *recorder) Suspend(_ context.Context, limit time.Duration) (func() error, error) {
	r.record("suspend for %v", limit)
	return func() error { r.record("resume"); return r.err }, r.refuse
}

func (r *recorder) Status(context.Context) (*Status, error) {
	return &Status{Listening: true, Disks: []DiskStatus{{Disk: "disk-0", Format: LUKS, Size: 512, Damage: []string{"bad"}, Rekey: &Rekey{
		Running: true, Done: 1, Total: 512, Rate: 3, Speed: 4, Failure: FailureOf(errs.New(errs.NoSpace, "full")),
	}, Conversion: &Conversion{
		Phase: Failed, Done: 1, Total: 1024, Failure: FailureOf(errs.New(errs.NoSpace, "full")),
	}}}}, nil
}

func (r *recorder) Shutdown(context.Context) error {
	r.record("shutdown")
	r.end()
	return nil
}

// serve runs a Server with r and returns its socket's path.
func serve(t *testing.T, r *recorder) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl") // short, unlike t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.end = cancel
	done := make(chan error)
	go func() {
		server := Server{VM: "web-1", Handler: r, Log: slog.New(slog.DiscardHandler)}
		done <- server.Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return path
}
