package volume_test

import (
	"bytes"
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
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// quickKDF is the least that keyslots may cost.
var quickKDF = luks.Argon2id{Passes: 4, Memory: 64, Lanes: 1}

// newPassphrase returns a passphrase and a file that holds it.
func newPassphrase(t *testing.T) (*keymem.Key, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "passphrase")
	check(t, os.WriteFile(path, []byte("correct horse"), 0o600))
	k, err := keymem.Take([]byte("correct horse"))
	check(t, err)
	t.Cleanup(func() { k.Close() })
	return k, path
}

// TestCryptsetupFinishesRekey has cryptsetup finish rekeys that were cut short at
// every kind of place, and compares all of the data under the key that remains.
func TestCryptsetupFinishesRekey(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	const size, zone = 768 << 10, 256 << 10
	// Of its own: cryptsetup locks the UUID of what it re-encrypts, on the whole
	// machine, and refuses to work beside another run of this test.
	id := uuid.NewString()
	passphrase, passphraseFile := newPassphrase(t)
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	want := pattern(size, 5)
	disk := blockdev.NewMemory(0, 512)
	check(t, volume.Format(disk, volume.FormatOptions{Size: size, DEK: oldDEK, Safe: newSafeOf(t, id, oldDEK, "old", 1), UUID: id}))
	h, err := luks.Read(disk, disk.Size())
	check(t, err)
	check(t, h.AddPassphrase(disk, oldDEK, passphrase, quickKDF))
	v, err := volume.Open(disk, oldDEK, volume.Options{})
	check(t, err)
	_, err = v.WriteAt(want, 0)
	check(t, err)
	disk = disk.Clone()
	check(t, v.Close())

	// Run the rekey up to each operation, and take one disk of each state.
	type state struct {
		done          int64
		inZone, wrote bool
	}
	crashed := map[state]*blockdev.Memory{}
	base := contents(t, disk)[16<<20:]
	for op := 0; ; op++ {
		dev := faultdev.New(disk.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true})
		v, err := openFaulty(dev, oldDEK)
		if err != nil {
			continue
		}
		err = v.Rekey(t.Context(), volume.RekeyOptions{
			NewDEK: newDEK, NewSafe: newSafeOf(t, id, newDEK, "new", 1), NewPassphrase: passphrase, PassphraseCost: quickKDF, Zone: zone,
		})
		if err == nil {
			break
		}
		for _, d := range []*blockdev.Memory{dev.Contents(), dev.PowerLoss(rng)} {
			info, err := volume.Inspect(d)
			check(t, err)
			if info.Rekey == nil {
				continue
			}
			start := info.Rekey.Done
			wrote := start < size && !bytes.Equal(contents(t, d)[16<<20+start:][:zone], base[start:start+zone])
			crashed[state{start, info.Rekey.InZone, wrote}] = d
		}
	}
	for _, s := range []state{
		{0, false, false},    // INIT, or its journal written
		{0, true, false},     // HOT, nothing written
		{0, true, true},      // HOT, written in part
		{zone, false, false}, // CLEAN, or the next journal written
		{zone, true, false},
		{zone, true, true},
		{2 * zone, false, false},
		{2 * zone, true, false},
		{2 * zone, true, true}, // the last zone
	} {
		if crashed[s] == nil {
			t.Errorf("no crash left the state %+v", s)
		}
	}
	// One after another, for the same reason.
	for s, d := range crashed {
		t.Run(fmt.Sprintf("%+v", s), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.luks")
			check(t, os.WriteFile(path, contents(t, d), 0o600))
			if out, err := cryptsetup(t, "luksDump", path); err != nil {
				t.Fatalf("luksDump: %v\n%s", err, out)
			}
			if s.inZone {
				if out, err := cryptsetup(t, "repair", "--batch-mode", "--key-file", passphraseFile, path); err != nil {
					t.Fatalf("repair: %v\n%s", err, out)
				}
			}
			resume := !s.inZone || s.done < size-zone // else there is nothing left to do
			if out, err := cryptsetup(t, "reencrypt", "--batch-mode", "--resume-only", "--force-offline-reencrypt", "--key-file", passphraseFile, path); resume != (err == nil) {
				t.Fatalf("reencrypt: %v\n%s", err, out)
			}
			f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
			check(t, err)
			defer f.Close()
			_, err = volume.Open(f, oldDEK, volume.Options{})
			wantError(t, err, volume.ErrWrongKey)
			v := openVolume(t, f, newDEK)
			if !bytes.Equal(contents(t, v), want) {
				t.Error("contents differ")
			}
		})
	}
}

// TestCryptsetupAcceptsRekeyed has cryptsetup look at a volume that we have
// rekeyed: the new key and its passphrase open it, the old ones do not.
func TestCryptsetupAcceptsRekeyed(t *testing.T) {
	t.Parallel()
	passphrase, passphraseFile := newPassphrase(t)
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	path := filepath.Join(t.TempDir(), "disk.luks")
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	check(t, err)
	check(t, volume.Format(f, volume.FormatOptions{Size: 1 << 20, DEK: oldDEK, Safe: newSafe(t, oldDEK, "old", 1), UUID: testUUID}))
	v := openVolume(t, f, oldDEK)
	want := pattern(1<<20, 9)
	_, err = v.WriteAt(want, 0)
	check(t, err)
	open := func(args ...string) (string, error) {
		return cryptsetup(t, append([]string{"open", "--type", "luks2", "--test-passphrase"}, append(args, path)...)...)
	}
	check(t, v.Rekey(t.Context(), volume.RekeyOptions{
		NewDEK: newDEK, NewSafe: newSafe(t, newDEK, "new", 1), NewPassphrase: passphrase, PassphraseCost: quickKDF, Zone: 128 << 10,
	}))
	if out, err := open("--key-size", "512", "--volume-key-file", keyFile(t, newDEK)); err != nil {
		t.Errorf("cryptsetup refuses the new key: %v\n%s", err, out)
	}
	if out, err := open("--key-size", "512", "--volume-key-file", keyFile(t, oldDEK)); err == nil {
		t.Errorf("cryptsetup accepts the old key\n%s", out)
	}
	if out, err := open("--key-file", passphraseFile); err != nil {
		t.Errorf("cryptsetup refuses the passphrase: %v\n%s", err, out)
	}
	check(t, v.Close())
	if out, err := cryptsetup(t, "repair", "--verbose", path); err != nil {
		t.Errorf("cryptsetup repair: %v\n%s", err, out)
	}
	raw, err := os.ReadFile(path)
	check(t, err)
	got, err := oracle(newDEK, raw[16<<20:], 512)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the oracle reads something else")
	}
}
