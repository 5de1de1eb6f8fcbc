package volume_test

import (
	"testing"

	"go.uber.org/goleak"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testOffset keeps test volumes small.
const testOffset = 1 << 20

func newKey(t testing.TB, n int) *keymem.Key {
	t.Helper()
	k, err := keymem.Random(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// format makes a volume for tests; fields of opts that are zero get defaults.
func format(t testing.TB, dev blockdev.Resizer, opts volume.FormatOptions) {
	t.Helper()
	if opts.DataOffset == 0 {
		opts.DataOffset = testOffset
	}
	check(t, volume.Format(dev, opts))
}

func openVolume(t testing.TB, dev blockdev.Device, dek *keymem.Key) *volume.Volume {
	t.Helper()
	v, err := volume.Open(dev, dek, volume.Options{})
	check(t, err)
	t.Cleanup(func() { v.Close() })
	return v
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name           string
		sector, device int // bytes
	}{
		{"512", 512, 512},
		{"4096", 4096, 512},
		{"512 on 4096", 512, 4096},
		{"4096 on 65536", 4096, 65536},
	} {
		t.Run(c.name, func(t *testing.T) {
			dek := newKey(t, 64)
			mems := map[blockdev.Device]*blockdev.Memory{}
			start := func(t testing.TB, mem *blockdev.Memory, opts volume.Options) blockdev.Device {
				v, err := volume.Open(mem, dek, opts)
				check(t, err)
				t.Cleanup(func() { v.Close() })
				mems[v] = mem
				return v
			}
			reopen := func(opts volume.Options) func(testing.TB, blockdev.Device) blockdev.Device {
				return func(t testing.TB, dev blockdev.Device) blockdev.Device {
					mem := mems[dev].Clone()
					dev.Close()
					return start(t, mem, opts)
				}
			}
			blockdevtest.Run(t, blockdevtest.Suite{
				New: func(t testing.TB, size int64) blockdev.Device {
					mem := blockdev.NewMemory(0, c.device)
					format(t, mem, volume.FormatOptions{Size: size, SectorSize: c.sector, DEK: dek, AllowDiscards: true})
					return start(t, mem, volume.Options{})
				},
				Reopen:   reopen(volume.Options{}),
				ReadOnly: reopen(volume.Options{ReadOnly: true}),
			})
		})
	}
}
