package keyprovider_test

import (
	"errors"
	"slices"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/leaktest"
	"strongroom/internal/keys/keyprovider"
)

func TestCache(t *testing.T) {
	t.Parallel()
	c := keyprovider.NewCache([]string{"kms-2", "kms-1"})
	defer c.Close()
	if got := c.Providers(); !slices.Equal(got, []string{"kms-1", "kms-2"}) {
		t.Errorf("providers %v", got)
	}
	a, b := keysafe.Ref{Provider: "kms-1", KeyID: "1"}, keysafe.Ref{Provider: "kms-2", KeyID: "1"}
	want := func(ref keysafe.Ref, key *keymem.Key, cause error) {
		t.Helper()
		got, err := c.KEK(t.Context(), ref)
		if cause != nil {
			if got != nil || !errors.Is(err, cause) {
				t.Errorf("KEK(%s): %v, %v; want %v", ref, got, err, cause)
			}
			return
		}
		if err != nil || !got.Equal(key) {
			t.Errorf("KEK(%s): %v", ref, err)
		}
		got.Close() // must not take the cache's with it
	}
	want(a, nil, keyprovider.ErrUnavailable)
	want(keysafe.Ref{Provider: "other", KeyID: "1"}, nil, keyprovider.ErrUnknownProvider)

	put := func(ref keysafe.Ref) *keymem.Key {
		t.Helper()
		key, err := keymem.Random(keyprovider.KEKSize)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { key.Close() })
		own, err := key.Clone()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Put(ref, own); err != nil {
			t.Fatal(err)
		}
		return key
	}
	put(a)
	keyA, keyB := put(a), put(b) // a is replaced
	want(a, keyA, nil)
	want(a, keyA, nil)
	want(b, keyB, nil)
	leaktest.Refute(t, leaktest.Print(c), keyA, keyB)

	// What is not wanted any more is wiped, what is wanted and not here is told.
	missing, wiped := c.Keep([]string{"kms-1"}, []keysafe.Ref{a, {Provider: "kms-1", KeyID: "2"}})
	if !slices.Equal(missing, []keysafe.Ref{{Provider: "kms-1", KeyID: "2"}}) || wiped != 1 {
		t.Errorf("missing %v, wiped %d", missing, wiped)
	}
	want(a, keyA, nil)
	want(b, nil, keyprovider.ErrUnknownProvider)

	short, err := keymem.Random(16)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Put(a, short); err == nil {
		t.Error("a key of 16 bytes was kept")
	}
	c.Close()
	c.Close()
	want(a, nil, keyprovider.ErrClosed)
	late, err := keymem.Random(keyprovider.KEKSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Put(a, late); !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("Put after Close: %v", err)
	}
}
