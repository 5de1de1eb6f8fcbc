package recrypt_test

import (
	"context"
	"errors"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reference is the address of the KEK of that name.
func reference(name string) keysafe.Ref { return keysafe.Ref{Provider: "kp-1", KeyID: name} }

// keyring holds KEKs by name.
type keyring map[string]*keymem.Key

var errNoKEK = errors.New("no such KEK")

func newKeyring(t testing.TB, names ...string) keyring {
	t.Helper()
	k := keyring{}
	for _, name := range names {
		key, err := keymem.Random(keysafe.KEKSize)
		check(t, err)
		t.Cleanup(func() { key.Close() })
		k[name] = key
	}
	return k
}

func (k keyring) get(_ context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	key := k[ref.KeyID]
	if key == nil || ref.Provider != "kp-1" {
		return nil, errNoKEK
	}
	return key.Clone()
}
