package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// holes returns how many bytes of dev are holes.
func holes(t *testing.T, dev blockdev.Extenter) (n int64) {
	t.Helper()
	for off := int64(0); off < dev.Size(); {
		e, err := dev.NextExtent(off)
		check(t, err)
		if e.Hole {
			n += e.Length
		}
		off += e.Length
	}
	return n
}

// TestCopy encrypts, rekeys and decrypts a sparse disk, with and without its
// holes.
func TestCopy(t *testing.T) {
	t.Parallel()
	for _, keep := range []bool{false, true} {
		for _, verify := range []bool{false, true} {
			t.Run(fmt.Sprintf("keep=%v verify=%v", keep, verify), func(t *testing.T) {
				t.Parallel()
				const size = 5<<20 + 512
				plain := blockdev.NewMemory(size, 512)
				_, err := plain.WriteAt(pattern(700_000, 5), 1<<20-5000)
				check(t, err)
				_, err = plain.WriteAt(pattern(512, 6), size-512)
				check(t, err)
				check(t, plain.WriteZeroes(4<<20, 64<<10, false)) // data that happen to be zeros
				want, sparse := contents(t, plain), holes(t, plain)

				opts := func() volume.CopyOptions {
					var last int64
					total := int64(size)
					if verify {
						total *= 2
					}
					t.Cleanup(func() {
						if last != total {
							t.Errorf("progress ended at %d of %d", last, total)
						}
					})
					return volume.CopyOptions{KeepHoles: keep, Verify: verify, Progress: func(done, all int64) {
						if done <= last || all != total {
							t.Errorf("progress %d of %d after %d, want a total of %d", done, all, last, total)
						}
						last = done
					}}
				}
				oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
				encrypted, rekeyed, decrypted := blockdev.NewMemory(0, 512), blockdev.NewMemory(0, 512), blockdev.NewMemory(size, 512)
				format(t, encrypted, volume.FormatOptions{Size: size, DEK: oldDEK})
				format(t, rekeyed, volume.FormatOptions{Size: size, DEK: newDEK})
				first, second := openVolume(t, encrypted, oldDEK), openVolume(t, rekeyed, newDEK)
				check(t, volume.Copy(t.Context(), first, plain, opts()))
				check(t, volume.Copy(t.Context(), second, first, opts()))
				check(t, volume.Copy(t.Context(), decrypted, second, opts()))
				for i, dev := range []blockdev.Extenter{first, second, decrypted} {
					if !bytes.Equal(contents(t, dev), want) {
						t.Errorf("copy %d differs", i)
					}
					left := holes(t, dev)
					if keep && left != sparse || !keep && left != 0 {
						t.Errorf("copy %d has %d bytes of holes, the source %d", i, left, sparse)
					}
				}
				if bytes.Equal(contents(t, encrypted)[testOffset:], contents(t, rekeyed)[testOffset:]) {
					t.Error("a deep rekey left the ciphertext as it was")
				}
			})
		}
	}
}

func TestCopyRefuses(t *testing.T) {
	t.Parallel()
	src := blockdev.NewMemory(1<<20, 512)
	wantError(t, volume.Copy(t.Context(), blockdev.NewMemory(1<<20-512, 512), src, volume.CopyOptions{}), blockdev.ErrOutOfRange)
	larger := blockdev.NewMemory(2<<20, 512)
	_, err := larger.WriteAt([]byte{9}, 1<<20)
	check(t, err)
	check(t, volume.Copy(t.Context(), larger, src, volume.CopyOptions{}))
	if contents(t, larger)[1<<20] != 9 {
		t.Error("the copy touched what is beyond the size of its source")
	}
}

// TestCopyCancelled stops a copy half way.
func TestCopyCancelled(t *testing.T) {
	t.Parallel()
	src, dst := blockdev.NewMemory(16<<20, 512), blockdev.NewMemory(16<<20, 512)
	stop := errors.New("the operator stopped it")
	ctx, cancel := context.WithCancelCause(t.Context())
	err := volume.Copy(ctx, dst, src, volume.CopyOptions{Progress: func(done, _ int64) {
		if done >= 4<<20 {
			cancel(stop)
		}
	}})
	wantError(t, err, stop)
}

// liar reads other bytes than were written.
type liar struct{ *blockdev.Memory }

func (l liar) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.Memory.ReadAt(p, off)
	if off <= 1<<20 && 1<<20 < off+int64(n) {
		p[1<<20-off] ^= 1
	}
	return n, err
}

func TestCopyVerifies(t *testing.T) {
	t.Parallel()
	src, dst := blockdev.NewMemory(2<<20, 512), liar{blockdev.NewMemory(2<<20, 512)}
	check(t, volume.Copy(t.Context(), dst, src, volume.CopyOptions{}))
	wantError(t, volume.Copy(t.Context(), dst, src, volume.CopyOptions{Verify: true}), volume.ErrVerify)
}
