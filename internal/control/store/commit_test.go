package store_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// TestCommitsTogether has many transactions at once that disturb each other in
// every way: each is as if it were alone, and they share steps of the log.
func TestCommitsTogether(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	numbers, names := store.NewTable[int](db, "numbers", 1), store.NewTable[string](db, "names", 1)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const workers, times, keys = 12, 25, 3
	for i := range keys {
		for _, table := range []string{"sum", "left", "right"} {
			if err := numbers.Create(ctx, fmt.Sprint(table, i), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	before, err := db.Revision(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var committed, own atomic.Int64
	var sums [keys]atomic.Int64
	errTaken := errors.New("taken")
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			for n := range times {
				i := r.IntN(keys)
				var err error
				switch r.IntN(4) {
				case 0: // no update is lost
					if _, err = numbers.Update(ctx, fmt.Sprint("sum", i), func(v *int) error { *v++; return nil }); err == nil {
						sums[i].Add(1)
					}
				case 1: // of two keys one at most is 1, whoever sets which
					this, that := "left", "right"
					if r.IntN(2) == 0 {
						this, that = that, this
					}
					err = db.Txn(ctx, func(tx *store.Tx) error {
						other, err := numbers.In(tx).Get(ctx, fmt.Sprint(that, i))
						if err != nil {
							return err
						}
						return numbers.In(tx).Set(fmt.Sprint(this, i), (1-other)*r.IntN(2))
					})
				case 2: // a name has one holder
					err = db.Txn(ctx, func(tx *store.Tx) error {
						prefix := fmt.Sprintf("%d/", r.IntN(20))
						holders, err := names.In(tx).List(ctx, prefix)
						if err != nil {
							return err
						}
						if len(holders) > 0 {
							return errTaken
						}
						return names.In(tx).Set(fmt.Sprintf("%s%d", prefix, w), "holder")
					})
				default: // nobody else's
					own.Add(1)
					err = numbers.Put(ctx, fmt.Sprintf("own%d-%d", w, n), n)
				}
				if errors.Is(err, errTaken) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				committed.Add(1)
			}
		})
	}
	all.Wait()
	after, err := db.Revision(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d transactions in %d revisions", committed.Load(), after-before)
	if after-before >= committed.Load() {
		t.Error("none was committed together with another")
	}
	for i := range keys {
		var left, right int
		if n, err := numbers.Get(ctx, fmt.Sprint("sum", i)); err != nil || int64(n) != sums[i].Load() {
			t.Errorf("sum %d is %d, want %d, %v", i, n, sums[i].Load(), err)
		}
		if left, err = numbers.Get(ctx, fmt.Sprint("left", i)); err == nil {
			right, err = numbers.Get(ctx, fmt.Sprint("right", i))
		}
		if err != nil || left+right > 1 {
			t.Errorf("pair %d: %d and %d, %v", i, left, right, err)
		}
	}
	entries, err := names.Scan(ctx, store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	holders := map[string]string{}
	for _, e := range entries {
		name, holder, _ := strings.Cut(e.Key, "/")
		if other, ok := holders[name]; ok {
			t.Errorf("%s and %s hold the name %s", other, holder, name)
		}
		holders[name] = holder
	}
	if mine, err := numbers.Scan(ctx, store.Range{Prefix: "own"}); err != nil || int64(len(mine)) != own.Load() {
		t.Errorf("%d of %d own keys are there, %v", len(mine), own.Load(), err)
	}
}

// TestLargeAmongOthers: a transaction with as many writes as there may be is
// committed, and one with more fails alone, whoever comes at the same time.
func TestLargeAmongOthers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	numbers := store.NewTable[int](db, "numbers", 1)
	large := func(name string, n int) error {
		return db.Txn(ctx, func(tx *store.Tx) error {
			for i := range n {
				if err := numbers.In(tx).Set(fmt.Sprintf("%s%d", name, i), i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	// On a busy machine a transaction may take longer than the database waits.
	inTime := func(f func() error) (err error) {
		for began := time.Now(); time.Since(began) < 10*time.Minute; {
			if err = f(); errs.KindOf(err) != errs.Unavailable {
				return err
			}
		}
		return err
	}
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for n := range 40 {
				if err := inTime(func() error { return numbers.Put(ctx, fmt.Sprintf("small%d-%d", w, n), n) }); err != nil {
					t.Errorf("a small one: %v", err)
				}
			}
		})
	}
	for n := range 4 {
		if err := inTime(func() error { return large(fmt.Sprintf("full%d-", n), 4096) }); err != nil {
			t.Errorf("4096 writes: %v", err)
		}
		if err := inTime(func() error { return large(fmt.Sprintf("over%d-", n), 4097) }); !errors.Is(err, store.ErrTooLarge) {
			t.Errorf("4097 writes: %v", err)
		}
	}
	all.Wait()
}
