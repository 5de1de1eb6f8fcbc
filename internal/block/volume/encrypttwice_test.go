package volume_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestEncryptInPlaceTwice: an encryption in place fails or is killed at each operation,
// another process goes on with what it finds in the kernel's memory, and at each of its
// operations the power goes. A third one brings it to the end, and nothing is lost.
func TestEncryptInPlaceTwice(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	const size = 64 << 10
	dek := keymemtest.Random(t, 64)
	opts := volume.EncryptOptions{Size: size, DEK: dek, UUID: testUUID}
	disk, want := plainDisk(t, rng, size)
	for _, dead := range []bool{false, true} {
		for first, reached := 0, true; reached; first += blockdevtest.FaultStep {
			for second, more := 0, true; more && second < 14; second++ {
				dev := left{faultdev.New(disk.Clone(), &faultdev.Fault{Op: first, Dead: dead})}
				_ = volume.EncryptInPlace(t.Context(), dev, opts)
				reached = dev.Injected() != faultdev.None
				dev.Inject(&faultdev.Fault{Op: second, Dead: true})
				_ = volume.EncryptInPlace(t.Context(), dev, opts)
				more = dev.Injected() != faultdev.None
				for range 4 {
					mem := dev.PowerLoss(rng)
					if err := volume.EncryptInPlace(t.Context(), mem, opts); err != nil {
						t.Fatalf("dead=%v, fault %d, power loss %d: %v", dead, first, second, err)
					}
					v := openVolume(t, mem, dek)
					if !bytes.Equal(contents(t, v), want) {
						t.Fatalf("dead=%v, fault %d, power loss %d: contents differ", dead, first, second)
					}
					check(t, v.Close())
				}
			}
		}
	}
}

var _ blockdev.Resizer = left{}
