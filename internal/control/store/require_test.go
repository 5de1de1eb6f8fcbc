package store_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"strongroom/internal/control/store"
)

// TestRequire commits while there is a record, whatever becomes of it else, and not
// once it is gone.
func TestRequire(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	groups, keys := store.NewTable[int](db, "groups", 1), store.NewTable[string](db, "keys", 1)
	if err := groups.Create(ctx, "prod", 1); err != nil {
		t.Fatal(err)
	}
	runs := 0
	add := func(key string, meanwhile func()) error {
		runs = 0
		return db.Txn(ctx, func(tx *store.Tx) error {
			runs++
			if err := groups.In(tx).Require(ctx, "prod"); err != nil {
				return err
			}
			if runs == 1 {
				meanwhile()
			}
			return keys.In(tx).Set(key, "k")
		})
	}
	change := func() {
		if _, err := groups.Update(ctx, "prod", func(v *int) error { *v++; return nil }); err != nil {
			t.Error(err)
		}
	}
	remove := func() {
		if err := db.Txn(ctx, func(tx *store.Tx) error { return groups.In(tx).Delete(ctx, "prod") }); err != nil {
			t.Error(err)
		}
	}
	if err := add("a", func() {}); err != nil || runs != 1 {
		t.Errorf("a record that is there: %v in %d runs", err, runs)
	}
	if err := add("b", change); err != nil || runs != 1 {
		t.Errorf("a record that changes: %v in %d runs", err, runs)
	}
	if err := add("c", remove); !store.IsNotFound(err) || runs != 2 {
		t.Errorf("a record that goes: %v in %d runs", err, runs)
	}
	if err := add("d", func() {}); !store.IsNotFound(err) {
		t.Errorf("no record: %v", err)
	}
	if list, err := keys.List(ctx); err != nil || len(list) != 2 {
		t.Errorf("%d keys, %v; want a and b", len(list), err)
	}
	err = db.Txn(ctx, func(tx *store.Tx) error {
		if err := groups.In(tx).Set("prod", 5); err != nil {
			return err
		}
		return groups.In(tx).Require(ctx, "prod")
	})
	if err != nil {
		t.Errorf("a record that the transaction makes itself: %v", err)
	}
}

// TestRequireTogether has records required and removed at once, by transactions that
// are committed together: none is made for what is gone.
func TestRequireTogether(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	groups, keys := store.NewTable[int](db, "groups", 1), store.NewTable[string](db, "keys", 1)
	for round := range 20 {
		group := fmt.Sprint("g", round)
		if err := groups.Create(ctx, group, 1); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				err := db.Txn(ctx, func(tx *store.Tx) error {
					return errors.Join(groups.In(tx).Require(ctx, group), keys.In(tx).Set(fmt.Sprint(group, "/", i), "k"))
				})
				if err != nil && !store.IsNotFound(err) {
					t.Error(err)
				}
			})
		}
		all.Go(func() {
			err := db.Txn(ctx, func(tx *store.Tx) error {
				if left, err := keys.In(tx).List(ctx, group+"/"); err != nil || len(left) > 0 {
					return err // it stays
				}
				return groups.In(tx).Delete(ctx, group)
			})
			if err != nil {
				t.Error(err)
			}
		})
		all.Wait()
		var left []string
		err := db.View(ctx, func(tx *store.Tx) (err error) {
			left, err = keys.In(tx).List(ctx, group+"/")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := groups.Get(ctx, group); store.IsNotFound(err) && len(left) > 0 {
			t.Errorf("round %d: %d keys of a group that is gone", round, len(left))
		}
	}
}
