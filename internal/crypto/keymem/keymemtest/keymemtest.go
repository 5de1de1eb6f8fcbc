// Package keymemtest makes keys for tests: each is closed when its test ends. It
// is for tests only. All functions are safe for concurrent use.
package keymemtest

import (
	"encoding/hex"
	"testing"

	"strongroom/internal/crypto/keymem"
)

// Random returns a key of n random bytes.
func Random(t testing.TB, n int) *keymem.Key {
	t.Helper()
	k, err := keymem.Random(n)
	return closed(t, k, err)
}

// Hex returns the key with the bytes that s is the hexadecimal text of.
func Hex(t testing.TB, s string) *keymem.Key {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return Of(t, b)
}

// Of returns the key with the bytes b, which it wipes.
func Of(t testing.TB, b []byte) *keymem.Key {
	t.Helper()
	k, err := keymem.Take(b)
	return closed(t, k, err)
}

func closed(t testing.TB, k *keymem.Key, err error) *keymem.Key {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}
