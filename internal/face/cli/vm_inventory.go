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
VirtualMachine.Inventory.Unregister.`,
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
