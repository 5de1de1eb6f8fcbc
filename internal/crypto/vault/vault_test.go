package vault

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
)

func TestUpdateReopen(t *testing.T) {
	t.Parallel()
	path, key := filepath.Join(t.TempDir(), "v"), keymemtest.Random(t, sealed.KeySize)
	v, err := New(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	a, b := keymemtest.Random(t, 32), keymemtest.Random(t, 100_000)
	if err := v.Update(map[string]*keymem.Key{"a": a, "b": b}); err != nil {
		t.Fatal(err)
	}
	if err := v.Update(map[string]*keymem.Key{"a": nil}); err != nil {
		t.Fatal(err)
	}
	again, err := Open(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for _, v := range []*Vault{v, again} {
		got, err := v.Get("b")
		if err != nil || !got.Equal(b) {
			t.Errorf("Get(b) = %v, %v; want what was put", got, err)
		}
		got.Close()
		if got, err := v.Get("a"); errs.KindOf(err) != errs.NotFound {
			t.Errorf("Get of a removed secret = %v, %v", got, err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil || bytes.Contains(text, b.Bytes()[:16]) {
		t.Errorf("the file shows a secret (error %v)", err)
	}
}

func TestWrongKeyOrContext(t *testing.T) {
	t.Parallel()
	path, key := filepath.Join(t.TempDir(), "v"), keymemtest.Random(t, sealed.KeySize)
	v, err := New(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := v.Update(map[string]*keymem.Key{"a": keymemtest.Random(t, 32)}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, keymemtest.Random(t, sealed.KeySize), "test"); !errors.Is(err, sealed.ErrWrongKey) {
		t.Errorf("wrong key: %v", err)
	}
	if _, err := Open(path, key, "other"); !errors.Is(err, sealed.ErrWrongKey) {
		t.Errorf("wrong context: %v", err)
	}
}

// TestFailedUpdate checks that an update that cannot be stored changes nothing.
func TestFailedUpdate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, key := filepath.Join(dir, "v"), keymemtest.Random(t, sealed.KeySize)
	v, err := New(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	a := keymemtest.Random(t, 32)
	if err := v.Update(map[string]*keymem.Key{"a": a}); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]map[string]*keymem.Key{
		"too large":     {"b": keymemtest.Random(t, SizeMax)},
		"name too long": {strings.Repeat("n", NameMax+1): keymemtest.Random(t, 1)},
		"empty name":    {"": keymemtest.Random(t, 1)},
	} {
		if err := v.Update(change); err == nil {
			t.Errorf("%s: no error", name)
		}
		got, err := v.Get("a")
		if err != nil || !got.Equal(a) {
			t.Errorf("%s: the update changed the vault: %v", name, err)
		}
		got.Close()
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := v.Update(map[string]*keymem.Key{"a": nil}); err == nil {
		t.Error("an update that could not be written succeeded")
	}
	if got, err := v.Get("a"); err != nil {
		t.Errorf("the failed update changed the vault: %v", err)
	} else {
		got.Close()
	}
}

// TestUpdateNotDurable: when only the last step of an update fails, the vault is
// what its file is, and the update can be repeated.
func TestUpdateNotDurable(t *testing.T) {
	t.Parallel()
	path, key := filepath.Join(t.TempDir(), "v"), keymemtest.Random(t, sealed.KeySize)
	v, err := New(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	failure := errors.New("the folder cannot be synced")
	a, b := keymemtest.Random(t, 32), keymemtest.Random(t, 32)
	for name, c := range map[string]struct {
		before bool // the write fails before it does anything
		want   *keymem.Key
	}{"before": {true, a}, "after": {false, b}} {
		v.write = sealed.WriteFile
		if err := v.Update(map[string]*keymem.Key{"k": a}); err != nil {
			t.Fatal(err)
		}
		v.write = func(path string, key *keymem.Key, context string, data *keymem.Key) error {
			if !c.before {
				if err := sealed.WriteFile(path, key, context, data); err != nil {
					return err
				}
			}
			return failure
		}
		if err := v.Update(map[string]*keymem.Key{"k": b}); !errors.Is(err, failure) {
			t.Errorf("%s: error %v", name, err)
		}
		again, err := Open(path, key, "test")
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []*Vault{v, again} {
			if got, err := v.Get("k"); err != nil || !got.Equal(c.want) {
				t.Errorf("%s: the vault holds another secret (error %v)", name, err)
			} else {
				got.Close()
			}
		}
		again.Close()
	}
}

// TestRekey seals a vault under another key: the old one opens it no more, and
// updates go on. A failure leaves it under the key that the file has.
func TestRekey(t *testing.T) {
	t.Parallel()
	path, old := filepath.Join(t.TempDir(), "v"), keymemtest.Random(t, sealed.KeySize)
	v, err := New(path, old, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	a := keymemtest.Random(t, 32)
	if err := v.Update(map[string]*keymem.Key{"a": a}); err != nil {
		t.Fatal(err)
	}
	opens := func(key *keymem.Key) error {
		again, err := Open(path, key, "test")
		if err == nil {
			defer again.Close()
			var got *keymem.Key
			if got, err = again.Get("a"); err == nil {
				got.Close()
			}
		}
		return err
	}
	failure, next := errors.New("the folder cannot be synced"), keymemtest.Random(t, sealed.KeySize)
	v.write = func(string, *keymem.Key, string, *keymem.Key) error { return failure }
	if err := v.Rekey(next); !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
	if err := opens(old); err != nil {
		t.Errorf("after a failure: %v", err)
	}
	v.write = func(path string, key *keymem.Key, context string, data *keymem.Key) error {
		return errors.Join(sealed.WriteFile(path, key, context, data), failure)
	}
	if err := v.Rekey(next); !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
	v.write = sealed.WriteFile
	if err := v.Update(map[string]*keymem.Key{"b": a}); err != nil { // under the key that the file has
		t.Fatal(err)
	}
	if err := opens(next); err != nil {
		t.Errorf("after what was not durable: %v", err)
	}
	for _, key := range []*keymem.Key{next, keymemtest.Random(t, sealed.KeySize)} {
		if err := v.Rekey(key); err != nil {
			t.Fatal(err)
		}
		if err := opens(key); err != nil {
			t.Errorf("the new key: %v", err)
		}
		if err := opens(old); !errors.Is(err, sealed.ErrWrongKey) {
			t.Errorf("the old key: %v", err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(magic + "\x00\x00\x00\x01\x00\x00"))
	f.Add([]byte(magic + "\x00\x00\x00\x01\x00\x02\x01a\x00\x00\x00\x01x\x01b\x00\x00\x00\x02yz"))
	f.Add([]byte(magic + "\x00\x00\x00\x01\x00\x01\x01a\xff\xff\xff\xffx"))
	f.Fuzz(func(t *testing.T, content []byte) {
		secrets, err := decode(content)
		if err != nil {
			if secrets != nil {
				t.Error("secrets beside an error")
			}
			return
		}
		defer closeAll(secrets)
		again, err := encode(secrets)
		if err != nil {
			t.Fatalf("cannot encode what was decoded: %v", err)
		}
		defer again.Close()
		if !bytes.Equal(again.Bytes(), content) {
			t.Error("decoding and encoding gave other bytes")
		}
	})
}

func TestSigningKey(t *testing.T) {
	t.Parallel()
	path, key := filepath.Join(t.TempDir(), "v"), keymemtest.Random(t, sealed.KeySize)
	v, err := New(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	first, err := v.SigningKey("audit")
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(path, key, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if same, err := again.SigningKey("audit"); err != nil || !same.Equal(first) {
		t.Errorf("after the vault was opened again the key is another, %v", err)
	}
	if other, err := again.SigningKey("other"); err != nil || other.Equal(first) {
		t.Errorf("two names have one key, %v", err)
	}
	if err := again.Update(map[string]*keymem.Key{"short": keymemtest.Random(t, 16)}); err != nil {
		t.Fatal(err)
	}
	if _, err := again.SigningKey("short"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("what is no signing key: error %v", err)
	}
}
