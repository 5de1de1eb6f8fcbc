package controller

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/inventory"
)

// TestDigests: a VM of which nothing is new is not told again; whatever else the
// inventory has than the host said last, is.
func TestDigests(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.create("web-2", true))
	web1, web2 := s.vm("web-1").ID, s.vm("web-2").ID
	settle := func() {
		t.Helper()
		lacking := h.lacks(h.brief(nil))
		if lacking = h.lacks(h.brief(lacking)); len(lacking) > 0 {
			t.Fatalf("told all, and the controller lacks %v", lacking)
		}
		if lacking = h.lacks(h.brief(nil)); len(lacking) > 0 {
			t.Fatalf("nothing changed, and the controller lacks %v", lacking)
		}
	}
	want := func(what string, ids ...string) {
		t.Helper()
		lacking := h.lacks(h.brief(nil))
		slices.Sort(lacking)
		slices.Sort(ids)
		if !slices.Equal(lacking, ids) {
			t.Errorf("%s: the controller lacks %v, want %v", what, lacking, ids)
		}
		settle()
	}
	settle()
	h.change(func() { h.vms[web1].PowerState = "poweredOn" })
	want("one changed", web1)
	if v := s.vm("web-1"); v.PowerState != inventory.PoweredOn {
		t.Errorf("web-1 is %s", v.PowerState)
	}
	h.change(func() { h.instance, h.told = "second", 0 })
	want("the agent started again")
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-2"}))
	want("a task told of one", web2)

	// Nobody knew for a while what the VMs do.
	if err := s.c.doubt(t.Context(), []inventory.Host{{ID: h.id, State: inventory.NotResponding}}); err != nil {
		t.Fatal(err)
	}
	want("after a silence", web1, web2)
	if v := s.vm("web-2"); v.PowerState != inventory.PoweredOn {
		t.Errorf("web-2 is %s", v.PowerState)
	}

	// What cannot be noted is told again, but not at once.
	h.change(func() { h.vms[web1].PowerState = "levitating" })
	if lacking := h.lacks(h.brief([]string{web1})); len(lacking) > 0 {
		t.Errorf("told just now, and the controller lacks %v", lacking)
	}
	if lacking := h.lacks(h.brief(nil)); !slices.Equal(lacking, []string{web1}) {
		t.Errorf("not noted, and the controller lacks %v", lacking)
	}
	h.change(func() { h.vms[web1].PowerState = "poweredOn" })
	settle()

	// The last heartbeat is lost, or late.
	h.change(func() { h.vms[web1].PowerState = "poweredOff" })
	lost := h.brief([]string{web1})
	h.change(func() { h.vms[web1].PowerState = "poweredOn" })
	settle()
	h.lacks(lost)
	if v := s.vm("web-1"); v.PowerState != inventory.PoweredOn {
		t.Errorf("after a late word web-1 is %s", v.PowerState)
	}
	want("after a late word")

	// What the host has no more needs nothing.
	h.change(func() { delete(h.vms, web2) })
	if keys, ok := s.c.said.keys(h.id); !ok || len(keys) != 2 {
		t.Errorf("the host told %v", keys)
	}
	settle()
	if keys, ok := s.c.said.keys(h.id); !ok || len(keys) != 1 || len(keys[web1]) != 1 {
		t.Errorf("the host told %v", keys)
	}

	// A new controller knows nothing, and says so until it was told all.
	s.restart()
	lacking := h.lacks(h.brief(nil))
	if _, ok := s.c.said.keys(h.id); ok || !slices.Equal(lacking, []string{web1}) {
		t.Errorf("a new controller lacks %v", lacking)
	}
	settle()
	if _, ok := s.c.said.keys(h.id); !ok {
		t.Error("the host counts as silent")
	}
	// What was told long ago is told again.
	digests := map[string][]byte{}
	for _, d := range h.brief(nil).GetDigests() {
		digests[d.GetId()] = d.GetDigest()
	}
	if lacking := s.c.said.lacking(h.id, digests, time.Now().Add(tellAgain+time.Minute)); !slices.Equal(lacking, []string{web1}) {
		t.Errorf("after a long time the controller lacks %v", lacking)
	}
}

// TestManySnapshots: a host with 1000 VMs of 32 snapshots each is heard, in messages
// of at most 1 MiB.
func TestManySnapshots(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	host, err := s.c.inv.HostByID(t.Context(), h.id)
	if err != nil {
		t.Fatal(err)
	}
	const vms, snapshots = 1000, 32
	var group errgroup.Group // side by side: each is a write to the disk
	group.SetLimit(32)
	for i := range vms {
		id := uuid.NewString()
		vm := h.newVM(id, fmt.Sprintf("web-%d", i), "lab", &strongroomv1.KeyRef{Provider: "kp-1", KeyId: uuid.NewString()}, 1)
		for j := range snapshots {
			vm.Snapshots = append(vm.Snapshots, &strongroomv1.Snapshot{
				Id: uuid.NewString(), Name: fmt.Sprintf("snapshot-%d", j), Description: "before the update of everything",
				Disks: []*strongroomv1.Disk{proto.CloneOf(vm.GetDisks()[0])}, Settings: proto.CloneOf(vm.GetSettings()),
			})
		}
		v := inventory.VM{ID: id, Name: vm.GetName(), ClusterID: host.ClusterID, HostID: h.id, Datastore: vm.GetDatastore(), Folder: vm.GetFolder(), Created: time.Now()}
		bare := proto.CloneOf(vm)
		bare.Snapshots = nil
		apply(&v, bare)
		h.change(func() { h.vms[id] = vm })
		group.Go(func() error {
			_, err := s.c.inv.CreateVM(t.Context(), v)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	all := proto.Size(h.heartbeat())
	var lacking []string
	for n := 1; ; n++ {
		req := h.brief(lacking)
		if size := proto.Size(req); size > 1<<20 {
			t.Fatalf("a heartbeat of %d bytes", size)
		}
		if lacking = h.lacks(req); len(lacking) == 0 {
			t.Logf("%d bytes in %d heartbeats; afterwards one has %d", all, n, proto.Size(h.brief(nil)))
			break
		}
		if n > 2+all/(1<<19) {
			t.Fatalf("after %d heartbeats the controller lacks %d VMs", n, len(lacking))
		}
	}
	if v := s.vm("web-999"); len(v.Snapshots) != snapshots {
		t.Errorf("web-999 has %d snapshots", len(v.Snapshots))
	}
	if keys, ok := s.c.said.keys(h.id); !ok || len(keys) != vms {
		t.Errorf("the host told of %d VMs", len(keys))
	}
}
