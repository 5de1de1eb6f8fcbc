package cli

import (
	"context"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newVMPowerOnCmd(env *Env) *cobra.Command {
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "power-on NAME...",
		Short: "Start virtual machines",
		Long: `Start VMs on their hosts. An encrypted VM needs its keys on its host: a native
provider's are there also while the controller is away.

Needs the privilege VirtualMachine.Interact.PowerOn.`,
		Example: `  strongroom vm power-on web-1 web-2
  strongroom --server unix:/run/strongroom/host.sock vm power-on web-1`,
		Args:              minArgs("a VM's name"),
		ValidArgsFunction: env.complete(vmNames),
		RunE: env.withClient("power on the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "power on VM", participle: "powered on",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: name})
				},
			}, args)
		}),
	}
	wait.add(cmd)
	return cmd
}

func newVMPowerOffCmd(env *Env) *cobra.Command {
	var (
		wait    waitFlags
		hard    bool
		timeout uint32
	)
	cmd := &cobra.Command{
		Use:   "power-off NAME...",
		Short: "Shut down virtual machines",
		Long: `Ask the guests to shut down and wait until they did; with --hard, cut the power
at once: what a guest had not written to its disks is lost.

Needs the privilege VirtualMachine.Interact.PowerOff.`,
		Example: `  strongroom vm power-off web-1
  strongroom vm power-off web-1 --hard`,
		Args:              minArgs("a VM's name"),
		ValidArgsFunction: env.complete(vmNames),
		RunE: env.withClient("power off the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "power off VM", participle: "powered off",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().PowerOffVM, &strongroomv1.PowerOffVMRequest{Name: name, Hard: hard, TimeoutSeconds: timeout})
				},
			}, args)
		}),
	}
	wait.add(cmd)
	cmd.Flags().BoolVar(&hard, "hard", false, "cut the power")
	cmd.Flags().Uint32Var(&timeout, "timeout", 120, "how long a guest has to shut down, in `seconds`")
	return cmd
}
