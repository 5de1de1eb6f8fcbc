package objectstore

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
)

const (
	// shredPause is the least time between two passes; a pass that took long is
	// followed by a pause ten times as long, for it reads every record, but never
	// by more than shredPauseMax: it may have taken long for waiting.
	shredPause    = time.Second
	shredPauseMax = 20 * time.Second
	// moveBatch and moveBytes bound what one transaction moves to another
	// epoch, in records and in their bytes.
	moveBatch = 64
	moveBytes = 1 << 20
)

// Run shreds the epochs of destroyed keys, as they come, until ctx ends. It
// begins with those that an earlier process left.
func (s *Store) Run(ctx context.Context) error {
	s.Wake()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.dirty:
		}
		began := time.Now()
		err := s.Shred(ctx)
		pause := min(max(shredPause, 10*time.Since(began)), shredPauseMax)
		if err != nil && ctx.Err() == nil {
			pause = shredPause // it waited rather than worked
			s.log.LogAttrs(ctx, slog.LevelError, "destroyed keys not shredded yet", slog.Any("err", err))
			s.Wake()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// Shred makes every key that was destroyed before the call unrecoverable: see
// docs/spec/kms-keyring.md. It may be broken off at any point and repeated.
func (s *Store) Shred(ctx context.Context) error {
	dirty, err := s.dirtyEpochs(ctx)
	if err != nil || len(dirty) == 0 {
		return err
	}
	epochs := slices.Sorted(maps.Keys(dirty))
	for _, n := range epochs {
		s.retire(n)
	}
	for {
		batches, err := s.survivors(ctx, dirty)
		if err != nil {
			return err
		}
		if len(batches) == 0 {
			break // and none can come: see [update.fresh]
		}
		for _, keys := range batches {
			if err := s.move(ctx, keys, dirty); err != nil {
				return err
			}
		}
	}
	return s.keeper.Erase(ctx, epochs...)
}

func (s *Store) dirtyEpochs(ctx context.Context) (map[uint64]bool, error) {
	marked, err := s.epochs.Scan(ctx, store.Range{})
	if err != nil {
		return nil, err
	}
	dirty := map[uint64]bool{}
	for _, e := range marked {
		if e.Value.State != EpochDirty {
			continue
		}
		n, err := EpochNumber(e.Key)
		if err != nil {
			return nil, err
		}
		dirty[n] = true
	}
	return dirty, nil
}

// survivors returns the keys of the records whose material is in one of those
// epochs, in batches for one transaction each.
func (s *Store) survivors(ctx context.Context, epochs map[uint64]bool) ([][]string, error) {
	var batches [][]string
	err := s.db.View(ctx, func(tx *store.Tx) error {
		batches = nil
		var bad error
		size := 0 // of the last batch
		err := s.objects.In(tx).Scan(ctx, "", func(e store.Entry[[]byte]) bool {
			_, _, epoch, err := split(e.Value)
			if err != nil {
				bad = fmt.Errorf("object %s: %w", e.Key, err)
				return false
			}
			if !epochs[epoch] {
				return true
			}
			last := len(batches) - 1
			if last < 0 || len(batches[last]) == moveBatch || size+len(e.Value) > moveBytes {
				batches, size, last = append(batches, nil), 0, last+1
			}
			batches[last], size = append(batches[last], e.Key), size+len(e.Value)
			return true
		})
		if err != nil {
			return err
		}
		return bad
	})
	return batches, err
}

// move wraps the material of those records that are in one of the epochs under
// the KEK of another.
func (s *Store) move(ctx context.Context, keys []string, epochs map[uint64]bool) error {
	return s.again(ctx, func() error {
		return s.db.Txn(ctx, func(tx *store.Tx) error {
			for _, key := range keys {
				if err := s.moveOne(ctx, tx, key, epochs); err != nil {
					return fmt.Errorf("object %s: %w", key, err)
				}
			}
			return nil
		})
	})
}

func (s *Store) moveOne(ctx context.Context, tx *store.Tx, key string, epochs map[uint64]bool) error {
	record, err := s.objects.In(tx).Get(ctx, key)
	if err != nil {
		return err
	}
	_, _, epoch, err := split(record)
	if err != nil || !epochs[epoch] { // destroyed meanwhile
		return err
	}
	escaped, id, _ := strings.Cut(key, "/")
	account, err := url.PathUnescape(escaped)
	if err != nil {
		return err
	}
	o, _, err := unseal(s.ring, account, id, record)
	if err != nil {
		return err
	}
	defer o.Material.Close()
	u := &update{view: s.in(ctx, tx, account, nil)}
	if epoch, err = u.fresh(); err != nil {
		return err
	}
	moved, err := seal(s.ring, account, o, epoch)
	if err != nil {
		return err
	}
	return s.objects.In(tx).Set(key, moved)
}
