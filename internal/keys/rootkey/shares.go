package rootkey

import (
	"encoding/hex"
	"errors"
	"fmt"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/shamir"
	"strongroom/internal/errs"
)

// Shares is a root key wrapped under a key that is split into shares
// (docs/spec/shamir.md), each with another person.
type Shares struct {
	Set       string `json:"set"` // of the shares, in hex
	Threshold int    `json:"threshold"`
	Count     int    `json:"count"`
	Wrapped   []byte `json:"wrapped"`
}

const kindShares = "shares"

// SharesMax is how many shares a root key can have.
const SharesMax = 32

// NewShares wraps root, which stays the caller's, under a new key, and returns
// the shares of that, which the caller hands out and closes. They are kept
// nowhere.
func NewShares(threshold, count int, root *keymem.Key) (_ Source, _ []shamir.Share, err error) {
	if count > SharesMax {
		return Source{}, nil, errs.New(errs.Invalid, "%d shares are more than %d", count, SharesMax)
	}
	kek, err := keymem.Random(Size)
	if err != nil {
		return Source{}, nil, err
	}
	defer kek.Close()
	shares, err := shamir.AES.Split(kek, threshold, count)
	if err != nil {
		return Source{}, nil, err
	}
	wrapped, err := wrap(kindShares, kek, root)
	if err != nil {
		shamir.Close(shares)
		return Source{}, nil, err
	}
	return Source{Shares: &Shares{hex.EncodeToString(shares[0].Set[:]), threshold, count, wrapped}}, shares, nil
}

// belongs reports whether a share is one of this source.
func (s *Shares) belongs(share shamir.Share) bool {
	return hex.EncodeToString(share.Set[:]) == s.Set && int(share.Threshold) == s.Threshold
}

func (s *Shares) open(shares []shamir.Share) (*keymem.Key, error) {
	var own []shamir.Share
	for _, share := range shares {
		if s.belongs(share) {
			own = append(own, share)
		}
	}
	kek, err := shamir.AES.Combine(own)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	root, err := unwrap(kindShares, kek, s.Wrapped)
	if errors.Is(err, sealed.ErrWrongKey) {
		return nil, errs.New(errs.Denied, "the shares together are wrong: at least one was forged")
	}
	return root, err
}

func (s *Shares) check() error {
	if len(s.Set) != 8 {
		return fmt.Errorf("a set of shares %.64q", s.Set)
	}
	if s.Threshold < shamir.ThresholdMin || s.Count < s.Threshold || s.Count > SharesMax {
		return fmt.Errorf("%d of %d shares", s.Threshold, s.Count)
	}
	return checkWrapped(s.Wrapped)
}
