package blockfuse_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockfuse"
)

// BenchmarkRead and BenchmarkWrite do one request at a time through the kernel.
// Their allocations are go-fuse's, since [TestAllocations] finds none of ours.
func BenchmarkRead(b *testing.B) { benchmark(b, unix.Pread) }

func BenchmarkWrite(b *testing.B) { benchmark(b, unix.Pwrite) }

func benchmark(b *testing.B, request func(fd int, p []byte, off int64) (int, error)) {
	needFUSE(b)
	_, path := show(b, blockdev.NewMemory(64<<20, 512), blockfuse.Options{})
	fd := openFile(b, path, unix.O_RDWR)
	defer unix.Close(fd)
	for _, size := range []int{4 << 10, 1 << 20} {
		name := "4KiB"
		if size > 4<<10 {
			name = "1MiB"
		}
		b.Run(name, func(b *testing.B) {
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if n, err := request(fd, p, int64(i*size)%(64<<20)); n != size || err != nil {
					b.Fatal(n, err)
				}
			}
		})
	}
}
