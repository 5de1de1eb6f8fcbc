package host

import (
	"context"
	"errors"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
)

// Reasons why a key cannot be had, with vSphere's names.
const (
	reasonProviderUnknown = "KeyStateClusterInvalid"
	reasonKeyMissing      = "KeyStateMissingInCache"
	reasonNotPermitted    = standard.ReasonNotPermitted
)

// kek returns the KEK at ref, which the caller closes, from what this host
// holds, else from its key server if the host may ask that. Its errors tell a user
// which key of which provider is wanted and what to do.
func (h *Host) kek(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	key, err := h.heldKEK(ctx, ref)
	if errors.Is(err, keyprovider.ErrUnavailable) {
		switch key, fetchErr := h.fetchKEK(ctx, ref); {
		case fetchErr == nil:
			return key, nil
		case !errors.Is(fetchErr, keyprovider.ErrUnknownProvider) && !errors.Is(fetchErr, keyprovider.ErrClosed):
			return nil, explainFetch(ref, fetchErr)
		}
	}
	return key, explainKEK(ref, err)
}

// heldKEK returns the KEK at ref, which the caller closes, from what this host
// holds.
func (h *Host) heldKEK(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	key, err := h.secrets.providers.KEK(ctx, ref)
	if errors.Is(err, keyprovider.ErrUnknownProvider) {
		key, err = h.secrets.cache.KEK(ctx, ref)
	}
	return key, err
}

// explainKEK tells a user why this host does not hold the KEK at ref.
func explainKEK(ref keysafe.Ref, err error) error {
	switch {
	case errors.Is(err, keyprovider.ErrUnknownProvider):
		return errs.New(errs.Locked, "provider %s, which has its key %s, is not on this host", ref.Provider, ref.KeyID).
			WithReason(reasonProviderUnknown).WithHint("strongroom provider import FILE.p12, with the backup of %s", ref.Provider)
	case errors.Is(err, keyprovider.ErrNotFound), errors.Is(err, keyprovider.ErrWrongProvider):
		return errs.New(errs.Locked, "the provider named %s on this host has other key material: it does not have key %s", ref.Provider, ref.KeyID).
			WithReason(reasonKeyMissing).WithHint("register the VM on a controller that has the right %s", ref.Provider)
	case errors.Is(err, keyprovider.ErrLocked):
		return errs.New(errs.Locked, "key %s of provider %s may not be used here: %w", ref.KeyID, ref.Provider, err).
			WithReason(reasonNotPermitted).WithHint("strongroom provider show %s", ref.Provider)
	case errors.Is(err, keyprovider.ErrUnavailable):
		return errs.New(errs.Locked, "key %s of provider %s is not in this host's memory; the controller sends it when its key server gives it", ref.KeyID, ref.Provider).
			WithReason(reasonKeyMissing).WithHint("strongroom provider check %s", ref.Provider)
	}
	return err
}

// explainFetch tells a user why the key server does not give the KEK at ref.
func explainFetch(ref keysafe.Ref, err error) error {
	reason, hint, ok := standard.Explain(ref.Provider, err)
	if !ok {
		return err
	}
	return errs.New(errs.Locked, "key %s of provider %s is not in this host's memory, and its key server does not give it: %w", ref.KeyID, ref.Provider, err).
		WithReason(reason).WithHint("%s", hint)
}

// holdsKEK returns why this host does not hold the KEK at ref, or nil. It does not
// ask a key server.
func (h *Host) holdsKEK(ctx context.Context, ref keysafe.Ref) error {
	key, err := h.heldKEK(ctx, ref)
	if errors.Is(err, keyprovider.ErrUnavailable) {
		h.lack(ref)
	}
	if err != nil {
		return explainKEK(ref, err)
	}
	return key.Close()
}

// haveKEK returns why the KEK at ref cannot be had, or nil.
func (h *Host) haveKEK(ctx context.Context, ref keysafe.Ref) error {
	key, err := h.kek(ctx, ref)
	if err != nil {
		return err
	}
	return key.Close()
}
