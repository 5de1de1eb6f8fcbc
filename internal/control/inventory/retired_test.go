package inventory_test

import (
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// TestRetired: a key of a key server that VMs need no more is known with the time
// since when, and one that an unregistered VM needs is kept.
func TestRetired(t *testing.T) {
	t.Parallel()
	l, ctx := newLab(t), t.Context()
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	l.SetClock(func() time.Time { return now })
	must(l.CreateProvider(ctx, inventory.Provider{Name: "kms-1", Type: inventory.StandardType, Standard: &inventory.Standard{}}))(t)
	must(l.CreateProvider(ctx, inventory.Provider{Name: "kp-1", Type: inventory.Native, KeyID: "k"}))(t)
	key := func(id string) inventory.KeyRef { return inventory.KeyRef{Provider: "kms-1", KeyID: id} }
	retired := func() map[string]time.Time {
		t.Helper()
		out := map[string]time.Time{}
		for id, r := range must(l.Retired(ctx, "kms-1"))(t) {
			if r.Key != key(id) || r.VM == "" {
				t.Errorf("retired: %+v", r)
			}
			out[id] = r.Since
		}
		return out
	}
	rekey := func(v inventory.VM, to inventory.KeyRef) {
		t.Helper()
		must(l.UpdateVM(ctx, v.ID, func(v *inventory.VM) error { v.Disks[0].Key = &to; return nil }))(t)
	}

	// A key server may call its keys anything.
	odd := "a/b \x00\u00fc"
	one := must(l.CreateVM(ctx, l.vm("one", key("1"), key(odd))))(t)
	two := must(l.CreateVM(ctx, l.vm("two", inventory.KeyRef{Provider: "kp-1", KeyID: "k/2"})))(t)
	rekey(one, key("2"))
	first := now
	now = now.Add(time.Hour)
	rekey(one, key("3"))
	rekey(two, key("4")) // what it had was of no key server
	if diff := cmp.Diff(map[string]time.Time{"1": first, "2": now}, retired()); diff != "" {
		t.Error(diff)
	}

	// Unregistered, a VM still needs its keys, until its folder is registered.
	if err := l.UnregisterVM(ctx, one.ID); err != nil {
		t.Fatal(err)
	}
	kept := must(l.KeptVMs(ctx))(t)
	want := []inventory.KeptVM{{ID: one.ID, Name: "one", Datastore: "ds", Folder: "one", Keys: []inventory.KeyRef{key("3"), key(odd)}, Since: now}}
	if diff := cmp.Diff(want, kept); diff != "" {
		t.Error(diff)
	}
	// A copy in another folder, with the same id, leaves that as it is.
	elsewhere := l.vm("one", key("3"))
	elsewhere.ID, elsewhere.Folder = one.ID, "copy"
	must(l.CreateVM(ctx, elsewhere))(t)
	if diff := cmp.Diff(want, must(l.KeptVMs(ctx))(t)); diff != "" {
		t.Error(diff)
	}
	now = now.Add(time.Hour)
	if err := l.DeleteVM(ctx, one.ID); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, must(l.KeptVMs(ctx))(t)); diff != "" {
		t.Error(diff)
	}
	for what, f := range map[string]func() error{
		"another VM":     func() error { return l.ForgetKept(ctx, two.ID, "ds", "one") },
		"another folder": func() error { return l.ForgetKept(ctx, one.ID, "ds", "two") },
	} {
		if err := f(); errs.KindOf(err) != errs.NotFound || len(must(l.KeptVMs(ctx))(t)) != 1 {
			t.Errorf("forget %s: %v", what, err)
		}
	}
	if err := l.ForgetKept(ctx, one.ID, "ds", "one"); err != nil || len(must(l.KeptVMs(ctx))(t)) != 0 {
		t.Errorf("forget: %v", err)
	}
	if got := retired(); got["3"] != now || got[odd] != now {
		t.Errorf("forgotten now, and retired %v", got)
	}
	must(l.CreateVM(ctx, one))(t)
	if err := l.UnregisterVM(ctx, one.ID); err != nil {
		t.Fatal(err)
	}
	must(l.CreateVM(ctx, one))(t)
	if kept := must(l.KeptVMs(ctx))(t); len(kept) != 0 {
		t.Errorf("registered again, and still kept: %+v", kept)
	}
	now = now.Add(time.Hour)
	for range 2 { // a second time there is nothing to delete
		if err := l.DeleteVM(ctx, one.ID); err != nil {
			t.Fatal(err)
		}
	}
	got := retired()
	if ids := slices.Sorted(maps.Keys(got)); !slices.Equal(ids, []string{"1", "2", "3", odd}) || got["1"] != now || got[odd] != now {
		t.Errorf("retired %v", got)
	}
	for range 2 {
		if err := l.ForgetRetired(ctx, key("3")); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := retired()["3"]; ok {
		t.Error("a forgotten key is known")
	}
}

// TestKeptBesideOthers: what an unregistered VM needs is known until that VM is
// registered again with all of it, whoever is in its folder meanwhile.
func TestKeptBesideOthers(t *testing.T) {
	t.Parallel()
	l, ctx := newLab(t), t.Context()
	must(l.CreateProvider(ctx, inventory.Provider{Name: "kms-1", Type: inventory.StandardType, Standard: &inventory.Standard{}}))(t)
	key := func(id string) inventory.KeyRef { return inventory.KeyRef{Provider: "kms-1", KeyID: id} }
	unregister := func(v inventory.VM) {
		t.Helper()
		if err := l.UnregisterVM(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	kept := func(what string, want map[string][]inventory.KeyRef) {
		t.Helper()
		got := map[string][]inventory.KeyRef{}
		for _, v := range must(l.KeptVMs(ctx))(t) {
			got[v.ID] = v.Keys
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	one := must(l.CreateVM(ctx, l.vm("one", key("1"), key("2"))))(t)
	unregister(one)
	other := l.vm("other", key("3"))
	other.Folder = "one" // the folder was moved away, and its name given to another
	other = must(l.CreateVM(ctx, other))(t)
	kept("another VM in its folder", map[string][]inventory.KeyRef{one.ID: {key("1"), key("2")}})
	unregister(other)
	kept("both unregistered", map[string][]inventory.KeyRef{one.ID: {key("1"), key("2")}, other.ID: {key("3")}})

	part := one
	part.Disks = part.Disks[:1] // of a snapshot, perhaps, whose key cannot be told
	must(l.CreateVM(ctx, part))(t)
	kept("registered without one of its keys", map[string][]inventory.KeyRef{one.ID: {key("1"), key("2")}, other.ID: {key("3")}})
	must(l.UpdateVM(ctx, one.ID, func(v *inventory.VM) error { k := key("4"); v.Disks[0].Key = &k; return nil }))(t)
	unregister(one)
	kept("unregistered again", map[string][]inventory.KeyRef{one.ID: {key("4"), key("1"), key("2")}, other.ID: {key("3")}})

	must(l.CreateVM(ctx, other))(t)
	kept("the other registered", map[string][]inventory.KeyRef{one.ID: {key("4"), key("1"), key("2")}})
	if err := l.ForgetKept(ctx, one.ID, "ds", "one"); err != nil {
		t.Fatal(err)
	}
	kept("forgotten", map[string][]inventory.KeyRef{})
}
