package controller

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/testca"
)

func (h *fakeHost) FindVM(_ context.Context, req *connect.Request[strongroomv1.AgentFindVMRequest]) (*connect.Response[strongroomv1.AgentFindVMResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.found == nil {
		return connect.NewResponse(&strongroomv1.AgentFindVMResponse{HasDatastore: true}), nil
	}
	return connect.NewResponse(h.found), nil
}

// TestForgetVM: the keys of an unregistered VM are orphans once all hosts say that
// its folder is gone, and not before.
func TestForgetVM(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.c.orphanAgeMin = time.Second
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	s.cluster("west")
	h, far := s.host("east", "host-1"), s.host("west", "host-2")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	for _, name := range []string{"web-1", "web-2"} {
		s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
	}
	v := s.vm("web-1")
	key := v.Key.KeyID
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "web-1"}))
	unregistered := func() []*strongroomv1.UnregisteredVM {
		t.Helper()
		return must[strongroomv1.ListUnregisteredVMsResponse](t)(client.Call(t.Context(), s.admin.VM().ListUnregisteredVMs, &strongroomv1.ListUnregisteredVMsRequest{})).GetVms()
	}
	if got := unregistered(); len(got) != 1 || got[0].GetId() != v.ID || got[0].GetName() != "web-1" || got[0].GetDatastore() != "east" || got[0].GetFolder() != "web-1" ||
		got[0].GetSince() == nil || len(got[0].GetKeys()) != 1 || got[0].GetKeys()[0].GetKeyId() != key {
		t.Fatalf("unregistered: %v", got)
	}
	req := &strongroomv1.ForgetVMRequest{Datastore: "east", Folder: "web-1"}
	refused := func(what string, kind errs.Kind, reason, says string) {
		t.Helper()
		_, err := client.Call(t.Context(), s.admin.VM().ForgetVM, req)
		if errs.KindOf(err) != kind || errs.ReasonOf(err) != reason || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v (kind %v, reason %q), want kind %v, reason %q, and %q", what, err, errs.KindOf(err), errs.ReasonOf(err), kind, reason, says)
		}
		if len(unregistered()) != 1 || slices.Contains(orphanIDs(s.orphans("kms-1")), key) {
			t.Fatalf("%s: it is forgotten", what)
		}
	}
	finds := func(h *fakeHost, res *strongroomv1.AgentFindVMResponse) { h.change(func() { h.found = res }) }
	sees := func(folders ...*strongroomv1.FoundFolder) *strongroomv1.AgentFindVMResponse {
		return &strongroomv1.AgentFindVMResponse{HasDatastore: true, Folders: folders}
	}
	_, err := client.Call(t.Context(), s.user("eve", "ReadOnly").VM().ForgetVM, req)
	wantKind(t, err, errs.Denied)
	_, err = client.Call(t.Context(), s.admin.VM().ForgetVM, &strongroomv1.ForgetVMRequest{Datastore: "east", Folder: "web-2"})
	wantKind(t, err, errs.NotFound)
	finds(h, sees(&strongroomv1.FoundFolder{Datastore: "east", Folder: "web-1"}))
	refused("the folder is there", errs.InvalidState, reasonFolderFound, "host-1 sees its folder, web-1 on datastore east")
	finds(h, sees(&strongroomv1.FoundFolder{Datastore: "east", Folder: "web-1", Problem: "no vm.json"}))
	refused("something is there", errs.InvalidState, reasonFolderFound, "no vm.json")
	finds(h, nil)
	finds(far, sees(&strongroomv1.FoundFolder{Datastore: "west", Folder: "moved"}))
	refused("it was moved", errs.InvalidState, reasonFolderFound, "host-2")
	finds(far, nil)
	finds(h, &strongroomv1.AgentFindVMResponse{HasDatastore: true, DatastoreEmpty: true})
	refused("the datastore may not be mounted", errs.InvalidState, reasonDatastoreEmpty, "host-1")
	finds(h, &strongroomv1.AgentFindVMResponse{})
	finds(far, &strongroomv1.AgentFindVMResponse{})
	refused("nobody has the datastore", errs.InvalidState, "", "no host has datastore east")
	finds(h, nil)
	far.failing("FindVM", 1, fault{refuse: errs.New(errs.Unavailable, "cannot look for VMs on datastore west")})
	refused("a host cannot look", errs.Unavailable, "", "host-2 may see its folder: cannot look")
	far.failing("FindVM", 1, fault{lost: true})
	refused("a host's answer is lost", errs.Unavailable, "", "host-2 may see its folder")
	if _, err := s.c.inv.UpdateHost(t.Context(), far.id, func(h *inventory.Host) error { h.State = inventory.NotResponding; return nil }); err != nil {
		t.Fatal(err)
	}
	refused("a host is silent", errs.Unavailable, reasonHostSilent, "host-2")
	far.beat()

	// A registered copy needs its keys itself.
	finds(h, sees(&strongroomv1.FoundFolder{Datastore: "east", Folder: "web-2"}))
	before := time.Now()
	got := must[strongroomv1.ForgetVMResponse](t)(client.Call(t.Context(), s.admin.VM().ForgetVM, req)).GetVm()
	after := time.Now()
	if got.GetId() != v.ID || len(unregistered()) != 0 {
		t.Errorf("forgot %v, and still knows %v", got, unregistered())
	}
	_, err = client.Call(t.Context(), s.admin.VM().ForgetVM, req)
	wantKind(t, err, errs.NotFound)
	eventually(t, "the key to be an orphan", func() bool { return slices.Equal(orphanIDs(s.orphans("kms-1")), []string{key}) })
	if since := s.orphans("kms-1").GetKeys()[0].GetUnusedSince().AsTime(); since.Before(before) || since.After(after) {
		t.Errorf("an orphan since %v, and forgotten from %v to %v", since, before, after)
	}
	if materials(t, server, clientName)[key] == nil {
		t.Error("the key was destroyed")
	}
	if n := s.events("strongroom.vm.Forgotten", "vm/web-1"); n != 1 {
		t.Errorf("%d events", n)
	}
	outcomes := map[string]int{}
	for _, r := range s.records() {
		if r.Action == "vm.forget" && r.Object == "/vm/web-1" && r.Details["vm_id"] == v.ID && r.Details["keys"] == "kms-1/"+key && r.Details["folder"] == "web-1" {
			outcomes[r.Outcome]++
		}
	}
	if outcomes[audit.Success] != 1 || outcomes[audit.Failed] != 8 {
		t.Errorf("on record: %v", outcomes)
	}
}

// TestForgetAndRegister: a folder that is registered again while it is to be
// forgotten is not forgotten.
func TestForgetAndRegister(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	v := s.vm("web-1")
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "web-1"}))
	going := make(chan struct{})
	h.failing("FindVM", 1, fault{hang: going})
	ended := make(chan error, 1)
	go func() {
		_, err := client.Call(t.Context(), s.admin.VM().ForgetVM, &strongroomv1.ForgetVMRequest{Datastore: "east", Folder: "web-1"})
		ended <- err
	}()
	eventually(t, "the host to be asked", func() bool { return h.count("FindVM") == 1 })
	if _, err := s.c.inv.CreateVM(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	close(going)
	wantKind(t, <-ended, errs.NotFound)
	n, err := s.c.needed(t.Context(), "kms-1")
	if err != nil || !n.registered[v.Key.KeyID] {
		t.Errorf("needed: %+v, %v", n, err)
	}
}
