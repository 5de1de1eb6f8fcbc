package keyring

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/crypto/keymem"
)

// disk keeps what was saved last, and fails on demand.
type disk struct {
	mu      sync.Mutex
	content []byte
	fail    error
}

func (d *disk) save(encoded *keymem.Key) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return d.fail
	}
	d.content = bytes.Clone(encoded.Bytes())
	return nil
}

func (d *disk) load(t *testing.T, used uint64) *Ring {
	t.Helper()
	r, err := Load(secret(t, d.content), used, d.save)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func secret(t *testing.T, b []byte) *keymem.Key {
	t.Helper()
	k, err := keymem.Take(bytes.Clone(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newRing(t *testing.T) (*Ring, *disk) {
	t.Helper()
	d := &disk{}
	r, err := New(d.save)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r, d
}

func begin(t *testing.T, r *Ring) uint64 {
	t.Helper()
	n, err := r.Begin()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSealAndShred(t *testing.T) {
	t.Parallel()
	r, d := newRing(t)
	one, two := begin(t, r), begin(t, r)
	key, aad := secret(t, bytes.Repeat([]byte{0xa5}, 32)), []byte("object 7")
	inOne, err := r.Seal(one, aad, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(inOne) != 32+Overhead || bytes.Contains(inOne, key.Bytes()[:16]) {
		t.Errorf("sealed to %d bytes", len(inOne))
	}
	again := d.load(t, 0)
	opened, err := again.Unseal(one, aad, inOne)
	if err != nil || !opened.Equal(key) {
		t.Fatalf("after a restart: %v", err)
	}
	opened.Close()

	altered := bytes.Clone(inOne)
	altered[len(altered)-1] ^= 1
	for name, f := range map[string]func() (*keymem.Key, error){
		"another epoch":   func() (*keymem.Key, error) { return r.Unseal(two, aad, inOne) },
		"another purpose": func() (*keymem.Key, error) { return r.Unseal(one, []byte("object 8"), inOne) },
		"altered":         func() (*keymem.Key, error) { return r.Unseal(one, aad, altered) },
		"cut":             func() (*keymem.Key, error) { return r.Unseal(one, aad, inOne[:Overhead-1]) },
		"key cut off":     func() (*keymem.Key, error) { return r.Unseal(one, aad, inOne[:Overhead]) },
	} {
		if k, err := f(); k != nil || !errors.Is(err, ErrDoesNotOpen) {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}

	if err := r.Shred(one); err != nil {
		t.Fatal(err)
	}
	for _, ring := range []*Ring{r, d.load(t, 0)} {
		if _, err := ring.Unseal(one, aad, inOne); !errors.Is(err, ErrNoEpoch) || ring.Has(one) {
			t.Errorf("a shredded epoch opens: %v", err)
		}
		if _, err := ring.Seal(one, aad, key); !errors.Is(err, ErrNoEpoch) {
			t.Errorf("a shredded epoch seals: %v", err)
		}
		if !ring.Has(two) {
			t.Error("another epoch went with it")
		}
	}
	if err := r.Shred(one); err != nil {
		t.Errorf("shredding it again: %v", err)
	}
	if err := r.Shred(two); err != nil {
		t.Fatal(err)
	}
	if n := begin(t, r); n <= two {
		t.Errorf("the number %d is used again", n)
	}
	if n := begin(t, d.load(t, 100)); n != 101 {
		t.Errorf("epoch %d although 100 is used", n)
	}
	if err := r.Shred(Metadata); err == nil {
		t.Error("the metadata epoch was shredded")
	}
}

func TestMetadataOnly(t *testing.T) {
	t.Parallel()
	r, _ := newRing(t)
	sealed, err := r.Seal(Metadata, []byte("record"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if k, err := r.Unseal(Metadata, []byte("record"), sealed); k != nil || err != nil {
		t.Errorf("%v, %v", k, err)
	}
	if _, err := r.Unseal(Metadata, []byte("other"), sealed); !errors.Is(err, ErrDoesNotOpen) {
		t.Errorf("another record: %v", err)
	}
}

// TestSaveFails loses neither an epoch in use nor the way to try again.
func TestSaveFails(t *testing.T) {
	t.Parallel()
	r, d := newRing(t)
	one := begin(t, r)
	key := secret(t, []byte("0123456789abcdef"))
	sealed, err := r.Seal(one, nil, key)
	if err != nil {
		t.Fatal(err)
	}
	d.fail = errors.New("disk full")
	if _, err := r.Begin(); !errors.Is(err, d.fail) {
		t.Errorf("Begin: %v", err)
	}
	if err := r.Shred(one); !errors.Is(err, d.fail) {
		t.Errorf("Shred: %v", err)
	}
	if k, err := r.Unseal(one, nil, sealed); err != nil {
		t.Errorf("after a shred that failed: %v", err)
	} else {
		k.Close()
	}
	d.fail = nil
	if n := begin(t, r); n != one+2 {
		t.Errorf("the number of an epoch that may be stored is used again: %d", n)
	}
	if err := r.Shred(one); err != nil || r.Has(one) {
		t.Errorf("Shred again: %v", err)
	}
}

// vector is the test vector of docs/spec/kms-keyring.md.
func vector(t testing.TB) []byte {
	text, err := os.ReadFile("../../../docs/spec/kms-keyring.md")
	if err != nil {
		t.Fatal(err)
	}
	_, digits, ok := strings.Cut(string(text), "20 21 .. 3f:\n")
	b, err := hex.DecodeString(strings.Join(strings.Fields(digits), ""))
	if !ok || err != nil {
		t.Fatal("the specification has no vector: ", err)
	}
	return b
}

func TestVector(t *testing.T) {
	t.Parallel()
	want := vector(t)
	keks := map[uint64]*keymem.Key{}
	for i, n := range []uint64{0, 5} {
		kek := make([]byte, 32)
		for j := range kek {
			kek[j] = byte(32*i + j)
		}
		keks[n] = secret(t, kek)
	}
	got, err := encode(keks)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !bytes.Equal(got.Bytes(), want) {
		t.Error("the encoding is not that of the specification")
	}
}

func FuzzDecode(f *testing.F) {
	good := vector(f)
	f.Add(good)
	f.Add(good[:56])
	for _, at := range []int{0, 11, 15, 23, 63} {
		bad := bytes.Clone(good)
		bad[at] ^= 0x81
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		keks, err := decode(b)
		if err != nil {
			return
		}
		defer closeAll(keks)
		again, err := encode(keks)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if !bytes.Equal(again.Bytes(), b) {
			t.Errorf("%d epochs are not in canonical form", binary.BigEndian.Uint32(b[12:]))
		}
	})
}
