package kms

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"
)

// TestCollect sets how much garbage there may be: it is one for the process, so this
// is the one test of it, and not parallel.
func TestCollect(t *testing.T) {
	t.Setenv("GOGC", "") // it is restored
	os.Unsetenv("GOGC")
	was := debug.SetGCPercent(100)
	defer debug.SetGCPercent(was)
	percent := func() int {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return p
	}
	cfg := Config{DataDir: t.TempDir()}
	file := filepath.Join(cfg.DataDir, storeName, "member", "snap", "db")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, at := range []struct {
		size int64
		want int
	}{{largeFile + 1, collectLarge}, {0, collectSmall}} {
		if err := os.Truncate(file, at.size); err != nil {
			t.Fatal(err)
		}
		if collectAtStart(cfg); percent() != at.want {
			t.Errorf("with %d bytes: %d, want %d", at.size, percent(), at.want)
		}
	}
	t.Setenv("GOGC", "200")
	if collectFor(true); percent() != collectSmall {
		t.Error("it is set although the environment says it")
	}
	runtime.GC()
	if live := liveHeap(); live == 0 || live > 1<<40 {
		t.Errorf("%d bytes live", live)
	}
}
