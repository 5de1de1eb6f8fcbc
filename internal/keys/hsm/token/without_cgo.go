//go:build !cgo

// Package token speaks PKCS #11 to a module. This build cannot: the module's
// library is written in C.
package token

import (
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/hsm"
)

// Wrap implements [hsm.Operation].
func Wrap(hsm.Key, []byte, []byte) (*keymem.Key, error) { return nil, without() }

// Unwrap implements [hsm.Operation].
func Unwrap(hsm.Key, []byte, []byte) (*keymem.Key, error) { return nil, without() }

func without() error {
	return errs.New(errs.Unavailable, "this strongroom-pkcs11 was built without C").WithHint("build it with CGO_ENABLED=1")
}
