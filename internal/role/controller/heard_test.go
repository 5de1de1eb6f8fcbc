package controller

import (
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/testca"
)

// TestLateWords: what a host said before a change and what arrives after it
// changes nothing.
func TestLateWords(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	arrives := func(req *strongroomv1.HeartbeatRequest) {
		t.Helper()
		if _, err := h.enroll.Heartbeat(t.Context(), connect.NewRequest(req)); err != nil {
			t.Fatal(err)
		}
	}
	none := h.heartbeat()
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	old := s.vm("web-1").Key
	before := h.heartbeat()
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	key := s.vm("web-1").Key
	after := h.heartbeat()
	want := func(what string, key *inventory.KeyRef) {
		t.Helper()
		v := s.vm("web-1")
		if *v.Key != *key || *v.Disks[0].Key != *key || v.Disks[0].Format != inventory.LUKS {
			t.Errorf("%s: web-1 has %+v, want %+v", what, v, key)
		}
		n, err := s.c.needed(t.Context(), "kms-1")
		if err != nil || !n.registered[key.KeyID] || !n.retired[old.KeyID].Since.After(v.Created) {
			t.Errorf("%s: needed %+v, %v", what, n, err)
		}
	}
	arrives(before)
	want("a word of before the rekey", key)
	arrives(after)
	arrives(before)
	arrives(none)
	want("words in the wrong order", key)
	if keys, ok := s.c.said.keys(h.id); !ok || len(keys) != 1 {
		t.Errorf("the host told %v", keys)
	}

	// The agent starts again, and counts anew.
	h.change(func() { h.instance, h.told = "second", 0 })
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	h.beat()
	arrives(after)
	if v := s.vm("web-1"); v.PowerState != inventory.PoweredOn {
		t.Errorf("after a word of the agent's start before: %s", v.PowerState)
	}
	if host, err := s.c.inv.Host(t.Context(), "host-1"); err != nil || host.Instance != "second" {
		t.Errorf("%+v, %v", host, err)
	}
	// A host that does not number its words is believed.
	late := h.heartbeat()
	late.Sequence, late.Vms[0].Description, late.Vms[0].PowerState = 0, nil, "poweredOff"
	h.beat()
	arrives(late)
	if v := s.vm("web-1"); v.PowerState != inventory.PoweredOff {
		t.Errorf("a word without a number: %s", v.PowerState)
	}
}

// TestUnreadVM: a VM whose folder its host cannot read needs what it needed.
func TestUnreadVM(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.c.orphanAgeMin = time.Second
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	for _, name := range []string{"web-1", "web-2"} {
		s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
	}
	v, other := s.vm("web-1"), s.vm("web-2")
	h.beat()
	powered := s.events(event.VMPoweredOff, "vm/web-1")
	h.change(func() {
		for id, vm := range h.vms {
			h.vms[id] = &strongroomv1.VM{
				Id: id, Name: vm.GetName(), Host: h.name, Datastore: vm.GetDatastore(), Folder: vm.GetFolder(),
				PowerState: "unknown", CryptoState: "locked", LockReason: "cannot read VM folder",
			}
		}
	})
	// web-2 is in no inventory, as after the restoration of an old backup.
	if err := s.c.inv.DeleteVM(t.Context(), other.ID); err != nil {
		t.Fatal(err)
	}
	h.beat()
	now := s.vm("web-1")
	if now.CryptoState != inventory.Locked || now.PowerState != inventory.PowerUnknown || now.Key == nil || *now.Key != *v.Key || len(now.Disks) != len(v.Disks) || *now.Disks[0].Key != *v.Key {
		t.Errorf("web-1 is %+v, was %+v", now, v)
	}
	if n := s.events(event.VMPoweredOff, "vm/web-1"); n != powered {
		t.Errorf("%d events of a VM that nobody powered off", n-powered)
	}
	n, err := s.c.needed(t.Context(), "kms-1")
	if err != nil || !n.registered[v.Key.KeyID] || !n.other[other.Key.KeyID] || len(n.silent) > 0 {
		t.Errorf("needed %+v, %v", n, err)
	}
	_, err = client.Call(t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kms-1"})
	wantKind(t, err, errs.InvalidState)

	// A controller that never heard what web-2 needs counts its host as silent.
	s.restart()
	s.c.orphanAgeMin = time.Second
	h.beat()
	if got := s.orphans("kms-1"); !slices.Equal(got.GetSilentHosts(), []string{"host-1"}) {
		t.Errorf("silent hosts: %v", got)
	}
	_, err = s.destroyOrphans("kms-1")
	wantKind(t, err, errs.Unavailable)
}
