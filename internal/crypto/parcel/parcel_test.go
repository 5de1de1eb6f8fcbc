package parcel

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/leaktest"
)

var testContext = Context{Sender: "controller", Recipient: "host-1", Provider: "kp-1", KeyID: "k"}.String()

func newTestRecipient(t testing.TB) *Recipient {
	t.Helper()
	r, err := NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestSealOpen(t *testing.T) {
	t.Parallel()
	r := newTestRecipient(t)
	if n := len(r.PublicKey()); n != PublicKeySize {
		t.Errorf("public key has %d bytes, want %d", n, PublicKeySize)
	}
	for _, size := range []int{1, 32, 64, KeyMax} {
		key := keymemtest.Random(t, size)
		parcel, err := Seal(r.PublicKey(), testContext, key)
		if err != nil {
			t.Fatal(err)
		}
		if len(parcel) != size+Overhead {
			t.Errorf("parcel of %d bytes has %d bytes, want %d more", size, len(parcel), Overhead)
		}
		if bytes.Contains(parcel, key.Bytes()) && size > 1 {
			t.Error("the parcel shows the key")
		}
		got, err := r.Open(parcel, testContext)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Equal(key) {
			t.Errorf("key of %d bytes differs", size)
		}
		got.Close()
	}
}

func TestSealIsRandomised(t *testing.T) {
	t.Parallel()
	r, key := newTestRecipient(t), keymemtest.Random(t, 32)
	a, errA := Seal(r.PublicKey(), testContext, key)
	b, errB := Seal(r.PublicKey(), testContext, key)
	if errA != nil || errB != nil || bytes.Equal(a[headerSize:headerSize+encapSize], b[headerSize:headerSize+encapSize]) {
		t.Errorf("two parcels share their encapsulated key (%v, %v)", errA, errB)
	}
}

func TestRestore(t *testing.T) {
	t.Parallel()
	r, key := newTestRecipient(t), keymemtest.Random(t, 32)
	parcel, err := Seal(r.PublicKey(), testContext, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := r.Secret()
	if err != nil {
		t.Fatal(err)
	}
	restored, err := RestoreRecipient(secret)
	if err != nil {
		t.Fatal(err)
	}
	defer restored.Close()
	secret.Close() // RestoreRecipient has its own copy
	if !bytes.Equal(restored.PublicKey(), r.PublicKey()) {
		t.Error("public key differs after restore")
	}
	got, err := restored.Open(parcel, testContext)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(key) {
		t.Error("key differs")
	}
	if r, err := RestoreRecipient(keymemtest.Random(t, 31)); r != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("secret of 31 bytes: %v, %v; want ErrInvalid", r, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	r, key := newTestRecipient(t), keymemtest.Random(t, 32)
	parcel, err := Seal(r.PublicKey(), testContext, key)
	if err != nil {
		t.Fatal(err)
	}
	if k, err := newTestRecipient(t).Open(parcel, testContext); k != nil || !errors.Is(err, ErrDoesNotOpen) {
		t.Errorf("another recipient: %v, %v; want ErrDoesNotOpen", k, err)
	}
	for _, other := range []Context{
		{"host", "host-1", "kp-1", "k"},
		{"controller", "host-2", "kp-1", "k"},
		{"controller", "host-1", "kp-2", "k"},
		{"controller", "host-1", "kp-1", "k2"},
		{"controller", "host-1", `kp-1" key_id="k`, ""},
	} {
		if k, err := r.Open(parcel, other.String()); k != nil || !errors.Is(err, ErrDoesNotOpen) {
			t.Errorf("context %s: %v, %v; want ErrDoesNotOpen", other, k, err)
		}
	}
	for i := 0; i < len(parcel); i += 17 {
		altered := bytes.Clone(parcel)
		altered[i] ^= 0x80
		k, err := r.Open(altered, testContext)
		want := ErrDoesNotOpen
		switch {
		case i < len(magic):
			want = ErrInvalid
		case i < headerSize:
			want = ErrVersion
			// X25519 ignores the topmost bit of a point, but the KEM binds it.
		}
		if k != nil || !errors.Is(err, want) {
			t.Fatalf("byte %d altered: %v, %v; want %v", i, k, err, want)
		}
	}
	for n := range len(parcel) {
		if k, err := r.Open(parcel[:n], testContext); k != nil || err == nil {
			t.Fatalf("cut to %d bytes: %v, %v", n, k, err)
		}
	}
	if k, err := r.Open(append(parcel, 0), testContext); k != nil || !errors.Is(err, ErrDoesNotOpen) {
		t.Errorf("a byte more: %v, %v; want ErrDoesNotOpen", k, err)
	}
	if k, err := r.Open(make([]byte, Overhead+KeyMax+1), testContext); k != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("no magic: %v, %v; want ErrInvalid", k, err)
	}
	tooLong := append(bytes.Clone(parcel), make([]byte, KeyMax)...)
	if k, err := r.Open(tooLong, testContext); k != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("too long: %v, %v; want ErrInvalid", k, err)
	}
}

func TestSealLimits(t *testing.T) {
	t.Parallel()
	r, key := newTestRecipient(t), keymemtest.Random(t, 32)
	lowOrder := bytes.Clone(r.PublicKey())
	clear(lowOrder[1184:]) // an X25519 point that makes every shared secret zero
	tests := []struct {
		name    string
		public  []byte
		context string
		key     *keymem.Key
	}{
		{"no public key", nil, testContext, key},
		{"short public key", r.PublicKey()[1:], testContext, key},
		{"long public key", append(r.PublicKey(), 0), testContext, key},
		{"public key not reduced", bytes.Repeat([]byte{0xff}, PublicKeySize), testContext, key},
		{"no context", r.PublicKey(), "", key},
		{"long context", r.PublicKey(), strings.Repeat("c", ContextMax+1), key},
		{"long key", r.PublicKey(), testContext, keymemtest.Random(t, KeyMax+1)},
	}
	for _, tt := range tests {
		if p, err := Seal(tt.public, tt.context, tt.key); p != nil || !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %d bytes, %v; want ErrInvalid", tt.name, len(p), err)
		}
	}
	if p, err := Seal(lowOrder, testContext, key); p != nil || err == nil {
		t.Errorf("low-order public key: %d bytes, %v; want an error", len(p), err)
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	r := newTestRecipient(t)
	parcel, err := Seal(r.PublicKey(), testContext, keymemtest.Random(t, 32))
	if err != nil {
		t.Fatal(err)
	}
	// Open and Close at once: each Open succeeds or reports ErrClosed.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			k, err := r.Open(parcel, testContext)
			if err != nil && !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
			k.Close()
		})
	}
	r.Close()
	r.Close()
	wg.Wait()
	if k, err := r.Open(parcel, testContext); k != nil || !errors.Is(err, ErrClosed) {
		t.Errorf("Open after Close: %v, %v; want ErrClosed", k, err)
	}
	if k, err := r.Secret(); k != nil || !errors.Is(err, ErrClosed) {
		t.Errorf("Secret after Close: %v, %v; want ErrClosed", k, err)
	}
}

func TestNoKeyIsPrinted(t *testing.T) {
	t.Parallel()
	r, key := newTestRecipient(t), keymemtest.Random(t, 32)
	secret, err := r.Secret()
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	parcel, err := Seal(r.PublicKey(), testContext, key)
	if err != nil {
		t.Fatal(err)
	}
	_, opens := r.Open(parcel, "another context")
	_, invalid := r.Open(key.Bytes(), testContext)
	if opens == nil || invalid == nil {
		t.Fatal("an error is missing")
	}
	leaktest.Refute(t, leaktest.Print(r, parcel, opens, invalid), key, secret)
}

// vector is one case of testdata/vectors.json, which gen.py makes with another
// implementation of HPKE.
type vector struct {
	Name, Secret, Public, Context, Parcel, Key, Expect string
}

func loadVectors(t testing.TB) []vector {
	t.Helper()
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

func TestVectors(t *testing.T) {
	t.Parallel()
	want := map[string]error{"invalid": ErrInvalid, "version": ErrVersion, "does not open": ErrDoesNotOpen}
	counts := map[string]int{}
	for _, v := range loadVectors(t) {
		counts[v.Expect]++
		r, err := RestoreRecipient(keymemtest.Hex(t, v.Secret))
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(r.PublicKey()); got != v.Public {
			t.Errorf("%s: public key is %s", v.Name, got)
		}
		parcel, err := hex.DecodeString(v.Parcel)
		if err != nil {
			t.Fatal(err)
		}
		key, err := r.Open(parcel, v.Context)
		r.Close()
		if v.Expect != "ok" {
			if key != nil || want[v.Expect] == nil || !errors.Is(err, want[v.Expect]) {
				t.Errorf("%s: got %v, want error %q", v.Name, err, v.Expect)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		if !key.Equal(keymemtest.Hex(t, v.Key)) {
			t.Errorf("%s: wrong key", v.Name)
		}
		key.Close()
	}
	for _, expect := range []string{"ok", "invalid", "version", "does not open"} {
		if counts[expect] == 0 {
			t.Errorf("no vector expects %q", expect)
		}
	}
}

func FuzzOpen(f *testing.F) {
	vectors := loadVectors(f)
	for _, v := range vectors {
		parcel, err := hex.DecodeString(v.Parcel)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(parcel, v.Context)
	}
	r, err := RestoreRecipient(keymemtest.Hex(f, vectors[0].Secret))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { r.Close() })
	f.Fuzz(func(t *testing.T, parcel []byte, context string) {
		key, err := r.Open(parcel, context)
		if (key == nil) == (err == nil) {
			t.Errorf("key %v with error %v", key, err)
		}
		if err == nil && key.Len() != len(parcel)-Overhead {
			t.Errorf("a parcel of %d bytes holds a key of %d", len(parcel), key.Len())
		}
		key.Close()
	})
}

func BenchmarkSeal(b *testing.B) {
	r, key := newTestRecipient(b), keymemtest.Random(b, 32)
	public := r.PublicKey()
	for b.Loop() {
		if _, err := Seal(public, testContext, key); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	r := newTestRecipient(b)
	parcel, err := Seal(r.PublicKey(), testContext, keymemtest.Random(b, 32))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		key, err := r.Open(parcel, testContext)
		if err != nil {
			b.Fatal(err)
		}
		key.Close()
	}
}
