package blockdev_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/test/reflink"
)

// TestCloneFrom: the clone has the same contents and shares their blocks, until
// either is written.
func TestCloneFrom(t *testing.T) {
	t.Parallel()
	dir := reflink.Dir(t)
	const size = 32<<20 + 512
	src := open(t, filepath.Join(dir, "src"), blockdev.FileOptions{Create: true})
	check(t, src.Resize(size))
	want := bytes.Repeat([]byte("contents"), size/8)
	_, err := src.WriteAt(want, 0) // not flushed
	check(t, err)
	before := free(t, dir)
	dst := open(t, filepath.Join(dir, "dst"), blockdev.FileOptions{Create: true})
	check(t, dst.CloneFrom(src))
	check(t, dst.Flush())
	if took := before - free(t, dir); took > size/2 {
		t.Errorf("the clone took %d bytes", took)
	}
	if dst.Size() != size {
		t.Errorf("the clone has %d bytes", dst.Size())
	}
	_, err = src.WriteAt([]byte("changed"), 4096)
	check(t, err)
	_, err = dst.WriteAt([]byte("otherwise"), size-9)
	check(t, err)
	got := make([]byte, size)
	_, err = dst.ReadAt(got, 0)
	check(t, err)
	copy(want[size-9:], "otherwise")
	if !bytes.Equal(got, want) {
		t.Error("the clone does not hold what its source held")
	}
	_, err = src.ReadAt(got, 0)
	check(t, err)
	if string(got[4096:4103]) != "changed" || string(got[size-9:]) == "otherwise" {
		t.Error("the source is not its own any more")
	}

	elsewhere := open(t, newFile(t, 0), blockdev.FileOptions{})
	wantError(t, elsewhere.CloneFrom(src), blockdev.ErrNoClone)
	wantError(t, dst.CloneFrom(blockdev.NewMemory(512, 512)), blockdev.ErrNoClone)
	wantError(t, dst.CloneFrom(dst), blockdev.ErrNoClone)
	readOnly := open(t, newFile(t, 512), blockdev.FileOptions{ReadOnly: true})
	wantError(t, readOnly.CloneFrom(src), blockdev.ErrReadOnly)
	check(t, src.Close())
	wantError(t, dst.CloneFrom(src), blockdev.ErrClosed)
	if info, err := os.Stat(elsewhere.Name()); err != nil || info.Size() != 0 || dst.Size() != size {
		t.Errorf("a refused clone changed its destination: %v, %v", info, err)
	}
}

// free returns the free bytes of a file system.
func free(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	check(t, unix.Statfs(dir, &st))
	return int64(st.Bfree) * st.Bsize
}
