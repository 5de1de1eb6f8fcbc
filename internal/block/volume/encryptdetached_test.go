package volume_test

import (
	"bytes"
	"context"
	"fmt"
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
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// detachedZone is the length of zones in most tests, in bytes.
const detachedZone = 32 << 10

// TestEncryptDetached encrypts devices of sizes, blocks and with holes of all kinds,
// in one go and in as many calls as there are zones.
func TestEncryptDetached(t *testing.T) {
	t.Parallel()
	seed := blockdevtest.Seed(t)
	const kib = 1 << 10
	for i, c := range []struct {
		size  int64
		block int
		zone  int64
		holes []luks.Area
	}{
		{512, 512, 0, nil},
		{4 * kib, 4 * kib, 0, nil},
		{64*kib + 512, 512, detachedZone, nil},
		{200 * kib, 4 * kib, 64 * kib, nil},
		{100 * kib, 512, 4 * kib, []luks.Area{{Offset: 0, Size: 100 * kib}}},
		{192 * kib, 512, detachedZone, []luks.Area{{Offset: 8 * kib, Size: 24 * kib}, {Offset: 68 * kib, Size: 80 * kib}}},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			dek := keymemtest.Random(t, 64)
			plain, want := plainDisk(t, rand.New(rand.NewPCG(uint64(c.size), 0)), c.size, c.holes...)
			data := blockdev.NewMemory(c.size, c.block)
			for off := int64(0); off < c.size; off += int64(c.block) {
				if p := want[off : off+int64(c.block)]; !bytes.Equal(p, make([]byte, c.block)) {
					_, err := data.WriteAt(p, off)
					check(t, err)
				}
			}
			check(t, plain.Close())
			s := storage{blockdev.NewMemory(smallHeader, 512), data}
			opts := volume.EncryptOptions{DEK: dek, Safe: newSafe(t, dek, "k", 1), UUID: testUUID, AllowDiscards: true, Zone: c.zone}
			again := s.clone()

			last := int64(0)
			opts.Progress = func(done, total int64) {
				if done <= last || total != c.size {
					t.Errorf("progress %d of %d after %d", done, total, last)
				}
				last = done
			}
			wantError(t, volume.EncryptDetached(t.Context(), s.dev(), opts), volume.ErrNotVolume)
			check(t, volume.BeginEncryption(s.dev(), opts))
			if !bytes.Equal(contents(t, s.data), want) {
				t.Fatal("the begin has written to the data")
			}
			wantError(t, volume.BeginEncryption(s.dev(), opts), volume.ErrNotEmpty)
			check(t, volume.EncryptDetached(t.Context(), s.dev(), opts))
			if last != c.size {
				t.Errorf("progress ended at %d", last)
			}
			underDetached(t, s, dek, want)
			info, err := volume.Inspect(s.dev())
			check(t, err)
			if info.Thin != (c.holes != nil) || !info.AllowDiscards || len(info.Safes) != 1 || info.Size != c.size || info.UUID != testUUID {
				t.Errorf("the header is %+v", info)
			}
			if raw := contents(t, s.data); c.holes == nil {
				if got, err := oracle(dek, raw, 512); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the oracle reads something else, error %v", err)
				}
			}
			// Again it is done already.
			check(t, volume.EncryptDetached(t.Context(), s.dev(), opts))
			underDetached(t, s, dek, want)
			wantError(t, volume.CancelDetached(s.dev(), dek), volume.ErrEncrypting)
			wantError(t, volume.EncryptDetached(t.Context(), s.dev(), volume.EncryptOptions{DEK: keymemtest.Random(t, 64)}), volume.ErrWrongKey)

			check(t, volume.BeginEncryption(again.dev(), opts))
			for {
				ctx, cancel := context.WithCancel(t.Context())
				opts.Progress = func(int64, int64) { cancel() } // after one zone
				err := volume.EncryptDetached(ctx, again.dev(), opts)
				if cancel(); err == nil {
					break
				}
				wantError(t, err, context.Canceled)
				again = again.clone()
				_, err = volume.Open(again.dev(), dek, volume.Options{})
				wantError(t, err, volume.ErrEncrypting)
				info, err := volume.Inspect(again.dev())
				check(t, err)
				if e := info.Encryption; e == nil || e.Done == 0 || e.Total != c.size || e.InZone || info.Size != c.size || info.UUID != testUUID || info.Rekey != nil {
					t.Fatalf("the header is %+v", info)
				}
				wantError(t, volume.CancelDetached(again.dev(), dek), volume.ErrEncrypting)
				wantError(t, volume.EncryptDetached(t.Context(), again.dev(), volume.EncryptOptions{DEK: keymemtest.Random(t, 64)}), volume.ErrWrongKey)
				// A device of the same size, and not the one.
				other := storage{again.header.Clone(), again.data.Clone()}
				sector, at := make([]byte, 512), rng.Int64N(min(c.size, 64*kib)/512)*512
				_, err = other.data.ReadAt(sector, at)
				check(t, err)
				sector[rng.IntN(512)] ^= 1
				_, err = other.data.WriteAt(sector, at)
				check(t, err)
				before := contents(t, other.data)
				wantError(t, volume.EncryptDetached(t.Context(), other.dev(), opts), volume.ErrOtherDevice)
				if !bytes.Equal(contents(t, other.data), before) {
					t.Fatal("another device was changed")
				}
			}
			underDetached(t, again, dek, want)
		})
	}
}

// TestEncryptDetachedRefuses: what is refused stays as it was.
func TestEncryptDetachedRefuses(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk, _ := plainDisk(t, rng, 128<<10)
	refused := func(name string, header, data *blockdev.Memory, opts volume.EncryptOptions, target error) {
		t.Helper()
		s := storage{header.Clone(), data.Clone()}
		if err := volume.BeginEncryption(s.dev(), opts); err == nil || target != nil {
			wantError(t, err, target)
		}
		if !bytes.Equal(contents(t, s.header), contents(t, header.Clone())) || !bytes.Equal(contents(t, s.data), contents(t, data.Clone())) {
			t.Errorf("%s: something was changed", name)
		}
	}
	empty := blockdev.NewMemory(smallHeader, 512)
	other := newSafe(t, dek, "k", 1)
	other.Owner = "disk:other"
	refused("another's safe", empty, disk, volume.EncryptOptions{DEK: dek, Safe: other, UUID: testUUID}, volume.ErrWrongSafe)
	refused("another size", empty, disk, volume.EncryptOptions{DEK: dek, Size: 64 << 10}, volume.ErrChanged)
	refused("no size", empty, blockdev.NewMemory(0, 512), volume.EncryptOptions{DEK: dek}, blockdev.ErrBadSize)
	refused("short key", empty, disk, volume.EncryptOptions{DEK: keymemtest.Random(t, 32)}, nil)
	refused("no room for a header", blockdev.NewMemory(8192, 512), disk, volume.EncryptOptions{DEK: dek}, nil)
	refused("no room for a journal", blockdev.NewMemory(32<<10, 512), disk, volume.EncryptOptions{DEK: dek}, luks.ErrNoSpace)
	used := empty.Clone()
	_, err := used.WriteAt([]byte("something"), 20<<10)
	check(t, err)
	refused("a header in use", used, disk, volume.EncryptOptions{DEK: dek}, volume.ErrNotEmpty)
	whole := blockdev.NewMemory(0, 512)
	format(t, whole, volume.FormatOptions{Size: 128 << 10, DEK: keymemtest.Random(t, 64)})
	refused("a volume", empty, whole, volume.EncryptOptions{DEK: dek}, volume.ErrEncrypted)

	// A volume is not encrypted, nor undone.
	s, want := detachedVolume(t, dek, 64<<10)
	v := openVolume(t, s.clone().dev(), dek)
	next := keymemtest.Random(t, 64)
	check(t, rekeyZones(v, 1, volume.RekeyOptions{NewDEK: next, Zone: detachedZone}, func() {}))
	underDetached(t, s, dek, want)
}

// beginFaulty begins an encryption on a pair, and goes on with it.
func beginFaulty(t *testing.T, p *pair, opts volume.EncryptOptions) error {
	if err := volume.BeginEncryption(p.dev(), opts); err != nil {
		return err
	}
	return volume.EncryptDetached(t.Context(), p.dev(), opts)
}

// TestFaultsEncryptDetached fails every operation of an encryption. Whatever a kill
// or a power loss then leaves can be brought to the end, or back if nothing was
// encrypted, and all data are there.
func TestFaultsEncryptDetached(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk, want := plainDisk(t, rng, 2*detachedZone+8<<10)
	clear(want[40<<10 : 56<<10]) // zeros that are data
	_, err := disk.WriteAt(want[40<<10:56<<10], 40<<10)
	check(t, err)
	plain := contents(t, disk)
	opts := volume.EncryptOptions{DEK: dek, Safe: newSafe(t, dek, "k", 1), UUID: testUUID, Zone: detachedZone}
	atEveryFaultOfPair(t, storage{blockdev.NewMemory(smallHeader, 512), disk}, func(t *testing.T, p *pair) error {
		err := beginFaulty(t, p, opts)
		if err == nil && p.Injected() == faultdev.Read {
			return errHealed
		}
		for i, left := range p.survivors(rng)[rng.IntN(2):] {
			if err == nil {
				underDetached(t, left, dek, want)
				continue
			}
			info, inspectErr := volume.Inspect(left.clone().dev())
			if inspectErr != nil {
				// The header was not begun, or is torn: nothing was done yet.
				if !bytes.Equal(contents(t, left.data), plain) {
					t.Fatalf("survivor %d of error %v: no header, and the disk is not as it was: %v", i, err, inspectErr)
				}
				continue
			}
			back := left.clone()
			cancelErr := volume.CancelDetached(back.dev(), dek)
			if undone := cancelErr == nil; undone != (info.Encryption != nil && info.Encryption.Done == 0) {
				t.Fatalf("survivor %d of error %v is %+v, and undoing it reports %v", i, err, info, cancelErr)
			}
			if cancelErr == nil && !bytes.Equal(contents(t, back.data), plain) {
				t.Fatalf("survivor %d of error %v: not as it was when undone", i, err)
			}
			if resumeErr := volume.EncryptDetached(t.Context(), left.dev(), opts); resumeErr != nil {
				t.Fatalf("survivor %d of error %v cannot go on: %v", i, err, resumeErr)
			}
			underDetached(t, left, dek, want)
		}
		if p.header.Heal(); err != nil { // the same process tries again
			p.data.Heal()
			p.fault.Op = -1
			if _, inspectErr := volume.Inspect(p.dev()); inspectErr == nil {
				check(t, volume.EncryptDetached(t.Context(), p.dev(), opts))
				underDetached(t, p.lose(rng), dek, want)
			}
		}
		return err
	})
}

// TestFaultsCancelDetached fails every operation of an undoing, of an encryption
// that was interrupted in its first zone.
func TestFaultsCancelDetached(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	dek := keymemtest.Random(t, 64)
	disk, want := plainDisk(t, rng, 2*detachedZone+8<<10)
	opts := volume.EncryptOptions{DEK: dek, UUID: testUUID, Zone: detachedZone}
	var begun *storage
	for op := 0; begun == nil; op++ {
		p := &pair{
			header: faultdev.New(blockdev.NewMemory(smallHeader, 512), nil), data: faultdev.New(disk.Clone(), nil),
			fault: faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true},
		}
		wantError(t, beginFaulty(t, p, opts), faultdev.ErrInjected)
		left := p.contents()
		if info, err := volume.Inspect(left.clone().dev()); err == nil && info.Encryption.InZone && !bytes.Equal(contents(t, left.data), want) {
			begun = &left
		}
	}
	wantError(t, volume.CancelDetached(begun.clone().dev(), keymemtest.Random(t, 64)), volume.ErrWrongKey)
	atEveryFaultOfPair(t, *begun, func(t *testing.T, p *pair) error {
		err := volume.CancelDetached(p.dev(), dek)
		if err == nil && p.Injected() == faultdev.Read {
			return errHealed
		}
		for i, left := range p.survivors(rng) {
			if err == nil && (!bytes.Equal(contents(t, left.data), want) || bytes.Contains(contents(t, left.header), want[:64])) {
				t.Fatal("not as it was, or the journal holds plain data")
			}
			back := left.clone()
			if again := volume.CancelDetached(back.dev(), dek); again != nil || !bytes.Equal(contents(t, back.data), want) {
				t.Fatalf("survivor %d of error %v cannot be undone, or is not as it was: %v", i, err, again)
			}
			check(t, volume.EncryptDetached(t.Context(), left.dev(), opts))
			underDetached(t, left, dek, want)
		}
		return err
	})
}

// files writes header and data to files.
func (s storage) files(t *testing.T) (header, data string) {
	t.Helper()
	header, data = filepath.Join(t.TempDir(), "header"), filepath.Join(t.TempDir(), "disk")
	check(t, os.WriteFile(header, contents(t, s.header), 0o600))
	check(t, os.WriteFile(data, contents(t, s.data), 0o600))
	return header, data
}

// openFiles opens header and data.
func openFiles(t *testing.T, header, data string) *volume.Detached {
	t.Helper()
	h, err := blockdev.OpenFile(header, blockdev.FileOptions{})
	check(t, err)
	d, err := blockdev.OpenFile(data, blockdev.FileOptions{})
	check(t, err)
	dev := volume.NewDetached(h, d)
	t.Cleanup(func() { dev.Close() })
	return dev
}

// TestCryptsetupFinishesDetached has cryptsetup finish encryptions that were cut
// short everywhere, and compares all of the data.
func TestCryptsetupFinishesDetached(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	const zone = 256 << 10
	passphrase, passphraseFile := newPassphrase(t)
	dek := keymemtest.Random(t, 64)
	disk, want := plainDisk(t, rng, 3*zone)
	opts := volume.EncryptOptions{DEK: dek, UUID: uuid.NewString(), Zone: zone} // which cryptsetup locks
	begun := storage{blockdev.NewMemory(16<<20, 512), disk}
	check(t, volume.BeginEncryption(begun.dev(), opts))
	h, err := luks.Read(begun.header, begun.header.Size())
	check(t, err)
	check(t, h.AddPassphrase(begun.header, dek, passphrase, quickKDF))
	unlocks(t, h, begun.header, passphrase, dek)

	type state struct {
		done          int64
		inZone, wrote bool // something of the zone was written
	}
	crashed := map[state]storage{}
	for op := 0; ; op++ {
		p := &pair{
			header: faultdev.New(begun.header.Clone(), nil), data: faultdev.New(begun.data.Clone(), nil),
			fault: faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true},
		}
		if volume.EncryptDetached(t.Context(), p.dev(), opts) == nil {
			break
		}
		for _, s := range []storage{p.contents(), p.lose(rng)} {
			info, err := volume.Inspect(s.clone().dev())
			check(t, err)
			if e := info.Encryption; e != nil {
				wrote := e.Done < e.Total && !bytes.Equal(contents(t, s.data)[e.Done:][:zone], want[e.Done:][:zone])
				crashed[state{e.Done, e.InZone, wrote}] = s
			}
		}
	}
	for done := int64(0); done < 3*zone; done += zone {
		for _, s := range []state{{done, false, false}, {done, true, false}, {done, true, true}} {
			if _, ok := crashed[s]; !ok {
				t.Errorf("no crash left the state %+v", s)
			}
		}
	}
	for s, left := range crashed {
		t.Run(fmt.Sprintf("%+v", s), func(t *testing.T) {
			header, data := left.files(t)
			if out, err := cryptsetup(t, "luksDump", header); err != nil {
				t.Fatalf("luksDump: %v\n%s", err, out)
			}
			if s.inZone {
				if out, err := cryptsetup(t, "repair", "--batch-mode", "--key-file", passphraseFile, "--header", header, data); err != nil {
					t.Fatalf("repair: %v\n%s", err, out)
				}
			}
			resume := !s.inZone || s.done < 2*zone // else there is nothing left to do
			out, err := cryptsetup(t, "reencrypt", "--batch-mode", "--resume-only", "--force-offline-reencrypt", "--key-file", passphraseFile, "--header", header, data)
			if resume != (err == nil) {
				t.Fatalf("reencrypt: %v\n%s", err, out)
			}
			if out, err := cryptsetup(t, "open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file", keyFile(t, dek), "--header", header, data); err != nil {
				t.Errorf("cryptsetup refuses the key: %v\n%s", err, out)
			}
			dev := openFiles(t, header, data)
			check(t, volume.EncryptDetached(t.Context(), dev, opts))
			if v := openVolume(t, dev, dek); !bytes.Equal(contents(t, v), want) {
				t.Error("contents differ")
			}
		})
	}
}

// TestFinishCryptsetupsEncryption goes on with what cryptsetup has begun.
func TestFinishCryptsetupsEncryption(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	_, passphraseFile := newPassphrase(t)
	disk, want := plainDisk(t, rng, 1<<20)
	header, data := storage{blockdev.NewMemory(16<<20, 512), disk}.files(t)
	key := filepath.Join(t.TempDir(), "key")
	for _, args := range [][]string{
		{
			"reencrypt", "--batch-mode", "--encrypt", "--init-only", "--type", "luks2", "--resilience", "journal", "--key-size", "512", "--sector-size", "512",
			"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", passphraseFile, "--header", header, data,
		},
		{"luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", key, "--key-file", passphraseFile, header},
	} {
		if out, err := cryptsetup(t, args...); err != nil {
			t.Fatalf("cryptsetup %v: %v\n%s", args, err, out)
		}
	}
	dek, err := keyfile.Read(key, luks.KeySize)
	check(t, err)
	defer dek.Close()
	dev := openFiles(t, header, data)
	check(t, volume.EncryptDetached(t.Context(), dev, volume.EncryptOptions{DEK: dek}))
	v := openVolume(t, dev, dek)
	if !bytes.Equal(contents(t, v), want) {
		t.Error("contents differ")
	}
	raw, err := os.ReadFile(data)
	check(t, err)
	if got, err := oracle(dek, raw, 512); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the oracle reads something else, error %v", err)
	}
	if out, err := cryptsetup(t, "open", "--test-passphrase", "--key-file", passphraseFile, "--header", header, data); err != nil {
		t.Errorf("cryptsetup refuses the passphrase: %v\n%s", err, out)
	}
}
