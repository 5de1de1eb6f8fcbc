package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newKMSGroupRotationCmd(env *Env) *cobra.Command {
	req := &strongroomv1.SetKMSGroupRotationRequest{Rotation: &strongroomv1.KMSRotation{}}
	cmd := &cobra.Command{
		Use:   "rotation NAME",
		Short: "Replace when a group's keys are rotated",
		Long: `Replace when the server rotates a group's keys by itself. An active symmetric key
that was activated so many days ago is re-keyed: the replacement takes over its
name and attributes, and both are linked. A key that was replaced, by the server
or by a client, is deactivated so many days later unless it has a Deactivation
Date: it then still decrypts. No key is ever destroyed. What is not given is never
done: without flags nothing is rotated.

The server looks for what is due every 10 minutes and puts every step on record.
Rotation is not held up by a quota. A client that keeps keys' identifiers goes on
with the old key until it asks for the replacement: rotate only what clients find
by name or link.`,
		Example: "  strongroom kms group rotation backup --every 90d --deactivate-after 30d",
		Args:    exactArgs("the group's name"),
		RunE: env.withClient("change the group", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			g, err := client.Call(cmd.Context(), c.KMS().SetKMSGroupRotation, req)
			if err != nil {
				return err
			}
			return env.printDone(g, "rotation of group %s changed", g.GetName())
		}),
	}
	cmd.Flags().Var((*daysValue)(&req.Rotation.EveryDays), "every", "re-key at this age, whole days such as 90d (default: never)")
	cmd.Flags().Var((*daysValue)(&req.Rotation.DeactivateAfterDays), "deactivate-after", "deactivate so long after the replacement was made, whole days such as 30d (default: never)")
	return cmd
}

// days is "every 90 days", or "never" for 0.
func days(word string, n int32) string {
	switch n {
	case 0:
		return "never"
	case 1:
		return word + " 1 day"
	}
	return fmt.Sprintf("%s %d days", word, n)
}
