package controller

import (
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/audit"
	"strongroom/internal/errs"
)

// TestEncryptInPlaceTask: an encryption in place keeps the VM from being powered on,
// the host is told what was asked for, and the audit log tells it from a copy.
func TestEncryptInPlaceTask(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	ctx := t.Context()
	s.success(s.create("web-1", false))
	inPlace := &strongroomv1.EncryptVMRequest{Name: "web-1", InPlace: true, Rate: 7, Disks: []string{"disk-0", "disk-1"}}
	encrypt := func() (*strongroomv1.Task, error) { return client.Call(ctx, s.admin.VM().EncryptVM, inPlace) }

	s.success(client.Call(ctx, s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	if _, err := encrypt(); errs.KindOf(err) != errs.InvalidState || errs.HintOf(err) == "" {
		t.Errorf("of a VM that runs: %v", err)
	}
	s.success(client.Call(ctx, s.admin.VM().PowerOffVM, &strongroomv1.PowerOffVMRequest{Name: "web-1"}))
	if _, err := client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1", InPlace: true, Rate: -1}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a negative rate: %v", err)
	}
	_, err := client.Call(ctx, s.user("reader", "ReadOnly").VM().EncryptVM, inPlace)
	wantKind(t, err, errs.Denied)

	release := make(chan struct{})
	h.failing("EncryptVM", 1, fault{hang: release})
	task := must[strongroomv1.Task](t)(encrypt())
	for name, start := range map[string]func() (*strongroomv1.Task, error){
		"power-on": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"})
		},
		"encrypt": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1"})
		},
		"delete": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-1"})
		},
	} {
		if _, err := start(); errs.KindOf(err) != errs.InvalidState || errs.ReasonOf(err) != "TaskInProgress" {
			t.Errorf("%s during an encryption in place: %v", name, err)
		}
	}
	close(release)
	if _, err := s.ended(task); err != nil {
		t.Fatal(err)
	}
	h.change(func() {
		if last := h.encrypts[len(h.encrypts)-1]; !last.GetInPlace() || last.GetRate() != 7 || len(last.GetDisks()) != 2 {
			t.Errorf("the host was asked for %v", last)
		}
	})
	told := 0
	for _, r := range s.records() {
		if r.Action == "vm.encrypt.in-place" && r.Object == "/vm/web-1" && r.Outcome == audit.Success && r.Details["key_id"] != "" {
			told++
		}
	}
	if told != 1 {
		t.Errorf("%d audit records of it", told)
	}
	if _, err := encrypt(); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("of a VM that is encrypted: %v", err)
	}
}

// TestEncryptInPlaceUnderWay: a VM with a disk that is encrypted in part shows it,
// refuses what would meet it, and goes on under the disk's key.
func TestEncryptInPlaceUnderWay(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	ctx := t.Context()
	s.success(s.create("web-1", false))
	vm := s.vm("web-1")
	key := &strongroomv1.KeyRef{Provider: "kp-1", KeyId: "some/key"}
	h.change(func() {
		d := h.vms[vm.ID].GetDisks()[0]
		d.Encrypted, d.Key, d.Encryption = true, key, &strongroomv1.DiskEncryption{DoneBytes: 1, TotalBytes: 2}
		h.vms[vm.ID].Key = key
	})
	h.beat()
	shown := must[strongroomv1.VM](t)(client.Call(ctx, s.admin.VM().GetVM, &strongroomv1.GetVMRequest{Name: "web-1"}))
	if e := shown.GetDisks()[0].GetEncryption(); e.GetDoneBytes() != 1 || e.GetTotalBytes() != 2 {
		t.Errorf("shown as %v", shown)
	}
	if _, err := client.Call(ctx, s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kp-1"}); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("deleting the provider of its key: %v", err)
	}
	for name, start := range map[string]func() (*strongroomv1.Task, error){
		"encrypt": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1"})
		},
		"decrypt": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().DecryptVM, &strongroomv1.DecryptVMRequest{Name: "web-1"})
		},
		"rekey": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})
		},
		"deep rekey": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Deep: true})
		},
		"snapshot": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().CreateSnapshot, &strongroomv1.CreateSnapshotRequest{Name: "web-1", Snapshot: "before"})
		},
		"fill": func() (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().FillDisks, &strongroomv1.FillDisksRequest{Name: "web-1"})
		},
	} {
		if _, err := start(); errs.ReasonOf(err) != strongroomv1.ReasonEncryptionInProgress || errs.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.success(client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1", InPlace: true}))
	if d := s.vm("web-1").Disks[0]; d.Encryption != nil || d.Key.KeyID != "some/key" {
		t.Errorf("at the end the disk is %+v", d)
	}
}
