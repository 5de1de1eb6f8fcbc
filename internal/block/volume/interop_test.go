package volume_test

import (
	"bytes"
	"crypto/aes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/xts"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

//go:embed testdata/vectors.json
var vectorsJSON []byte

// TestVectors writes the plaintext of docs/spec/volume.md by odd requests and
// compares the data area.
func TestVectors(t *testing.T) {
	t.Parallel()
	var vectors []struct {
		DEK        string `json:"dek"`
		SectorSize int    `json:"sector_size"`
		First      string `json:"first_16"`
		Last       string `json:"last_16"`
		SHA256     string `json:"sha256"`
	}
	check(t, json.Unmarshal(vectorsJSON, &vectors))
	if len(vectors) != 2 {
		t.Fatalf("%d vectors", len(vectors))
	}
	const size, emptyStart, emptyEnd = 64 << 10, 3 * 4096, 5 * 4096
	plain := make([]byte, size)
	for o := range plain {
		plain[o] = byte(o*131 + (o>>9)*17)
	}
	clear(plain[emptyStart:emptyEnd])
	for _, vector := range vectors {
		raw, err := hex.DecodeString(vector.DEK)
		check(t, err)
		dek, err := keymem.Take(raw)
		check(t, err)
		defer dek.Close()
		mem := blockdev.NewMemory(0, 512)
		format(t, mem, volume.FormatOptions{Size: size, SectorSize: vector.SectorSize, DEK: dek})
		v := openVolume(t, mem, dek)
		for off := 0; off < size; {
			end := min(off+1777, size)
			if off < emptyStart {
				end = min(end, emptyStart)
			}
			if off == emptyStart {
				off, end = emptyEnd, emptyEnd+1
			}
			_, err := v.WriteAt(plain[off:end], int64(off))
			check(t, err)
			off = end
		}
		if !bytes.Equal(contents(t, v), plain) {
			t.Errorf("sector size %d: contents differ", vector.SectorSize)
		}
		data := contents(t, mem)[testOffset:]
		sum := sha256.Sum256(data)
		for what, got := range map[string][2]string{
			"first 16 bytes": {hex.EncodeToString(data[:16]), vector.First},
			"last 16 bytes":  {hex.EncodeToString(data[size-16:]), vector.Last},
			"SHA-256":        {hex.EncodeToString(sum[:]), vector.SHA256},
		} {
			if got[0] != got[1] {
				t.Errorf("sector size %d: %s of the data area: %s, want %s", vector.SectorSize, what, got[0], got[1])
			}
		}
	}
}

// cryptsetup runs the real one and returns its output.
func cryptsetup(t *testing.T, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath("cryptsetup")
	if err != nil {
		path = "/usr/sbin/cryptsetup" // not in an ordinary user's PATH
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	return string(out), err
}

// keyFile writes a test's DEK to a file, as the escape hatch does.
func keyFile(t *testing.T, dek *keymem.Key) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dek")
	check(t, os.WriteFile(path, dek.Bytes(), 0o600))
	return path
}

// TestCryptsetupAcceptsOurs has cryptsetup check a volume of ours, also while we
// have it open, and a wrong key.
func TestCryptsetupAcceptsOurs(t *testing.T) {
	t.Parallel()
	for _, sector := range []int{512, 4096} {
		dek := keymemtest.Random(t, 64)
		path := filepath.Join(t.TempDir(), "disk-0.luks")
		f, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
		check(t, err)
		check(t, volume.Format(f, volume.FormatOptions{
			Size: 1 << 20, SectorSize: sector, DEK: dek, UUID: testUUID, Label: "web-1", Safe: newSafe(t, dek, "k", 1), AllowDiscards: true,
		}))
		v := openVolume(t, f, dek)
		check(t, v.ReplaceSafe(newSafe(t, dek, "k2", 2)))

		dump, err := cryptsetup(t, "luksDump", path)
		check(t, err)
		for _, want := range []string{testUUID, "web-1", "strongroom", "aes-xts-plain64", fmt.Sprintf("sector: %d [bytes]", sector), "offset: 16777216 [bytes]", "allow-discards"} {
			if !strings.Contains(dump, want) {
				t.Errorf("luksDump does not show %q:\n%s", want, dump)
			}
		}
		test := func(key *keymem.Key) (string, error) {
			return cryptsetup(t, "open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file", keyFile(t, key), path)
		}
		if out, err := test(dek); err != nil {
			t.Errorf("cryptsetup refuses the DEK: %v\n%s", err, out)
		}
		if out, err := test(keymemtest.Random(t, 64)); err == nil {
			t.Errorf("cryptsetup accepts a wrong DEK\n%s", out)
		}
		check(t, v.Close())
		if out, err := cryptsetup(t, "repair", "--verbose", path); err != nil || !strings.Contains(out, "No known problems") {
			t.Errorf("cryptsetup repair: %v\n%s", err, out)
		}
	}
}

// TestOpensCryptsetups opens volumes that cryptsetup made and x/crypto/xts
// encrypted, writes to them, and has the oracle read.
func TestOpensCryptsetups(t *testing.T) {
	t.Parallel()
	for _, sector := range []int{512, 4096} {
		dek := keymemtest.Random(t, 64)
		path := filepath.Join(t.TempDir(), "foreign.luks")
		check(t, os.WriteFile(path, nil, 0o600))
		check(t, os.Truncate(path, 17<<20))
		passphrase := filepath.Join(t.TempDir(), "passphrase")
		check(t, os.WriteFile(passphrase, []byte("correct horse"), 0o600))
		out, err := cryptsetup(t, "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
			"--sector-size", fmt.Sprint(sector), "--key-size", "512", "--volume-key-file", keyFile(t, dek), path, passphrase)
		if err != nil {
			t.Fatalf("luksFormat: %v\n%s", err, out)
		}
		plain := pattern(1<<20, 11)
		cipher, err := xts.NewCipher(aes.NewCipher, dek.Bytes())
		check(t, err)
		data := make([]byte, len(plain))
		for off := 0; off < len(plain); off += sector {
			cipher.Encrypt(data[off:off+sector], plain[off:off+sector], uint64(off/512))
		}
		f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
		check(t, err)
		_, err = f.WriteAt(data, 16<<20)
		check(t, err)
		_, err = volume.Open(f, keymemtest.Random(t, 64), volume.Options{})
		wantError(t, err, volume.ErrWrongKey)

		info, err := volume.Inspect(f)
		check(t, err)
		if len(info.Safes) != 0 || info.SectorSize != sector || info.Size != 1<<20 {
			t.Errorf("info %+v", info)
		}
		v := openVolume(t, f, dek)
		if !bytes.Equal(contents(t, v), plain) {
			t.Error("contents differ")
		}
		_, err = v.WriteAt(plain[:100_000], 5001)
		check(t, err)
		copy(plain[5001:], bytes.Clone(plain[:100_000]))
		check(t, v.Flush())
		check(t, v.Close())
		raw, err := os.ReadFile(path)
		check(t, err)
		got, err := oracle(dek, raw[16<<20:], sector)
		check(t, err)
		if !bytes.Equal(got, plain) {
			t.Error("the oracle reads something else")
		}
	}
}

// TestRefusesWhatItCannotServe opens LUKS volumes of other kinds.
func TestRefusesWhatItCannotServe(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"--type", "luks1"},
		{"--type", "luks2", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"},
		{"--type", "luks2", "--cipher", "aes-xts-plain64", "--key-size", "256"},
	} {
		path := filepath.Join(t.TempDir(), "foreign.luks")
		check(t, os.WriteFile(path, nil, 0o600))
		check(t, os.Truncate(path, 17<<20))
		passphrase := filepath.Join(t.TempDir(), "passphrase")
		check(t, os.WriteFile(passphrase, []byte("correct horse"), 0o600))
		args = append([]string{"luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}, args...)
		if out, err := cryptsetup(t, append(args, path, passphrase)...); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		before, err := os.ReadFile(path)
		check(t, err)
		f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
		check(t, err)
		if v, err := volume.Open(f, keymemtest.Random(t, 64), volume.Options{}); err == nil {
			t.Errorf("%v was opened", args)
			v.Close()
		}
		if _, err := volume.Inspect(f); err == nil {
			t.Errorf("%v was inspected without an error", args)
		}
		if err := volume.ReplaceSafe(f, newSafe(t, keymemtest.Random(t, 64), "k", 1)); err == nil {
			t.Errorf("%v was given a key safe", args)
		}
		check(t, f.Close())
		after, err := os.ReadFile(path)
		check(t, err)
		if !bytes.Equal(after, before) {
			t.Errorf("%v: something was written", args)
		}
	}
}
