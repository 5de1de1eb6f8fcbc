package rootkey

import (
	"context"
	"errors"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
	"strongroom/internal/keys/tpm"
)

// TPM is a root key wrapped under a key that a TPM 2.0 has sealed (package tpm).
type TPM struct {
	Device  string     `json:"device"`
	Sealed  tpm.Sealed `json:"sealed"`
	Wrapped []byte     `json:"wrapped"`
}

const kindTPM = "tpm"

// NewTPM wraps root, which stays the caller's, under a new key that the TPM at
// device opens while those PCRs have their present values; for device and errors
// see [tpm.Seal].
func NewTPM(ctx context.Context, device string, pcrs []int, root *keymem.Key) (Source, error) {
	kek, err := keymem.Random(Size)
	if err != nil {
		return Source{}, err
	}
	defer kek.Close()
	s, err := tpm.Seal(ctx, device, pcrs, kek)
	if err != nil {
		return Source{}, err
	}
	wrapped, err := wrap(kindTPM, kek, root)
	return Source{TPM: &TPM{device, *s, wrapped}}, err
}

func (s *TPM) open(ctx context.Context) (*keymem.Key, error) {
	kek, err := tpm.Unseal(ctx, s.Device, &s.Sealed)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	if kek.Len() != Size {
		return nil, errs.New(errs.Corrupt, "the TPM sealed a key of %d bytes", kek.Len())
	}
	root, err := unwrap(kindTPM, kek, s.Wrapped)
	if errors.Is(err, sealed.ErrWrongKey) {
		return nil, errs.New(errs.Denied, "the TPM gives another key")
	}
	return root, err
}

func (s *TPM) check() error {
	return errors.Join(tpm.CheckDevice(s.Device), s.Sealed.Check(), checkWrapped(s.Wrapped))
}
