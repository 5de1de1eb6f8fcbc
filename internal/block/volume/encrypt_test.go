package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

const smallShift = 64 << 10 // of disks below 1 MiB, in bytes

// plainDisk returns a disk of size bytes in which every 512 bytes are unlike any
// others, but for holes, and what it holds.
func plainDisk(t *testing.T, rng *rand.Rand, size int64, holes ...luks.Area) (*blockdev.Memory, []byte) {
	t.Helper()
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(rng.Uint32())
	}
	for _, h := range holes {
		clear(want[h.Offset : h.Offset+h.Size])
	}
	disk := blockdev.NewMemory(size, 512)
	for off := int64(0); off < size; off += 512 {
		if p := want[off : off+512]; !bytes.Equal(p, make([]byte, 512)) {
			_, err := disk.WriteAt(p, off)
			check(t, err)
		}
	}
	return disk, want
}

// encrypted checks that disk is a volume under dek that holds want, as every other
// program sees it too, and nothing of want in plain.
func encrypted(t *testing.T, disk *blockdev.Memory, dek *keymem.Key, shift int64, want []byte) {
	t.Helper()
	raw := contents(t, disk)
	if len(raw) != int(shift)+len(want) {
		t.Fatalf("the storage has %d bytes, want %d", len(raw), int(shift)+len(want))
	}
	v, err := volume.Open(disk.Clone(), dek, volume.Options{SizeMin: int64(len(want))})
	check(t, err)
	defer v.Close()
	if !bytes.Equal(contents(t, v), want) {
		t.Fatal("contents differ")
	}
	got, err := oracle(dek, raw[shift:], 512)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Fatal("the oracle reads something else")
	}
	plain := map[string]bool{}
	for off := 0; off < len(want); off += 512 {
		plain[string(want[off:off+32])] = true
	}
	delete(plain, string(make([]byte, 32)))
	for off := 0; off+32 <= len(raw); off += 512 {
		if plain[string(raw[off:off+32])] {
			t.Fatalf("there is plain data at %d", off)
		}
	}
	for _, b := range raw[2*16384 : shift] {
		if b != 0 {
			t.Fatal("the space behind the header is not empty")
		}
	}
	info, err := v.Inspect()
	check(t, err)
	if info.Encryption != nil || len(info.Damage) > 0 {
		t.Errorf("the header is %+v", info)
	}
}

// TestEncryptInPlace encrypts disks of sizes and with holes of all kinds, in one go
// and in as many calls as there are zones.
func TestEncryptInPlace(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	const mib, kib = 1 << 20, 1 << 10
	for _, c := range []struct {
		size  int64
		shift int64
		holes []luks.Area
	}{
		{64 * kib, 64 * kib, nil},
		{64*kib + 512, 64 * kib, nil},
		{128 * kib, 64 * kib, nil},
		{192*kib + 512, 64 * kib, nil},
		{192 * kib, 64 * kib, []luks.Area{{Offset: 0, Size: 192 * kib}}},
		{384 * kib, 64 * kib, []luks.Area{{Offset: 128 * kib, Size: 192 * kib}}},
		{384*kib + 512, 64 * kib, []luks.Area{{Offset: 4 * kib, Size: 128 * kib}, {Offset: 320 * kib, Size: 64*kib + 512}}},
		{320 * kib, 64 * kib, []luks.Area{{Offset: 0, Size: 64 * kib}, {Offset: 128 * kib, Size: 4 * kib}}},
		{2*mib + 512, mib, []luks.Area{{Offset: mib / 2, Size: mib}}},
		{17*mib + 512, 16 * mib, []luks.Area{{Offset: 10 * mib, Size: 5 * mib}}},
	} {
		for _, known := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/%d/%v", c.size, len(c.holes), known), func(t *testing.T) {
				dek := keymemtest.Random(t, 64)
				disk, want := plainDisk(t, rng, c.size, c.holes...)
				opts := volume.EncryptOptions{DEK: dek, Safe: newSafe(t, dek, "k", 1), UUID: testUUID, AllowDiscards: true}
				if known {
					opts.Size = c.size
				}
				again := disk.Clone()

				last := int64(0)
				opts.Progress = func(done, total int64) {
					if done <= last || total != c.size {
						t.Errorf("progress %d of %d after %d", done, total, last)
					}
					last = done
				}
				check(t, volume.EncryptInPlace(t.Context(), disk, opts))
				if last != c.size {
					t.Errorf("progress ended at %d", last)
				}
				encrypted(t, disk, dek, c.shift, want)
				info, err := volume.Inspect(disk)
				check(t, err)
				if info.Thin != (c.holes != nil) || !info.AllowDiscards || len(info.Safes) != 1 {
					t.Errorf("the header is %+v", info)
				}
				empty := emptySectors(t, disk, c.shift, 512)
				for sector, e := range empty {
					off := int64(sector) * 512
					if e == '-' && !bytes.Equal(want[off:off+512], make([]byte, 512)) {
						t.Fatalf("the sector at %d is empty", off)
					}
					for _, h := range c.holes { // but for a block at each end
						if first, end := h.Offset+8192, h.Offset+h.Size-8192; off >= first && off < end && e != '-' {
							t.Fatalf("the hole at %d was filled", off)
						}
					}
				}
				// Again it is done already.
				check(t, volume.EncryptInPlace(t.Context(), disk, opts))
				encrypted(t, disk, dek, c.shift, want)

				for {
					ctx, cancel := context.WithCancel(t.Context())
					opts.Progress = func(int64, int64) { cancel() } // after one zone
					err := volume.EncryptInPlace(ctx, again, opts)
					if cancel(); err == nil {
						break
					}
					wantError(t, err, context.Canceled)
					again = again.Clone()
					if _, err := volume.Open(again.Clone(), dek, volume.Options{}); !errors.Is(err, volume.ErrEncrypting) || !errors.Is(err, volume.ErrUnsupported) {
						t.Fatalf("opening reports %v", err)
					}
					info, err := volume.Inspect(again)
					check(t, err)
					if e := info.Encryption; e == nil || e.Done == 0 || e.Total != c.size || info.Size != c.size || info.UUID != testUUID {
						t.Fatalf("the header is %+v", info)
					}
					state, err := volume.InspectEncryption(again, opts.Size)
					check(t, err)
					if state.Done != info.Encryption.Done || state.Total != c.size || state.UUID != testUUID || state.Safe == nil || state.Finished {
						t.Fatalf("the encryption is %+v", state)
					}
					wantError(t, volume.CancelEncryption(again, opts.Size), volume.ErrEncrypting)
				}
				encrypted(t, again, dek, c.shift, want)
			})
		}
	}
}

// TestEncryptInPlaceRefuses: what is refused stays as it was.
func TestEncryptInPlaceRefuses(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk, want := plainDisk(t, rng, 128<<10)
	refused := func(name string, dev *blockdev.Memory, opts volume.EncryptOptions, target error) {
		t.Helper()
		before := contents(t, dev)
		if err := volume.EncryptInPlace(t.Context(), dev, opts); !errors.Is(err, target) {
			t.Errorf("%s: error %v, want %v", name, err, target)
		}
		if !bytes.Equal(contents(t, dev), before) {
			t.Errorf("%s: the disk was changed", name)
		}
	}
	tiny, _ := plainDisk(t, rng, 64<<10-512)
	refused("too small", tiny, volume.EncryptOptions{DEK: dek}, volume.ErrTooSmall)
	other := newSafe(t, dek, "k", 1)
	other.Owner = "disk:other"
	refused("another's safe", disk, volume.EncryptOptions{DEK: dek, Safe: other, UUID: testUUID}, volume.ErrWrongSafe)
	refused("another size", disk, volume.EncryptOptions{DEK: dek, Size: 64 << 10}, volume.ErrChanged)

	luksDisk := blockdev.NewMemory(0, 512)
	format(t, luksDisk, volume.FormatOptions{Size: 128 << 10, DEK: keymemtest.Random(t, 64)})
	refused("a volume", luksDisk, volume.EncryptOptions{DEK: dek}, volume.ErrEncrypted)

	// But a guest may have one on a disk whose size is known, at every step.
	guest, guestWant := luksDisk.Clone(), contents(t, luksDisk)
	opts := volume.EncryptOptions{DEK: dek, Size: guest.Size()}
	for op := 0; ; op++ {
		dev := faultdev.New(guest.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true})
		err := volume.EncryptInPlace(t.Context(), dev, opts)
		left := dev.PowerLoss(rng)
		if state, stateErr := volume.InspectEncryption(left, opts.Size); stateErr != nil || state != nil && state.Finished != (left.Size() == opts.Size+smallShift && left.Size() != opts.Size) {
			if stateErr != nil || state.Total != opts.Size {
				t.Errorf("operation %d leaves %+v, error %v", op, state, stateErr)
			}
		}
		check(t, volume.EncryptInPlace(t.Context(), left, opts))
		v, openErr := volume.Open(left, dek, volume.Options{})
		check(t, openErr)
		if !bytes.Equal(contents(t, v), guestWant) {
			t.Fatalf("operation %d: the guest's volume differs", op)
		}
		v.Close()
		if err == nil && dev.Injected() == faultdev.None {
			break
		}
	}

	// Begun, then used as a plain disk, then begun again.
	var used *blockdev.Memory
	for op := 0; used == nil; op++ {
		dev := faultdev.New(disk.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Undone, Dead: true})
		err := volume.EncryptInPlace(t.Context(), dev, volume.EncryptOptions{DEK: dek, UUID: testUUID})
		wantError(t, err, faultdev.ErrInjected)
		left := dev.Contents()
		if state, err := volume.InspectEncryption(left, 0); err == nil && state != nil {
			used = left
		}
	}
	for _, off := range []int64{0, 700, 20000, 40000, 64<<10 - 1} {
		left := used.Clone()
		_, err := left.WriteAt([]byte{want[off] ^ 1}, off)
		check(t, err)
		refused(fmt.Sprintf("used at %d", off), left, volume.EncryptOptions{DEK: dek}, volume.ErrUsed)
		wantError(t, volume.CancelEncryption(left, 0), volume.ErrUsed)
	}
	refused("another key", used, volume.EncryptOptions{DEK: keymemtest.Random(t, 64)}, volume.ErrWrongKey)
	check(t, volume.EncryptInPlace(t.Context(), used, volume.EncryptOptions{DEK: dek}))
	encrypted(t, used, dek, smallShift, want)
	refused("another key, when it is finished", used, volume.EncryptOptions{DEK: keymemtest.Random(t, 64)}, volume.ErrEncrypted)
}

// encryptDisk returns the disk of the tests of faults: three zones and a part of
// one, of which one is empty.
func encryptDisk(t *testing.T, rng *rand.Rand) (*blockdev.Memory, []byte) {
	t.Helper()
	return plainDisk(t, rng, 3*smallShift+8<<10, luks.Area{Offset: smallShift + 8<<10, Size: smallShift})
}

// TestFaultsEncryptInPlace fails every operation of an encryption. Whatever a kill
// or a power loss then leaves can be brought to the end, or back if nothing was
// encrypted, and all data are there.
func TestFaultsEncryptInPlace(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	safe := newSafe(t, dek, "k", 1)
	disk, want := encryptDisk(t, rng)
	plain := contents(t, disk)
	for _, size := range []int64{disk.Size(), 0} {
		opts := volume.EncryptOptions{DEK: dek, Safe: safe, UUID: testUUID, Size: size}
		t.Run(fmt.Sprintf("size=%d", size), func(t *testing.T) {
			atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
				err := volume.EncryptInPlace(t.Context(), dev, opts)
				if err == nil && dev.Injected() == faultdev.Read {
					return errHealed
				}
				for i, left := range survivors(dev, rng)[:3] {
					if err == nil {
						encrypted(t, left, dek, smallShift, want)
						continue
					}
					again := opts
					if state, err := volume.InspectEncryption(left, size); err == nil && state == nil && size == 0 {
						// Nobody can tell that the disk has grown.
						again.Size = disk.Size()
					}
					back := left.Clone()
					switch cancelErr := volume.CancelEncryption(back, again.Size); {
					case cancelErr == nil:
						if !bytes.Equal(contents(t, back), plain) {
							t.Fatalf("survivor %d of error %v: not as it was when undone", i, err)
						}
					case !errors.Is(cancelErr, volume.ErrEncrypting):
						t.Fatalf("survivor %d of error %v cannot be undone: %v", i, err, cancelErr)
					}
					if resumeErr := volume.EncryptInPlace(t.Context(), left, again); resumeErr != nil {
						t.Fatalf("survivor %d of error %v cannot go on: %v", i, err, resumeErr)
					}
					encrypted(t, left, dek, smallShift, want)
				}
				return err
			})
		})
	}
}

// TestFaultsCancelEncryption fails every operation of an undoing.
func TestFaultsCancelEncryption(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk, want := encryptDisk(t, rng)
	plain := contents(t, disk)
	opts := volume.EncryptOptions{DEK: dek, UUID: testUUID, Size: disk.Size()}
	// A disk with a header and half a zone, which has overwritten the record.
	var begun *blockdev.Memory
	for op := 0; begun == nil; op++ {
		dev := faultdev.New(disk.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Done, Dead: true})
		wantError(t, volume.EncryptInPlace(t.Context(), dev, opts), faultdev.ErrInjected)
		left := dev.Contents()
		info, err := volume.Inspect(left)
		if err == nil && info.Encryption != nil && info.Encryption.Done == 0 {
			record := make([]byte, 32768)
			_, err := left.ReadAt(record, disk.Size()+smallShift-32768)
			check(t, err)
			if _, err := luks.Read(bytes.NewReader(record), left.Size()); err != nil {
				begun = left
			}
		}
	}
	atEveryFault(t, begun, func(t *testing.T, dev *faultdev.Device) error {
		err := volume.CancelEncryption(dev, opts.Size)
		if err == nil && dev.Injected() == faultdev.Read {
			return errHealed
		}
		for i, left := range survivors(dev, rng)[:3] {
			if err == nil && !bytes.Equal(contents(t, left), plain) {
				t.Fatal("not as it was")
			}
			back := left.Clone()
			if again := volume.CancelEncryption(back, opts.Size); again != nil || !bytes.Equal(contents(t, back), plain) {
				t.Fatalf("survivor %d of error %v cannot be undone, or is not as it was: %v", i, err, again)
			}
			check(t, volume.EncryptInPlace(t.Context(), left, opts))
			encrypted(t, left, dek, smallShift, want)
		}
		return err
	})
}

// TestEncryptInPlaceFile encrypts a real file with a hole, and shows it to cryptsetup.
func TestEncryptInPlaceFile(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	_, want := plainDisk(t, rng, 20<<20)
	clear(want[5<<20 : 12<<20])
	path := filepath.Join(t.TempDir(), "disk")
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	check(t, err)
	defer f.Close()
	check(t, f.Resize(int64(len(want))))
	for _, part := range []luks.Area{{Offset: 0, Size: 5 << 20}, {Offset: 12 << 20, Size: 8 << 20}} {
		_, err := f.WriteAt(want[part.Offset:part.Offset+part.Size], part.Offset)
		check(t, err)
	}
	dek := keymemtest.Random(t, 64)
	check(t, volume.EncryptInPlace(t.Context(), f, volume.EncryptOptions{DEK: dek}))
	v := openVolume(t, f, dek)
	if !bytes.Equal(contents(t, v), want) {
		t.Error("contents differ")
	}
	x, err := v.NextExtent(6 << 20)
	check(t, err)
	if !x.Hole || x.Length < 5<<20 {
		t.Errorf("the hole has become %+v", x)
	}
	if out, err := cryptsetup(t, "open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file", keyFile(t, dek), path); err != nil {
		t.Errorf("cryptsetup refuses the key: %v\n%s", err, out)
	}
}

// unlocks checks that the passphrase gives the key during an encryption too.
func unlocks(t *testing.T, h *luks.Header, r io.ReaderAt, passphrase, dek *keymem.Key) {
	t.Helper()
	got, err := h.UnlockPassphrase(r, passphrase)
	check(t, err)
	defer got.Close()
	if !got.Equal(dek) {
		t.Error("the passphrase gives another key")
	}
}

// TestCryptsetupFinishesEncryption has cryptsetup finish encryptions that were cut
// short everywhere, and compares all of the data.
func TestCryptsetupFinishesEncryption(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	passphrase, passphraseFile := newPassphrase(t)
	dek := keymemtest.Random(t, 64)
	disk, want := plainDisk(t, rng, 3<<20+64<<10)
	size := disk.Size()
	opts := volume.EncryptOptions{DEK: dek, UUID: uuid.NewString(), Size: size} // which cryptsetup locks

	// Begin, and add a passphrase for cryptsetup.
	var begun *blockdev.Memory
	for op := 0; begun == nil; op++ {
		dev := faultdev.New(disk.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Undone, Dead: true})
		wantError(t, volume.EncryptInPlace(t.Context(), dev, opts), faultdev.ErrInjected)
		left := dev.Contents()
		if info, err := volume.Inspect(left); err == nil && info.Encryption != nil && len(info.Damage) == 0 {
			h, err := luks.Read(left, left.Size())
			check(t, err)
			check(t, h.AddPassphrase(left, dek, passphrase, quickKDF))
			unlocks(t, h, left, passphrase, dek)
			begun = left
		}
	}
	type state struct {
		done int64
		torn bool // something of the next zone was written
	}
	crashed := map[state]*blockdev.Memory{{0, false}: begun.Clone()}
	last := contents(t, begun)
	for op := 0; ; op++ {
		dev := faultdev.New(begun.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true})
		err := volume.EncryptInPlace(t.Context(), dev, opts)
		if err == nil {
			break
		}
		for _, d := range []*blockdev.Memory{dev.Contents(), dev.PowerLoss(rng)} {
			info, err := volume.Inspect(d)
			check(t, err)
			if info.Encryption == nil {
				continue
			}
			now := contents(t, d)
			s := state{info.Encryption.Done, len(now) != len(last) || !bytes.Equal(now[2*16384:], last[2*16384:])}
			if crashed[s] == nil {
				crashed[s] = d
			}
			last = now
		}
	}
	for _, done := range []int64{0, 1 << 20, 2 << 20, 2<<20 + 64<<10, size} {
		if crashed[state{done, true}] == nil && crashed[state{done, false}] == nil {
			t.Errorf("no crash left %d bytes encrypted", done)
		}
	}
	for s, d := range crashed {
		t.Run(fmt.Sprintf("%+v", s), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.luks")
			check(t, os.WriteFile(path, contents(t, d), 0o600))
			if out, err := cryptsetup(t, "luksDump", path); err != nil {
				t.Fatalf("luksDump: %v\n%s", err, out)
			}
			out, err := cryptsetup(t, "reencrypt", "--batch-mode", "--resume-only", "--force-offline-reencrypt", "--key-file", passphraseFile, path)
			if left := s.done < size; left != (err == nil) { // else there is nothing left that it could do
				t.Fatalf("reencrypt: %v\n%s", err, out)
			} else if left {
				check(t, os.Truncate(path, size+1<<20))
			}
			f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
			check(t, err)
			check(t, volume.EncryptInPlace(t.Context(), f, opts))
			v := openVolume(t, f, dek)
			if !bytes.Equal(contents(t, v), want) {
				t.Error("contents differ")
			}
		})
	}
}
