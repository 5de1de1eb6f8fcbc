package keyring

import (
	"maps"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// ExcerptMax is how many epochs besides [Metadata] an excerpt has at most.
const ExcerptMax = 4096

// Excerpt returns the encoding of a ring that has, of the KEKs of this one, that
// of [Metadata] and those of the epochs given, as far as they are here: what one
// node of a KMS gives to another. The caller closes it.
func (r *Ring) Excerpt(epochs ...uint64) (*keymem.Key, error) {
	if len(epochs) > ExcerptMax {
		return nil, errs.New(errs.Invalid, "an excerpt of %d epochs; the limit is %d", len(epochs), ExcerptMax)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.keks == nil {
		return nil, errs.New(errs.InvalidState, "the key ring is closed")
	}
	some := map[uint64]*keymem.Key{Metadata: r.keks[Metadata]}
	for _, n := range epochs {
		if kek := r.keks[n]; kek != nil {
			some[n] = kek
		}
	}
	return encode(some)
}

// Merge adds those epochs of an excerpt of the same ring, on another node, that
// are wanted, and returns when they are durable. A ring whose metadata epoch has
// another KEK is refused as Denied: it is another KMS's. The KEK of an epoch
// that is here stays.
func (r *Ring) Merge(excerpt *keymem.Key, wanted func(epoch uint64) bool) error {
	got, err := decode(excerpt.Bytes())
	if err != nil {
		return err
	}
	defer func() { closeAll(got) }() // of what was not taken over
	r.change.Lock()
	defer r.change.Unlock()
	if r.keks == nil {
		return errs.New(errs.InvalidState, "the key ring is closed")
	}
	if !got[Metadata].Equal(r.keks[Metadata]) {
		return errs.New(errs.Denied, "cannot take epochs over: %w", errOther)
	}
	next, last := maps.Clone(r.keks), r.newest
	for n, kek := range got {
		if next[n] == nil && wanted(n) {
			next[n] = kek
			last = max(last, n)
		}
	}
	if len(next) == len(r.keks) {
		return nil
	}
	if err := r.replace(next, last); err != nil {
		return errs.Wrap(err, "cannot take epochs over")
	}
	maps.DeleteFunc(got, func(n uint64, kek *keymem.Key) bool { return next[n] == kek })
	return nil
}

// BeginAt adds an epoch of that number, with a KEK of its own, and returns when
// the ring with it is durable. If the epoch is there nothing happens. That the
// number was never used is the caller's to know.
func (r *Ring) BeginAt(n uint64) error {
	r.change.Lock()
	defer r.change.Unlock()
	if r.keks[n] != nil {
		return nil
	}
	kek, err := keymem.Random(kekSize)
	if err != nil {
		return err
	}
	next := maps.Clone(r.keks)
	next[n] = kek
	if err := r.replace(next, max(r.newest, n)); err != nil {
		kek.Close()
		return errs.Wrap(err, "cannot begin epoch %d", n)
	}
	return nil
}

// replace makes next, which has more than the ring, durable and then the ring.
func (r *Ring) replace(next map[uint64]*keymem.Key, newest uint64) error {
	if len(next) > EpochsMax {
		return errs.New(errs.NoSpace, "the key ring is full with %d", EpochsMax)
	}
	// Even if it fails the ring may have been written: the numbers are used up.
	r.newest = newest
	if err := r.write(next); err != nil {
		return err
	}
	r.mu.Lock()
	r.keks = next
	r.mu.Unlock()
	return nil
}

// Epochs returns the numbers of the epochs on the ring but [Metadata], in no
// order.
func (r *Ring) Epochs() []uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []uint64
	for n := range r.keks {
		if n != Metadata {
			out = append(out, n)
		}
	}
	return out
}

// UsedUpTo has no new epoch get the number used or a lower one: see [Load].
func (r *Ring) UsedUpTo(used uint64) {
	r.change.Lock()
	defer r.change.Unlock()
	r.newest = max(r.newest, used)
}
