package inventory_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"strongroom/internal/control/inventory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestProviderLife(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t)
	now := time.Now().UTC()
	l.SetClock(func() time.Time { return now })
	encrypt := func(name string) error { _, err := l.ProviderForEncryption(ctx, name, l.cluster.ID); return err }

	err := encrypt("")
	if errs.ReasonOf(err) != "NoDefaultProvider" || errs.HintOf(err) == "" {
		t.Errorf("without default: %v (hint %q)", err, errs.HintOf(err))
	}
	wantKind(t, "unknown provider", encrypt("kp-1"), errs.NotFound)
	p := must(l.CreateProvider(ctx, inventory.Provider{Name: "kp-1", Type: inventory.Native, KeyID: "kdk-1"}))(t)
	if p.State != inventory.NotBackedUp || p.Default || len(p.Details) == 0 {
		t.Errorf("new: %+v", p)
	}
	err = encrypt("kp-1")
	if errs.ReasonOf(err) != "NotBackedUp" || errs.HintOf(err) != "strongroom provider backup kp-1 --out kp-1.p12" {
		t.Errorf("before the backup: %v (hint %q)", err, errs.HintOf(err))
	}

	// Only the confirmed download of the newest export counts.
	old := must(l.StartExport(ctx, "kp-1", "aa"))(t)
	id := must(l.StartExport(ctx, "kp-1", "bb"))(t)
	_, err = l.ConfirmBackup(ctx, "kp-1", old, "aa")
	wantKind(t, "older export", err, errs.InvalidState)
	_, err = l.ConfirmBackup(ctx, "kp-1", id, "aa")
	wantKind(t, "other file", err, errs.Corrupt)
	now = now.Add(2 * time.Hour)
	_, err = l.ConfirmBackup(ctx, "kp-1", id, "bb")
	wantKind(t, "too late", err, errs.InvalidState)
	wantKind(t, "still", encrypt("kp-1"), errs.InvalidState)
	id = must(l.StartExport(ctx, "kp-1", "cc"))(t)
	p = must(l.ConfirmBackup(ctx, "kp-1", id, "cc"))(t)
	if p.State != inventory.Warning || !p.BackedUpAt.Equal(now) || p.Export != nil {
		t.Errorf("backed up: %+v", p)
	}
	if err := encrypt("kp-1"); err != nil {
		t.Error(err)
	}

	// Active when all hosts have it, and Warning again with a new host.
	must(l.UpdateHost(ctx, l.host.ID, func(h *inventory.Host) error {
		h.Held = []inventory.HeldKey{{Provider: "kp-1", KeyID: "another"}}
		return nil
	}))(t)
	if changes := must(l.RefreshProviderStates(ctx))(t); len(changes) != 0 {
		t.Errorf("a host has another key of that name: %+v", changes)
	}
	must(l.UpdateHost(ctx, l.host.ID, func(h *inventory.Host) error {
		h.Held = []inventory.HeldKey{{Provider: "kp-1", KeyID: "kdk-1"}}
		return nil
	}))(t)
	changes := must(l.RefreshProviderStates(ctx))(t)
	if len(changes) != 1 || changes[0].Was != inventory.Warning || changes[0].Provider.State != inventory.Active {
		t.Errorf("%+v", changes)
	}
	if changes := must(l.RefreshProviderStates(ctx))(t); len(changes) != 0 {
		t.Errorf("nothing has changed: %+v", changes)
	}
	must(l.AddHost(ctx, inventory.Host{Name: "h2", ClusterID: l.cluster.ID}))(t)
	if changes := must(l.RefreshProviderStates(ctx))(t); len(changes) != 1 || changes[0].Provider.State != inventory.Warning {
		t.Errorf("%+v", changes)
	}
}

func TestDefaultProvider(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t)
	for _, n := range []string{"a", "b", "c"} {
		if _, _, err := l.ImportProvider(ctx, inventory.Provider{Name: n, Type: inventory.Native, KeyID: "kdk-" + n}); err != nil {
			t.Fatal(err)
		}
	}
	defaults := func() (names []string) {
		for _, p := range must(l.Providers(ctx))(t) {
			if p.Default {
				names = append(names, p.Name)
			}
		}
		return names
	}
	if d := defaults(); len(d) != 0 {
		t.Errorf("a default by itself: %v", d)
	}
	wantKind(t, "unknown", l.SetDefaultProvider(ctx, "nope"), errs.NotFound)
	var wg sync.WaitGroup
	for _, n := range []string{"a", "b", "c", "a", "b"} {
		wg.Go(func() {
			if err := l.SetDefaultProvider(ctx, n); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if d := defaults(); len(d) != 1 {
		t.Errorf("defaults: %v", d)
	}
	if err := l.SetDefaultProvider(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := l.SetClusterDefaultProvider(ctx, "lab", "b"); err != nil {
		t.Fatal(err)
	}
	for cluster, want := range map[string]string{"": "a", l.cluster.ID: "b"} {
		if p, err := l.ProviderForEncryption(ctx, "", cluster); err != nil || p.Name != want {
			t.Errorf("cluster %q: %v, %v", cluster, p.Name, err)
		}
	}
	// Deleting the default leaves none, in the cluster, too.
	for _, n := range []string{"a", "b"} {
		if err := l.DeleteProvider(ctx, n, false); err != nil {
			t.Fatal(err)
		}
	}
	if d := defaults(); len(d) != 0 {
		t.Errorf("the product picked a default: %v", d)
	}
	_, err := l.ProviderForEncryption(ctx, "", l.cluster.ID)
	if errs.ReasonOf(err) != "NoDefaultProvider" {
		t.Errorf("%v", err)
	}
	if err := l.SetDefaultProvider(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if err := l.SetDefaultProvider(ctx, ""); err != nil || len(defaults()) != 0 {
		t.Errorf("cleared: %v, %v", defaults(), err)
	}
}

func TestProviderNamesAreNeverReused(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t)
	native := func(name, key string) inventory.Provider {
		return inventory.Provider{Name: name, Type: inventory.Native, KeyID: key}
	}
	must(l.CreateProvider(ctx, native("kp", "kdk-1")))(t)
	_, err := l.CreateProvider(ctx, native("kp", "kdk-1"))
	wantKind(t, "created twice", err, errs.Exists)
	_, _, err = l.ImportProvider(ctx, native("kp", "kdk-2"))
	if errs.ReasonOf(err) != "NameCollision" {
		t.Errorf("import with other key material: %v", err)
	}
	_, _, err = l.ImportProvider(ctx, native("kp-b", "kdk-1"))
	if errs.ReasonOf(err) != "NameCollision" {
		t.Errorf("import of the same key under another name: %v", err)
	}
	// Who can import it has a backup.
	p, imported, err := l.ImportProvider(ctx, native("kp", "kdk-1"))
	if err != nil || imported || p.State != inventory.Warning {
		t.Errorf("import of what is here: %+v, %v, %v", p, imported, err)
	}
	if err := l.DeleteProvider(ctx, "kp", false); err != nil {
		t.Fatal(err)
	}
	_, err = l.CreateProvider(ctx, native("kp", "kdk-3"))
	if errs.ReasonOf(err) != "NameCollision" || errs.HintOf(err) == "" {
		t.Errorf("a deleted provider's name with other key material: %v", err)
	}
	if existed, err := l.CheckImport(ctx, native("kp", "kdk-1")); existed || err != nil {
		t.Errorf("CheckImport: %v, %v", existed, err)
	}
	if _, err := l.Provider(ctx, "kp"); errs.KindOf(err) != errs.NotFound {
		t.Errorf("a dry run imported it: %v", err)
	}
	p, imported, err = l.ImportProvider(ctx, native("kp", "kdk-1"))
	if err != nil || !imported || p.State == inventory.NotBackedUp {
		t.Errorf("restore of a deleted provider: %+v, %v, %v", p, imported, err)
	}
	for i := range inventory.MaxProviders - 1 {
		must(l.CreateProvider(ctx, native(fmt.Sprint("x", i), fmt.Sprint("key-x", i))))(t)
	}
	_, err = l.CreateProvider(ctx, native("one-more", "key"))
	wantKind(t, "too many", err, errs.InvalidState)
}

func TestUsageAndDeleteGuard(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t)
	for _, n := range []string{"a", "b"} {
		if _, _, err := l.ImportProvider(ctx, inventory.Provider{Name: n, Type: inventory.Native, KeyID: "kdk-" + n}); err != nil {
			t.Fatal(err)
		}
	}
	a1, a2, b1 := inventory.KeyRef{Provider: "a", KeyID: "1"}, inventory.KeyRef{Provider: "a", KeyID: "2"}, inventory.KeyRef{Provider: "b", KeyID: "1"}
	both := l.vm("both", a1, b1, inventory.KeyRef{}, a1)
	both.Key = &a1
	both = must(l.CreateVM(ctx, both))(t)
	must(l.CreateVM(ctx, l.vm("second", a2)))(t)
	must(l.CreateVM(ctx, l.vm("plain", inventory.KeyRef{})))(t)
	list := func(users []inventory.KeyUser, err error) (out []string) {
		if err != nil {
			t.Error(err)
		}
		for _, u := range users {
			out = append(out, u.VM+"/"+u.Disk+" "+u.Key.KeyID)
		}
		return out
	}
	got := list(l.Usage(ctx, "a", ""))
	if len(got) != 4 || !cmp.Equal(list(l.Usage(ctx, "a", "2")), []string{"second/disk-0 2"}) || !cmp.Equal(list(l.Usage(ctx, "b", "")), []string{"both/disk-1 1"}) {
		t.Errorf("usage of a: %v", got)
	}
	if keys := both.Keys(); !cmp.Equal(keys, []inventory.KeyRef{a1, b1}) {
		t.Errorf("keys: %v", keys)
	}
	err := l.DeleteProvider(ctx, "a", false)
	if errs.ReasonOf(err) != "ResourceInUse" || !strings.Contains(err.Error(), "both") || !strings.Contains(err.Error(), "second") {
		t.Errorf("delete of a provider in use: %v", err)
	}
	must(l.UpdateVM(ctx, both.ID, func(v *inventory.VM) error { // rekey
		for i := range v.Disks {
			if v.Disks[i].Key != nil {
				v.Disks[i].Key = &b1
			}
		}
		v.Key = &b1
		return nil
	}))(t)
	wantKind(t, "one user is left", l.DeleteProvider(ctx, "a", false), errs.InvalidState)
	if err := l.DeleteProvider(ctx, "a", true); err != nil {
		t.Error(err)
	}
	if got := list(l.Usage(ctx, "a", "")); len(got) != 1 {
		t.Errorf("users of a deleted provider are still known: %v", got)
	}
	wantKind(t, "second delete", l.DeleteProvider(ctx, "a", true), errs.NotFound)
}

func TestComputeState(t *testing.T) {
	t.Parallel()
	p := inventory.Provider{Name: "kp", KeyID: "k"}
	held := []inventory.HeldKey{{Provider: "kp", KeyID: "k"}}
	tpm := map[string]bool{inventory.CapabilityTPM: true}
	for _, c := range []struct {
		name     string
		backedUp bool
		tpm      bool
		hosts    []inventory.Host
		want     inventory.ProviderState
		details  int
	}{
		{"new", false, false, []inventory.Host{{Held: held}}, inventory.NotBackedUp, 1},
		{"no hosts", true, false, nil, inventory.Warning, 1},
		{"all", true, false, []inventory.Host{{Held: held}, {Held: held}}, inventory.Active, 0},
		{"one without", true, false, []inventory.Host{{Held: held}, {}}, inventory.Warning, 1},
		{"TPM wanted, all have", true, true, []inventory.Host{{Held: held, Capabilities: tpm}}, inventory.Active, 0},
		{"TPM wanted, one lacks it", true, true, []inventory.Host{{Held: held, Capabilities: tpm}, {}}, inventory.Warning, 1},
		{"TPM wanted, none has", true, true, []inventory.Host{{Held: held}}, inventory.Warning, 2},
	} {
		p := p
		p.TPMRequired = c.tpm
		if c.backedUp {
			p.BackedUpAt = time.Now()
		}
		if got, details := inventory.ComputeState(p, c.hosts); got != c.want || len(details) != c.details {
			t.Errorf("%s: %s %q, want %s", c.name, got, details, c.want)
		}
	}
}

func TestPresence(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := newLab(t)
	wantKind(t, "beat of an unknown host", l.Beat(ctx, "nope", time.Second), errs.NotFound)
	for range 2 {
		if err := l.Beat(ctx, l.host.ID, time.Second); err != nil {
			t.Fatal(err)
		}
	}
	h := must(l.HostByID(ctx, l.host.ID))(t)
	if h.State != inventory.Connected || h.LastSeen.IsZero() {
		t.Errorf("after a beat: %+v", h)
	}
	for {
		began := time.Now()
		if err := l.Beat(ctx, l.host.ID, time.Second); err != nil {
			t.Fatal(err)
		}
		lost := must(l.Sweep(ctx))(t)
		if len(lost) == 0 {
			break
		}
		if time.Since(began) < time.Second { // else it is true on a busy machine
			t.Fatalf("lost although it beats: %+v", lost)
		}
	}
	gone := fmt.Errorf("gone")
	there := false
	err := l.WatchPresence(ctx, func(op store.Op, id string) error {
		switch {
		case op == store.Put && id == l.host.ID:
			there = true
		case op == store.Deleted && id == l.host.ID, op == store.Synced && !there: // before the watch began
			return gone
		}
		return nil
	})
	if err != gone {
		t.Fatal(err)
	}
	if lost := must(l.Sweep(ctx))(t); len(lost) != 1 || lost[0].State != inventory.NotResponding {
		t.Errorf("lost: %+v", lost)
	}
	if lost := must(l.Sweep(ctx))(t); len(lost) != 0 {
		t.Errorf("lost again: %+v", lost)
	}
	if err := l.Beat(ctx, l.host.ID, time.Second); err != nil { // its lease is gone: a new one
		t.Fatal(err)
	}
	if h := must(l.HostByID(ctx, l.host.ID))(t); h.State != inventory.Connected {
		t.Errorf("after it came back: %v", h.State)
	}
	must(l.UpdateHost(ctx, l.host.ID, func(h *inventory.Host) error { h.State = inventory.Disconnected; return nil }))(t)
	if err := l.Beat(ctx, l.host.ID, time.Second); err != nil {
		t.Fatal(err)
	}
	if h := must(l.HostByID(ctx, l.host.ID))(t); h.State != inventory.Disconnected {
		t.Errorf("a heartbeat undid an operator's decision: %v", h.State)
	}
	if err := l.DeleteHost(ctx, "h1"); err != nil {
		t.Error(err)
	}
}

// TestProvidersModel does random operations on providers and compares with a
// plain model: names burnt for ever, one default at most, states by backup.
func TestProvidersModel(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ctx := t.Context()
	burnt := map[string]string{} // over all runs: the store stays
	here := map[string]bool{}
	def := ""
	rapid.Check(t, func(rt *rapid.T) {
		for range rapid.IntRange(1, 8).Draw(rt, "operations") {
			name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "name")
			key := name + rapid.SampledFrom([]string{"1", "2"}).Draw(rt, "key")
			p := inventory.Provider{Name: name, Type: inventory.Native, KeyID: key}
			collides := burnt[name] != "" && burnt[name] != key
			switch rapid.IntRange(0, 3).Draw(rt, "operation") {
			case 0:
				_, err := l.CreateProvider(ctx, p)
				if ok := !here[name] && !collides; ok != (err == nil) {
					rt.Fatalf("create %s %s: %v, want success %v", name, key, err, ok)
				} else if ok {
					here[name], burnt[name] = true, key
				}
			case 1:
				_, imported, err := l.ImportProvider(ctx, p)
				if collides != (err != nil) || err == nil && imported == here[name] {
					rt.Fatalf("import %s %s: %v, %v; collides %v, here %v", name, key, imported, err, collides, here[name])
				} else if !collides {
					here[name], burnt[name] = true, key
				}
			case 2:
				if err := l.DeleteProvider(ctx, name, false); (err == nil) != here[name] {
					rt.Fatalf("delete %s: %v, here %v", name, err, here[name])
				}
				delete(here, name)
				if def == name {
					def = ""
				}
			case 3:
				if err := l.SetDefaultProvider(ctx, name); (err == nil) != here[name] {
					rt.Fatalf("default %s: %v, here %v", name, err, here[name])
				} else if err == nil {
					def = name
				}
			}
			all, err := l.Providers(ctx)
			if err != nil || len(all) != len(here) {
				rt.Fatalf("%d providers, %v; want %d", len(all), err, len(here))
			}
			for _, p := range all {
				if !here[p.Name] || p.KeyID != burnt[p.Name] || p.Default != (p.Name == def) {
					rt.Fatalf("%+v; here %v, burnt %v, default %q", p, here, burnt, def)
				}
			}
		}
	})
}
