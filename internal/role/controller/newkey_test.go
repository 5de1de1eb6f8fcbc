package controller

import (
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

// newRekeySite is a site with the VM web-1, whose key is of a key server, on a host.
func newRekeySite(t *testing.T) (*site, *kms.Server, *fakeHost) {
	t.Helper()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	return s, server, h
}

// TestFolderOutOfSight: a host that was at work with a new key and then does not see
// the VM's folder any more, because the datastore is not mounted after its restart,
// does not get the key destroyed that the disks have by now.
func TestFolderOutOfSight(t *testing.T) {
	t.Parallel()
	s, server, h := newRekeySite(t)
	v := s.vm("web-1")
	gone := errs.New(errs.NotFound, "cannot read VM folder web-1: it has no vm.json")
	h.change(func() {
		first := h.calls["RekeyVM"]
		h.fault = func(method string, call int) fault {
			switch {
			case method == "RekeyVM" && call == first:
				return fault{lost: true} // done, and then the host is cut off
			case method == "RekeyVM" || method == "GetVM":
				return fault{refuse: gone}
			}
			return fault{}
		}
	})
	_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})))
	wantKind(t, err, errs.NotFound)
	var now string
	h.change(func() { now = h.vms[v.ID].GetDisks()[0].GetKey().GetKeyId() })
	if now == v.Key.KeyID {
		t.Fatal("the host did not rekey the disk")
	}
	if has := materials(t, server, clientName); has[now] == nil || has[v.Key.KeyID] == nil {
		t.Errorf("the key server has %d keys; that of the disk: %v, the one before: %v", len(has), has[now] != nil, has[v.Key.KeyID] != nil)
	}
}

// TestCanceledAtItsEnd: a task that is canceled while the host is about to write the
// new key does not get it destroyed: the host is asked once it is done.
func TestCanceledAtItsEnd(t *testing.T) {
	t.Parallel()
	s, server, h := newRekeySite(t)
	v := s.vm("web-1")
	h.change(func() { h.latecomer = true })
	task := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	eventually(t, "the host to be at work", func() bool { return h.count("RekeyVM") == 1 })
	must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.Task().CancelTask, &strongroomv1.CancelTaskRequest{Id: task.GetId()}))
	if _, err := s.ended(task); err == nil {
		t.Fatal("it was not canceled")
	}
	// What the host was about to write it has written, whoever asks.
	var now string
	h.change(func() {
		h.settle(v.ID)
		now = h.vms[v.ID].GetDisks()[0].GetKey().GetKeyId()
	})
	if now == v.Key.KeyID {
		t.Fatal("the host did not rekey the disk")
	}
	if has := materials(t, server, clientName); has[now] == nil {
		t.Errorf("the key server has %d keys, and not that of the disk", len(has))
	}
}
