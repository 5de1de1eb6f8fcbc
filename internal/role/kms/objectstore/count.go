package objectstore

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/keys/keyring"
)

const (
	// recountAfter is how often the objects are counted anew, so that what other
	// nodes did comes in. A count reads every record: what took long is not
	// repeated before a hundred times as long has passed.
	recountAfter = 15 * time.Minute
	recountRatio = 100
)

// counts is how many objects with material each account has.
type counts struct {
	// gate is held for reading by every change from its transaction to its
	// addition here, and for writing where a count begins: so that a change is
	// either in what is counted or added to it.
	gate  sync.RWMutex
	known chan struct{} // closed once everything was counted

	mu      sync.Mutex
	objects map[string]int64 // by account
	since   map[string]int64 // changes since the count under way began; nil without one
}

func newCounts() counts {
	return counts{known: make(chan struct{}), objects: map[string]int64{}}
}

func (c *counts) add(account string, more int64) {
	if more == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects[account] += more
	if c.since != nil {
		c.since[account] += more
	}
}

// withMaterial is 1 for the epoch of an object with material.
func withMaterial(epoch uint64) int64 {
	if epoch == keyring.Metadata {
		return 0
	}
	return 1
}

// Keys returns how many objects an account has that are not destroyed, templates
// left out. After a start it waits until they have been counted. What other
// nodes did may be missing for a quarter of an hour, and longer where counting
// takes longer than ten seconds.
func (s *Store) Keys(ctx context.Context, account string) (int64, error) {
	select {
	case <-s.counts.known:
	case <-ctx.Done():
		return 0, fmt.Errorf("keys are not counted yet: %w", context.Cause(ctx))
	}
	n, _ := s.Counted(account)
	return n, nil
}

// Counted is [Store.Keys] that does not wait: it reports whether they have been
// counted.
func (s *Store) Counted(account string) (int64, bool) {
	select {
	case <-s.counts.known:
	default:
		return 0, false
	}
	s.counts.mu.Lock()
	defer s.counts.mu.Unlock()
	return s.counts.objects[account], true
}

// RunCounts counts, now and then, until ctx ends.
func (s *Store) RunCounts(ctx context.Context) error {
	for {
		began := time.Now()
		wait := recountAfter
		if err := s.Count(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.log.Error("keys not counted", "err", err)
			wait = time.Second
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(wait, recountRatio*time.Since(began))):
		}
	}
}

// Count counts all objects. It is for one caller at a time.
func (s *Store) Count(ctx context.Context) error {
	var found map[string]int64
	err := s.db.View(ctx, func(tx *store.Tx) error {
		found = map[string]int64{}
		if err := s.beginCount(ctx, tx); err != nil {
			return err
		}
		var bad error
		err := s.objects.In(tx).Scan(ctx, "", func(e store.Entry[[]byte]) bool {
			_, _, epoch, err := split(e.Value)
			escaped, _, _ := strings.Cut(e.Key, "/")
			account, accountErr := url.PathUnescape(escaped)
			if err != nil || accountErr != nil {
				bad = fmt.Errorf("object %s: %w", e.Key, errCorrupt)
				return false
			}
			found[account] += withMaterial(epoch)
			return true
		})
		if err != nil {
			return err
		}
		return bad
	})
	c := &s.counts
	c.mu.Lock()
	defer c.mu.Unlock()
	since := c.since
	c.since = nil
	if err != nil {
		return err
	}
	for account, more := range since {
		found[account] += more
	}
	c.objects = found
	select {
	case <-c.known:
	default:
		close(c.known)
	}
	return nil
}

// beginCount fixes the revision that tx reads, while no change is under way.
func (s *Store) beginCount(ctx context.Context, tx *store.Tx) error {
	s.counts.gate.Lock()
	defer s.counts.gate.Unlock()
	// Any read fixes it.
	if _, err := s.epochs.In(tx).Has(ctx, EpochKey(keyring.Metadata)); err != nil {
		return err
	}
	s.counts.mu.Lock()
	s.counts.since = map[string]int64{}
	s.counts.mu.Unlock()
	return nil
}
