package volume_test

import (
	"fmt"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// BenchmarkVolume compares an encrypted disk with a plain one over the same
// memory, so that the difference is what encryption costs.
func BenchmarkVolume(b *testing.B) {
	const size = 64 << 20
	dek := keymemtest.Random(b, 64)
	for _, sector := range []int{0, 512, 4096} {
		mem := blockdev.NewMemory(size, 512)
		var dev blockdev.Device = mem
		name := "plain"
		if sector > 0 {
			mem = blockdev.NewMemory(0, 512)
			format(b, mem, volume.FormatOptions{Size: size, SectorSize: sector, DEK: dek})
			dev, name = openVolume(b, mem, dek), fmt.Sprintf("encrypted%d", sector)
		}
		for _, request := range []int{4 << 10, 1 << 20} {
			p := pattern(request, 1)
			for off := int64(0); off < size; off += int64(request) {
				if _, err := dev.WriteAt(p, off); err != nil {
					b.Fatal(err)
				}
			}
			for _, op := range []struct {
				name string
				run  func(p []byte, off int64) (int, error)
			}{{"read", dev.ReadAt}, {"write", dev.WriteAt}} {
				b.Run(fmt.Sprintf("%s/%s/%dKiB", name, op.name, request>>10), func(b *testing.B) {
					b.SetBytes(int64(request))
					b.ReportAllocs()
					var off int64
					for b.Loop() {
						if _, err := op.run(p, off); err != nil {
							b.Fatal(err)
						}
						off = (off + int64(request)) % size
					}
				})
			}
		}
	}
}
