package controller

import (
	"cmp"
	"context"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
)

// CloneVM clones on the host of the source, which has its folder.
func (c vms) CloneVM(ctx context.Context, req *connect.Request[strongroomv1.CloneVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := req.Msg
	if err := inventory.CheckName("VM", m.GetClone()); err != nil {
		return nil, err
	}
	v, source, err := c.on(ctx, m.GetName())
	if err != nil {
		return nil, err
	}
	if err := c.mayClone(ctx, v, m); err != nil {
		return nil, err
	}
	switch _, err := c.inv.VM(ctx, m.GetClone()); {
	case err == nil:
		return nil, errs.New(errs.Exists, "there is a VM %s already", m.GetClone()).WithHint("strongroom vm show %s", m.GetClone())
	case !v.Encrypted() && (m.GetRecrypt() || m.GetProvider() != ""):
		return nil, errs.New(errs.InvalidState, "VM %s is not encrypted, so its clone has no key to change", v.Name).WithHint("strongroom vm encrypt %s", v.Name)
	}
	if !m.GetRecrypt() {
		if err := undisturbed(v, v.Disks); err != nil {
			return nil, err
		}
	}
	datastore := cmp.Or(m.GetDatastore(), v.Datastore)
	h, err := c.inv.HostByID(ctx, source.HostID)
	if err != nil {
		return nil, err
	}
	if _, err := c.place(ctx, datastore, h.Name); err != nil {
		return nil, err
	}
	args := vmArgs{ID: uuid.NewString(), Name: m.GetClone(), HostID: h.ID, Datastore: datastore, Source: v.ID, SourceVM: v.Name, Recrypt: m.GetRecrypt(), SourceRuns: v.PowerState == inventory.PoweredOn, Runs: v.Runs, AllowCircular: m.GetAllowCircular()}
	if v.Encrypted() {
		if err := c.chooseRekeyKey(ctx, &args, v, nil, m.GetProvider()); err != nil {
			return nil, err
		}
	}
	return c.submit(ctx, taskClone, args.Name, args)
}

// mayClone checks the privileges that a clone needs beside the declared one.
func (c vms) mayClone(ctx context.Context, v inventory.VM, m *strongroomv1.CloneVMRequest) error {
	who, source := guard.CallerOf(ctx).Principal, vmObject(v.Name)
	err := c.access.Check(ctx, who, "VirtualMachine.Inventory.CreateFromExisting", vmObject(m.GetClone()))
	if err == nil && v.Encrypted() {
		err = c.access.Check(ctx, who, "Cryptographer.Clone", source)
	}
	if err == nil && v.Encrypted() && m.GetRecrypt() {
		err = c.access.Check(ctx, who, "Cryptographer.Recrypt", source)
	}
	return err
}

// mayCopy checks that the caller may clone each VM from whose folder a new VM would
// have something: a disk or a boot image that is made of its disk is a clone of it.
func (c vms) mayCopy(ctx context.Context, m *strongroomv1.CreateVMRequest) error {
	files := []string{m.GetSettings().GetKernel(), m.GetSettings().GetInitrd()}
	for _, d := range m.GetDisks() {
		files = append(files, d.GetImage())
	}
	var folders []string
	for _, f := range files {
		if folder, _, inside := strings.Cut(filepath.Clean(f), "/"); inside {
			folders = append(folders, folder)
		}
	}
	if len(folders) == 0 {
		return nil
	}
	vms, err := c.inv.VMs(ctx, "")
	if err != nil {
		return err
	}
	kept, err := c.inv.KeptVMs(ctx)
	if err != nil {
		return err
	}
	for _, v := range kept {
		vms = append(vms, inventory.VM{Name: v.Name, Datastore: v.Datastore, Folder: v.Folder})
	}
	for _, v := range vms {
		if v.Datastore == m.GetDatastore() && slices.Contains(folders, v.Folder) {
			if err := c.access.Check(ctx, guard.CallerOf(ctx).Principal, "VirtualMachine.Provisioning.Clone", vmObject(v.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// mayRegister checks that the caller may register again the VM that was unregistered
// from the folder, whatever it is to be called.
func (c vms) mayRegister(ctx context.Context, m *strongroomv1.RegisterVMRequest) error {
	kept, err := c.inv.KeptVMs(ctx)
	if err != nil {
		return err
	}
	for _, v := range kept {
		if v.Datastore == m.GetDatastore() && v.Folder == m.GetFolder() {
			if err := c.access.Check(ctx, guard.CallerOf(ctx).Principal, "Cryptographer.RegisterVM", vmObject(v.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Controller) cloneOnHost(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.syncHost(ctx, h.ID); err != nil {
		return nil, err
	}
	if err := c.equipVM(ctx, h, vmArgs{ID: a.Source, Key: a.Key}); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).CloneVM, &strongroomv1.AgentCloneVMRequest{
		Id: a.ID, Name: a.Name, Datastore: a.Datastore, SourceId: a.Source, Key: keyToAPI(a.Key), Recrypt: a.Recrypt,
	}, progress(ctx, r))
}
