package store_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// TestDumpIsOfOneRevision reads a database page by page while it changes, and
// loads what was read into another one.
func TestDumpIsOfOneRevision(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	open := func(token string) *store.DB {
		d, err := store.Open(ctx, store.Config{Dir: t.TempDir(), Token: token})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	d := open("")
	raw, other := store.NewRawTable(d, "raw"), store.NewTable[thing](d, "other", 1)
	want := map[string]string{}
	const records = 1600
	var first []store.Record
	for i := range records {
		key := fmt.Sprintf("%04d", i)
		first = append(first, store.Record{Name: "raw/" + key, Value: []byte("v" + key)})
		want["raw/"+key] = "v" + key
	}
	if err := d.Load(ctx, first); err != nil {
		t.Fatal(err)
	}
	if err := other.Put(ctx, "a/b", thing{N: 3}); err != nil {
		t.Fatal(err)
	}
	want["other/a/b"] = `{"schema":1,"data":{"name":"","n":3}}`
	lease, err := d.NewLease(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.PutLeased(ctx, "alive", thing{}, lease); err != nil {
		t.Fatal(err)
	}
	dump, err := d.Dump(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, changed, last := map[string]string{}, false, ""
	var all []store.Record
	err = dump.Each(ctx, func(name string, value []byte) error {
		if name <= last {
			t.Errorf("%s comes behind %s", name, last)
		}
		got[name], last = string(value), name
		all = append(all, store.Record{Name: name, Value: value})
		if !changed { // what comes now is not in it
			changed = true
			if err := raw.Put(ctx, "9999", []byte("new")); err != nil {
				return err
			}
			return raw.Put(ctx, "1599", []byte("changed"))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if n, err := dump.Count(ctx, "raw"); err != nil || n != records {
		t.Errorf("%d records, %v", n, err)
	}
	into := open("another")
	if err := into.Load(ctx, all); err != nil {
		t.Fatal(err)
	}
	if v, err := store.NewRawTable(into, "raw").Get(ctx, "1599"); err != nil || !bytes.Equal(v, []byte("v1599")) {
		t.Errorf("loaded: %q, %v", v, err)
	}
	for _, bad := range []string{"raw", "raw/", "/x", "Raw/x", "raw/\x00"} {
		if err := into.Load(ctx, []store.Record{{Name: bad}}); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
