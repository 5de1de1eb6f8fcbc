package controller

import (
	"context"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
)

// newVM is a VM as its host describes it.
func (h *fakeHost) newVM(id, name, datastore string, key *strongroomv1.KeyRef, disks int) *strongroomv1.VM {
	vm := &strongroomv1.VM{
		Id: id, Name: name, Host: h.name, Datastore: datastore, Folder: name, PowerState: "poweredOff", CryptoState: "unlocked",
		Settings: &strongroomv1.VMSettings{Cpus: 1, MemoryMib: 64},
	}
	for i := range disks {
		disk := "disk-" + string(rune('0'+i))
		vm.Disks = append(vm.Disks, &strongroomv1.Disk{Name: disk, File: disk + ".raw", SizeBytes: 1 << 20})
	}
	wrap(vm, key)
	return vm
}

// wrap encrypts a VM's disks under a key, or rekeys them, and the VM with them
// unless some are named; a key that they have changes nothing.
func wrap(vm *strongroomv1.VM, key *strongroomv1.KeyRef, disks ...string) {
	if key == nil {
		return
	}
	for _, d := range vm.GetDisks() {
		if len(disks) > 0 && !slices.Contains(disks, d.GetName()) {
			continue
		}
		if !proto.Equal(d.GetKey(), key) {
			d.Encrypted, d.Key, d.Generation, d.Cipher = true, key, d.GetGeneration()+1, "xts-aes-256"
		}
	}
	if len(disks) == 0 {
		vm.Key = key
	}
}

func (h *fakeHost) find(id string) (*strongroomv1.VM, error) {
	vm, ok := h.vms[id]
	if !ok {
		return nil, errs.New(errs.NotFound, "no VM %s", id)
	}
	return vm, nil
}

// work changes a VM and sends it as a stream's result.
func (h *fakeHost) work(out *connect.ServerStream[strongroomv1.AgentProgress], id string, f func(*strongroomv1.VM)) error {
	h.mu.Lock()
	vm, err := h.find(id)
	if err == nil {
		f(vm)
		vm = h.describe(vm)
	}
	h.mu.Unlock()
	if err != nil {
		return err
	}
	if err := out.Send(&strongroomv1.AgentProgress{Step: "working", Done: 1, Total: 2, Unit: "bytes"}); err != nil {
		return err
	}
	return out.Send(&strongroomv1.AgentProgress{Result: vm})
}

func (h *fakeHost) CreateVM(_ context.Context, req *connect.Request[strongroomv1.AgentCreateVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	m := req.Msg
	h.change(func() {
		h.created = m
		if h.vms[m.GetId()] == nil {
			h.vms[m.GetId()] = h.newVM(m.GetId(), m.GetName(), m.GetDatastore(), m.GetKey(), len(m.GetDisks()))
		}
	})
	return h.work(out, m.GetId(), func(*strongroomv1.VM) {})
}

func (h *fakeHost) CloneVM(_ context.Context, req *connect.Request[strongroomv1.AgentCloneVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	m := req.Msg
	h.mu.Lock()
	source, err := h.find(m.GetSourceId())
	if err == nil && h.vms[m.GetId()] == nil {
		h.vms[m.GetId()] = h.newVM(m.GetId(), m.GetName(), m.GetDatastore(), m.GetKey(), len(source.GetDisks()))
	}
	h.mu.Unlock()
	if err != nil {
		return err
	}
	return h.work(out, m.GetId(), func(*strongroomv1.VM) {})
}

func (h *fakeHost) CreateSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentCreateSnapshotRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	m := req.Msg
	return h.work(out, m.GetId(), func(vm *strongroomv1.VM) {
		for _, s := range vm.GetSnapshots() {
			if s.GetId() == m.GetSnapshotId() {
				return
			}
		}
		s := &strongroomv1.Snapshot{Id: m.GetSnapshotId(), Name: m.GetSnapshot(), Description: m.GetDescription(), Parent: vm.GetCurrentSnapshot(), Settings: proto.CloneOf(vm.GetSettings())}
		for _, d := range vm.GetDisks() {
			s.Disks = append(s.Disks, proto.CloneOf(d))
		}
		vm.Snapshots, vm.CurrentSnapshot = append(vm.Snapshots, s), s.GetId()
	})
}

func (h *fakeHost) RevertToSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentRevertToSnapshotRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	h.change(func() { h.reverts = append(h.reverts, req.Msg.GetRevertId()) })
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.CurrentSnapshot = req.Msg.GetSnapshotId() })
}

func (h *fakeHost) DeleteSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentDeleteSnapshotRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) {
		id := req.Msg.GetSnapshotId()
		i := slices.IndexFunc(vm.GetSnapshots(), func(s *strongroomv1.Snapshot) bool { return s.GetId() == id })
		if i < 0 {
			return
		}
		parent := vm.GetSnapshots()[i].GetParent()
		vm.Snapshots = slices.Delete(vm.Snapshots, i, i+1)
		for _, s := range vm.GetSnapshots() {
			if s.GetParent() == id {
				s.Parent = parent
			}
		}
		if vm.GetCurrentSnapshot() == id {
			vm.CurrentSnapshot = parent
		}
	})
}

func (h *fakeHost) RenameSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentRenameSnapshotRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) {
		for _, s := range vm.GetSnapshots() {
			if s.GetId() == req.Msg.GetSnapshotId() {
				s.Name, s.Description = req.Msg.GetSnapshot(), req.Msg.GetDescription()
			}
		}
	})
}

func (h *fakeHost) ConsolidateSnapshots(_ context.Context, req *connect.Request[strongroomv1.AgentConsolidateSnapshotsRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.ConsolidationNeeded = false })
}

func (h *fakeHost) EncryptVM(_ context.Context, req *connect.Request[strongroomv1.AgentEncryptVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) {
		h.encrypts = append(h.encrypts, proto.CloneOf(req.Msg))
		wrap(vm, req.Msg.GetKey())
		for _, d := range vm.GetDisks() {
			d.Encryption = nil
		}
	})
}

func (h *fakeHost) DecryptVM(_ context.Context, req *connect.Request[strongroomv1.AgentDecryptVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) {
		vm.Key = nil
		for _, d := range vm.GetDisks() {
			d.Encrypted, d.Key, d.Generation, d.Cipher = false, nil, 0, ""
		}
	})
}

func (h *fakeHost) RekeyVM(ctx context.Context, req *connect.Request[strongroomv1.AgentRekeyVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	late := false
	h.change(func() {
		if late = h.latecomer; late {
			h.unsettled[req.Msg.GetId()] = req.Msg.GetKey()
		}
	})
	if late {
		<-ctx.Done()
		return ctx.Err()
	}
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) {
		if !req.Msg.GetOwnKey() || len(req.Msg.GetDisks()) > 0 {
			wrap(vm, req.Msg.GetKey(), req.Msg.GetDisks()...)
		}
		if req.Msg.GetOwnKey() {
			vm.Key = req.Msg.GetKey()
		}
	})
}

func (h *fakeHost) SetRekeyRate(_ context.Context, req *connect.Request[strongroomv1.AgentSetRekeyRateRequest]) (*connect.Response[strongroomv1.AgentSetRekeyRateResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rates = append(h.rates, req.Msg.GetRate())
	return connect.NewResponse(&strongroomv1.AgentSetRekeyRateResponse{}), nil
}

func (h *fakeHost) answer(id string, f func(*strongroomv1.VM)) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	vm, err := h.find(id)
	if err != nil {
		return nil, err
	}
	f(vm)
	return connect.NewResponse(&strongroomv1.AgentVMResponse{Vm: h.describe(vm)}), nil
}

func (h *fakeHost) GetVM(_ context.Context, req *connect.Request[strongroomv1.AgentGetVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	res, err := h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) {
		if req.Msg.GetSettled() {
			h.settle(vm.GetId())
		}
	})
	if err == nil {
		h.change(func() {
			if h.lie != nil {
				h.lie(res.Msg.GetVm())
			}
		})
	}
	return res, err
}

// RegisterVM registers a VM that a test has put into its folder.
func (h *fakeHost) RegisterVM(_ context.Context, req *connect.Request[strongroomv1.AgentRegisterVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	var id string
	h.change(func() {
		for _, vm := range h.vms {
			if vm.GetDatastore() == req.Msg.GetDatastore() && vm.GetFolder() == req.Msg.GetFolder() {
				id = vm.GetId()
			}
		}
	})
	return h.answer(id, func(vm *strongroomv1.VM) {
		if req.Msg.GetName() != "" {
			vm.Name = req.Msg.GetName()
		}
	})
}

// settle ends what was broken off. The host is locked.
func (h *fakeHost) settle(id string) {
	wrap(h.vms[id], h.unsettled[id])
	delete(h.unsettled, id)
}

func (h *fakeHost) PowerOnVM(_ context.Context, req *connect.Request[strongroomv1.AgentPowerOnVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.PowerState = "poweredOn" })
}

func (h *fakeHost) PowerOffVM(_ context.Context, req *connect.Request[strongroomv1.AgentPowerOffVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.PowerState = "poweredOff" })
}

func (h *fakeHost) DeleteVM(_ context.Context, req *connect.Request[strongroomv1.AgentDeleteVMRequest]) (*connect.Response[strongroomv1.AgentDeleteVMResponse], error) {
	h.change(func() { delete(h.vms, req.Msg.GetId()) })
	return connect.NewResponse(&strongroomv1.AgentDeleteVMResponse{}), nil
}

func (h *fakeHost) UnregisterVM(_ context.Context, req *connect.Request[strongroomv1.AgentUnregisterVMRequest]) (*connect.Response[strongroomv1.AgentUnregisterVMResponse], error) {
	h.change(func() { delete(h.vms, req.Msg.GetId()) })
	return connect.NewResponse(&strongroomv1.AgentUnregisterVMResponse{}), nil
}
