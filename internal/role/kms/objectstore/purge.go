package objectstore

import (
	"context"
	"fmt"
	"slices"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
)

// purgeBatch is how many records a transaction removes: each has an entry for each
// of its names and one for its date.
const purgeBatch = 8

// CheckNone refuses an account that has objects, in tx, which does not commit if it
// gets one meanwhile.
func (s *Store) CheckNone(ctx context.Context, tx *store.Tx, account string) error {
	left, err := s.objects.In(tx).Entries(ctx, accountPrefix(account))
	if err == nil && len(left) > 0 {
		err = errs.New(errs.InvalidState, "it has %d objects", len(left)).WithReason("ResourceInUse")
	}
	return err
}

// Purge removes the records of an account's destroyed objects, with all by which
// they are found. If there are others it removes nothing and says how many. It may be
// broken off at any point and repeated. Nobody may use the account meanwhile: what is
// made then stays.
func (s *Store) Purge(ctx context.Context, account string) error {
	var ids []string
	living := 0
	err := s.db.View(ctx, func(tx *store.Tx) error {
		ids, living = nil, 0
		v := s.in(ctx, tx, account, &holding{})
		var bad error
		err := s.objects.In(tx).Scan(ctx, accountPrefix(account), func(e store.Entry[[]byte]) bool {
			_, _, epoch, err := split(e.Value)
			if err == nil && epoch == keyring.Metadata {
				o, err := v.describe(e)
				if err == nil && o.Destroyed() {
					ids = append(ids, o.ID)
					return true
				}
				bad = err
			} else {
				bad = err
			}
			living++
			return bad == nil
		})
		if err != nil {
			return err
		}
		return bad
	})
	if err != nil {
		return fmt.Errorf("objects: %w", err)
	}
	if living > 0 {
		return errs.New(errs.InvalidState, "it has %d keys or other objects that are not destroyed", living).WithReason("ResourceInUse")
	}
	for batch := range slices.Chunk(ids, purgeBatch) {
		if err := s.purge(ctx, account, batch); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) purge(ctx context.Context, account string, ids []string) error {
	err := s.db.Txn(ctx, func(tx *store.Tx) error {
		for _, id := range ids {
			key := accountPrefix(account) + id
			record, err := s.objects.In(tx).Get(ctx, key)
			if store.IsNotFound(err) {
				continue // by another node
			}
			if err != nil {
				return err
			}
			o, epoch, err := unseal(s.ring, account, id, record)
			if err != nil {
				return fmt.Errorf("object %s: %w", id, err)
			}
			if epoch != keyring.Metadata || !o.Destroyed() {
				closeMaterial(o.Material)
				return errs.New(errs.InvalidState, "object %s is not destroyed", id)
			}
			for _, name := range namesOf(o) {
				if err := s.names.remove(ctx, tx, account, name, id); err != nil {
					return err
				}
			}
			if err := s.dates.move(ctx, tx, account, id, o, nil); err != nil {
				return err
			}
			if err := s.objects.In(tx).Delete(ctx, key); err != nil {
				return err
			}
		}
		return nil
	})
	for _, id := range ids {
		s.cache.forget(accountPrefix(account) + id)
	}
	return err
}

func closeMaterial(k *keymem.Key) {
	if k != nil {
		k.Close()
	}
}
