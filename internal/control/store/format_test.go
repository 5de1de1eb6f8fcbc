package store_test

import (
	"testing"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// TestFormat: a database admits releases that know its format, and no others; the
// format goes up only.
func TestFormat(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	do := func(f func(tx *store.Tx) error) error { return db.Txn(ctx, f) }
	for _, step := range []struct {
		raise int
		known int
		kind  errs.Kind
	}{
		{1, 1, errs.Other}, {3, 3, errs.Other}, {2, 2, errs.InvalidState}, {2, 1, errs.InvalidState}, {3, 4, errs.Other},
	} {
		if err := do(func(tx *store.Tx) error { return tx.Raise(ctx, store.Format{Version: step.raise, Release: "9.9"}) }); err != nil {
			t.Fatal(err)
		}
		err := do(func(tx *store.Tx) error { return tx.Admit(ctx, step.known) })
		if (err != nil) != (step.kind != errs.Other) || err != nil && (errs.KindOf(err) != step.kind || errs.HintOf(err) == "") {
			t.Errorf("raised to %d, a release that knows %d: %v", step.raise, step.known, err)
		}
	}
	// One that was admitted does not commit once the format was raised.
	attempts := 0
	things := store.NewTable[thing](db, "things", 1)
	err = do(func(tx *store.Tx) error {
		if err := tx.Admit(ctx, 3); err != nil {
			return err
		}
		if attempts++; attempts == 1 {
			if err := do(func(other *store.Tx) error { return other.Raise(ctx, store.Format{Version: 4, Release: "9.9"}) }); err != nil {
				return err
			}
		}
		return things.In(tx).Put(ctx, "k", thing{})
	})
	if errs.KindOf(err) != errs.InvalidState || attempts != 1 {
		t.Errorf("after %d attempts: %v", attempts, err)
	}
}
