// Package softhsm gives tests tokens of SoftHSM2, and the program through which
// they are used (cmd/strongroom-pkcs11).
package softhsm

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// PIN is that of every token's user.
const PIN = "471199"

// Module returns the path of SoftHSM2's library.
func Module(t testing.TB) string {
	t.Helper()
	for _, path := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatal("libsofthsm2.so is missing: run scripts/setup.sh")
	return ""
}

// Main is for a package's TestMain: it builds the program beside the test's own,
// has SoftHSM2 keep its tokens in a folder of its own, and runs the tests.
func Main(m *testing.M) (code int) {
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(filepath.Dir(os.Getenv(confVariable)))
	return m.Run()
}

const confVariable = "SOFTHSM2_CONF"

func setUp() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	build := exec.Command("go", "build", "-o", filepath.Join(filepath.Dir(self), "strongroom-pkcs11"), "strongroom/cmd/strongroom-pkcs11")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build strongroom-pkcs11: %w\n%s", err, out)
	}
	dir, err := os.MkdirTemp("", "softhsm")
	if err != nil {
		return err
	}
	conf := filepath.Join(dir, "conf")
	return errors.Join(os.Mkdir(filepath.Join(dir, "tokens"), 0o700),
		os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir), 0o600), os.Setenv(confVariable, conf))
}

// Token makes a token and returns its label and a file with its user's PIN.
func Token(t testing.TB) (label, pinFile string) {
	t.Helper()
	label = "test-" + rand.Text()[:12]
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "12345678", "--pin", PIN).CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, bytes.TrimSpace(out))
	}
	pinFile = filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pinFile, []byte(PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return label, pinFile
}
