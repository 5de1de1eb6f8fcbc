package cli

import (
	"cmp"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

// runsNothing is the value of --runs that takes all marks away.
const runsNothing = "none"

func newVMSetCmd(env *Env) *cobra.Command {
	var runs []string
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Say what a virtual machine is for",
		Long: `Say with --runs which parts of this site a VM runs, instead of what was said
before: the controller, the key server of a standard provider (provider:NAME), or
none. A VM that is called like a machine with a key server, or with the controller,
is known without that.

Such a VM is not encrypted with keys that come by way of what it runs, as nothing
could start it once its host was restarted: "vm create", "vm clone", "vm encrypt"
and "vm rekey" refuse, unless --allow-circular is given. The key server runs its
provider; the controller passes on the keys of standard providers without host
access "direct", and is not needed for those of native ones. An alarm tells of a
VM that is encrypted so already.

The marks are the controller's: a VM that is unregistered loses them. Needs the
privilege VirtualMachine.Config.Settings.`,
		Example: `  strongroom vm set kms-a --runs provider:kms-1
  strongroom vm set infra-1 --runs controller --runs provider:kms-1
  strongroom vm set web-1 --runs none`,
		Args:              exactArgs("the VM's name"),
		ValidArgsFunction: env.completeFirst(vmNames),
		RunE: env.withClient("set the VM", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if len(runs) == 1 && runs[0] == runsNothing {
				runs = nil
			}
			v, err := client.Call(cmd.Context(), c.VM().MarkVM, &strongroomv1.MarkVMRequest{Name: args[0], Runs: runs})
			if err != nil {
				return err
			}
			return env.printDone(v, "VM %s runs of this site: %s", v.GetName(), cmp.Or(strings.Join(v.GetRuns(), ", "), runsNothing))
		}),
	}
	cmd.Flags().StringArrayVar(&runs, "runs", nil, "a part of the site: controller, provider:NAME, or none; may be repeated")
	must(cmd.MarkFlagRequired("runs"))
	return cmd
}
