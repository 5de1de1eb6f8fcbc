package blockdevtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// ReflinkDir returns a directory on a file system of its own, an XFS of 320 MiB
// whose files can share blocks, until the test ends. Only root can mount one:
// others skip the test.
func ReflinkDir(t testing.TB) string {
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
	check(t, os.WriteFile(image, nil, 0o600))
	check(t, os.Truncate(image, 320<<20)) // about the least that mkfs.xfs takes
	check(t, os.Mkdir(mount, 0o700))
	run("mkfs.xfs", "-q", "-m", "reflink=1", image)
	run("mount", "-o", "loop", image, mount)
	t.Cleanup(func() { run("umount", "--lazy", mount) })
	return mount
}
