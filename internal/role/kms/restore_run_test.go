package kms

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	"strongroom/internal/crypto/keymem"
)

// runRestore runs a restore in a process of its own and kills it behind its nth
// step. It returns the steps, and whether it came to its end.
func runRestore(t *testing.T, dir, file string, secret *keymem.Key, n int) (steps []string, ended bool) {
	t.Helper()
	cmd := self()
	cmd.Env = append(os.Environ(), childVariable+"="+dir, childVariable+"_RESTORE="+file)
	cmd.Stderr = os.Stderr
	return killBehind(t, cmd, secret.Bytes(), func(steps []string) bool { return len(steps) == n })
}

// oneFile is a file system with one file of a folder.
func oneFile(t *testing.T, dir, name string) fs.FS {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return fstest.MapFS{name: {Data: text, Mode: 0o600}}
}
