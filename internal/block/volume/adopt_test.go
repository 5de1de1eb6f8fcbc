package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestAdopt takes over volumes that cryptsetup made, with either sector size
// and room to grow.
func TestAdopt(t *testing.T) {
	t.Parallel()
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			t.Parallel()
			dir, dek := t.TempDir(), keymemtest.Random(t, 64)
			name, key, pass := filepath.Join(dir, "foreign"), filepath.Join(dir, "key"), filepath.Join(dir, "pass")
			check(t, os.WriteFile(key, dek.Bytes(), 0o600))
			check(t, os.WriteFile(pass, []byte("secret"), 0o600))
			const size = 5<<20 + 4096
			check(t, os.WriteFile(name, nil, 0o600))
			check(t, os.Truncate(name, 16<<20+size))
			out, err := cryptsetup(t, "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
				"--key-file", pass, "--key-size", "512", "--volume-key-file", key, "--sector-size", fmt.Sprint(sector), name)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			f, err := blockdev.OpenFile(name, blockdev.FileOptions{})
			check(t, err)
			foreign := openVolume(t, f, dek)
			want := make([]byte, size)
			for _, part := range [][2]int{{0, 1 << 20}, {3 << 20, 3<<20 + 5000}, {size - 4096, size}} {
				copy(want[part[0]:part[1]], keymemtest.Random(t, part[1]-part[0]).Bytes()) // random bytes
				_, err = foreign.WriteAt(want[part[0]:part[1]], int64(part[0]))
				check(t, err)
			}
			check(t, foreign.Close())
			before, err := os.ReadFile(name)
			check(t, err)

			src, err := blockdev.OpenFile(name, blockdev.FileOptions{ReadOnly: true})
			check(t, err)
			defer src.Close()
			v, err := luks.ReadForeign(src, src.Size())
			check(t, err)
			mem := blockdev.NewMemory(0, 512)
			format(t, mem, volume.FormatOptions{Size: size + 1<<20, SectorSize: sector, DEK: dek})
			var last, all int64
			check(t, volume.Adopt(t.Context(), mem, src, v.Segment, func(done, total int64) { last, all = done, total }))
			if last != all || all != 2*size {
				t.Errorf("progress ended at %d of %d", last, all)
			}
			got := contents(t, openVolume(t, mem, dek))
			if !bytes.Equal(got[:size], want) {
				t.Error("the data differ")
			}
			if !bytes.Equal(got[size:], make([]byte, 1<<20)) {
				t.Error("what was added does not read as zeros")
			}
			if after, err := os.ReadFile(name); err != nil || !bytes.Equal(after, before) {
				t.Errorf("the source was changed, %v", err)
			}

			small := blockdev.NewMemory(0, 512)
			format(t, small, volume.FormatOptions{Size: size - 4096, SectorSize: sector, DEK: dek})
			if err := volume.Adopt(t.Context(), small, src, v.Segment, nil); !errors.Is(err, blockdev.ErrOutOfRange) {
				t.Errorf("too small: %v", err)
			}
			other := blockdev.NewMemory(0, 512)
			format(t, other, volume.FormatOptions{Size: 6 << 20, SectorSize: 512 + 4096 - sector, DEK: dek})
			if err := volume.Adopt(t.Context(), other, src, v.Segment, nil); !errors.Is(err, volume.ErrUnsupported) {
				t.Errorf("another sector size: %v", err)
			}
			stopped, stop := context.WithCancel(t.Context())
			stop()
			if err := volume.Adopt(stopped, mem, src, v.Segment, nil); !errors.Is(err, context.Canceled) {
				t.Errorf("stopped: %v", err)
			}
		})
	}
}
