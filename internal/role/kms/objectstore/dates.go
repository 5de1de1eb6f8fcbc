package objectstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/keys/kmip/kmipserver"
)

// indexBuilt is the key of the record that says which indexes are complete.
const indexBuilt = "built"

// built says which indexes have an entry for every object that there was before
// there was the index.
type built struct {
	Dates bool `json:"dates"`
}

// dateIndex finds objects by the date that changes their state next
// (docs/spec/kms-object.md). Until a [Store.Index] has completed it, which an early
// release's objects and restored ones need, every object is looked at.
type dateIndex struct {
	db       *store.DB
	table    *store.Table[[]byte]
	built    *store.Table[built]
	complete *atomic.Bool // as far as this process knows
}

func newDateIndex(db *store.DB) dateIndex {
	return dateIndex{db: db, table: store.NewRawTable(db, "kms-date"), built: store.NewTable[built](db, "kms-index", 1), complete: &atomic.Bool{}}
}

// datePrefix is where the entries of a date begin.
func datePrefix(account string, t time.Time) string {
	return fmt.Sprintf("%s%016x/", accountPrefix(account), max(t.Unix(), 0))
}

// dateKey returns where o has its entry; o may be nil.
func dateKey(account, id string, o *kmipserver.Object) (string, bool) {
	if o == nil {
		return "", false
	}
	at, ok := o.NextChange()
	return datePrefix(account, at) + id, ok
}

// move brings the entry of an object, which was another before, in line.
func (d dateIndex) move(ctx context.Context, tx *store.Tx, account, id string, was, now *kmipserver.Object) error {
	before, had := dateKey(account, id, was)
	after, has := dateKey(account, id, now)
	if had && (!has || before != after) {
		if err := d.table.In(tx).Delete(ctx, before); err != nil && !store.IsNotFound(err) {
			return err
		}
	}
	if !has {
		return nil
	}
	return d.table.In(tx).Set(after, []byte{1})
}

// isComplete reports whether every object has its entry.
func (d dateIndex) isComplete(ctx context.Context, tx *store.Tx) (bool, error) {
	if d.complete.Load() {
		return true, nil
	}
	b, err := d.built.In(tx).Get(ctx, indexBuilt)
	if store.IsNotFound(err) {
		return false, nil
	}
	if err == nil && b.Dates {
		d.complete.Store(true)
	}
	return b.Dates, err
}

// due calls f with the account's records that have an entry of that time or an
// earlier one.
func (v *view) due(by time.Time, f func(store.Entry[[]byte]) bool) error {
	var ids []string
	from := accountPrefix(v.account)
	err := v.s.dates.table.In(v.tx).ScanBetween(v.ctx, from, datePrefix(v.account, by.Add(time.Second)), func(e store.Entry[[]byte]) bool {
		_, id, _ := strings.Cut(e.Key[len(from):], "/")
		ids = append(ids, id)
		return true
	})
	if err != nil {
		return err
	}
	for _, id := range ids {
		e, err := v.s.objects.In(v.tx).Entry(v.ctx, from+id)
		if err != nil {
			return err
		}
		if !f(e) {
			return nil
		}
	}
	return nil
}

// Index completes what objects are found by: see docs/spec/kms-object.md. It may
// be broken off at any point and repeated, and done by several nodes at once.
func (s *Store) Index(ctx context.Context) error {
	if err := s.names.fold(ctx); err != nil {
		return fmt.Errorf("cannot fold names: %w", err)
	}
	var complete bool
	err := s.db.View(ctx, func(tx *store.Tx) (err error) {
		complete, err = s.dates.isComplete(ctx, tx)
		return err
	})
	if err != nil || complete {
		return err
	}
	batches, err := s.dated(ctx)
	if err != nil {
		return fmt.Errorf("cannot index dates: %w", err)
	}
	for _, keys := range batches {
		if err := s.indexDates(ctx, keys); err != nil {
			return fmt.Errorf("cannot index dates: %w", err)
		}
	}
	if err := s.dates.built.Put(ctx, indexBuilt, built{Dates: true}); err != nil {
		return err
	}
	s.dates.complete.Store(true)
	return nil
}

// indexRetry is the pause before an index that could not be completed is tried again.
const indexRetry = time.Minute

// RunIndex does [Store.Index] once, however often it has to try until ctx ends.
// Until then what it completes is found all the same, slowly.
func (s *Store) RunIndex(ctx context.Context) error {
	for {
		err := s.Index(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		s.log.LogAttrs(ctx, slog.LevelError, "indexes not complete", slog.Any("err", err))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(indexRetry):
		}
	}
}

// dated returns the keys of the records of objects whose state a date will change,
// in batches for one transaction each.
func (s *Store) dated(ctx context.Context) (batches [][]string, err error) {
	err = s.db.View(ctx, func(tx *store.Tx) error {
		batches = nil
		var bad error
		err := s.objects.In(tx).Scan(ctx, "", func(e store.Entry[[]byte]) bool {
			var o *kmipserver.Object
			clear, _, _, err := split(e.Value)
			if err == nil {
				o, err = parseClear(clear) // for one that is found so it is authenticated later
			}
			if err != nil {
				bad = fmt.Errorf("object %s: %w", e.Key, err)
				return false
			}
			if _, ok := o.NextChange(); !ok {
				return true
			}
			if last := len(batches) - 1; last < 0 || len(batches[last]) == moveBatch {
				batches = append(batches, nil)
			}
			batches[len(batches)-1] = append(batches[len(batches)-1], e.Key)
			return true
		})
		return errors.Join(err, bad)
	})
	return batches, err
}

// indexDates gives objects their entries.
func (s *Store) indexDates(ctx context.Context, keys []string) error {
	return s.again(ctx, func() error {
		return s.db.Txn(ctx, func(tx *store.Tx) error {
			for _, key := range keys {
				account, id, err := splitKey(key)
				if err != nil {
					return err
				}
				record, err := s.objects.In(tx).Get(ctx, key)
				if err != nil {
					return err
				}
				o, _, err := unseal(s.ring, account, id, record)
				if err != nil {
					return fmt.Errorf("object %s: %w", key, err)
				}
				o.Material.Close()
				if err := s.dates.move(ctx, tx, account, id, nil, o); err != nil {
					return err
				}
			}
			return nil
		})
	})
}
