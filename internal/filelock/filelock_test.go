package filelock_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"strongroom/internal/filelock"
)

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestTake(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	one, two := open(t, path), open(t, path)
	if err := filelock.Take(one); err != nil {
		t.Fatal(err)
	}
	if err := filelock.Take(two); !errors.Is(err, filelock.ErrHeld) {
		t.Fatalf("a held lock: %v", err)
	}
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	if err := filelock.Take(two); err != nil {
		t.Errorf("after its holder has closed it: %v", err)
	}
	if err := filelock.Take(one); err == nil || errors.Is(err, filelock.ErrHeld) {
		t.Errorf("a closed file: %v", err)
	}
}

// TestForks: processes that are started meanwhile do not keep a lock that was
// given up, so none is ever seen as held.
func TestForks(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	var starters sync.WaitGroup
	defer starters.Wait()
	defer close(stop)
	for range 4 {
		starters.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := exec.CommandContext(t.Context(), "/bin/true").Run(); err != nil && t.Context().Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	path := filepath.Join(t.TempDir(), "lock")
	for range 300 {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := filelock.Take(f); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
