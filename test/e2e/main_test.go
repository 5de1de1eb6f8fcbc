// Package e2e proves what users rely on by the real binary: controllers, hosts,
// QEMU guests and the command line, on loopback. A controller with its hosts is a
// site; the subtests of a test share one and build on each other.
//
// Numbers in comments are those of the behaviours in the product's requirements.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binary is the program under test, built by TestMain.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "sr-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // other users run it too
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	binary = filepath.Join(dir, "strongroom")
	build := exec.Command("go", "build", "-trimpath", "-o", binary, "strongroom/cmd/strongroom")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build strongroom: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}
