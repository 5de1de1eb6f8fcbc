package controller

import (
	"slices"
	"strings"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/errs"
)

func (s *site) clone(c *client.Client, name, clone string, recrypt bool) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), c.VM().CloneVM, &strongroomv1.CloneVMRequest{Name: name, Clone: clone, Recrypt: recrypt})
}

// TestCloneTask: a clone survives lost answers and a restart of the controller,
// has a key of its own, and keeps both VMs to itself meanwhile.
func TestCloneTask(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	source := s.vm("web-1")

	h.failing("CloneVM", 1, fault{lost: true})
	s.success(s.clone(s.admin, "web-1", "web-2", false))
	if n := h.count("CloneVM"); n != 2 {
		t.Errorf("the host was called %d times, want once more after the lost answer", n)
	}
	clone := s.vm("web-2")
	if clone.ID == source.ID || clone.Key == nil || *clone.Key == *source.Key || clone.Key.Provider != "kp-1" || len(clone.Disks) != 2 || clone.Datastore != "lab" {
		t.Errorf("the clone is %+v", clone)
	}
	if users, err := s.c.inv.Usage(t.Context(), "kp-1", clone.Key.KeyID); err != nil || len(users) == 0 {
		t.Errorf("its key is used by %v, %v", users, err)
	}
	if n := s.events(event.VMCloned, "vm/web-2"); n != 1 {
		t.Errorf("%d events of the clone, want one", n)
	}

	release := make(chan struct{})
	h.failing("CloneVM", 1, fault{hang: release})
	before := h.count("CloneVM")
	task := must[strongroomv1.Task](t)(s.clone(s.admin, "web-1", "web-3", true))
	eventually(t, "the host is at work", func() bool { return h.count("CloneVM") > before })
	for _, name := range []string{"web-1", "web-3"} { // a VM that is being made is none yet
		_, err := client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: name})
		if name == "web-1" && errs.ReasonOf(err) != "TaskInProgress" || name == "web-3" && errs.KindOf(err) != errs.NotFound {
			t.Errorf("power on of %s: %v", name, err)
		}
	}
	_, err := s.clone(s.admin, "web-2", "web-3", false)
	if errs.ReasonOf(err) != "TaskInProgress" {
		t.Errorf("a second clone of that name: %v", err)
	}
	s.restart()
	close(release)
	if _, err := s.ended(task); err != nil {
		t.Fatal(err)
	}
	if v := s.vm("web-3"); !v.Encrypted() {
		t.Errorf("after the restart: %+v", v)
	}
	actions := map[string]int{}
	for _, r := range s.records() {
		if (r.Object == "/vm/web-2" || r.Object == "/vm/web-3") && strings.HasPrefix(r.Action, "vm.clone") {
			actions[r.Object+" "+r.Action+" "+r.Outcome+" of "+r.Details["source"]]++
		}
	}
	if len(actions) != 2 || actions["/vm/web-2 vm.clone success of /vm/web-1"] != 1 || actions["/vm/web-3 vm.clone.recrypt success of /vm/web-1"] != 1 {
		t.Errorf("audit records: %v", actions)
	}
}

// TestCloneFails: what the host refuses is undone.
func TestCloneFails(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	h.failing("CloneVM", 1, fault{refuse: errs.New(errs.NoSpace, "no room for disk-0")})
	_, err := s.ended(must[strongroomv1.Task](t)(s.clone(s.admin, "web-1", "web-2", false)))
	wantKind(t, err, errs.NoSpace)
	if n := h.count("DeleteVM"); n != 1 {
		t.Errorf("the failed clone was undone %d times", n)
	}
	if n := s.events(event.VMNoDiskSpace, "vm/web-2"); n != 1 {
		t.Errorf("%d events of the full datastore, want one", n)
	}
	var actions []string
	for _, r := range s.records() {
		if r.Object == "/vm/web-2" && strings.HasPrefix(r.Action, "vm.") {
			actions = append(actions, r.Action+" "+r.Outcome)
		}
	}
	if !slices.Equal(actions, []string{"vm.clone error", "vm.clone.undo success"}) {
		t.Errorf("audit records: %q", actions)
	}
	s.success(s.clone(s.admin, "web-1", "web-2", false)) // name and locks are free again
}

// TestCloneRefused: requests that make no sense start no task.
func TestCloneRefused(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.create("plain-1", false))
	s.success(s.create("on", true))
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "on"}))
	for name, c := range map[string]struct {
		req  *strongroomv1.CloneVMRequest
		kind errs.Kind
		hint string
	}{
		"no such VM":           {&strongroomv1.CloneVMRequest{Name: "web-9", Clone: "web-2"}, errs.NotFound, "strongroom vm ls"},
		"no name":              {&strongroomv1.CloneVMRequest{Name: "web-1"}, errs.Invalid, ""},
		"a name with a slash":  {&strongroomv1.CloneVMRequest{Name: "web-1", Clone: "a/b"}, errs.Invalid, ""},
		"a name that is taken": {&strongroomv1.CloneVMRequest{Name: "web-1", Clone: "plain-1"}, errs.Exists, "strongroom vm show plain-1"},
		"its own name":         {&strongroomv1.CloneVMRequest{Name: "web-1", Clone: "web-1"}, errs.Exists, "strongroom vm show web-1"},
		"no key to change":     {&strongroomv1.CloneVMRequest{Name: "plain-1", Clone: "web-2", Recrypt: true}, errs.InvalidState, "strongroom vm encrypt plain-1"},
		"no key of a provider": {&strongroomv1.CloneVMRequest{Name: "plain-1", Clone: "web-2", Provider: "kp-1"}, errs.InvalidState, "strongroom vm encrypt plain-1"},
		"no such provider":     {&strongroomv1.CloneVMRequest{Name: "web-1", Clone: "web-2", Provider: "kp-9"}, errs.NotFound, "strongroom provider ls"},
		"no such datastore":    {&strongroomv1.CloneVMRequest{Name: "web-1", Clone: "web-2", Datastore: "ds-9"}, errs.NotFound, "strongroom datastore ls"},
	} {
		_, err := client.Call(t.Context(), s.admin.VM().CloneVM, c.req)
		if errs.KindOf(err) != c.kind || errs.HintOf(err) != c.hint {
			t.Errorf("%s: %v (kind %v, hint %q)", name, err, errs.KindOf(err), errs.HintOf(err))
		}
	}
	if n := h.count("CloneVM"); n != 0 {
		t.Errorf("the host was called %d times", n)
	}
	// One that runs may be powered off while it is cloned, but not rekeyed.
	release := make(chan struct{})
	h.failing("CloneVM", 1, fault{hang: release})
	task := must[strongroomv1.Task](t)(s.clone(s.admin, "on", "web-2", false))
	eventually(t, "the host is at work", func() bool { return h.count("CloneVM") > 0 })
	if _, err := client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "on"}); errs.ReasonOf(err) != "TaskInProgress" {
		t.Errorf("a rekey during a clone: %v", err)
	}
	s.success(client.Call(t.Context(), s.admin.VM().PowerOffVM, &strongroomv1.PowerOffVMRequest{Name: "on", Hard: true}))
	close(release)
	if _, err := s.ended(task); err != nil {
		t.Error(err)
	}
}

// TestClonePrivileges: each part of what a clone does has its privilege.
func TestClonePrivileges(t *testing.T) {
	t.Parallel()
	s, _ := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.create("plain-1", false))
	all := []access.Privilege{"VirtualMachine.Provisioning.Clone", "VirtualMachine.Inventory.CreateFromExisting", "Cryptographer.Clone", "Cryptographer.Recrypt", "System.Read"}
	for i, c := range []struct {
		without   access.Privilege
		vm        string
		recrypt   bool
		permitted bool
	}{
		{"VirtualMachine.Provisioning.Clone", "plain-1", false, false},
		{"VirtualMachine.Inventory.CreateFromExisting", "plain-1", false, false},
		{"Cryptographer.Clone", "plain-1", false, true},
		{"Cryptographer.Clone", "web-1", false, false},
		{"Cryptographer.Recrypt", "web-1", false, true},
		{"Cryptographer.Recrypt", "web-1", true, false},
	} {
		name := "r" + string(rune('a'+i))
		role := access.Role{Name: name, Privileges: slices.DeleteFunc(slices.Clone(all), func(p access.Privilege) bool { return p == c.without })}
		if err := s.c.access.PutRole(t.Context(), role); err != nil {
			t.Fatal(err)
		}
		task, err := s.clone(s.user("u"+name, name), c.vm, "clone-"+name, c.recrypt)
		if !c.permitted {
			wantKind(t, err, errs.Denied)
			continue
		}
		s.success(task, err)
	}
}
