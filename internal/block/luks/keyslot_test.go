package luks_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// quick is a cost that no secret should have.
var quick = luks.Argon2id{Passes: 4, Memory: 64, Lanes: 2}

func TestPassphraseOpensInCryptsetup(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	f := newImage(t, 17<<20)
	h := newHeader(t, luks.Options{UUID: testUUID, DEK: dek, Safe: newSafe(t, dek, 1)})
	commit(t, h, f)
	secrets := []string{"first", "zweites Kennwort äöü", "\x00binary\n\xff"}
	for _, secret := range secrets {
		if err := h.AddPassphrase(f, dek, newKey(t, secret), quick); err != nil {
			t.Fatal(err)
		}
	}
	for _, secret := range secrets {
		mustCryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile(t, newKey(t, secret)), f.Name())
		got, err := h.UnlockPassphrase(f, newKey(t, secret))
		if err != nil {
			t.Fatal(err)
		}
		if !got.Equal(dek) {
			t.Errorf("%q unlocks another key", secret)
		}
		got.Close()
	}
	wrong := newKey(t, "First")
	if code, out := cryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile(t, wrong), f.Name()); code != 2 {
		t.Errorf("cryptsetup with a wrong passphrase: exit code %d\n%s", code, out)
	}
	if _, err := h.UnlockPassphrase(f, wrong); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("wrong passphrase: %v", err)
	}
	mustCryptsetup(t, "luksKillSlot", "--batch-mode", f.Name(), "1")
	again, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.UnlockPassphrase(f, newKey(t, secrets[1])); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("passphrase that cryptsetup removed: %v", err)
	}
	// The gap is used again.
	if err := again.AddPassphrase(f, dek, newKey(t, "fourth"), quick); err != nil {
		t.Fatal(err)
	}
	mustCryptsetup(t, "open", "--test-passphrase", "--key-slot", "1", "--key-file", keyFile(t, newKey(t, "fourth")), f.Name())
}

func TestUnlocksKeyslotsOfCryptsetup(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"argon2id":      {"--pbkdf", "argon2id", "--pbkdf-memory", "1024", "--pbkdf-parallel", "4", "--pbkdf-force-iterations", "4"},
		"argon2i":       {"--pbkdf", "argon2i", "--pbkdf-memory", "1024", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4"},
		"pbkdf2":        {"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"},
		"pbkdf2 sha512": {"--pbkdf", "pbkdf2", "--hash", "sha512", "--pbkdf-force-iterations", "1000"},
		"pbkdf2 sha1":   {"--pbkdf", "pbkdf2", "--hash", "sha1", "--pbkdf-force-iterations", "1000"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newImage(t, 17<<20)
			dek := keymemtest.Random(t, luks.KeySize)
			passphrase := newKey(t, "a passphrase that is longer than the block of sixty-four bytes of SHA-256")
			args = append(args, "--batch-mode", "--key-file", keyFile(t, passphrase), "--volume-key-file", keyFile(t, dek), "--key-size", "512")
			mustCryptsetup(t, append([]string{"luksFormat", "--type", "luks2", f.Name()}, args...)...)
			h, err := f.read()
			if err != nil {
				t.Fatal(err)
			}
			if err := h.VerifyKey(dek); err != nil {
				t.Error(err)
			}
			if _, err := h.Segment(); err != nil {
				t.Error(err)
			}
			got, err := h.UnlockPassphrase(f, passphrase)
			if err != nil {
				t.Fatal(err)
			}
			defer got.Close()
			if !got.Equal(dek) {
				t.Error("unlocks another key")
			}

			// A header that we rewrite stays whole for cryptsetup.
			if err := h.SetSafe(newSafe(t, dek, 1)); err != nil {
				t.Fatal(err)
			}
			commit(t, h, f)
			mustCryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile(t, passphrase), f.Name())
		})
	}
}

// TestCryptsetupAddsKeyslot checks the reverse order: cryptsetup adds a
// passphrase to a volume of ours by its volume key, and keeps our key safe.
func TestCryptsetupAddsKeyslot(t *testing.T) {
	t.Parallel()
	dek, passphrase := keymemtest.Random(t, luks.KeySize), newKey(t, "recovery")
	f := newImage(t, 17<<20)
	commit(t, newHeader(t, luks.Options{DEK: dek, Safe: newSafe(t, dek, 3)}), f)
	mustCryptsetup(t, "luksAddKey", "--batch-mode", "--key-size", "512", "--volume-key-file", keyFile(t, dek),
		"--pbkdf", "argon2id", "--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4", f.Name(), keyFile(t, passphrase))
	h, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	got, err := h.UnlockPassphrase(f, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(dek) {
		t.Error("unlocks another key")
	}
	if safes, err := h.Safes(); err != nil || len(safes) != 1 || safes[0].Generation != 3 {
		t.Errorf("Safes() = %v, %v", safes, err)
	}
}

func TestTokenInCryptsetup(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	f := newImage(t, 17<<20)
	commit(t, newHeader(t, luks.Options{DEK: dek, Safe: newSafe(t, dek, 3)}), f)
	token := filepath.Join(t.TempDir(), "token.json")
	mustCryptsetup(t, "token", "export", "--token-id", "0", "--json-file", token, f.Name())
	text, err := os.ReadFile(token)
	if err != nil || !bytes.Contains(text, []byte("native-1")) {
		t.Errorf("exported token: %s, %v", text, err)
	}
	mustCryptsetup(t, "token", "remove", "--token-id", "0", f.Name())
	h, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	if safes, err := h.Safes(); err != nil || len(safes) != 0 {
		t.Errorf("Safes() = %v, %v after the token was removed", safes, err)
	}
	mustCryptsetup(t, "token", "import", "--token-id", "5", "--json-file", token, f.Name())
	if h, err = f.read(); err != nil {
		t.Fatal(err)
	}
	if safes, err := h.Safes(); err != nil || len(safes) != 1 || safes[0].Generation != 3 {
		t.Errorf("Safes() = %v, %v after the token was restored", safes, err)
	}
}

func TestAddPassphraseRefuses(t *testing.T) {
	t.Parallel()
	dek, passphrase := keymemtest.Random(t, luks.KeySize), newKey(t, "secret")
	f := newImage(t, 2<<20)
	h := newHeader(t, luks.Options{DEK: dek, DataOffset: 1 << 20})
	commit(t, h, f)

	if _, err := h.UnlockPassphrase(f, passphrase); !errors.Is(err, luks.ErrNoPassphrase) {
		t.Errorf("unlock without a keyslot: %v", err)
	}
	if err := h.AddPassphrase(f, keymemtest.Random(t, luks.KeySize), passphrase, quick); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("with a wrong DEK: %v", err)
	}
	if err := h.AddPassphrase(f, dek, keymemtest.Random(t, luks.PassphraseMax+1), quick); err == nil {
		t.Error("a passphrase that cryptsetup cannot read is accepted")
	}
	for _, cost := range []luks.Argon2id{
		{Passes: 1, Memory: 1<<20 + 1, Lanes: 4},
		{Passes: 65, Memory: 1 << 20, Lanes: 4},
		{Passes: 1, Memory: 64, Lanes: 5},
		{Passes: 1, Memory: 31, Lanes: 4},
		{Passes: 0, Memory: 64, Lanes: 1},
		{Passes: 1, Memory: -1, Lanes: 1},
		{Passes: 1, Memory: 64, Lanes: 0},
	} {
		if err := h.AddPassphrase(f, dek, passphrase, cost); !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("cost %+v: %v", cost, err)
		}
	}
	for range 3 { // 3 x 258048 bytes fit between the headers and 1 MiB
		if err := h.AddPassphrase(f, dek, passphrase, quick); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.AddPassphrase(f, dek, passphrase, quick); !errors.Is(err, luks.ErrNoSpace) {
		t.Errorf("when no area is left: %v", err)
	}
}

// TestAddPassphraseFaults fails every operation; the volume stays whole, and
// every keyslot that its header names opens.
func TestAddPassphraseFaults(t *testing.T) {
	t.Parallel()
	dek, passphrase := keymemtest.Random(t, luks.KeySize), newKey(t, "secret")
	base := memory(t, make([]byte, 1<<20))
	commit(t, newHeader(t, luks.Options{UUID: testUUID, DataOffset: 1 << 20, DEK: dek, Safe: newSafe(t, dek, 1)}), base)
	for _, mode := range faultdev.Modes() {
		for op := 0; ; op++ {
			h, err := luks.Read(base, base.Size())
			if err != nil {
				t.Fatal(err)
			}
			dev := faultdev.New(base.Clone(), &faultdev.Fault{Op: op, Mode: mode})
			err = h.AddPassphrase(dev, dek, passphrase, quick)
			if dev.Injected() == faultdev.None {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			if !errors.Is(err, faultdev.ErrInjected) {
				t.Fatalf("operation %d %v: fault is not reported: %v", op, mode, err)
			}
			if _, err := h.UnlockPassphrase(dev.Contents(), passphrase); !errors.Is(err, luks.ErrNoPassphrase) {
				t.Fatalf("operation %d %v: the header in memory has the keyslot: %v", op, mode, err)
			}
			crashed := dev.Contents()
			generation(t, crashed)
			after, err := luks.Read(crashed, crashed.Size())
			if err != nil {
				t.Fatal(err)
			}
			if got, err := after.UnlockPassphrase(crashed, passphrase); err == nil {
				got.Close()
			} else if !errors.Is(err, luks.ErrNoPassphrase) {
				t.Fatalf("operation %d %v: header names a keyslot that does not open: %v", op, mode, err)
			}
		}
	}
}

// TestErrorsHoldNoSecret keeps secrets out of what an error says.
func TestErrorsHoldNoSecret(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	h := newHeader(t, luks.Options{DEK: dek})
	wrong, err := keymem.Take([]byte("hunter2-hunter2"))
	if err != nil {
		t.Fatal(err)
	}
	defer wrong.Close()
	if err := h.VerifyKey(wrong); err == nil || bytes.Contains([]byte(err.Error()), []byte("hunter2")) {
		t.Errorf("VerifyKey: %v", err)
	}
}
