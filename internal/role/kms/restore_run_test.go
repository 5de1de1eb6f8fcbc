package kms

import (
	"bufio"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"strongroom/internal/crypto/keymem"
)

// runRestore runs a restore in a process of its own and kills it behind its nth
// step. It returns the steps, and whether it came to its end.
func runRestore(t *testing.T, dir, file string, secret *keymem.Key, n int) (steps []string, ended bool) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVariable+"="+dir, childVariable+"_RESTORE="+file)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := in.Write(secret.Bytes()); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewReader(out); ; {
		line, err := lines.ReadString('\n')
		if err != nil { // it has ended
			if err := cmd.Wait(); err != nil {
				t.Fatalf("behind %q: %v", steps, err)
			}
			return steps, true
		}
		if steps = append(steps, strings.TrimSpace(line)); len(steps) == n {
			return steps, false
		}
		if _, err := in.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
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
