package blockdev_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
)

// TestBlockDevice runs the conformance suite on a loop device, which only root
// can make.
func TestBlockDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: block devices are not tested")
		return
	}
	blockdevtest.Run(t, blockdevtest.Suite{
		New: func(t testing.TB, size int64) blockdev.Device {
			path := newFile(t, size)
			out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
			if err != nil {
				t.Fatalf("losetup: %v\n%s", err, out)
			}
			loop := strings.TrimSpace(string(out))
			t.Cleanup(func() {
				if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
					t.Errorf("losetup: %v\n%s", err, out)
				}
			})
			return fixed{open(t, loop, blockdev.FileOptions{})}
		},
	})
}

// fixed hides Resize, which a block device refuses.
type fixed struct{ blockdev.Extenter }

func TestBlockDeviceResizeAndLock(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: block devices are not tested")
		return
	}
	path := newFile(t, 1<<20)
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v\n%s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "--detach", loop).Run()
	f := open(t, loop, blockdev.FileOptions{})
	if f.Size() != 1<<20 || f.BlockSize() != 512 {
		t.Errorf("size %d, block size %d", f.Size(), f.BlockSize())
	}
	_, err = blockdev.OpenFile(loop, blockdev.FileOptions{})
	wantError(t, err, blockdev.ErrInUse)
	check(t, f.Resize(1<<20))
	wantError(t, f.Resize(2<<20), blockdev.ErrBadSize)
	wantError(t, f.Resize(512), blockdev.ErrBadSize)

	p := bytes.Repeat([]byte{5}, 1<<20)
	_, err = f.WriteAt(p, 0)
	check(t, err)
	check(t, f.Discard(64<<10, 64<<10))
	check(t, f.WriteZeroes(256<<10+1, 1000, true)) // no fallocate does this
	check(t, f.Flush())
	check(t, f.Close())
	clear(p[64<<10 : 128<<10])
	clear(p[256<<10+1 : 256<<10+1001])
	got, err := os.ReadFile(path)
	check(t, err)
	if !bytes.Equal(got, p) {
		t.Error("the file behind the block device has other contents")
	}
}
