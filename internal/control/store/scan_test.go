package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"strongroom/internal/control/store"
)

func TestScan(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	name := own("scan")
	tbl := store.NewTable[thing](db, name, 1)
	// A neighbour whose name starts alike must never be seen.
	if err := store.NewTable[thing](db, name+"-b", 1).Put(ctx, "x", thing{}); err != nil {
		t.Fatal(err)
	}
	const n = 2500 // more than two pages
	for i := 0; i < n; i += 100 {
		err := db.Txn(ctx, func(tx *store.Tx) error {
			for j := i; j < i+100; j++ {
				if err := tbl.In(tx).Put(ctx, fmt.Sprintf("k%05d", j), thing{N: j}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name               string
		r                  store.Range
		first, last, count int
	}{
		{"all", store.Range{}, 0, n - 1, n},
		{"descending", store.Range{Descending: true}, n - 1, 0, n},
		{"limit over a page", store.Range{Limit: 1500}, 0, 1499, 1500},
		{"after", store.Range{After: "k01000", Limit: 3}, 1001, 1003, 3},
		{"before", store.Range{After: "k01000", Limit: 3, Descending: true}, 999, 997, 3},
		{"after all", store.Range{After: "z"}, 0, 0, 0},
		{"before all", store.Range{After: "a", Descending: true}, 0, 0, 0},
		{"after something before all", store.Range{After: "a", Limit: 1}, 0, 0, 1},
		{"prefix", store.Range{Prefix: "k002"}, 200, 299, 100},
	} {
		got, err := tbl.Scan(ctx, c.r)
		if err != nil || len(got) != c.count {
			t.Errorf("%s: %d records, %v; want %d", c.name, len(got), err, c.count)
			continue
		}
		if c.count > 0 && (got[0].Value.N != c.first || got[len(got)-1].Value.N != c.last || got[0].Revision == 0) {
			t.Errorf("%s: %+v to %+v", c.name, got[0], got[len(got)-1])
		}
	}
	if gone, err := tbl.Prune(ctx, 10); gone != n-10 || err != nil {
		t.Errorf("Prune: %d, %v", gone, err)
	}
	left, err := tbl.List(ctx)
	if err != nil || len(left) != 10 || left[0].N != n-10 {
		t.Errorf("after Prune: %v, %v", left, err)
	}
	if gone, err := tbl.Prune(ctx, 10); gone != 0 || err != nil {
		t.Errorf("second Prune: %d, %v", gone, err)
	}
	if gone, err := tbl.Prune(ctx, 0); gone != 10 || err != nil {
		t.Errorf("Prune of all: %d, %v", gone, err)
	}
}

// Two transactions that each check "nobody else" by a scan and then write to
// different keys must not both succeed.
func TestScanInTransactionGuardsTheRange(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	tbl := store.NewTable[thing](db, own("one-only"), 1)
	taken := errors.New("taken")
	for round := range 10 {
		prefix := fmt.Sprintf("r%d/", round)
		var wg sync.WaitGroup
		results := make([]error, 4)
		for i := range results {
			wg.Go(func() {
				results[i] = db.Txn(ctx, func(tx *store.Tx) error {
					all, err := tbl.In(tx).List(ctx, prefix)
					if err != nil {
						return err
					}
					if len(all) > 0 {
						return taken
					}
					return tbl.In(tx).Create(ctx, fmt.Sprintf("%s%d", prefix, i), thing{})
				})
			})
		}
		wg.Wait()
		won := 0
		for _, err := range results {
			if err == nil {
				won++
			} else if !errors.Is(err, taken) {
				t.Fatal(err)
			}
		}
		if won != 1 {
			t.Fatalf("round %d: %d transactions succeeded, want 1", round, won)
		}
	}
}

// TestScanOfHistory has what a scan reads compacted away under it: the
// transaction begins anew, with the current state.
func TestScanOfHistory(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	raw := store.NewRawTable(db, "test-raw")
	put := func(from, to int, value string) {
		if err := db.Txn(ctx, func(tx *store.Tx) error {
			for i := from; i < to; i++ {
				if err := raw.In(tx).Set(fmt.Sprintf("%04d", i), []byte(value)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	put(0, 1000, "old")
	runs, seen := 0, 0
	err = db.View(ctx, func(tx *store.Tx) error {
		runs, seen = runs+1, 0
		return raw.In(tx).Scan(ctx, "", func(e store.Entry[[]byte]) bool {
			if want := map[int]string{1: "old", 2: "new"}[runs]; string(e.Value) != want {
				t.Errorf("run %d: %s = %q", runs, e.Key, e.Value)
			}
			if seen++; runs == 1 && seen == 1 {
				put(0, 1000, "new")
				rev, err := db.Revision(ctx)
				if err == nil {
					err = db.Compact(ctx, rev)
				}
				if err != nil {
					t.Error(err)
				}
			}
			return true
		})
	})
	if err != nil || runs != 2 || seen != 1000 {
		t.Errorf("%d runs, the last saw %d records: %v", runs, seen, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	err = db.View(ctx, func(tx *store.Tx) error {
		return raw.In(tx).Scan(ctx, "", func(store.Entry[[]byte]) bool { cancel(); return true })
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a scan whose context ended: %v", err)
	}
}
