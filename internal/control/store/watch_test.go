package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/control/store"
)

// opNames makes a change readable in a diff.
func describe(c store.Change[thing]) string {
	switch c.Op {
	case store.Put:
		return fmt.Sprintf("put %s=%d", c.Key, c.Value.N)
	case store.Deleted:
		return "delete " + c.Key
	case store.Reset:
		return "reset"
	case store.Synced:
		return "synced"
	}
	return "?"
}

var errEnough = errors.New("enough")

func TestWatchFromTheBeginningAndFromARevision(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	tbl := store.NewTable[thing](db, own("watch"), 1)
	for i, k := range []string{"a", "b", "z/other"} {
		if err := tbl.Put(ctx, k, thing{N: i}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	var syncedAt int64
	err := tbl.Watch(ctx, "", 0, func(c store.Change[thing]) error {
		got = append(got, describe(c))
		switch {
		case c.Op == store.Synced:
			syncedAt = c.Revision
			// Changes made while the watcher is busy must not be lost.
			if _, err := tbl.Update(ctx, "a", func(v *thing) error { v.N = 7; return nil }); err != nil {
				return err
			}
			if err := tbl.Delete(ctx, "b"); err != nil {
				return err
			}
		case c.Op == store.Deleted:
			return errEnough
		}
		return nil
	})
	want := []string{"reset", "put a=0", "put b=1", "put z/other=2", "synced", "put a=7", "delete b"}
	if diff := cmp.Diff(want, got); err != errEnough || diff != "" {
		t.Fatalf("Watch: %v\n%s", err, diff)
	}

	got = nil
	err = tbl.Watch(ctx, "a", syncedAt, func(c store.Change[thing]) error {
		got = append(got, describe(c))
		return errEnough
	})
	if diff := cmp.Diff([]string{"put a=7"}, got); err != errEnough || diff != "" {
		t.Fatalf("Watch from a revision: %v\n%s", err, diff)
	}
}

func TestWatchSurvivesCompaction(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	// A member of its own: compaction is of the whole database.
	d, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	tbl := store.NewTable[thing](d, "watch", 1)
	if err := tbl.Put(ctx, "a", thing{}); err != nil {
		t.Fatal(err)
	}
	from, err := d.Revision(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := tbl.Put(ctx, "b", thing{N: 1}); err != nil {
		t.Fatal(err)
	}
	if err := tbl.Delete(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	rev, err := d.Revision(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // a second compaction at the same place is no error
		if err := d.Compact(ctx, rev); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	err = tbl.Watch(ctx, "", from, func(c store.Change[thing]) error {
		got = append(got, describe(c))
		if c.Op == store.Synced {
			return tbl.Put(ctx, "c", thing{N: 3})
		}
		if c.Key == "c" {
			return errEnough
		}
		return nil
	})
	// The deletion of a is in nobody's history any more: Reset tells it.
	if diff := cmp.Diff([]string{"reset", "put b=1", "synced", "put c=3"}, got); err != errEnough || diff != "" {
		t.Fatalf("Watch over a compaction: %v\n%s", err, diff)
	}
}

func TestWatchEndsWithItsContextAndWithTheDatabase(t *testing.T) {
	t.Parallel()
	d, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	tbl := store.NewTable[thing](d, "watch", 1)
	watch := func(ctx context.Context) (synced chan struct{}, ended chan error) {
		synced, ended = make(chan struct{}), make(chan error, 1)
		go func() {
			ended <- tbl.Watch(ctx, "", 0, func(c store.Change[thing]) error {
				if c.Op == store.Synced {
					close(synced)
				}
				return nil
			})
		}()
		return synced, ended
	}
	ctx, cancel := context.WithCancel(t.Context())
	synced, ended := watch(ctx)
	<-synced
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
	synced, ended = watch(t.Context())
	<-synced
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, store.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestWatchedIsThere: who is told of a change reads it, or a later one, at once:
// there is nobody who tells a second time.
func TestWatchedIsThere(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	tbl := store.NewTable[thing](db, own("watched"), 1)
	const n = 2000
	var writing sync.WaitGroup
	defer writing.Wait()
	seen := 0
	err := tbl.Watch(ctx, "", 0, func(c store.Change[thing]) error {
		switch c.Op {
		case store.Synced:
			writing.Go(func() {
				for i := range n {
					if err := tbl.Create(ctx, fmt.Sprint(i), thing{N: i}); err != nil {
						t.Error(err)
						return
					}
				}
			})
		case store.Put:
			if _, err := tbl.Get(ctx, c.Key); err != nil {
				return fmt.Errorf("change %d: %w", seen, err)
			}
			if seen++; seen == n {
				return errEnough
			}
		}
		return nil
	})
	if err != errEnough {
		t.Fatal(err)
	}
}
