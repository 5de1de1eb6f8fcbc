package inventory_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

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

func open(t *testing.T) *inventory.Inventory {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return inventory.New(db)
}

// must ends the test if err is not nil: must(f())(t).
func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantKind(t *testing.T, what string, err error, want errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(err) != want {
		t.Errorf("%s: %v, want kind %v", what, err, want)
	}
}

// lab is a cluster with one host and one datastore.
type lab struct {
	*inventory.Inventory
	cluster inventory.Cluster
	host    inventory.Host
	store   inventory.Datastore
}

func newLab(t *testing.T) lab {
	t.Helper()
	ctx := t.Context()
	inv := open(t)
	l := lab{Inventory: inv}
	l.cluster = must(inv.CreateCluster(ctx, "lab"))(t)
	l.host = must(inv.AddHost(ctx, inventory.Host{Name: "h1", ClusterID: l.cluster.ID, Address: "h1:7444"}))(t)
	l.store = must(inv.CreateDatastore(ctx, inventory.Datastore{Name: "ds", Type: "dir", ClusterID: l.cluster.ID, Path: "/vms"}))(t)
	return l
}

func (l lab) vm(name string, keys ...inventory.KeyRef) inventory.VM {
	v := inventory.VM{Name: name, ClusterID: l.cluster.ID, HostID: l.host.ID, Datastore: l.store.Name, Folder: name}
	for i, k := range keys {
		d := inventory.Disk{Name: fmt.Sprintf("disk-%d", i), Format: inventory.Raw}
		if k != (inventory.KeyRef{}) {
			d.Format, d.Key = inventory.LUKS, &k
		}
		v.Disks = append(v.Disks, d)
	}
	return v
}

func TestNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"a", "web-1", "0.x_Y", strings.Repeat("n", inventory.MaxName)} {
		if err := inventory.CheckName("vm", name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "-a", ".", "..", "a/b", "a b", "ä", "a\x00", strings.Repeat("n", inventory.MaxName+1)} {
		wantKind(t, name, inventory.CheckName("vm", name), errs.Invalid)
	}
}

func TestClustersHostsDatastores(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t)
	_, err := l.CreateCluster(ctx, "lab")
	wantKind(t, "cluster of the same name", err, errs.Exists)
	_, err = l.Cluster(ctx, "nope")
	wantKind(t, "unknown cluster", err, errs.NotFound)
	if errs.HintOf(err) == "" {
		t.Error("no hint for an unknown cluster")
	}
	got := must(l.Cluster(ctx, "lab"))(t)
	if diff := cmp.Diff(l.cluster, got); diff != "" {
		t.Error(diff)
	}
	_, err = l.AddHost(ctx, inventory.Host{Name: "h1", ClusterID: l.cluster.ID})
	wantKind(t, "host of the same name", err, errs.Exists)
	_, err = l.AddHost(ctx, inventory.Host{Name: "h2", ClusterID: "nope"})
	wantKind(t, "host of no cluster", err, errs.NotFound)
	_, err = l.AddHost(ctx, inventory.Host{Name: "h2", ClusterID: l.cluster.ID, State: "odd"})
	wantKind(t, "host of an odd state", err, errs.Invalid)
	_, err = l.UpdateHost(ctx, l.host.ID, func(h *inventory.Host) error { h.Name = "other"; return nil })
	wantKind(t, "rename of a host", err, errs.Invalid)
	for _, d := range []inventory.Datastore{
		{Name: "x", Type: "osa", ClusterID: l.cluster.ID, Path: "/x"},
		{Name: "x", Type: "dir", ClusterID: l.cluster.ID, Path: "x"},
		{Name: "x/y", Type: "dir", ClusterID: l.cluster.ID, Path: "/x"},
	} {
		_, err = l.CreateDatastore(ctx, d)
		wantKind(t, fmt.Sprint(d), err, errs.Invalid)
	}
	_, err = l.CreateDatastore(ctx, l.store)
	wantKind(t, "datastore of the same name", err, errs.Exists)
	d := must(l.UpdateDatastore(ctx, "ds", func(d *inventory.Datastore) error {
		d.FreeBytes = 5
		d.HostPaths = inventory.HostPaths{l.host.ID: "/other"}
		return nil
	}))(t)
	if d.FreeBytes != 5 || d.PathOn(l.host.ID) != "/other" || d.PathOn("else") != "/vms" {
		t.Errorf("%+v", d)
	}

	v := must(l.CreateVM(ctx, l.vm("web-1")))(t)
	wantKind(t, "delete cluster in use", l.DeleteCluster(ctx, "lab"), errs.InvalidState)
	wantKind(t, "delete host in use", l.DeleteHost(ctx, "h1"), errs.InvalidState)
	wantKind(t, "delete datastore in use", l.DeleteDatastore(ctx, "ds"), errs.InvalidState)
	for range 2 {
		if err := l.DeleteVM(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []error{
		l.DeleteHost(ctx, "h1"), l.DeleteDatastore(ctx, "ds"), l.DeleteCluster(ctx, "lab"),
	} {
		if step != nil {
			t.Error(step)
		}
	}
	must(l.CreateCluster(ctx, "lab"))(t) // the name is free again
}

func TestVMs(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t)
	key := inventory.KeyRef{Provider: "kp-1", KeyID: "k/1"}
	v := must(l.CreateVM(ctx, l.vm("web-1", key, inventory.KeyRef{})))(t)
	if v.PowerState != inventory.PoweredOff || v.CryptoState != inventory.Unlocked || !v.Encrypted() || v.ID == "" {
		t.Errorf("%+v", v)
	}
	if diff := cmp.Diff(v, must(l.VM(ctx, "web-1"))(t)); diff != "" {
		t.Error(diff)
	}
	other := must(l.CreateCluster(ctx, "other"))(t)
	foreign := must(l.AddHost(ctx, inventory.Host{Name: "h9", ClusterID: other.ID}))(t)
	for name, change := range map[string]func(*inventory.VM){
		"no name":                   func(v *inventory.VM) { v.Name = "" },
		"no folder":                 func(v *inventory.VM) { v.Folder = "" },
		"folder with a slash":       func(v *inventory.VM) { v.Folder = "../x" },
		"folder ..":                 func(v *inventory.VM) { v.Folder = ".." },
		"host of another cluster":   func(v *inventory.VM) { v.HostID = foreign.ID },
		"locked without reason":     func(v *inventory.VM) { v.CryptoState = inventory.Locked },
		"reason without lock":       func(v *inventory.VM) { v.LockReason = "x" },
		"odd power state":           func(v *inventory.VM) { v.PowerState = "flying" },
		"encrypted disk, no key":    func(v *inventory.VM) { v.Disks[0].Key = nil },
		"plain disk with key":       func(v *inventory.VM) { v.Disks[0].Format = inventory.Raw },
		"key without id":            func(v *inventory.VM) { v.Disks[0].Key = &inventory.KeyRef{Provider: "kp-1"} },
		"VM key without provider":   func(v *inventory.VM) { v.Key = &inventory.KeyRef{KeyID: "x"} },
		"two disks of one name":     func(v *inventory.VM) { v.Disks = append(v.Disks, v.Disks[0]) },
		"negative size":             func(v *inventory.VM) { v.Disks[0].SizeBytes = -1 },
		"too many disks":            func(v *inventory.VM) { v.Disks = make([]inventory.Disk, 61) },
		"disk of an unknown format": func(v *inventory.VM) { v.Disks[0].Format, v.Disks[0].Key = "qcow2", nil },
	} {
		bad := l.vm("web-2", key)
		change(&bad)
		_, err := l.CreateVM(ctx, bad)
		wantKind(t, "create: "+name, err, errs.Invalid)
		if name == "no name" || name == "folder .." {
			continue
		}
		_, err = l.UpdateVM(ctx, v.ID, func(v *inventory.VM) error { change(v); return nil })
		wantKind(t, "update: "+name, err, errs.Invalid)
	}
	same := l.vm("web-1")
	same.Folder = "elsewhere"
	_, err := l.CreateVM(ctx, same)
	wantKind(t, "same name", err, errs.Exists)
	same = l.vm("web-2")
	same.Folder = "web-1"
	_, err = l.CreateVM(ctx, same)
	wantKind(t, "same folder", err, errs.Exists)
	same = l.vm("web-3")
	same.ID = v.ID
	_, err = l.CreateVM(ctx, same)
	wantKind(t, "same id", err, errs.Exists)
	// What was refused has left no name behind.
	must(l.CreateVM(ctx, l.vm("web-2")))(t)

	v = must(l.UpdateVM(ctx, v.ID, func(v *inventory.VM) error { v.Folder = "moved"; return nil }))(t)
	again := l.vm("web-3")
	again.Folder = "web-1" // given back
	must(l.CreateVM(ctx, again))(t)
	_, err = l.UpdateVM(ctx, v.ID, func(v *inventory.VM) error { v.Folder = "web-2"; return nil })
	wantKind(t, "move to another's folder", err, errs.Exists)
	_, err = l.UpdateVM(ctx, "nope", func(*inventory.VM) error { return nil })
	wantKind(t, "update of nothing", err, errs.NotFound)
	if on := must(l.VMs(ctx, l.host.ID))(t); len(on) != 3 {
		t.Errorf("%d VMs on the host", len(on))
	}
	if on := must(l.VMs(ctx, foreign.ID))(t); len(on) != 0 {
		t.Errorf("%d VMs on another host", len(on))
	}
}
