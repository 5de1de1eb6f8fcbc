package blockfuse_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockfuse"
)

// TestFio writes blocks of 4 to 64 KiB in parallel and verifies them, for which
// QEMU 7.2's FUSE export of a raw image returns other data than were written.
func TestFio(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	v := newVolume(t, 64<<20, 4096, true)
	_, path := show(t, v, blockfuse.Options{})
	for _, args := range [][]string{
		{"--ioengine=libaio", "--iodepth=32", "--bsrange=4k-64k", "--direct=1"},
		{"--ioengine=psync", "--numjobs=4", "--size=16m", "--offset_increment=16m", "--bsrange=512-9k", "--blockalign=512", "--io_size=4m"},
	} {
		run(t, "fio", append([]string{
			"--name=verify", "--filename=" + path, "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
			"--randrepeat=0", "--verify_state_save=0", "--output-format=terse",
		}, args...)...)
	}
}

// TestLoop puts a loop device on the file, makes file systems on it and checks
// them.
func TestLoop(t *testing.T) {
	needFUSE(t)
	needRoot(t)
	t.Parallel()
	v := newVolume(t, 512<<20, 4096, true)
	_, path := show(t, v, blockfuse.Options{})
	loop := run(t, "losetup", "--find", "--show", "--direct-io=on", path)
	defer run(t, "losetup", "--detach", loop)
	if dio := run(t, "losetup", "--noheadings", "--output", "DIO", loop); dio != "1" {
		t.Errorf("direct I/O of the loop device: %s", dio)
	}
	dir := t.TempDir()
	data := bytes.Repeat([]byte("strongroom"), 300_000)
	for _, c := range []struct{ kind, mkfs, force, check string }{
		{"ext4", "mkfs.ext4", "-F", "e2fsck"},
		{"xfs", "mkfs.xfs", "-f", "xfs_repair"},
	} {
		run(t, c.mkfs, "-q", c.force, loop)
		check(t, unix.Mount(loop, dir, c.kind, 0, ""))
		for _, name := range []string{"a", "b", "c"} {
			check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
		}
		check(t, os.Remove(filepath.Join(dir, "b")))
		run(t, "fstrim", dir)
		check(t, unix.Unmount(dir, 0))
		check(t, unix.Mount(loop, dir, c.kind, unix.MS_RDONLY, ""))
		for _, name := range []string{"a", "c"} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s: file %s: %v", c.kind, name, err)
			}
		}
		check(t, unix.Unmount(dir, 0))
		if c.check == "e2fsck" {
			run(t, "e2fsck", "-f", "-n", loop)
		} else {
			run(t, "xfs_repair", "-n", loop)
		}
	}
}

// TestQEMU copies a sparse volume with QEMU: what was never written stays a hole.
func TestQEMU(t *testing.T) {
	needFUSE(t)
	t.Parallel()
	v := newVolume(t, 64<<20, 512, true)
	_, path := show(t, v, blockfuse.Options{})
	run(t, "qemu-io", "-f", "raw", "-t", "none", "-c", "write -P 0x5a 1M 3M", "-c", "write -P 0xa5 512 512", "-c", "discard 2M 1M", "-c", "flush", path)
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", path, copied)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, copied)
	run(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x5a 1M 1M", "-c", "read -P 0 2M 1M", "-c", "read -P 0xa5 512 512", copied)
	var st unix.Stat_t
	check(t, unix.Stat(copied, &st))
	if st.Blocks*512 > 4<<20 {
		t.Errorf("the copy of 2 MiB of data takes %d bytes", st.Blocks*512)
	}
}
