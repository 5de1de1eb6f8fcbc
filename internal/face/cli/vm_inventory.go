package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newVMRegisterCmd(env *Env) *cobra.Command {
	req := &strongroomv1.RegisterVMRequest{}
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "register FOLDER",
		Short: "Take a VM folder on a datastore into the inventory",
		Long: `Take a VM whose folder is on a datastore into the inventory: one that was copied,
replicated or restored there, or unregistered before. If the keys of its disks
cannot be had it is registered as locked, and says which provider it needs.

Undo it with "strongroom vm unregister". Needs the privilege
Cryptographer.RegisterVM.`,
		Example: "  strongroom vm register web-1 --datastore ds-1",
		Args:    exactArgs("the folder's name"),
		RunE: env.withClient("register the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Folder = args[0]
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "register VM", participle: "registered",
				start: func(ctx context.Context, _ string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().RegisterVM, req)
				},
			}, args)
		}),
	}
	wait.add(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Datastore, "datastore", "", "the datastore that the folder is on")
	f.StringVar(&req.Name, "name", "", "the VM's name (default: the one in its vm.json)")
	f.StringVar(&req.Host, "host", "", "the host to run on (default: any of the datastore's cluster)")
	must(cmd.MarkFlagRequired("datastore"))
	env.completeFlag(cmd, "datastore", datastoreNames)
	env.completeFlag(cmd, "host", hostNames)
	return cmd
}

func newVMUnregisterCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		yes  bool
	)
	cmd := &cobra.Command{
		Use:   "unregister NAME...",
		Short: "Take virtual machines out of the inventory",
		Long: `Take VMs that are powered off out of the inventory and leave their folders where
they are. Their keys are dropped from the hosts' memory.

Undo it with "strongroom vm register". Needs the privilege
VirtualMachine.Inventory.Unregister.

As a folder can be registered again, its keys at a key server are not orphans. If
you delete the folder by hand after this: "strongroom vm forget".`,
		Example:           "  strongroom vm unregister web-1 --yes",
		Args:              minArgs("a VM's name"),
		ValidArgsFunction: env.complete(vmNames),
		RunE: env.withClient("unregister the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Take %s out of the inventory? The folders stay.", strings.Join(args, ", ")); err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "unregister VM", participle: "unregistered",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: name})
				},
			}, args)
		}),
	}
	wait.add(cmd)
	addYes(cmd, &yes)
	return cmd
}

func newVMDeleteCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		yes  bool
	)
	cmd := &cobra.Command{
		Use:   "delete NAME...",
		Short: "Delete virtual machines and their data",
		Long: `Delete VMs that are powered off, with their folders and disks. This cannot be
undone. Needs the privilege VirtualMachine.Inventory.Delete.`,
		Example:           "  strongroom vm delete web-1 --yes",
		Args:              minArgs("a VM's name"),
		ValidArgsFunction: env.complete(vmNames),
		RunE: env.withClient("delete the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete %s with all data?", strings.Join(args, ", ")); err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "delete VM", participle: "deleted",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: name})
				},
			}, args)
		}),
	}
	wait.add(cmd)
	addYes(cmd, &yes)
	return cmd
}

func newVMForgetCmd(env *Env) *cobra.Command {
	var yes bool
	req := &strongroomv1.ForgetVMRequest{}
	cmd := &cobra.Command{
		Use:   "forget FOLDER",
		Short: "Forget an unregistered virtual machine whose folder is gone",
		Long: `Forget a VM that was unregistered and whose folder somebody deleted since. Until
then its keys at a key server count as needed, because the folder could be
registered again; after this they are orphans ("strongroom provider orphans").
No key is destroyed by this.

Every host must answer that it sees neither the folder nor another one with this
VM, on any of its datastores. A datastore that has nothing on it at all may be one
that is not mounted: for that --even-if-empty is needed.

It cannot be undone, but a folder that turns up again, of a backup, can be
registered for as long as its keys are not destroyed. Needs the privilege
VirtualMachine.Inventory.Delete.`,
		Example: `  strongroom vm ls --unregistered
  strongroom vm forget web-1 --datastore ds-1 --yes`,
		Args: exactArgs("the folder's name"),
		RunE: env.withClient("forget the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Folder = args[0]
			if err := env.confirm(yes, "Forget the VM of folder %s on datastore %s? Its keys are orphans then, which can be destroyed.", req.GetFolder(), req.GetDatastore()); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.VM().ForgetVM, req)
			if err != nil {
				return err
			}
			return env.printDone(res, "VM %s is forgotten; its keys are orphans: %s", res.GetVm().GetName(), keysText(res.GetVm().GetKeys()))
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Datastore, "datastore", "", "the datastore that the folder was on")
	f.BoolVar(&req.EvenIfEmpty, "even-if-empty", false, "believe a datastore that has nothing on it")
	must(cmd.MarkFlagRequired("datastore"))
	env.completeFlag(cmd, "datastore", datastoreNames)
	addYes(cmd, &yes)
	return cmd
}

func keysText(keys []*strongroomv1.KeyRef) string {
	var out []string
	for _, k := range keys {
		out = append(out, k.GetKeyId()+" of "+k.GetProvider())
	}
	return strings.Join(out, ", ")
}

// printUnregistered lists the VMs whose folders can be registered again.
func (env *Env) printUnregistered(ctx context.Context, c *client.Client) error {
	res, err := client.Call(ctx, c.VM().ListUnregisteredVMs, &strongroomv1.ListUnregisteredVMsRequest{})
	if err != nil {
		return err
	}
	return printList(env, res, res.GetVms(), []column[*strongroomv1.UnregisteredVM]{
		{"NAME", (*strongroomv1.UnregisteredVM).GetName},
		{"DATASTORE", (*strongroomv1.UnregisteredVM).GetDatastore},
		{"FOLDER", (*strongroomv1.UnregisteredVM).GetFolder},
		{"UNREGISTERED", func(v *strongroomv1.UnregisteredVM) string { return env.when(v.GetSince()) }},
		{"KEYS", func(v *strongroomv1.UnregisteredVM) string { return keysText(v.GetKeys()) }},
	})
}
