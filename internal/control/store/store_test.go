package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// db is the one member that the tests of this package share; each test has tables
// of its own.
var db *store.DB

// runs counts the tables of [own].
var runs atomic.Int64

// own returns a table's name that no other test has, nor the same one when it is
// run again.
func own(name string) string {
	name += "-"
	for n := runs.Add(1); n > 0; n /= 26 {
		name += string(rune('a' + n%26))
	}
	return name
}

func TestMain(m *testing.M) {
	code := func() int {
		dir, err := os.MkdirTemp("", "store-test-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		db, err = store.Open(context.Background(), store.Config{Dir: dir, Log: slog.Default()})
		if err != nil {
			panic(err)
		}
		code := m.Run()
		if err := db.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close:", err)
			return 1
		}
		return code
	}()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

type thing struct {
	Name string `json:"name"`
	N    int    `json:"n"`
}

func TestOpenIsQuickAndDurable(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := t.TempDir()
	start := time.Now()
	d, err := store.Open(ctx, store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("ready after %v", took)
	if took > 30*time.Second {
		t.Errorf("ready after %v, want well under a second on a quiet machine", took)
	}
	if _, err := store.Open(ctx, store.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second Open of an open directory: %v", err)
	}
	tbl := store.NewTable[thing](d, "thing", 1)
	for i := range 50 {
		if err := tbl.Create(ctx, fmt.Sprintf("k%02d", i), thing{"a", i}); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := tbl.Get(ctx, "k01"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Get after Close: %v", err)
	}

	start = time.Now()
	d, err = store.Open(ctx, store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	t.Logf("ready again after %v", time.Since(start))
	all, err := store.NewTable[thing](d, "thing", 1).List(ctx)
	if err != nil || len(all) != 50 || all[49] != (thing{"a", 49}) {
		t.Fatalf("after reopening: %d records, %v", len(all), err)
	}
}

func TestTableConformance(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	tbl := store.NewTable[thing](db, own("conformance"), 1)

	if _, err := tbl.Get(ctx, "a"); !errors.Is(err, store.ErrNotFound) || errs.KindOf(err) != errs.NotFound {
		t.Errorf("Get of nothing: %v", err)
	}
	if err := tbl.Create(ctx, "a", thing{"a", 1}); err != nil {
		t.Fatal(err)
	}
	if err := tbl.Create(ctx, "a", thing{"b", 2}); !errors.Is(err, store.ErrExists) || errs.KindOf(err) != errs.Exists {
		t.Errorf("second Create: %v", err)
	}
	got, err := tbl.Update(ctx, "a", func(v *thing) error { v.N++; return nil })
	if err != nil || got.N != 2 {
		t.Errorf("Update: %+v, %v", got, err)
	}
	boom := errors.New("boom")
	if got, err := tbl.Update(ctx, "a", func(v *thing) error { v.N = 99; return boom }); err != boom || got != (thing{}) {
		t.Errorf("Update with error: %+v, %v", got, err)
	}
	if got, _ := tbl.Get(ctx, "a"); got != (thing{"a", 2}) {
		t.Errorf("after refused update: %+v", got)
	}
	if _, err := tbl.Update(ctx, "zz", func(*thing) error { return nil }); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Update of nothing: %v", err)
	}
	if err := tbl.Put(ctx, "b", thing{"b", 1}); err != nil {
		t.Fatal(err)
	}
	if err := tbl.Put(ctx, "b", thing{"b", 5}); err != nil {
		t.Fatal(err)
	}
	all, err := tbl.List(ctx)
	if diff := cmp.Diff([]thing{{"a", 2}, {"b", 5}}, all); err != nil || diff != "" {
		t.Errorf("List: %v %s", err, diff)
	}
	if n, err := tbl.Count(ctx); n != 2 || err != nil {
		t.Errorf("Count: %d, %v", n, err)
	}
	if err := tbl.Delete(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := tbl.Delete(ctx, "a"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("second Delete: %v", err)
	}
	for _, key := range []string{"", strings.Repeat("k", store.MaxKeyBytes+1), "a\x00b", "\xff"} {
		if err := tbl.Put(ctx, key, thing{}); !errors.Is(err, store.ErrInvalidKey) {
			t.Errorf("Put at key %.10q: %v", key, err)
		}
	}
	if err := tbl.Put(ctx, "big", thing{Name: strings.Repeat("x", store.MaxValueBytes)}); !errors.Is(err, store.ErrTooLarge) {
		t.Errorf("Put of a too large value: %v", err)
	}
}

func TestConcurrentUpdatesAllCount(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	tbl := store.NewTable[thing](db, own("counter"), 1)
	if err := tbl.Create(ctx, "c", thing{}); err != nil {
		t.Fatal(err)
	}
	const workers, each = 8, 10
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				if _, err := tbl.Update(ctx, "c", func(v *thing) error { v.N++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if v, err := tbl.Get(ctx, "c"); v.N != workers*each || err != nil {
		t.Errorf("count is %d, %v; want %d", v.N, err, workers*each)
	}
}

func TestTransactionSeesItsWritesAndIsAtomic(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	tbl := store.NewTable[thing](db, own("atomic"), 1)
	other := store.NewTable[thing](db, own("atomic-other"), 1)
	boom := errors.New("boom")
	for _, end := range []error{boom, nil} {
		err := db.Txn(ctx, func(tx *store.Tx) error {
			a := tbl.In(tx)
			if err := a.Create(ctx, "a", thing{"a", 1}); err != nil {
				return err
			}
			if err := a.Create(ctx, "a", thing{}); !errors.Is(err, store.ErrExists) {
				t.Errorf("own write not seen by Create: %v", err)
			}
			if err := a.Create(ctx, "b", thing{"b", 1}); err != nil {
				return err
			}
			if err := a.Delete(ctx, "b"); err != nil {
				return err
			}
			if ok, err := a.Has(ctx, "b"); ok || err != nil {
				t.Errorf("own deletion not seen: %v, %v", ok, err)
			}
			if err := other.In(tx).Put(ctx, "x", thing{"x", 1}); err != nil {
				return err
			}
			if all, err := a.List(ctx, ""); len(all) != 1 || err != nil {
				t.Errorf("List in the transaction: %v, %v", all, err)
			}
			return end
		})
		if err != end {
			t.Fatalf("Txn: %v", err)
		}
		na, _ := tbl.Count(ctx)
		no, _ := other.Count(ctx)
		want := int64(1)
		if end != nil {
			want = 0
		}
		if na != want || no != want {
			t.Errorf("with end %v: %d and %d records, want %d each", end, na, no, want)
		}
	}
	err := db.View(ctx, func(tx *store.Tx) error { return tbl.In(tx).Delete(ctx, "a") })
	if _, gerr := tbl.Get(ctx, "a"); err != nil || gerr != nil {
		t.Errorf("a View wrote: %v, %v", err, gerr)
	}
}

func TestSchema(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	type newThing struct {
		Name  string `json:"name"`
		Added string `json:"added"`
	}
	name := own("schema")
	old, same, newer := store.NewTable[thing](db, name, 1), store.NewTable[newThing](db, name, 1), store.NewTable[newThing](db, name, 2)
	if err := old.Put(ctx, "k", thing{"k", 3}); err != nil {
		t.Fatal(err)
	}
	if v, err := newer.Get(ctx, "k"); err != nil || v != (newThing{Name: "k"}) {
		t.Errorf("new release reads old record: %+v, %v", v, err)
	}
	if err := same.Put(ctx, "k", newThing{"k", "x"}); err != nil {
		t.Fatal(err)
	}
	if v, err := old.Get(ctx, "k"); err != nil || v != (thing{Name: "k"}) {
		t.Errorf("unknown field of the same schema: %+v, %v", v, err)
	}
	if err := newer.Put(ctx, "k", newThing{"k", "new"}); err != nil {
		t.Fatal(err)
	}
	_, getErr := old.Get(ctx, "k")
	_, listErr := old.List(ctx)
	_, updateErr := old.Update(ctx, "k", func(*thing) error { return nil })
	for _, err := range []error{getErr, listErr, updateErr, old.Put(ctx, "k", thing{}), old.Delete(ctx, "k")} {
		if !errors.Is(err, store.ErrNewerSchema) {
			t.Errorf("old release on a new record: %v", err)
		}
	}
	if v, err := newer.Get(ctx, "k"); err != nil || v.Added != "new" {
		t.Errorf("the record was touched: %+v, %v", v, err)
	}
}

func TestLease(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	tbl := store.NewTable[thing](db, own("presence"), 1)
	long, err := db.NewLease(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := tbl.PutLeased(ctx, "other", thing{}, long); err != nil {
		t.Fatal(err)
	}
	if err := long.Renew(ctx); err != nil {
		t.Fatal(err)
	}
	// The watch sees it vanish when nobody renews.
	var l *store.Lease
	gone := errors.New("gone")
	wctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := tbl.Watch(wctx, "", 0, func(c store.Change[thing]) error {
		switch {
		case c.Op == store.Synced:
			for began := time.Now(); ; began = time.Now() {
				if l, err = db.NewLease(wctx, time.Second); err != nil {
					return err
				}
				err = tbl.PutLeased(wctx, "host", thing{}, l)
				if !errors.Is(err, store.ErrLeaseExpired) || time.Since(began) < time.Second { // else the machine is busy
					return err
				}
			}
		case c.Op == store.Deleted && c.Key == "host":
			return gone
		case c.Op == store.Deleted:
			return fmt.Errorf("%s is gone, too", c.Key)
		}
		return nil
	}); err != gone {
		t.Fatalf("Watch: %v", err)
	}
	if err := l.Renew(ctx); !errors.Is(err, store.ErrLeaseExpired) {
		t.Errorf("Renew of an expired lease: %v", err)
	}
	if err := l.Revoke(ctx); err != nil {
		t.Errorf("Revoke of an expired lease: %v", err)
	}
	if err := tbl.PutLeased(ctx, "host", thing{}, l); !errors.Is(err, store.ErrLeaseExpired) {
		t.Errorf("PutLeased with an expired lease: %v", err)
	}
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	n, err := db.Snapshot(t.Context(), &b)
	if err != nil || n != int64(b.Len()) || n < 512 {
		t.Fatalf("Snapshot: %d of %d bytes, %v", n, b.Len(), err)
	}
	data, sum := b.Bytes()[:b.Len()-sha256.Size], b.Bytes()[b.Len()-sha256.Size:]
	if len(data)%512 != 0 || sha256.Sum256(data) != [32]byte(sum) {
		t.Error("the snapshot does not end with the SHA-256 of its data")
	}
}

func TestNoListener(t *testing.T) {
	t.Parallel()
	// A listening socket of this process would be in one of these tables with
	// an inode that one of our descriptors names.
	own := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if l, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil && strings.HasPrefix(l, "socket:[") {
			own[strings.Trim(l, "socket:[]")] = true
		}
	}
	for _, table := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		b, err := os.ReadFile(table)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(b), "\n") {
			f := strings.Fields(line)
			const listen = "0A"
			if len(f) > 9 && f[3] == listen && own[f[9]] {
				t.Errorf("the database listens on %s", f[1])
			}
		}
	}
}

func TestRawTable(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	raw := store.NewRawTable(db, own("raw"))
	const n = 2500 // more than two pages
	for i := 0; i < n; i += 500 {
		if err := db.Txn(ctx, func(tx *store.Tx) error {
			for j := i; j < i+500; j++ {
				if err := raw.In(tx).Create(ctx, fmt.Sprintf("a/%04d", j), []byte{0xff, byte(j), 0}); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := raw.Put(ctx, "b/0000", []byte("other")); err != nil {
		t.Fatal(err)
	}
	err := db.View(ctx, func(tx *store.Tx) error {
		seen := 0
		if err := raw.In(tx).Scan(ctx, "a/", func(e store.Entry[[]byte]) bool {
			if e.Key != fmt.Sprintf("a/%04d", seen) || !bytes.Equal(e.Value, []byte{0xff, byte(seen), 0}) {
				t.Errorf("record %d is %q = %x", seen, e.Key, e.Value)
			}
			seen++
			return true
		}); err != nil {
			return err
		}
		if seen != n {
			t.Errorf("the scan saw %d records, want %d", seen, n)
		}
		seen = 0
		if err := raw.In(tx).Scan(ctx, "a/", func(store.Entry[[]byte]) bool { seen++; return seen < 3 }); err != nil || seen != 3 {
			t.Errorf("a scan that was ended saw %d, %v", seen, err)
		}
		var between []string
		if err := raw.In(tx).ScanBetween(ctx, "a/0003", "a/0005", func(e store.Entry[[]byte]) bool {
			between = append(between, e.Key)
			return true
		}); err != nil || !slices.Equal(between, []string{"a/0003", "a/0004"}) {
			t.Errorf("a scan between two keys saw %q, %v", between, err)
		}
		if err := raw.In(tx).ScanBetween(ctx, "a/0005", "a/0005", func(store.Entry[[]byte]) bool { t.Error("there is something between a key and itself"); return true }); err != nil {
			return err
		}
		first, err := raw.In(tx).Entry(ctx, "a/0000")
		if err != nil || first.Revision == 0 {
			t.Errorf("entry: %+v, %v", first, err)
		}
		last, err := raw.In(tx).Entry(ctx, "b/0000")
		if err != nil || last.Revision <= first.Revision {
			t.Errorf("entries: %+v behind %+v, %v", last, first, err)
		}
		if _, err := raw.In(tx).Entry(ctx, "b/none"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("missing: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
