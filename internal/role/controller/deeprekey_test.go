package controller

import (
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// TestDeepRekeyTask: while a deep rekey is at work the VM is powered on and off, and
// nothing else changes its disks.
func TestDeepRekeyTask(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	ctx := t.Context()
	s.success(s.create("web-1", true))
	release := make(chan struct{})
	h.failing("RekeyVM", 1, fault{hang: release})
	rekey := must[strongroomv1.Task](t)(client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Deep: true, Rate: 7}))
	s.success(client.Call(ctx, s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	for name, start := range map[string]func() (*strongroomv1.Task, error){
		"encrypt": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().DecryptVM, &strongroomv1.DecryptVMRequest{Name: "web-1"})
		},
		"rekey": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})
		},
		"deep rekey": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Deep: true})
		},
		"delete": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-1"})
		},
	} {
		if _, err := start(); errs.KindOf(err) != errs.InvalidState || errs.ReasonOf(err) != "TaskInProgress" || errs.HintOf(err) == "" {
			t.Errorf("%s during a deep rekey: %v", name, err)
		}
	}
	s.success(client.Call(ctx, s.admin.VM().PowerOffVM, &strongroomv1.PowerOffVMRequest{Name: "web-1"}))
	close(release)
	if _, err := s.ended(rekey); err != nil {
		t.Error(err)
	}
	s.success(client.Call(ctx, s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-1"}))
}

// TestDeepRekeyUnderWay: a VM with a deep rekey under way shows it, needs both keys,
// refuses what would meet it, and the next deep rekey leads to the same key.
func TestDeepRekeyUnderWay(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	ctx := t.Context()
	s.success(s.create("web-1", true))
	s.provider("kp-2")
	vm, err := s.c.inv.VM(ctx, "web-1")
	if err != nil {
		t.Fatal(err)
	}
	first := *vm.Key
	next := &strongroomv1.KeyRef{Provider: "kp-2", KeyId: "some/key"}
	h.change(func() {
		h.vms[vm.ID].GetDisks()[0].Rekey = &strongroomv1.DiskRekey{Key: next, DoneBytes: 1, TotalBytes: 2}
	})
	h.beat()
	shown := must[strongroomv1.VM](t)(client.Call(ctx, s.admin.VM().GetVM, &strongroomv1.GetVMRequest{Name: "web-1"}))
	if r := shown.GetDisks()[0].GetRekey(); r.GetKey().GetKeyId() != "some/key" || r.GetDoneBytes() != 1 || r.GetTotalBytes() != 2 {
		t.Errorf("shown as %v", shown)
	}
	if vm, err = s.c.inv.VM(ctx, "web-1"); err != nil || len(vm.Keys()) != 2 {
		t.Errorf("it needs %v, %v", vm.Keys(), err)
	}
	if _, err := client.Call(ctx, s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kp-2"}); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("deleting the provider of the next key: %v", err)
	}
	for name, start := range map[string]func() (*strongroomv1.Task, error){
		"decrypt": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().DecryptVM, &strongroomv1.DecryptVMRequest{Name: "web-1"})
		},
		"rekey": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})
		},
	} {
		if _, err := start(); errs.ReasonOf(err) != strongroomv1.ReasonRekeyInProgress || errs.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Its other disk is free.
	s.success(client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Disks: []string{"disk-1"}}))
	for _, bad := range []*strongroomv1.RekeyVMRequest{{Name: "web-1", Deep: true, Rate: -1}, {Name: "web-1", Disks: []string{"disk-1"}, Rate: 1}} {
		if _, err := client.Call(ctx, s.admin.VM().RekeyVM, bad); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%v: %v", bad, err)
		}
	}
	// To another provider it is another key; without one, that of the rekey.
	for provider, same := range map[string]bool{"kp-1": false, "": true} {
		args := vmArgs{HostID: vm.HostID, Deep: true}
		err := s.c.chooseRekeyKey(ctx, &args, vm, vm.Disks, provider)
		got := args.Key
		if err != nil || *got == first || (*got == inventory.KeyRef{Provider: "kp-2", KeyID: "some/key"}) != same {
			t.Errorf("with provider %q the key is %v, %v", provider, got, err)
		}
	}
}
