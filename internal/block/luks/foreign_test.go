package luks_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestForeign unlocks what cryptsetup and QEMU make, by each of two
// passphrases.
func TestForeign(t *testing.T) {
	t.Parallel()
	fast := []string{"--pbkdf-force-iterations", "1000"}
	argon2 := []string{"--pbkdf-memory", "1024", "--pbkdf-parallel", "2", "--pbkdf-force-iterations", "4"}
	for name, c := range map[string]struct {
		version int
		sector  int
		args    []string
	}{
		"LUKS1":              {1, 512, append([]string{"--type", "luks1", "--hash", "sha256"}, fast...)},
		"LUKS1 sha1":         {1, 512, append([]string{"--type", "luks1", "--hash", "sha1"}, fast...)},
		"LUKS1 sha512":       {1, 512, append([]string{"--type", "luks1", "--hash", "sha512"}, fast...)},
		"LUKS2 PBKDF2":       {2, 512, append([]string{"--type", "luks2", "--sector-size", "512", "--pbkdf", "pbkdf2"}, fast...)},
		"LUKS2 Argon2id":     {2, 512, append([]string{"--type", "luks2", "--sector-size", "512", "--pbkdf", "argon2id"}, argon2...)},
		"LUKS2 4096-byte":    {2, 4096, append([]string{"--type", "luks2", "--pbkdf", "argon2i", "--sector-size", "4096"}, argon2...)},
		"LUKS2 small header": {2, 4096, append([]string{"--type", "luks2", "--pbkdf", "pbkdf2", "--offset", "4096"}, fast...)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 20 << 20
			f, dek := newImage(t, size), keymemtest.Random(t, luks.KeySize)
			secrets := []string{"first", strings.Repeat("a key file\n\x00", 1000)}
			mustCryptsetup(t, append([]string{"luksFormat", "--batch-mode", f.Name(), "--key-file", keyFile(t, newKey(t, secrets[0])), "--volume-key-file", keyFile(t, dek), "--key-size", "512"}, c.args...)...)
			add := []string{"luksAddKey", "--batch-mode", "--key-file", keyFile(t, newKey(t, secrets[0])), f.Name(), keyFile(t, newKey(t, secrets[1]))}
			if strings.Contains(strings.Join(c.args, " "), "argon2") {
				mustCryptsetup(t, append(add, argon2...)...)
			} else {
				mustCryptsetup(t, append(add, append(fast, "--pbkdf", "pbkdf2")...)...)
			}

			v, err := luks.ReadForeign(f, size)
			if err != nil {
				t.Fatal(err)
			}
			if v.Version != c.version || v.Segment.SectorSize != c.sector || v.Segment.Offset == 0 || len(v.UUID) != 36 {
				t.Errorf("%+v", v)
			}
			for _, secret := range secrets {
				got, err := v.Unlock(t.Context(), f, newKey(t, secret))
				if err != nil {
					t.Fatal(err)
				}
				if !got.Equal(dek) {
					t.Error("another key")
				}
				got.Close()
			}
			if _, err := v.Unlock(t.Context(), f, newKey(t, "First")); !errors.Is(err, luks.ErrWrongKey) {
				t.Errorf("wrong passphrase: %v", err)
			}
			stopped, stop := context.WithCancel(t.Context())
			stop()
			if _, err := v.Unlock(stopped, f, newKey(t, "First")); !errors.Is(err, context.Canceled) {
				t.Errorf("stopped: %v", err)
			}
			mustCryptsetup(t, "luksKillSlot", "--batch-mode", f.Name(), "0")
			if v, err = luks.ReadForeign(f, size); err != nil {
				t.Fatal(err)
			}
			if _, err := v.Unlock(t.Context(), f, newKey(t, secrets[0])); !errors.Is(err, luks.ErrWrongKey) {
				t.Errorf("removed passphrase: %v", err)
			}
		})
	}
}

func TestForeignOfQEMU(t *testing.T) {
	t.Parallel()
	name := t.TempDir() + "/qemu.luks"
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "luks", "--object", "secret,id=s,data=secret",
		"-o", "key-secret=s,hash-alg=sha512,iter-time=10", name, "1M").CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img: %v\n%s", err, out)
	}
	f, size := openImage(t, name)
	v, err := luks.ReadForeign(f, size)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := v.Segment.Length(size); v.Version != 1 || n != 1<<20 || err != nil {
		t.Errorf("%+v with %d bytes, %v", v, n, err)
	}
	dek, err := v.Unlock(t.Context(), f, newKey(t, "secret"))
	if err != nil {
		t.Fatal(err)
	}
	dek.Close()
}

// TestForeignRefused: volumes of which no volume of ours can be made.
func TestForeignRefused(t *testing.T) {
	t.Parallel()
	fast := []string{"--pbkdf-force-iterations", "1000", "--pbkdf", "pbkdf2"}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"LUKS1 XTS-AES-128":     {[]string{"--type", "luks1", "--key-size", "256"}, "32 bytes, not 64"},
		"LUKS1 CBC":             {[]string{"--type", "luks1", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"}, `"aes-cbc-essiv:sha256"`},
		"LUKS1 hash":            {[]string{"--type", "luks1", "--hash", "ripemd160"}, `"ripemd160"`},
		"LUKS2 XTS-AES-128":     {[]string{"--type", "luks2", "--key-size", "256"}, "32 bytes, not 64"},
		"LUKS2 CBC":             {[]string{"--type", "luks2", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"}, `"aes-cbc-essiv:sha256"`},
		"LUKS2 2048-byte":       {[]string{"--type", "luks2", "--key-size", "512", "--sector-size", "2048"}, "2048 bytes"},
		"LUKS2 detached header": {[]string{"--type", "luks2", "--key-size", "512", "--offset", "0"}, "on another device"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newImage(t, 20<<20)
			args := []string{"luksFormat", "--batch-mode", f.Name(), "--key-file", keyFile(t, newKey(t, "x"))}
			if strings.Contains(name, "detached") {
				args = append(args, "--header", f.Name())
			}
			mustCryptsetup(t, append(append(args, fast...), c.args...)...)
			if _, err := luks.ReadForeign(f, 20<<20); !errors.Is(err, luks.ErrUnsupported) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %s", err, c.want)
			}
		})
	}
	if _, err := luks.ReadForeign(padded(nil, 1<<20), 1<<20); !errors.Is(err, luks.ErrNotLUKS) {
		t.Errorf("nothing: %v", err)
	}
}

// TestLUKS1Header changes single fields of a header.
func TestLUKS1Header(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	good := golden(t, "luks1")
	read := func(b []byte, size int64) error {
		_, err := luks.ReadForeign(padded(b, int(size)), size)
		return err
	}
	if err := read(good, size); err != nil {
		t.Fatal(err)
	}
	v, err := luks.ReadForeign(padded(good, size), size)
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.Unlock(t.Context(), padded(good, size), newKey(t, "correct horse battery staple"))
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(goldenKey(t, "luks1")) {
		t.Error("another key")
	}
	for name, c := range map[string]struct {
		off  int
		to   uint32
		want error
	}{
		"cipher not text":       {8 + 28, 0x61616161, luks.ErrCorrupt},
		"payload 0":             {104, 0, luks.ErrUnsupported},
		"payload in the slot":   {104, 8, luks.ErrCorrupt},
		"payload at the end":    {104, size / 512, luks.ErrTruncated},
		"payload beyond":        {104, 1<<32 - 1, luks.ErrTruncated},
		"key of 0 bytes":        {108, 0, luks.ErrUnsupported},
		"huge key":              {108, 1<<32 - 1, luks.ErrUnsupported},
		"digest not iterated":   {164, 0, luks.ErrCorrupt},
		"slot not known":        {208, 1, luks.ErrCorrupt},
		"slot not iterated":     {208 + 4, 0, luks.ErrCorrupt},
		"slot in the header":    {208 + 40, 1, luks.ErrCorrupt},
		"slot behind the data":  {208 + 40, 1<<32 - 1, luks.ErrCorrupt},
		"slot with one stripe":  {208 + 44, 1, luks.ErrCorrupt},
		"slot with too many":    {208 + 44, 1<<32 - 1, luks.ErrCorrupt},
		"last slot not known":   {208 + 7*48, 0, luks.ErrCorrupt},
		"UUID without an end":   {168 + 36, 0x61616161, luks.ErrCorrupt},
		"LUKS of version 3 (!)": {4, 0xbabe0003, luks.ErrVersion},
	} {
		b := bytes.Clone(good)
		binary.BigEndian.PutUint32(b[c.off:], c.to)
		if err := read(b, size); !errors.Is(err, c.want) {
			t.Errorf("%s: %v; want %v", name, err, c.want)
		}
	}
	if err := read(good[:500], 500); !errors.Is(err, luks.ErrTruncated) {
		t.Errorf("cut short: %v", err)
	}
	// What may be asked of the processor is bounded.
	for name, off := range map[string]int{"keyslot": 208 + 4, "digest": 164} {
		b := bytes.Clone(good)
		binary.BigEndian.PutUint32(b[off:], 1<<32-1)
		v, err := luks.ReadForeign(padded(b, size), size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Unlock(t.Context(), padded(b, size), newKey(t, "x")); !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("%s with 2^32-1 iterations: %v", name, err)
		}
	}
}

// FuzzLUKS1 unlocks a LUKS1 volume with any header.
func FuzzLUKS1(f *testing.F) {
	const size = 3 << 20
	good := golden(f, "luks1")
	storage := make([]byte, size)
	copy(storage, good)
	f.Add(good[:592], uint32(size))
	f.Add(good[:100], uint32(592))
	guess := newKey(f, "guess")
	f.Fuzz(func(t *testing.T, header []byte, length uint32) {
		n := min(length, size)
		clear(storage[:592])
		copy(storage[:592], header)
		copy(storage, "LUKS\xba\xbe\x00\x01")
		for i := range 9 { // what costs little
			at := 208 + 48*i + 4
			if i == 8 {
				at = 164
			}
			if v := binary.BigEndian.Uint32(storage[at:]); v > 100 && v <= 50_000_000 {
				binary.BigEndian.PutUint32(storage[at:], v%100)
			}
		}
		r := bytes.NewReader(storage[:n])
		v, err := luks.ReadForeign(r, int64(n))
		if err != nil {
			if v != nil {
				t.Error("a volume beside an error")
			}
			return
		}
		if length, err := v.Segment.Length(int64(n)); err != nil || length <= 0 || v.Segment.Offset+length > int64(n) {
			t.Errorf("data %+v of %d bytes: %d, %v", v.Segment, n, length, err)
		}
		if dek, err := v.Unlock(t.Context(), r, guess); err == nil || dek != nil {
			t.Errorf("a guess unlocks: %v", err)
		}
	})
}
