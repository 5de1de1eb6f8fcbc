package objectstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/control/store"
	"strongroom/internal/keys/kmip/kmipserver"
)

var past = time.Unix(1_700_000_000, 0)

// due returns the identifiers of objects whose state a date has changed, sorted.
func (n *node) due(t testing.TB) (ids []string) {
	t.Helper()
	err := n.View(context.Background(), account, func(r kmipserver.Reader) error {
		ids = nil
		for o, err := range r.Find(kmipserver.Query{Due: past}) {
			if err != nil {
				return err
			}
			ids = append(ids, o.ID)
		}
		slices.Sort(ids)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func date(name kmip.AttributeName, at time.Time) func(*kmipserver.Object) {
	return func(o *kmipserver.Object) {
		o.Attributes = slices.DeleteFunc(o.Attributes, func(a kmip.Attribute) bool { return a.AttributeName == name })
		o.Attributes = append(o.Attributes, kmip.Attribute{AttributeName: name, AttributeValue: at})
	}
}

// asBefore turns the database into what an early release left: names with entries
// of their own, and no index of dates.
func (n *node) asBefore(t testing.TB) {
	t.Helper()
	err := n.db.Txn(t.Context(), func(tx *store.Tx) error {
		for _, table := range []*store.Table[[]byte]{n.names.buckets, n.dates.table} {
			entries, err := table.In(tx).Entries(t.Context(), "")
			if err != nil {
				return err
			}
			for _, e := range entries {
				if err := table.In(tx).Delete(t.Context(), e.Key); err != nil {
					return err
				}
			}
		}
		if err := n.dates.built.In(tx).Delete(t.Context(), indexBuilt); err != nil && !store.IsNotFound(err) {
			return err
		}
		objects, err := n.objects.In(tx).Entries(t.Context(), "")
		if err != nil {
			return err
		}
		for _, e := range objects {
			account, id, err := splitKey(e.Key)
			if err != nil {
				return err
			}
			o, _, err := unseal(n.ring, account, id, e.Value)
			if err != nil {
				return err
			}
			o.Material.Close()
			for _, name := range namesOf(o) {
				if err := n.names.loose.In(tx).Set(loosePrefix(account, name)+id, []byte{1}); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	n.restart(t)
}

// TestIndexOfBefore completes the indexes of a database of an early release,
// interrupted by a stop after every step: what can be found is found in between.
func TestIndexOfBefore(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	const objects = 4
	var ids, due []string
	for i := range objects {
		id, _ := n.create(t, fmt.Sprint("name-", i))
		ids = append(ids, id)
		if i%2 == 0 {
			n.change(t, id, date(kmip.AttributeNameActivationDate, past))
			due = append(due, id)
		}
	}
	both, _ := n.create(t, "name-0") // a name of two objects
	check := func(when string) {
		t.Helper()
		for i, id := range ids {
			want := []string{id}
			if i == 0 {
				want = append(want, both)
			}
			if found := n.find(t, account, fmt.Sprint("name-", i)); !slices.Equal(found, want) {
				t.Errorf("%s: name %d: %v, not %v", when, i, found, want)
			}
		}
		if found := n.due(t); !slices.Equal(found, due) {
			t.Errorf("%s: due are %v, not %v", when, found, due)
		}
	}
	check("new")
	n.asBefore(t)
	check("as before")
	// A change of what has not been moved.
	n.change(t, ids[3], func(o *kmipserver.Object) {
		o.Attributes = slices.DeleteFunc(o.Attributes, func(a kmip.Attribute) bool { return a.AttributeName == kmip.AttributeNameName })
	})
	if found := n.find(t, account, "name-3"); len(found) != 0 {
		t.Errorf("found %v by the name that it lost", found)
	}
	ids = ids[:3]
	for step := 0; ; step++ {
		entries, err := n.names.loose.Scan(t.Context(), store.Range{Limit: 1})
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			break
		}
		// Twice, as by two nodes.
		for range 2 {
			if err := n.names.foldSome(t.Context(), entries); err != nil {
				t.Fatal(err)
			}
		}
		n.restart(t)
		check(fmt.Sprint("folded ", step))
	}
	batches, err := n.dated(t.Context())
	if err != nil || len(batches) != 1 || len(batches[0]) != len(due) {
		t.Fatal(batches, err)
	}
	for i := range batches[0] {
		if err := n.indexDates(t.Context(), batches[0][i:i+1]); err != nil {
			t.Fatal(err)
		}
		n.restart(t)
		check(fmt.Sprint("indexed ", i))
	}
	for range 2 {
		if err := n.Index(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !n.names.folded.Load() || !n.dates.complete.Load() {
			t.Error("it does not know that the indexes are complete")
		}
		check("complete")
		n.restart(t)
		check("started anew")
	}
	if count, err := n.names.loose.Count(t.Context()); err != nil || count != 0 {
		t.Errorf("%d names are left, %v", count, err)
	}
}

// TestDue has the index of dates follow what becomes of an object.
func TestDue(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	if err := n.Index(t.Context()); err != nil {
		t.Fatal(err)
	}
	id, _ := n.create(t, "")
	state := func(s kmip.State) func(*kmipserver.Object) {
		return func(o *kmipserver.Object) {
			o.Attributes = slices.DeleteFunc(o.Attributes, func(a kmip.Attribute) bool { return a.AttributeName == kmip.AttributeNameState })
			o.Attributes = append(o.Attributes, kmip.Attribute{AttributeName: kmip.AttributeNameState, AttributeValue: s})
		}
	}
	for i, step := range []struct {
		change func(*kmipserver.Object)
		due    bool
	}{
		{date(kmip.AttributeNameActivationDate, past.Add(time.Second)), false},
		{date(kmip.AttributeNameActivationDate, past), true},
		{date(kmip.AttributeNameActivationDate, past.Add(-time.Hour)), true},
		{func(o *kmipserver.Object) { o.Archived = true }, false},
		{func(o *kmipserver.Object) { o.Archived = false }, true},
		{state(kmip.StateActive), false},
		{date(kmip.AttributeNameDeactivationDate, time.Unix(-5, 0)), true},
		{state(kmip.StateDeactivated), false},
		{state(kmip.StateActive), true},
		{destroy, true},
		{state(kmip.StateDestroyed), false},
	} {
		n.change(t, id, step.change)
		if found := n.due(t); len(found) == 1 != step.due {
			t.Errorf("step %d: due are %v", i, found)
		}
		entries, err := n.dates.table.Count(t.Context())
		if err != nil || entries > 1 || step.due && entries != 1 {
			t.Errorf("step %d: %d entries, %v", i, entries, err)
		}
	}
}

// TestDamagedBucket has names that are not there refused, not found missing.
func TestDamagedBucket(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.create(t, "a")
	key, _ := place(account, "a")
	good, err := n.names.buckets.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"empty": {}, "no entry": good[:1], "cut": good[:len(good)-1], "newer": append([]byte{2}, good[1:]...)} {
		if err := n.names.buckets.Put(t.Context(), key, bytes.Clone(bad)); err != nil {
			t.Fatal(err)
		}
		err := n.View(t.Context(), account, func(r kmipserver.Reader) error {
			for _, err := range r.Find(kmipserver.Query{Name: "a"}) {
				return err
			}
			return nil
		})
		if !errors.Is(err, errCorrupt) && !errors.Is(err, errVersion) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
