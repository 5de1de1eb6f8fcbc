package durable_test

import (
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/durable"
)

func TestWriteFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path+".new", []byte("left by a crash, and longer"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"old", "new"} {
		if err := durable.WriteFile(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != want {
			t.Errorf("it holds %q, %v, want %q", got, err, want)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
	if _, err := os.Stat(path + ".new"); !os.IsNotExist(err) {
		t.Errorf("the temporary file is left: %v", err)
	}
	if err := durable.WriteFile(filepath.Join(path, "x"), nil); err == nil {
		t.Error("a file in a file")
	}
}
