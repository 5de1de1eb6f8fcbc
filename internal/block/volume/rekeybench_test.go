package volume_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// BenchmarkRekey rekeys a full disk in a file in the folder for temporary files
// (TMPDIR), beside plain writes of as many bytes to the same file, flushed once
// for each zone.
func BenchmarkRekey(b *testing.B) {
	const size = 256 << 20
	dek, next := keymemtest.Random(b, 64), keymemtest.Random(b, 64)
	f, err := blockdev.OpenFile(filepath.Join(b.TempDir(), "disk.luks"), blockdev.FileOptions{Create: true})
	check(b, err)
	check(b, volume.Format(f, volume.FormatOptions{Size: size, DEK: dek}))
	v := openVolume(b, f, dek)
	data := pattern(4<<20, 1)
	write := func(dev blockdev.Device, base int64) {
		for off := int64(0); off < size; off += int64(len(data)) {
			_, err := dev.WriteAt(data, base+off)
			check(b, err)
			check(b, dev.Flush())
		}
	}
	write(v, 0)
	b.Run("raw", func(b *testing.B) {
		raw, err := blockdev.OpenFile(filepath.Join(b.TempDir(), "raw"), blockdev.FileOptions{Create: true})
		check(b, err)
		defer raw.Close()
		check(b, raw.Resize(size))
		write(raw, 0) // so that both write to blocks that are there
		b.SetBytes(size)
		for b.Loop() {
			write(raw, 0)
		}
	})
	for _, zone := range []int64{1 << 20, 4 << 20, 15 << 20} {
		b.Run(fmt.Sprintf("zone=%dMiB", zone>>20), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				check(b, v.Rekey(b.Context(), volume.RekeyOptions{NewDEK: next, Zone: zone}))
				dek, next = next, dek
			}
		})
	}
}
