// Package reflink makes file systems for tests whose files can share blocks.
package reflink

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Dir returns a directory on a file system of its own, an XFS of 320 MiB
// whose files can share blocks, until the test ends. Only root can mount one:
// others skip the test.
func Dir(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a file system with reflinks is mounted by root only")
	}
	dir := t.TempDir()
	image, mount := filepath.Join(dir, "xfs"), filepath.Join(dir, "mnt")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	// About the least that mkfs.xfs takes.
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 320<<20), os.Mkdir(mount, 0o700)); err != nil {
		t.Fatal(err)
	}
	run("mkfs.xfs", "-q", "-m", "reflink=1", image)
	run("mount", "-o", "loop", image, mount)
	t.Cleanup(func() { run("umount", "--lazy", mount) })
	return mount
}
