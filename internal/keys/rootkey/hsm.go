package rootkey

import (
	"context"
	"errors"
	"fmt"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
	"strongroom/internal/keys/hsm"
)

// HSM is a root key wrapped under a key that a key in a hardware security module
// has wrapped (package hsm).
type HSM struct {
	hsm.Key
	WrappedKey []byte `json:"wrappedKey"` // by the module
	Wrapped    []byte `json:"wrapped"`
}

const kindHSM = "hsm"

// NewHSM wraps root, which stays the caller's, under a new key that the module
// wraps; for errors see [hsm.Key.Wrap].
func NewHSM(ctx context.Context, key hsm.Key, root *keymem.Key) (Source, error) {
	kek, err := keymem.Random(Size)
	if err != nil {
		return Source{}, err
	}
	defer kek.Close()
	wrappedKey, err := key.Wrap(ctx, kek)
	if err != nil {
		return Source{}, err
	}
	wrapped, err := wrap(kindHSM, kek, root)
	return Source{HSM: &HSM{key, wrappedKey, wrapped}}, err
}

func (s *HSM) open(ctx context.Context) (*keymem.Key, error) {
	kek, err := s.Unwrap(ctx, s.WrappedKey)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	if kek.Len() != Size {
		return nil, errs.New(errs.Corrupt, "the HSM wrapped a key of %d bytes", kek.Len())
	}
	root, err := unwrap(kindHSM, kek, s.Wrapped)
	if errors.Is(err, sealed.ErrWrongKey) {
		return nil, errs.New(errs.Denied, "the HSM gives another key")
	}
	return root, err
}

func (s *HSM) check() error {
	if n := len(s.WrappedKey); n == 0 || n > hsm.WrappedMax {
		return fmt.Errorf("%d bytes that an HSM wrapped", n)
	}
	return errors.Join(s.Check(), checkWrapped(s.Wrapped))
}
