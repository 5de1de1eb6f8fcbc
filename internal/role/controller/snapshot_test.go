package controller

import (
	"slices"
	"strings"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

func (s *site) snapshot(c *client.Client, vm, name string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), c.VM().CreateSnapshot, &strongroomv1.CreateSnapshotRequest{Name: vm, Snapshot: name, Description: "of a test"})
}

func (s *site) revert(c *client.Client, vm, name string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), c.VM().RevertToSnapshot, &strongroomv1.RevertToSnapshotRequest{Name: vm, Snapshot: name})
}

func (s *site) renameSnapshot(c *client.Client, vm, name, newName string, description *string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), c.VM().RenameSnapshot, &strongroomv1.RenameSnapshotRequest{Name: vm, Snapshot: name, NewName: newName, Description: description})
}

func (s *site) deleteSnapshot(c *client.Client, vm, name string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), c.VM().DeleteSnapshot, &strongroomv1.DeleteSnapshotRequest{Name: vm, Snapshot: name})
}

func (s *site) consolidate(c *client.Client, vm string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), c.VM().ConsolidateSnapshots, &strongroomv1.ConsolidateSnapshotsRequest{Name: vm})
}

// TestSnapshotTasks: they survive lost answers and a restart of the controller,
// and what they did is on record.
func TestSnapshotTasks(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	h.failing("CreateSnapshot", 1, fault{lost: true})
	s.success(s.snapshot(s.admin, "web-1", "first"))
	s.success(s.snapshot(s.admin, "web-1", "second"))
	v := s.vm("web-1")
	if len(v.Snapshots) != 2 || v.Snapshots[0].Name != "first" || v.Snapshots[0].Description != "of a test" || v.Snapshots[1].Parent != v.Snapshots[0].ID || v.Snapshot != v.Snapshots[1].ID {
		t.Fatalf("the snapshots are %+v, current %s", v.Snapshots, v.Snapshot)
	}

	// A revert whose answer is lost is known by its id.
	h.failing("RevertToSnapshot", 1, fault{lost: true})
	s.success(s.revert(s.admin, "web-1", "first"))
	h.change(func() {
		if len(h.reverts) != 2 || h.reverts[0] != h.reverts[1] || h.reverts[0] == "" {
			t.Errorf("the host was asked for the reverts %q", h.reverts)
		}
	})
	release := make(chan struct{})
	h.failing("RevertToSnapshot", 1, fault{hang: release})
	before := h.count("RevertToSnapshot")
	task := must[strongroomv1.Task](t)(s.revert(s.admin, "web-1", "second"))
	eventually(t, "the host is at work", func() bool { return h.count("RevertToSnapshot") > before })
	if _, err := client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}); errs.ReasonOf(err) != "TaskInProgress" {
		t.Errorf("power on during a revert: %v", err)
	}
	s.restart()
	close(release)
	if _, err := s.ended(task); err != nil {
		t.Fatal(err)
	}
	if v := s.vm("web-1"); v.Snapshot != v.Snapshots[1].ID {
		t.Errorf("after the restart the disks come from %q", v.Snapshot)
	}

	// Its own id is what a failed creation is undone by.
	h.failing("CreateSnapshot", 1, fault{refuse: errs.New(errs.NoSpace, "no room for disk-0")})
	_, err := s.ended(must[strongroomv1.Task](t)(s.snapshot(s.admin, "web-1", "third")))
	wantKind(t, err, errs.NoSpace)
	if n := h.count("DeleteSnapshot"); n != 1 {
		t.Errorf("the failed snapshot was undone %d times", n)
	}
	if v := s.vm("web-1"); len(v.Snapshots) != 2 {
		t.Errorf("undone, the snapshots are %+v", v.Snapshots)
	}
	s.success(s.deleteSnapshot(s.admin, "web-1", "second"))
	h.failing("RenameSnapshot", 1, fault{lost: true})
	s.success(s.renameSnapshot(s.admin, "web-1", "first", "earliest", nil))
	if v := s.vm("web-1"); v.Snapshots[0].Name != "earliest" || v.Snapshots[0].Description != "of a test" {
		t.Errorf("renamed, it is %+v", v.Snapshots[0])
	}
	none := ""
	s.success(s.renameSnapshot(s.admin, "web-1", "earliest", "", &none))
	if v := s.vm("web-1"); v.Snapshots[0].Name != "earliest" || v.Snapshots[0].Description != "" {
		t.Errorf("described, it is %+v", v.Snapshots[0])
	}
	h.change(func() { h.vms[v.ID].ConsolidationNeeded = true })
	h.beat()
	if !s.vm("web-1").ConsolidationNeeded {
		t.Error("it is not told that consolidation is needed")
	}
	s.success(s.consolidate(s.admin, "web-1"))
	if v := s.vm("web-1"); len(v.Snapshots) != 1 || v.Snapshot != v.Snapshots[0].ID || v.ConsolidationNeeded {
		t.Errorf("at the end: %+v", v)
	}

	var actions []string
	for _, r := range s.records() {
		if strings.HasPrefix(r.Action, "vm.snapshot.") {
			actions = append(actions, r.Action+" "+r.Outcome+" "+r.Object+" "+r.Details["snapshot"])
		}
	}
	if want := []string{
		"vm.snapshot.create success /vm/web-1 first", "vm.snapshot.create success /vm/web-1 second", "vm.snapshot.revert success /vm/web-1 first",
		"vm.snapshot.revert success /vm/web-1 second", "vm.snapshot.create error /vm/web-1 third", "vm.snapshot.create.undo success /vm/web-1 third",
		"vm.snapshot.delete success /vm/web-1 second",
		"vm.snapshot.rename success /vm/web-1 first", "vm.snapshot.rename success /vm/web-1 earliest",
		"vm.snapshot.consolidate success /vm/web-1 ",
	}; !slices.Equal(actions, want) {
		t.Errorf("audit records: %q", actions)
	}
	for kind, want := range map[string]int{event.VMSnapshotCreated: 2, event.VMSnapshotReverted: 2, event.VMSnapshotDeleted: 1, event.VMSnapshotRenamed: 2, event.VMConsolidated: 1, event.VMNoDiskSpace: 1} {
		if n := s.events(kind, "vm/web-1"); n != want {
			t.Errorf("%d events %s, want %d", n, kind, want)
		}
	}
}

// TestSnapshotKeys: the key of a snapshot counts as used for as long as it is
// there, but a VM runs without it.
func TestSnapshotKeys(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.snapshot(s.admin, "web-1", "first"))
	old := *s.vm("web-1").Key
	// The fake host rekeys the disks alone, as one that was killed in between.
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	v := s.vm("web-1")
	if keys := v.Keys(); len(keys) != 2 || !slices.Contains(keys, old) || slices.Contains(v.RunKeys(), old) {
		t.Errorf("the VM needs %v, to run %v", keys, v.RunKeys())
	}
	users, err := s.c.inv.Usage(t.Context(), old.Provider, old.KeyID)
	if err != nil || len(users) != len(v.Disks) || users[0].Snapshot != "first" || users[0].VM != "web-1" {
		t.Errorf("its old key is used by %+v, %v", users, err)
	}
	res := must[strongroomv1.GetProviderUsageResponse](t)(client.Call(t.Context(), s.admin.Provider().GetProviderUsage, &strongroomv1.GetProviderUsageRequest{Name: old.Provider}))
	if !slices.ContainsFunc(res.GetUsers(), func(u *strongroomv1.KeyUser) bool { return u.GetSnapshot() == "first" && u.GetKeyId() == old.KeyID }) {
		t.Errorf("users of the provider: %v", res.GetUsers())
	}
	host, err := s.c.inv.HostByID(t.Context(), h.id)
	if err != nil {
		t.Fatal(err)
	}
	for _, forget := range []bool{false, true} { // the host is asked if the inventory does not know
		if used, err := s.c.mayUse(t.Context(), host, v.ID, old); !used || err != nil {
			t.Errorf("used: %v, %v", used, err)
		}
		if forget {
			break
		}
		if _, err := s.c.inv.UpdateVM(t.Context(), v.ID, func(v *inventory.VM) error { v.Snapshots, v.Snapshot = nil, ""; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	h.beat()

	// A header that cannot be read keeps the key that it was last seen with.
	h.change(func() { h.vms[v.ID].Snapshots[0].Disks[0].Key = nil })
	h.beat()
	if d := s.vm("web-1").Snapshots[0].Disks[0]; d.Key == nil || *d.Key != old {
		t.Errorf("the disk is %+v", d)
	}
	s.success(s.deleteSnapshot(s.admin, "web-1", "first"))
	if users, err := s.c.inv.Usage(t.Context(), old.Provider, old.KeyID); err != nil || len(users) > 0 {
		t.Errorf("without the snapshot the old key is used by %v, %v", users, err)
	}
}

// TestSnapshotRefused: requests that make no sense start no task.
func TestSnapshotRefused(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.create("plain-1", false))
	s.success(s.snapshot(s.admin, "web-1", "first"))
	s.success(s.snapshot(s.admin, "web-1", "other"))
	s.success(s.snapshot(s.admin, "plain-1", "first"))
	s.success(s.create("on", true))
	s.success(s.snapshot(s.admin, "on", "first"))
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "on"}))
	made, ctx := h.count("CreateSnapshot"), t.Context()
	for name, c := range map[string]struct {
		call func() (*strongroomv1.Task, error)
		kind errs.Kind
		hint string
	}{
		"no such VM":                     {func() (*strongroomv1.Task, error) { return s.snapshot(s.admin, "web-9", "second") }, errs.NotFound, "strongroom vm ls"},
		"no name":                        {func() (*strongroomv1.Task, error) { return s.snapshot(s.admin, "web-1", "") }, errs.Invalid, ""},
		"a taken name":                   {func() (*strongroomv1.Task, error) { return s.snapshot(s.admin, "web-1", "first") }, errs.Exists, "strongroom vm snapshot ls web-1"},
		"a revert that runs":             {func() (*strongroomv1.Task, error) { return s.revert(s.admin, "on", "first") }, errs.InvalidState, "strongroom vm power-off on"},
		"a name to rename that is taken": {func() (*strongroomv1.Task, error) { return s.renameSnapshot(s.admin, "web-1", "first", "other", nil) }, errs.Exists, "strongroom vm snapshot ls web-1"},
		"none to rename":                 {func() (*strongroomv1.Task, error) { return s.renameSnapshot(s.admin, "web-1", "second", "third", nil) }, errs.NotFound, "strongroom vm snapshot ls web-1"},
		"a bad name to rename":           {func() (*strongroomv1.Task, error) { return s.renameSnapshot(s.admin, "web-1", "first", "../x", nil) }, errs.Invalid, ""},
		"no such snapshot":               {func() (*strongroomv1.Task, error) { return s.revert(s.admin, "web-1", "second") }, errs.NotFound, "strongroom vm snapshot ls web-1"},
		"none to delete":                 {func() (*strongroomv1.Task, error) { return s.deleteSnapshot(s.admin, "web-1", "second") }, errs.NotFound, "strongroom vm snapshot ls web-1"},
		"a description that is a command": {func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().CreateSnapshot, &strongroomv1.CreateSnapshotRequest{Name: "web-1", Snapshot: "second", Description: "\x1b[2J"})
		}, errs.Invalid, ""},
		"encrypt": {func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "plain-1"})
		}, errs.InvalidState, "delete them first: strongroom vm snapshot ls plain-1"},
		"decrypt": {func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().DecryptVM, &strongroomv1.DecryptVMRequest{Name: "web-1"})
		}, errs.InvalidState, "delete them first: strongroom vm snapshot ls web-1"},
		"deep rekey": {func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Deep: true})
		}, errs.InvalidState, "delete them first: strongroom vm snapshot ls web-1"},
	} {
		_, err := c.call()
		if errs.KindOf(err) != c.kind || errs.HintOf(err) != c.hint {
			t.Errorf("%s: %v (kind %v, hint %q)", name, err, errs.KindOf(err), errs.HintOf(err))
		}
	}
	if h.count("CreateSnapshot") != made || h.count("RevertToSnapshot")+h.count("DeleteSnapshot")+h.count("EncryptVM")+h.count("DecryptVM")+h.count("RekeyVM") > 0 {
		t.Error("the host was called")
	}
	s.success(s.snapshot(s.admin, "on", "second")) // of a VM that runs
}

// TestSnapshotPrivileges: each operation has its own.
func TestSnapshotPrivileges(t *testing.T) {
	t.Parallel()
	s, _ := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.snapshot(s.admin, "web-1", "first"))
	s.success(s.snapshot(s.admin, "web-1", "second"))
	user := func(name string, privileges ...access.Privilege) *client.Client {
		t.Helper()
		role := access.Role{Name: name, Privileges: append([]access.Privilege{"System.Read"}, privileges...)}
		if err := s.c.access.PutRole(t.Context(), role); err != nil {
			t.Fatal(err)
		}
		return s.user("u-"+name, name)
	}
	reader := user("reader")
	creator, reverter, remover := user("creator", "VirtualMachine.State.CreateSnapshot"), user("reverter", "VirtualMachine.State.RevertToSnapshot"), user("remover", "VirtualMachine.State.RemoveSnapshot")
	renamer := user("renamer", "VirtualMachine.State.RenameSnapshot")
	for _, c := range []struct {
		may, mayNot *client.Client
		do          func(c *client.Client) (*strongroomv1.Task, error)
	}{
		{creator, reverter, func(c *client.Client) (*strongroomv1.Task, error) { return s.snapshot(c, "web-1", "third") }},
		{reverter, remover, func(c *client.Client) (*strongroomv1.Task, error) { return s.revert(c, "web-1", "first") }},
		{renamer, creator, func(c *client.Client) (*strongroomv1.Task, error) {
			return s.renameSnapshot(c, "web-1", "first", "earliest", nil)
		}},
		{remover, creator, func(c *client.Client) (*strongroomv1.Task, error) { return s.deleteSnapshot(c, "web-1", "second") }},
		{remover, creator, func(c *client.Client) (*strongroomv1.Task, error) { return s.consolidate(c, "web-1") }},
	} {
		for _, other := range []*client.Client{reader, c.mayNot} {
			_, err := c.do(other)
			wantKind(t, err, errs.Denied)
		}
		s.success(c.do(c.may))
	}
}
