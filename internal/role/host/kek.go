package host

import (
	"errors"
	"slices"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// syncKEKs makes the wanted KEKs of standard providers those that are in memory,
// wipes all others, and returns the wanted ones that are not here. Nothing of
// them comes to a disk: only the providers' names are stored.
func (h *Host) syncKEKs(providers []*strongroomv1.WantedProvider, wanted []*strongroomv1.WantedKEK) ([]*strongroomv1.KeyRef, error) {
	var names []string
	for _, p := range providers {
		if p.GetStandard() {
			names = append(names, p.GetName())
		}
	}
	slices.Sort(names)
	if !slices.Equal(h.secrets.snapshot().Standard, names) {
		if err := h.secrets.updateRegistry(func(r *registry) error {
			r.Standard = names
			return nil
		}); err != nil {
			return nil, err
		}
	}
	refs := make([]keysafe.Ref, 0, len(wanted))
	parcels := map[keysafe.Ref][]byte{}
	for _, w := range wanted {
		refs = append(refs, ref(w.GetKey()))
		if len(w.GetParcel()) > 0 {
			parcels[ref(w.GetKey())] = w.GetParcel()
		}
	}
	missing, wiped := h.secrets.cache.Keep(names, refs)
	changed := wiped > 0
	var still []*strongroomv1.KeyRef
	var failures []error // one bad parcel does not keep the others away
	for _, r := range missing {
		sealed, sent := parcels[r]
		if !sent {
			still = append(still, keyRef(r))
			continue
		}
		if err := h.takeKEK(r, sealed); err != nil {
			failures = append(failures, err)
			continue
		}
		changed = true
	}
	if changed {
		h.notify()
	}
	return still, errors.Join(failures...)
}

// takeKEK opens the parcel of a KEK into memory.
func (h *Host) takeKEK(r keysafe.Ref, sealed []byte) error {
	kek, err := h.secrets.parcel.Open(sealed, keyprovider.KEKContext("controller", h.secrets.identity.HostID, r))
	if err == nil {
		err = h.secrets.cache.Put(r, kek)
	}
	if errors.Is(err, parcel.ErrInvalid) {
		err = errs.New(errs.Invalid, "%w", err)
	}
	return errs.Wrap(err, "cannot take over key %s", r)
}
