package keysafe

import (
	"errors"
	"fmt"
)

// Limits of the parts of a [Ref], in bytes.
const (
	ProviderMax = 63
	KeyIDMax    = 256
)

// ErrInvalidRef is reported for a [Ref] that cannot address a key.
var ErrInvalidRef = errors.New("invalid key reference")

// Ref is the address of a KEK. It is no secret.
type Ref struct {
	// Provider is the name of a key provider: 1 to [ProviderMax] lower-case
	// letters, digits, dots and hyphens, beginning with a letter or digit.
	Provider string
	// KeyID names the key within the provider: 1 to [KeyIDMax] bytes of
	// printable ASCII.
	KeyID string
}

// String returns "provider/keyid", unambiguous because a provider's name has no
// slash.
func (r Ref) String() string { return r.Provider + "/" + r.KeyID }

// IsZero reports whether r is the zero Ref, which addresses nothing.
func (r Ref) IsZero() bool { return r == Ref{} }

// Validate returns an error wrapping [ErrInvalidRef] unless both parts are
// within their limits.
func (r Ref) Validate() error {
	if err := ValidateProvider(r.Provider); err != nil {
		return err
	}
	if !printable(r.KeyID, KeyIDMax) {
		return fmt.Errorf("%w: key id %.*q is not 1 to %d bytes of printable ASCII", ErrInvalidRef, KeyIDMax, r.KeyID, KeyIDMax)
	}
	return nil
}

// ValidateProvider returns an error wrapping [ErrInvalidRef] unless name can be
// the name of a key provider.
func ValidateProvider(name string) error {
	valid := len(name) >= 1 && len(name) <= ProviderMax
	for i := 0; valid && i < len(name); i++ {
		c := name[i]
		alphanumeric := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		valid = alphanumeric || i > 0 && (c == '.' || c == '-')
	}
	if !valid {
		return fmt.Errorf("%w: provider name %.*q is not 1 to %d of a-z, 0-9, '.' and '-', beginning with a letter or digit",
			ErrInvalidRef, ProviderMax, name, ProviderMax)
	}
	return nil
}

// printable reports whether s is 1 to limit bytes of printable ASCII.
func printable(s string, limit int) bool {
	if len(s) < 1 || len(s) > limit {
		return false
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}
