package controller

import (
	"cmp"
	"context"
	"slices"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
)

// snapshotArgs are the arguments of a task on a snapshot. The ids are chosen
// before it starts, so that a host recognises what it has done already.
type snapshotArgs struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Revert      string `json:"revert,omitempty"`   // id of a revert to it
	NewName     string `json:"new_name,omitempty"` // what it is called after a renaming
}

func (c vms) ListSnapshots(ctx context.Context, req *connect.Request[strongroomv1.ListSnapshotsRequest]) (*connect.Response[strongroomv1.ListSnapshotsResponse], error) {
	v, err := c.inv.VM(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	vm := vmToAPI(v, nil)
	return connect.NewResponse(&strongroomv1.ListSnapshotsResponse{
		Snapshots: vm.GetSnapshots(), CurrentSnapshot: vm.GetCurrentSnapshot(), ConsolidationNeeded: vm.GetConsolidationNeeded(),
	}), nil
}

func (c vms) CreateSnapshot(ctx context.Context, req *connect.Request[strongroomv1.CreateSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := req.Msg
	v, args, err := c.on(ctx, m.GetName())
	if err != nil {
		return nil, err
	}
	if err := inventory.CheckSnapshot(m.GetSnapshot(), m.GetDescription()); err != nil {
		return nil, err
	}
	if err := freeSnapshotName(v, m.GetSnapshot()); err != nil {
		return nil, err
	}
	if err := undisturbed(v, v.Disks); err != nil {
		return nil, err
	}
	args.Snapshot = &snapshotArgs{ID: uuid.NewString(), Name: m.GetSnapshot(), Description: m.GetDescription()}
	return c.submit(ctx, taskSnapshot, v.Name, args)
}

func freeSnapshotName(v inventory.VM, name string) error {
	if slices.ContainsFunc(v.Snapshots, func(s inventory.Snapshot) bool { return s.Name == name }) {
		return errs.New(errs.Exists, "VM %s has a snapshot %s already", v.Name, name).WithHint("strongroom vm snapshot ls %s", v.Name)
	}
	return nil
}

func (c vms) RenameSnapshot(ctx context.Context, req *connect.Request[strongroomv1.RenameSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := req.Msg
	v, args, err := c.onSnapshot(ctx, m.GetName(), m.GetSnapshot())
	if err != nil {
		return nil, err
	}
	s, err := v.FindSnapshot(m.GetSnapshot())
	if err != nil {
		return nil, err
	}
	args.Snapshot.NewName, args.Snapshot.Description = cmp.Or(m.GetNewName(), s.Name), s.Description
	if m.Description != nil {
		args.Snapshot.Description = m.GetDescription()
	}
	if err := inventory.CheckSnapshot(args.Snapshot.NewName, args.Snapshot.Description); err != nil {
		return nil, err
	}
	if args.Snapshot.NewName != s.Name {
		if err := freeSnapshotName(v, args.Snapshot.NewName); err != nil {
			return nil, err
		}
	}
	return c.submit(ctx, taskRenameSnapshot, v.Name, args)
}

func (c vms) RevertToSnapshot(ctx context.Context, req *connect.Request[strongroomv1.RevertToSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.onSnapshot(ctx, req.Msg.GetName(), req.Msg.GetSnapshot())
	if err != nil {
		return nil, err
	}
	if err := poweredOff(v, "a revert", "a guest would not survive that its disks change under it"); err != nil {
		return nil, err
	}
	args.Snapshot.Revert = uuid.NewString()
	return c.submit(ctx, taskRevert, v.Name, args)
}

func (c vms) DeleteSnapshot(ctx context.Context, req *connect.Request[strongroomv1.DeleteSnapshotRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.onSnapshot(ctx, req.Msg.GetName(), req.Msg.GetSnapshot())
	if err != nil {
		return nil, err
	}
	return c.submit(ctx, taskDeleteSnapshot, v.Name, args)
}

func (c vms) ConsolidateSnapshots(ctx context.Context, req *connect.Request[strongroomv1.ConsolidateSnapshotsRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return c.submit(ctx, taskConsolidate, v.Name, args)
}

// onSnapshot is on for a snapshot of a VM.
func (c vms) onSnapshot(ctx context.Context, vm, snapshot string) (inventory.VM, vmArgs, error) {
	v, args, err := c.on(ctx, vm)
	if err != nil {
		return inventory.VM{}, vmArgs{}, err
	}
	s, err := v.FindSnapshot(snapshot)
	if err != nil {
		return inventory.VM{}, vmArgs{}, err
	}
	args.Snapshot = &snapshotArgs{ID: s.ID, Name: s.Name}
	return v, args, nil
}

// poweredOff returns an error if a VM runs.
func poweredOff(v inventory.VM, what, why string) error {
	if v.PowerState != inventory.PoweredOn {
		return nil
	}
	return errs.New(errs.InvalidState, "%s needs VM %s to be powered off: %s", what, v.Name, why).WithHint("strongroom vm power-off %s", v.Name)
}

// withoutSnapshots returns an error if a VM has snapshots.
func withoutSnapshots(v inventory.VM) error {
	if len(v.Snapshots) == 0 {
		return nil
	}
	return errs.New(errs.InvalidState, "VM %s has snapshots, which this would leave as they are", v.Name).
		WithReason(strongroomv1.ReasonHasSnapshots).WithHint("delete them first: strongroom vm snapshot ls %s", v.Name)
}

func (c *Controller) createSnapshot(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).CreateSnapshot, &strongroomv1.AgentCreateSnapshotRequest{
		Id: a.ID, SnapshotId: a.Snapshot.ID, Snapshot: a.Snapshot.Name, Description: a.Snapshot.Description,
	}, progress(ctx, r))
}

func (c *Controller) revertToSnapshot(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipSnapshots(ctx, h, a); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).RevertToSnapshot, &strongroomv1.AgentRevertToSnapshotRequest{
		Id: a.ID, SnapshotId: a.Snapshot.ID, RevertId: a.Snapshot.Revert,
	}, progress(ctx, r))
}

// deleteSnapshot also undoes a creation.
func (c *Controller) deleteSnapshot(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	res, err := callHost(ctx, h, c.agents.of(h).DeleteSnapshot, &strongroomv1.AgentDeleteSnapshotRequest{Id: a.ID, SnapshotId: a.Snapshot.ID})
	return res.GetVm(), err
}

func (c *Controller) renameSnapshot(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	res, err := callHost(ctx, h, c.agents.of(h).RenameSnapshot, &strongroomv1.AgentRenameSnapshotRequest{
		Id: a.ID, SnapshotId: a.Snapshot.ID, Snapshot: a.Snapshot.NewName, Description: a.Snapshot.Description,
	})
	return res.GetVm(), err
}

func (c *Controller) consolidateSnapshots(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	res, err := callHost(ctx, h, c.agents.of(h).ConsolidateSnapshots, &strongroomv1.AgentConsolidateSnapshotsRequest{Id: a.ID})
	return res.GetVm(), err
}
