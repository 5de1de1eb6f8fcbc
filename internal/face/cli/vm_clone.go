package cli

import (
	"context"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newVMCloneCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CloneVMRequest{}
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "clone VM CLONE",
		Short: "Make a virtual machine from another",
		Long: `Make a VM with the settings and disks of another. Where the datastore can share
blocks (XFS, Btrfs) the clone is there in a moment and takes no space until either
VM writes; elsewhere the disks are copied, holes left out.

The original may run, if its datastore can share blocks. Then the clone has what
all of its disks hold at one moment, as after a power failure.

The clone is marked as running what the original is ("strongroom vm set --runs").

The clone of an encrypted VM is encrypted: it has a key encryption key of its own
and the data encryption keys of the original, so that who has one of those reads
both VMs. With --recrypt it gets its own, and its disks are written anew; that
also takes the passphrases of the original away.

Interrupted, it is finished or nothing is left of it. Undo it with "strongroom vm
delete". Needs the privileges VirtualMachine.Provisioning.Clone,
VirtualMachine.Inventory.CreateFromExisting, for an encrypted VM
Cryptographer.Clone, and with --recrypt Cryptographer.Recrypt.`,
		Example: `  strongroom vm clone web-1 web-2
  strongroom vm clone web-1 web-2 --recrypt --datastore ds-2`,
		Args:              exactArgs("the VM's name", "the clone's"),
		ValidArgsFunction: env.completeFirst(vmNames),
		RunE: env.withClient("clone the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "clone " + args[0] + " to", participle: "created",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					req.Clone = name
					return client.Call(ctx, c.VM().CloneVM, req)
				},
			}, args[1:])
		}),
	}
	wait.add(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Datastore, "datastore", "", "the datastore for its folder (default: the original's)")
	f.StringVar(&req.Provider, "provider", "", "the provider of its key (default: the original's)")
	f.BoolVar(&req.Recrypt, "recrypt", false, "give it data encryption keys of its own")
	addAllowCircular(cmd, &req.AllowCircular)
	env.completeFlag(cmd, "datastore", datastoreNames)
	env.completeFlag(cmd, "provider", providerNames)
	return cmd
}
