package cli

import (
	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newKMSGroupDeleteCmd(env *Env) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a group that has nothing in it",
		Long: `Delete a group that has no applications, no keys or other objects but destroyed
ones, and on which nobody has roles. What is known of destroyed keys goes with it,
but for the audit log. The name can be used again; nothing of this group comes back
with it.

Needs the privilege Cryptographer.ManageKeyServers on the group.`,
		Example: "  strongroom kms group delete acme/test",
		Args:    exactArgs("the group's name"),
		RunE: env.withClient("delete the group", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete group %s?", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.KMS().DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(res, "group %s deleted", args[0])
		}),
	}
	addYes(cmd, &yes)
	return cmd
}
