package blockdev_test

import (
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
)

func TestMemory(t *testing.T) {
	for _, bs := range []int{512, 4096, 65536} {
		blockdevtest.Run(t, blockdevtest.Suite{
			New: func(_ testing.TB, size int64) blockdev.Device { return blockdev.NewMemory(size, bs) },
			Reopen: func(_ testing.TB, dev blockdev.Device) blockdev.Device {
				clone := dev.(*blockdev.Memory).Clone()
				dev.Close()
				return clone
			},
		})
	}
}

func TestFile(t *testing.T) {
	reopen := func(opts blockdev.FileOptions) func(testing.TB, blockdev.Device) blockdev.Device {
		return func(t testing.TB, dev blockdev.Device) blockdev.Device {
			name := dev.(*blockdev.File).Name()
			dev.Close()
			return open(t, name, opts)
		}
	}
	for _, direct := range []bool{false, true} {
		blockdevtest.Run(t, blockdevtest.Suite{
			New: func(t testing.TB, size int64) blockdev.Device {
				f := open(t, filepath.Join(t.TempDir(), "disk"), blockdev.FileOptions{Create: true, Direct: direct})
				if err := f.Resize(size); err != nil {
					t.Fatal(err)
				}
				return f
			},
			Reopen:   reopen(blockdev.FileOptions{Direct: direct}),
			ReadOnly: reopen(blockdev.FileOptions{ReadOnly: true, Direct: direct}),
		})
	}
}

func open(t testing.TB, name string, opts blockdev.FileOptions) *blockdev.File {
	t.Helper()
	f, err := blockdev.OpenFile(name, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
