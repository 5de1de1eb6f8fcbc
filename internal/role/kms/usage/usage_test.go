package usage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openDB(t *testing.T) *store.DB {
	t.Helper()
	db, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(t.TempDir(), "db"), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// bench is a meter with a clock and keys of its own.
type bench struct {
	*Meter
	keys atomic.Int64
	now  time.Time
}

func open(t *testing.T, db *store.DB) *bench {
	t.Helper()
	b := &bench{now: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)}
	var err error
	b.Meter, err = Open(t.Context(), db, func(context.Context, string) (int64, error) { return b.keys.Load(), nil }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b.Meter.now = func() time.Time { return b.now }
	return b
}

// clientOf is a client in an account of one group without quota.
func clientOf(app directory.Application, group directory.Group) Client {
	return Client{Application: app, Group: group, Account: directory.Account{Name: "a"}, Groups: func() []string { return []string{group.Name} }}
}

// try does one operation, which makes a key if makes, and returns its quota's
// refusal.
func (b *bench) try(t *testing.T, app directory.Application, group directory.Group, makes bool) *Exceeded {
	t.Helper()
	count := int64(0)
	if makes {
		count = 1
	}
	done, err := b.Admit(t.Context(), clientOf(app, group), count)
	if err != nil {
		e, ok := errors.AsType[*Exceeded](err)
		if !ok {
			t.Fatal(err)
		}
		return e
	}
	if makes {
		b.keys.Add(1)
	}
	done(makes)
	return nil
}

func TestOperations(t *testing.T) {
	t.Parallel()
	b := open(t, openDB(t))
	group := directory.Group{Name: "g", Quota: directory.Quota{Operations: 5, Period: time.Hour}}
	small := directory.Application{Name: "small", Quota: directory.Quota{Operations: 2, Period: time.Minute}}
	free := directory.Application{Name: "free"}
	for i := range 2 {
		if e := b.try(t, small, group, false); e != nil {
			t.Fatalf("operation %d: %v", i, e)
		}
	}
	e := b.try(t, small, group, false)
	if e == nil || *e != (Exceeded{Subject: "application/small", What: "operations", Limit: 2, Until: time.Date(2026, 3, 4, 5, 7, 0, 0, time.UTC)}) {
		t.Fatalf("over the application's quota: %+v", e)
	}
	for i := range 3 {
		if e := b.try(t, free, group, false); e != nil {
			t.Fatalf("operation %d of another: %v", i, e)
		}
	}
	if e := b.try(t, free, group, false); e == nil || e.Subject != "group/g" || !e.Until.Equal(time.Date(2026, 3, 4, 6, 0, 0, 0, time.UTC)) {
		t.Fatalf("over the group's quota: %+v", e)
	}
	b.now = b.now.Add(time.Minute)
	if e := b.try(t, small, group, false); e == nil || e.Subject != "group/g" {
		t.Fatalf("in the application's next period the group's quota still holds: %+v", e)
	}
	b.now = b.now.Add(time.Hour)
	if e := b.try(t, small, group, false); e != nil {
		t.Fatalf("in the next period: %v", e)
	}
	c := b.Of(Application("small"))
	if c.Operations != 3 || c.Refused != 2 || !c.LastUse.Equal(b.now) {
		t.Errorf("small: %+v", c)
	}
	if n, ends := c.In(small.Quota, b.now); n != 1 || !ends.Equal(time.Date(2026, 3, 4, 6, 8, 0, 0, time.UTC)) {
		t.Errorf("small, this period: %d until %v", n, ends)
	}
	if g := b.Of(Group("g")); g.Operations != 6 || g.Refused != 3 {
		t.Errorf("group: %+v", g)
	}
}

// TestKeysAtOnce has many clients make keys at once: the quota is never
// exceeded, and it is used up.
func TestKeysAtOnce(t *testing.T) {
	t.Parallel()
	b := open(t, openDB(t))
	group := directory.Group{Name: "g", Quota: directory.Quota{Keys: 100}}
	app := directory.Application{Name: "a"}
	var wait sync.WaitGroup
	for range 16 {
		wait.Go(func() {
			for i := range 50 {
				done, err := b.Admit(context.Background(), clientOf(app, group), 1)
				if err != nil {
					continue
				}
				made := i%5 != 0 // else it fails
				if made {
					if n := b.keys.Add(1); n > 100 {
						t.Errorf("%d keys", n)
					}
				}
				done(made)
			}
		})
	}
	wait.Wait()
	for b.try(t, app, group, true) == nil { // what was refused while others were under way
	}
	if n := b.keys.Load(); n != 100 {
		t.Errorf("%d keys at last", n)
	}
	if c := b.Of(Application("a")); c.Made != 100 || c.Refused == 0 {
		t.Errorf("counters: %+v", c)
	}
	if e := b.try(t, app, group, false); e != nil {
		t.Errorf("what makes no key: %v", e)
	}
	b.keys.Add(-1) // destroyed
	if e := b.try(t, app, group, true); e != nil {
		t.Errorf("after a key was destroyed: %v", e)
	}
}

// TestFlush has two meters, as of two nodes, in one database.
func TestFlush(t *testing.T) {
	t.Parallel()
	db := openDB(t)
	one, two := open(t, db), open(t, db)
	group := directory.Group{Name: "g", Quota: directory.Quota{Operations: 1000, Period: time.Hour}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, c Counters, operations int64) {
		t.Helper()
		if c.Operations != operations {
			t.Errorf("%s: %d operations, want %d", what, c.Operations, operations)
		}
	}
	for i := range 120 { // more than one transaction takes
		one.try(t, directory.Application{Name: fmt.Sprint("a", i)}, group, false)
	}
	must(one.Flush(t.Context()))
	two.try(t, directory.Application{Name: "a7"}, group, false)
	want("before the other's flush", two.Of(Group("g")), 1)
	must(two.Flush(t.Context()))
	want("after it", two.Of(Group("g")), 121)
	if n, _ := two.Of(Group("g")).In(group.Quota, two.now); n != 121 {
		t.Errorf("%d operations in the period", n)
	}
	one.try(t, directory.Application{Name: "a7"}, group, false)
	must(one.Flush(t.Context()))
	must(one.Flush(t.Context())) // adds nothing
	want("of both", one.Of(Application("a7")), 3)

	t.Log("a flush that fails loses nothing")
	broken, cancel := context.WithCancel(t.Context())
	cancel()
	one.try(t, directory.Application{Name: "a7"}, group, false)
	if err := one.Flush(broken); err == nil {
		t.Fatal("a flush without a database")
	}
	want("after it failed", one.Of(Application("a7")), 4)
	must(one.Flush(t.Context()))
	must(one.Forget(t.Context(), Application("a8")))
	again := open(t, db)
	want("after a start", again.Of(Application("a7")), 4)
	want("group, after a start", again.Of(Group("g")), 123)
	want("forgotten", again.Of(Application("a8")), 0)
}

// TestFlushKilled ends a process in the middle of a flush, and another repeats
// one that broke off: what was stored was done, once, and no subject has a part
// of it.
func TestFlushKilled(t *testing.T) {
	t.Parallel()
	const apps, times = 3*flushBatch - 7, 3
	for batches := range 4 { // stored before the end
		db := openDB(t)
		b := open(t, db)
		for a := range apps {
			for range times {
				b.try(t, directory.Application{Name: fmt.Sprintf("app-%03d", a)}, directory.Group{Name: "g"}, false)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		if batches == 0 {
			cancel()
		}
		watched := make(chan error, 1)
		synced := make(chan struct{})
		go func() {
			seen := 0
			watched <- b.table.Watch(ctx, "", 0, func(c store.Change[Counters]) error {
				if c.Op == store.Synced {
					close(synced)
				}
				if c.Op == store.Put {
					if seen++; batches > 0 && seen == batches*flushBatch-1 {
						cancel()
					}
				}
				return nil
			})
		}()
		select {
		case <-synced:
		case <-ctx.Done():
		}
		err := b.Flush(ctx)
		cancel()
		<-watched
		check := func(what string, m *Meter, all bool) {
			t.Helper()
			sum := int64(0)
			for a := range apps {
				n := m.Of(Application(fmt.Sprintf("app-%03d", a))).Operations
				if sum += n; n != times && (all || n != 0) {
					t.Errorf("%s, after %d batches: application %d has %d operations, want %d", what, batches, a, n, times)
				}
			}
			if n := m.Of(Group("g")).Operations; n != apps*times && (all || n != 0) {
				t.Errorf("%s, after %d batches: the group has %d operations, want %d", what, batches, n, apps*times)
			}
		}
		check("the process goes on", b.Meter, true)
		check("another process", open(t, db).Meter, err == nil)
		if err := b.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		check("flushed again", open(t, db).Meter, true)
	}
}
