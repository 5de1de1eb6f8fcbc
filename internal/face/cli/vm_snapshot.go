package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

func newVMSnapshotCmd(env *Env) *cobra.Command {
	return newGroup("snapshot", "Snapshots of virtual machines",
		`A snapshot keeps the disks and settings that a VM has, to revert to. It is a set
of whole files in the VM's folder: where the datastore can share blocks (XFS,
Btrfs) it is there in a moment and takes no space until the VM writes; elsewhere
the disks are copied, holes left out. No snapshot needs another.

The snapshots of an encrypted VM are encrypted with the keys of its disks. A
shallow rekey changes them too. To encrypt or decrypt a VM, or to rekey it deeply,
delete its snapshots first.

While the controller is away, ls and show work with a host's local socket:
--server unix:/PATH.`,
		newVMSnapshotCreateCmd(env), newVMSnapshotLsCmd(env), newVMSnapshotShowCmd(env),
		newVMSnapshotRevertCmd(env), newVMSnapshotRenameCmd(env), newVMSnapshotDeleteCmd(env), newVMSnapshotConsolidateCmd(env))
}

// completeSnapshot completes the name of a VM, then that of a snapshot of it.
func (env *Env) completeSnapshot(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return env.complete(vmNames)(cmd, args, begun)
	case 1:
		return env.complete(func(ctx context.Context, c *client.Client) ([]string, error) {
			res, err := client.Call(ctx, c.VM().ListSnapshots, &strongroomv1.ListSnapshotsRequest{Name: args[0]})
			return pick(res.GetSnapshots(), (*strongroomv1.Snapshot).GetName), err
		})(cmd, nil, begun)
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func newVMSnapshotCreateCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateSnapshotRequest{}
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "create VM SNAPSHOT",
		Short: "Keep what a virtual machine is now",
		Long: `Make a snapshot of a VM: of its disks and its settings. It becomes the child of
the snapshot that the disks come from.

The VM may run, if the datastore can share blocks (XFS, Btrfs). Then the snapshot
has what all of its disks hold at one moment, as after a power failure; the guest
waits a moment for its disks and is not told. Memory is not kept.

Interrupted, it is finished or nothing is left of it. Undo it with "strongroom vm
snapshot delete". Needs the privilege VirtualMachine.State.CreateSnapshot.`,
		Example:           `  strongroom vm snapshot create web-1 before-upgrade --description patched`,
		Args:              exactArgs("the VM's name", "the snapshot's"),
		ValidArgsFunction: env.completeFirst(vmNames),
		RunE: env.withClient("make the snapshot", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "make snapshot", participle: "made",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					req.Name, req.Snapshot = args[0], name
					return client.Call(ctx, c.VM().CreateSnapshot, req)
				},
			}, args[1:])
		}),
	}
	wait.add(cmd)
	cmd.Flags().StringVar(&req.Description, "description", "", "what it is for, one line")
	return cmd
}

func newVMSnapshotLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls VM",
		Short: "List the snapshots of a virtual machine",
		Long: `List the snapshots of a VM as a tree: a child was made after its parent, or after
a revert to that. The disks come from the one that is marked. Blocks that a
snapshot shares with other files count as used by each.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom vm snapshot ls web-1",
		Args:              exactArgs("the VM's name"),
		ValidArgsFunction: env.completeFirst(vmNames),
		RunE: env.withClient("list the snapshots", func(cmd *cobra.Command, c *client.Client, args []string) error {
			res, err := client.Call(cmd.Context(), c.VM().ListSnapshots, &strongroomv1.ListSnapshotsRequest{Name: args[0]})
			if err != nil {
				return err
			}
			if res.GetConsolidationNeeded() {
				env.notef("there are files that no snapshot has: strongroom vm snapshot consolidate %s", args[0])
			}
			return printList(env, res, snapshotTree(res.GetSnapshots()), []column[snapshotNode]{
				{"SNAPSHOT", func(n snapshotNode) string { return strings.Repeat("  ", n.depth) + n.GetName() }},
				{"CURRENT", func(n snapshotNode) string {
					if n.GetId() == res.GetCurrentSnapshot() {
						return "*"
					}
					return ""
				}},
				{"CREATED", func(n snapshotNode) string { return env.when(n.GetCreated()) }},
				{"USED", func(n snapshotNode) string { return formatSize(allocated(n.GetDisks())) }},
				{"ENCRYPTION", func(n snapshotNode) string { return disksEncryption(n.GetDisks(), n.GetLockReason() != "") }},
				{"DESCRIPTION", func(n snapshotNode) string { return n.GetDescription() }},
			})
		}),
	}
}

// snapshotNode is a snapshot and how many parents it has.
type snapshotNode struct {
	*strongroomv1.Snapshot
	depth int
}

// snapshotTree returns snapshots each followed by its descendants.
func snapshotTree(all []*strongroomv1.Snapshot) []snapshotNode {
	var out []snapshotNode
	var add func(parent string, depth int)
	add = func(parent string, depth int) {
		for _, s := range all {
			if s.GetParent() == parent && s.GetId() != parent && depth <= len(all) {
				out = append(out, snapshotNode{s, depth})
				add(s.GetId(), depth+1)
			}
		}
	}
	add("", 0)
	return out
}

func allocated(disks []*strongroomv1.Disk) int64 {
	var n int64
	for _, d := range disks {
		n += d.GetAllocatedBytes()
	}
	return n
}

func newVMSnapshotShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show VM SNAPSHOT",
		Short: "Show one snapshot of a virtual machine",
		Long: `Show a snapshot, its disks and the keys that they need; if the VM cannot be
reverted to it, why.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom vm snapshot show web-1 before-upgrade",
		Args:              exactArgs("the VM's name", "the snapshot's"),
		ValidArgsFunction: env.completeSnapshot,
		RunE: env.withClient("show the snapshot", func(cmd *cobra.Command, c *client.Client, args []string) error {
			res, err := client.Call(cmd.Context(), c.VM().ListSnapshots, &strongroomv1.ListSnapshotsRequest{Name: args[0]})
			if err != nil {
				return err
			}
			i := slices.IndexFunc(res.GetSnapshots(), func(s *strongroomv1.Snapshot) bool { return s.GetName() == args[1] })
			if i < 0 {
				return errs.New(errs.NotFound, "VM %s has no snapshot %q", args[0], args[1]).WithHint("strongroom vm snapshot ls %s", args[0])
			}
			s := res.GetSnapshots()[i]
			var parent string
			var children []string
			for _, other := range res.GetSnapshots() {
				if other.GetId() == s.GetParent() {
					parent = other.GetName()
				}
				if other.GetParent() == s.GetId() {
					children = append(children, other.GetName())
				}
			}
			fields := []field{
				{"Name", s.GetName()},
				{"ID", s.GetId()},
				{"Description", s.GetDescription()},
				{"Created", env.when(s.GetCreated())},
				{"Parent", parent},
				{"Children", strings.Join(children, ", ")},
				{"Current", yesNo(s.GetId() == res.GetCurrentSnapshot())},
				{"CPUs", fmt.Sprint(s.GetSettings().GetCpus())},
				{"Memory", formatSize(int64(s.GetSettings().GetMemoryMib()) << 20)},
			}
			if s.GetLockReason() != "" {
				fields = append(fields, field{"Locked because", s.GetLockReason()})
			}
			for _, d := range s.GetDisks() {
				fields = append(fields, field{d.GetName(), diskText(d)})
			}
			return env.printOne(s, fields)
		}),
	}
}

func newVMSnapshotRevertCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		yes  bool
	)
	cmd := &cobra.Command{
		Use:   "revert VM SNAPSHOT",
		Short: "Make a virtual machine what it was at a snapshot",
		Long: `Give a VM that is powered off the disks and settings of a snapshot. What its disks
hold now is lost, unless a snapshot has it. A disk that has grown since gets its
old size back. The snapshot stays, and so do all others.

Interrupted, it is finished, or the VM is as before. Needs the privilege
VirtualMachine.State.RevertToSnapshot.`,
		Example: `  strongroom vm power-off web-1
  strongroom vm snapshot revert web-1 before-upgrade`,
		Args:              exactArgs("the VM's name", "the snapshot's"),
		ValidArgsFunction: env.completeSnapshot,
		RunE: env.withClient("revert the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Revert %s to snapshot %s? What its disks hold now is lost.", args[0], args[1]); err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "revert VM", participle: "reverted to " + args[1],
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().RevertToSnapshot, &strongroomv1.RevertToSnapshotRequest{Name: name, Snapshot: args[1]})
				},
			}, args[:1])
		}),
	}
	wait.add(cmd)
	addYes(cmd, &yes)
	return cmd
}

func newVMSnapshotRenameCmd(env *Env) *cobra.Command {
	var (
		wait        waitFlags
		description string
	)
	cmd := &cobra.Command{
		Use:   "rename VM SNAPSHOT NAME",
		Short: "Rename or describe a snapshot of a virtual machine",
		Long: `Give a snapshot another name, in any power state of the VM, and with --description
another description; to change that alone, say the name that it has. Undo it by
the same command. Needs the privilege VirtualMachine.State.RenameSnapshot.`,
		Example: `  strongroom vm snapshot rename web-1 before-upgrade bookworm
  strongroom vm snapshot rename web-1 bookworm bookworm --description pre-trixie`,
		Args:              exactArgs("the VM's name", "the snapshot's", "its new name"),
		ValidArgsFunction: env.completeSnapshot,
		RunE: env.withClient("rename the snapshot", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "rename snapshot", participle: "is now " + args[2],
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					req := &strongroomv1.RenameSnapshotRequest{Name: args[0], Snapshot: name, NewName: args[2]}
					if cmd.Flags().Changed("description") {
						req.Description = &description
					}
					return client.Call(ctx, c.VM().RenameSnapshot, req)
				},
			}, args[1:2])
		}),
	}
	wait.add(cmd)
	cmd.Flags().StringVar(&description, "description", "", "what it is for, one line; empty: none")
	return cmd
}

func newVMSnapshotDeleteCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		yes  bool
	)
	cmd := &cobra.Command{
		Use:   "delete VM SNAPSHOT",
		Short: "Delete a snapshot of a virtual machine",
		Long: `Delete a snapshot, in any power state of the VM. Neither the VM's disks nor other
snapshots change; its children become those of its parent. This cannot be undone.
Needs the privilege VirtualMachine.State.RemoveSnapshot.`,
		Example:           "  strongroom vm snapshot delete web-1 before-upgrade --yes",
		Args:              exactArgs("the VM's name", "the snapshot's"),
		ValidArgsFunction: env.completeSnapshot,
		RunE: env.withClient("delete the snapshot", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete snapshot %s of %s? It cannot be undone.", args[1], args[0]); err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "delete snapshot", participle: "deleted",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().DeleteSnapshot, &strongroomv1.DeleteSnapshotRequest{Name: args[0], Snapshot: name})
				},
			}, args[1:])
		}),
	}
	wait.add(cmd)
	addYes(cmd, &yes)
	return cmd
}

func newVMSnapshotConsolidateCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		yes  bool
	)
	cmd := &cobra.Command{
		Use:   "consolidate VM...",
		Short: "Delete files that no snapshot has",
		Long: `Delete files of snapshots and reverts in VMs' folders that the VMs do not have, in
any power state. "vm show" and "vm snapshot ls" tell if there are any: they were
left by an operation that was cut off and could not be tried again.

If vm.json was restored from a backup, they may be newer than that, and what you
want instead: look at the files before. This cannot be undone. Needs the privilege
VirtualMachine.State.RemoveSnapshot.`,
		Example:           "  strongroom vm snapshot consolidate web-1 --yes",
		Args:              minArgs("a VM's name"),
		ValidArgsFunction: env.complete(vmNames),
		RunE: env.withClient("consolidate the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete the files of %s that none of the snapshots has?", strings.Join(args, ", ")); err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "consolidate VM", participle: "consolidated",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().ConsolidateSnapshots, &strongroomv1.ConsolidateSnapshotsRequest{Name: name})
				},
			}, args)
		}),
	}
	wait.add(cmd)
	addYes(cmd, &yes)
	return cmd
}

// snapshotFields tells of a VM's snapshots, if it has any.
func snapshotFields(v *strongroomv1.VM) []field {
	var fields []field
	if n := len(v.GetSnapshots()); n > 0 {
		text := fmt.Sprint(n)
		for _, s := range v.GetSnapshots() {
			if s.GetId() == v.GetCurrentSnapshot() {
				text += ", the disks come from " + s.GetName()
			}
		}
		fields = append(fields, field{"Snapshots", text})
	}
	if v.GetConsolidationNeeded() {
		fields = append(fields, field{"Consolidation", "needed: strongroom vm snapshot consolidate " + v.GetName()})
	}
	return fields
}
