package event_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func open(t *testing.T) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	types := map[string]event.Type{}
	for _, ty := range event.Types() {
		if _, dup := types[ty.ID]; dup || !strings.HasPrefix(ty.ID, "strongroom.") || ty.Text == "" {
			t.Errorf("type %q is there twice, or has a wrong id or no text", ty.ID)
		}
		switch ty.Severity {
		case event.Info, event.Warning, event.Error:
		default:
			t.Errorf("type %s has severity %q", ty.ID, ty.Severity)
		}
		if n := strings.Count(ty.Text, "{"); n != strings.Count(ty.Text, "}") || n != len(event.Placeholders(ty.Text)) {
			t.Errorf("type %s: braces in %q", ty.ID, ty.Text)
		}
		types[ty.ID] = ty
	}
	seen := map[string]bool{}
	for _, a := range event.AlarmTypes() {
		if seen[a.ID] || a.Name == "" || a.Check == "" || a.Hint == "" {
			t.Errorf("alarm %+v is there twice or lacks something", a)
		}
		seen[a.ID] = true
		raised, ok := types[a.Raised]
		if !ok || raised.Severity == event.Info {
			t.Errorf("alarm %s is raised by %q, which is no warning or error", a.ID, a.Raised)
		}
		if cleared, ok := types[a.Cleared]; !ok || cleared.Severity != event.Info {
			t.Errorf("alarm %s is cleared by %q, which is no info", a.ID, a.Cleared)
		}
	}
}

// TestRunbooks holds that each alarm has its runbook, of the same shape, and
// each runbook its alarm.
func TestRunbooks(t *testing.T) {
	t.Parallel()
	const docs = "../../../docs"
	index, err := os.ReadFile(filepath.Join(docs, "runbooks", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	severity := map[string]event.Severity{}
	for _, e := range event.Types() {
		severity[e.ID] = e.Severity
	}
	want := map[string]bool{}
	for _, a := range event.AlarmTypes() {
		if row := fmt.Sprintf("| [%[1]s](%[1]s.md) | %[2]s | %[3]s |\n", a.ID, severity[a.Raised], a.Check); !strings.Contains(string(index), row) {
			t.Errorf("the index of runbooks lacks the row\n%s", row)
		}
		path := filepath.Join(docs, a.Runbook())
		want[filepath.Base(path)] = true
		b, err := os.ReadFile(path)
		if err != nil {
			t.Errorf("alarm %s has no runbook: %v", a.ID, err)
			continue
		}
		text := string(b)
		for _, part := range []string{"# " + a.Name + "\n", a.ID, a.Raised, "\n## What it means", "\n## What is affected", "\n## What to do", "\n## When it clears", "strongroom "} {
			if !strings.Contains(text, part) {
				t.Errorf("%s does not have %q", path, part)
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(docs, "runbooks", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if base := filepath.Base(f); !want[base] && base != "README.md" {
			t.Errorf("%s has no alarm", f)
		}
	}
}

func TestPostAndList(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := event.Open(open(t), 0)
	if _, err := l.Post(ctx, event.New{Type: "nonsense"}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("unknown type: %v", err)
	}
	e, err := l.Post(ctx, event.New{
		Type: event.VMPoweredOn, Principal: "user:ann", Target: "vm/web-1",
		Args: map[string]string{"host": "{target} " + strings.Repeat("h", 2000)},
	})
	if err != nil {
		t.Fatal(err)
	}
	// An argument is never a template, and is cut.
	if !strings.HasPrefix(e.Message, "vm/web-1 was powered on on {target} hhh") || len(e.Message) > 1100 || e.Sequence != 1 || e.Severity != event.Info {
		t.Errorf("%+v", e)
	}
	if e, err = l.Post(ctx, event.New{Type: event.VMRegistered, Target: "vm/web-1"}); err != nil || e.Message != "The controller registered vm/web-1" {
		t.Errorf("%q, %v", e.Message, err)
	}
	if e, err = l.Post(ctx, event.New{Type: event.VMPoweredOn, Target: "vm/x"}); err != nil || e.Message != "vm/x was powered on on {host}" {
		t.Errorf("without an argument: %q, %v", e.Message, err)
	}
	got, err := l.List(ctx, 2)
	if err != nil || len(got) != 2 || got[0].Sequence != 2 || got[1].Sequence != 3 {
		t.Errorf("List: %+v, %v", got, err)
	}
}

func TestManyAtOnceAndRetention(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := event.Open(open(t), 50)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				if _, err := l.Post(ctx, event.New{Type: event.SystemStarted}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := l.List(ctx, 1000)
	if err != nil || len(got) < 50 || len(got) > 150 || got[len(got)-1].Sequence != 200 {
		t.Fatalf("%d events, %v", len(got), err)
	}
	for i, e := range got {
		if want := got[0].Sequence + uint64(i); e.Sequence != want {
			t.Fatalf("event %d where %d should be", e.Sequence, want)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := event.Open(open(t), 0)
	post := func() {
		if _, err := l.Post(ctx, event.New{Type: event.SystemStarted}); err != nil {
			t.Error(err)
		}
	}
	post() // before: not seen
	enough := errors.New("enough")
	ready, ended := make(chan struct{}), make(chan error, 1)
	var seen []uint64
	go func() {
		ended <- l.Watch(ctx, func() { close(ready) }, func(e event.Event) error {
			if seen = append(seen, e.Sequence); len(seen) == 10 {
				return enough
			}
			return nil
		})
	}()
	<-ready
	for range 12 {
		post()
	}
	if err := <-ended; err != enough {
		t.Fatal(err)
	}
	for i, s := range seen {
		if s != uint64(i+2) {
			t.Fatalf("saw %v", seen)
		}
	}
}

func types(t *testing.T, l *event.Log) (ids []string) {
	t.Helper()
	all, err := l.List(t.Context(), 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		ids = append(ids, e.Type)
	}
	return ids
}

func TestAlarmsAreRaisedToldAgainAndCleared(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := event.Open(open(t), 0)
	now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	l.SetClock(func() time.Time { return now })
	cond := func(names ...string) (out []event.Condition) {
		for _, n := range names {
			out = append(out, event.Condition{Target: "provider/" + n, Args: map[string]string{"provider": n}})
		}
		return out
	}
	sync := func(c []event.Condition) {
		t.Helper()
		if err := l.Sync(ctx, event.AlarmProviderNotBackedUp, c); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 { // the same condition is told once
		sync(cond("a", "b"))
	}
	if got := types(t, l); len(got) != 2 {
		t.Errorf("events: %v", got)
	}
	alarms, err := l.Alarms(ctx)
	if err != nil || len(alarms) != 2 || alarms[0].Message != "provider/a is not backed up" ||
		alarms[0].Hint != "strongroom provider backup a --out a.p12" || alarms[0].Runbook != "runbooks/provider-not-backed-up.md" || !alarms[0].Since.Equal(now) {
		t.Errorf("%+v, %v", alarms, err)
	}
	if al, err := l.Acknowledge(ctx, event.AlarmProviderNotBackedUp, "provider/b", "user:ann"); err != nil || al.AckedBy != "user:ann" {
		t.Errorf("%+v, %v", al, err)
	}
	if _, err := l.Acknowledge(ctx, event.AlarmProviderNotBackedUp, "provider/c", "user:ann"); errs.KindOf(err) != errs.NotFound {
		t.Errorf("acknowledge of nothing: %v", err)
	}
	now = now.Add(24 * time.Hour) // told again, but not what was acknowledged
	sync(cond("a", "b"))
	all, err := l.List(ctx, 1)
	if err != nil || all[0].Target != "provider/a" || len(types(t, l)) != 3 {
		t.Errorf("after a day: %+v, %v", all, err)
	}
	sync(cond("b"))
	sync(nil)
	if got := types(t, l); len(got) != 5 || got[4] != event.ProviderAllBackedUp {
		t.Errorf("events: %v", got)
	}
	if alarms, err := l.Alarms(ctx); err != nil || len(alarms) != 0 {
		t.Errorf("%+v, %v", alarms, err)
	}
	if err := l.Sync(ctx, "nonsense", nil); errs.KindOf(err) != errs.Invalid {
		t.Errorf("unknown alarm: %v", err)
	}
}

// TestEvaluateAndHealth goes through every alarm with an inventory that has its
// cause, and then not any more.
func TestEvaluateAndHealth(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db := open(t)
	inv, l := inventory.New(db), event.Open(db, 0)
	active := func() (ids []string) {
		t.Helper()
		if err := l.Evaluate(ctx, inv); err != nil {
			t.Fatal(err)
		}
		alarms, err := l.Alarms(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range alarms {
			ids = append(ids, a.ID)
			if i > 0 && a.Severity == event.Error && alarms[i-1].Severity != event.Error {
				t.Errorf("graver alarms do not come first: %+v", alarms)
			}
		}
		slices.Sort(ids)
		// Health says the same.
		checks, err := l.Health(ctx, inv)
		if err != nil || len(checks) != len(event.AlarmTypes()) {
			t.Fatalf("%d checks, %v", len(checks), err)
		}
		for i, a := range event.AlarmTypes() {
			c := checks[i]
			if bad := slices.Contains(ids, a.ID); bad == (c.Status == event.Green) || bad != (c.Message != "") || bad != (c.Hint != "") || c.Checked.IsZero() {
				t.Errorf("alarm %s active %v, check %+v", a.ID, bad, c)
			}
		}
		return ids
	}
	want := func(what string, ids ...string) {
		t.Helper()
		slices.Sort(ids)
		if got := active(); !slices.Equal(got, ids) {
			t.Errorf("%s: %v, want %v", what, got, ids)
		}
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want("new", event.AlarmNoDefaultProvider)
	_, err := inv.CreateProvider(ctx, inventory.Provider{Name: "kp", Type: inventory.Native, KeyID: "k"})
	check(err)
	check(inv.SetDefaultProvider(ctx, "kp"))
	want("not backed up", event.AlarmProviderNotBackedUp)
	id, err := inv.StartExport(ctx, "kp", "00")
	check(err)
	_, err = inv.ConfirmBackup(ctx, "kp", id, "00")
	check(err)
	want("on no host", event.AlarmProviderNotOnHosts)
	cl, err := inv.CreateCluster(ctx, "lab")
	check(err)
	h, err := inv.AddHost(ctx, inventory.Host{Name: "h", ClusterID: cl.ID, Held: []inventory.HeldKey{{Provider: "kp", KeyID: "k"}}})
	check(err)
	_, err = inv.RefreshProviderStates(ctx)
	check(err)
	want("host has joined and was never heard of")
	_, err = inv.UpdateHost(ctx, h.ID, func(h *inventory.Host) error {
		h.LastSeen = time.Now().Add(-time.Hour)
		return nil
	})
	check(err)
	want("host away", event.AlarmHostNotResponding)
	check(inv.Beat(ctx, h.ID, time.Minute))
	want("all well")
	_, err = inv.CreateDatastore(ctx, inventory.Datastore{Name: "ds", Type: "dir", ClusterID: cl.ID, Path: "/d"})
	check(err)
	for i := range 7 {
		_, err = inv.CreateVM(ctx, inventory.VM{
			Name: fmt.Sprint("vm-", i), ClusterID: cl.ID, HostID: h.ID, Datastore: "ds", Folder: fmt.Sprint(i),
			CryptoState: inventory.Locked, LockReason: "key k2 of lost is not on host h",
			Key: &inventory.KeyRef{Provider: "lost", KeyID: "k2"},
		})
		check(err)
	}
	ids := []string{event.AlarmProviderMissing}
	for range 7 {
		ids = append(ids, event.AlarmVMLocked)
	}
	want("locked", ids...)
	alarms, err := l.Alarms(ctx)
	check(err)
	i := slices.IndexFunc(alarms, func(a event.Alarm) bool { return a.ID == event.AlarmProviderMissing })
	// VMs come in order of their random ids, so which five are named is open.
	if m := alarms[i].Message; !strings.HasPrefix(m, "provider/lost is not here, but is needed by vm-") || !strings.HasSuffix(m, " and 2 more") {
		t.Errorf("message %q", m)
	}
	vms, err := inv.VMs(ctx, "")
	check(err)
	for _, v := range vms {
		_, err := inv.UpdateVM(ctx, v.ID, func(v *inventory.VM) error {
			v.CryptoState, v.LockReason, v.Key.Provider = inventory.Unlocked, "", "kp"
			return nil
		})
		check(err)
	}
	want("unlocked")
	check(inv.DeleteProvider(ctx, "kp", true))
	want("deleted by force", event.AlarmProviderMissing, event.AlarmNoDefaultProvider)
}
