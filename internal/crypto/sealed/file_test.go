package sealed

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

func wantContent(t *testing.T, path string, key, want *keymem.Key) {
	t.Helper()
	got, err := ReadFile(path, key, testContext)
	if err != nil {
		t.Error(err)
		return
	}
	defer got.Close()
	if !got.Equal(want) {
		t.Errorf("%s has another content", path)
	}
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("directory has %q, want %q", got, want)
	}
}

func TestWriteFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "secrets.sealed")
	key := keymemtest.Random(t, KeySize)
	// What a crash left behind is no obstacle.
	if err := os.WriteFile(path+newSuffix, []byte("left behind"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 100, SegmentSize + 1, keymem.SizeMax} {
		data := keymemtest.Random(t, size)
		if err := WriteFile(path, key, testContext, data); err != nil {
			t.Fatal(err)
		}
		wantContent(t, path, key, data)
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if size >= 32 && (bytes.Contains(raw, data.Bytes()[:32]) || bytes.Contains(raw, key.Bytes())) {
			t.Error("the file shows the content or the key")
		}
	}
	wantNames(t, dir, "secrets.sealed")
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

func TestReadFileRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key := keymemtest.Random(t, KeySize)
	path := filepath.Join(dir, "f")
	for _, tt := range []struct {
		name    string
		content []byte
		want    error
	}{
		{"no content", seal(t, key, nil), ErrCorrupt},
		{"too large for a key", seal(t, key, make([]byte, keymem.SizeMax+1)), ErrTooLarge},
		{"not sealed", []byte("{}"), ErrNotSealed},
		{"empty", nil, ErrNotSealed},
		{"another key", seal(t, keymemtest.Random(t, KeySize), pattern(10)), ErrWrongKey},
	} {
		if err := os.WriteFile(path, tt.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadFile(path, key, testContext); got != nil || !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, %v; want %v", tt.name, got, err, tt.want)
		}
	}
	if got, err := ReadFile(filepath.Join(dir, "none"), key, testContext); got != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v, %v; want ErrNotExist", got, err)
	}
	if err := WriteFile(filepath.Join(dir, "none", "f"), key, testContext, keymemtest.Random(t, 1)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v; want ErrNotExist", err)
	}
}

func TestWriteFileWrongKeyLeavesTheOldFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	key, data := keymemtest.Random(t, KeySize), keymemtest.Random(t, 32)
	if err := WriteFile(path, key, testContext, data); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, keymemtest.Random(t, 16), testContext, data); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v; want ErrInvalid", err)
	}
	wantContent(t, path, key, data)
	wantNames(t, dir, "f")
}

// Each operation of WriteFile fails in turn, in each way, and after each the
// machine may lose its power: the file has the old or the new content.
func TestWriteFileFaults(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	oldData, newData := keymemtest.Random(t, 100), keymemtest.Random(t, 1000)
	const path = "dir/f"
	everyFault(t, func() *faultFS {
		fsys := newFaultFS()
		if err := writeFile(fsys, path, key, testContext, oldData); err != nil {
			t.Fatal(err)
		}
		return fsys
	}, func(fsys *faultFS) error {
		return writeFile(fsys, path, key, testContext, newData)
	}, func(fsys *faultFS, done bool) {
		got, err := readFile(fsys, path, key, testContext)
		if err != nil {
			t.Errorf("%s: neither old nor new content: %v", fsys.history, err)
			return
		}
		defer got.Close()
		if !got.Equal(newData) && (done || !got.Equal(oldData)) {
			t.Errorf("%s: wrong content, done = %t", fsys.history, done)
		}
		// It can be tried again.
		if err := writeFile(fsys, path, key, testContext, newData); err != nil {
			t.Errorf("%s: second try: %v", fsys.history, err)
		}
	})
}

// everyFault runs operation on what setup returns, with its first, second, ...
// file system call failing in each way, until a run without a fault. After
// each, check sees every state in which a power loss could leave the disk.
func everyFault(t *testing.T, setup func() *faultFS, operation func(*faultFS) error, check func(fsys *faultFS, done bool)) {
	t.Helper()
	for call := 0; ; call++ {
		reached := false
		for _, mode := range []faultMode{notDone, doneButFailed, torn} {
			fsys := setup()
			fsys.arm(call, mode)
			err := operation(fsys)
			if fsys.injected && err == nil {
				t.Errorf("%s: the fault was swallowed", fsys.history)
			}
			if !fsys.injected && err != nil {
				t.Fatalf("without a fault: %v", err)
			}
			reached = reached || fsys.injected
			fsys.disarm()
			for _, after := range fsys.powerLosses() {
				check(after, err == nil)
			}
			check(fsys, err == nil)
		}
		if !reached {
			if call < 8 {
				t.Errorf("only %d calls were failed", call)
			}
			return
		}
	}
}
