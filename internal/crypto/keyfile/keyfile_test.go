package keyfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/errs"
)

func TestCreateRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "k")
	made, err := keyfile.Create(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	defer made.Close()
	got, err := keyfile.Read(path, 32)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(made) {
		t.Error("the key read is not the one made")
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, error %v; want 0600", info.Mode(), err)
	}
	if _, err := keyfile.Create(path, 32); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create over a file: error %v, want ErrExist", err)
	}
	if again, err := keyfile.Read(path, 32); err != nil || !again.Equal(made) {
		t.Errorf("Create over a file changed it: %v", err)
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name string, size int, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, size), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		name, path string
		kind       errs.Kind
	}{
		{"short", write("short", 31, 0o600), errs.Invalid},
		{"long", write("long", 33, 0o600), errs.Invalid},
		{"empty", write("empty", 0, 0o600), errs.Invalid},
		{"readable by others", write("open", 32, 0o644), errs.Denied},
		{"a folder", dir, errs.Invalid},
		{"missing", filepath.Join(dir, "missing"), errs.NotFound},
	} {
		if key, err := keyfile.Read(c.path, 32); errs.KindOf(err) != c.kind || key != nil {
			t.Errorf("%s: Read = %v, %v; want kind %v", c.name, key, err, c.kind)
		}
	}
}
