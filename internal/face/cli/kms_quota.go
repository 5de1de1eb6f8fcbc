package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

const quotaPeriod = 24 * time.Hour

// addOperations adds the flags of a quota of operations, which operations
// reads.
func addOperations(cmd *cobra.Command, q *strongroomv1.KMSQuota, period *time.Duration) {
	cmd.Flags().Int64Var(&q.Operations, "operations", 0, "how many operations in a period (default: any number)")
	addDuration(cmd, period, "period", quotaPeriod, "the period, from 1m to 365d; one of 1d begins at midnight UTC")
}

// setPeriod completes a quota.
func setPeriod(q *strongroomv1.KMSQuota, period time.Duration) {
	if q.PeriodSeconds = 0; q.Operations != 0 {
		q.PeriodSeconds = int64(period / time.Second)
	}
}

func newKMSGroupQuotaCmd(env *Env) *cobra.Command {
	req := &strongroomv1.SetKMSGroupQuotaRequest{Quota: &strongroomv1.KMSQuota{}}
	var period time.Duration
	cmd := &cobra.Command{
		Use:   "quota NAME",
		Short: "Replace a group's quota",
		Long: `Replace how many keys a group may have, and how many operations its applications
may do together in a period, from their next operation on. What is not given is not
bounded: without flags there is no quota. An operation beyond it is refused
(Permission Denied) and the refusal is on record. Keys that are destroyed, and the
operations Query and Discover Versions, do not count.`,
		Example: `  strongroom kms group quota vsphere --keys 10000
  strongroom kms group quota trial --keys 100 --operations 10000 --period 30d`,
		Args: exactArgs("the group's name"),
		RunE: env.withClient("change the group", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			setPeriod(req.Quota, period)
			g, err := client.Call(cmd.Context(), c.KMS().SetKMSGroupQuota, req)
			if err != nil {
				return err
			}
			return env.printDone(g, "quota of group %s changed", g.GetName())
		}),
	}
	cmd.Flags().Int64Var(&req.Quota.Keys, "keys", 0, "how many keys (default: any number)")
	addOperations(cmd, req.Quota, &period)
	return cmd
}

func newKMSAppQuotaCmd(env *Env) *cobra.Command {
	req := &strongroomv1.SetKMSApplicationQuotaRequest{Quota: &strongroomv1.KMSQuota{}}
	var period time.Duration
	cmd := &cobra.Command{
		Use:   "quota NAME",
		Short: "Replace an application's quota",
		Long: `Replace how many operations an application may do in a period, from its next
operation on. Without flags there is no quota but its group's. An operation beyond
it is refused (Permission Denied) and the refusal is on record.`,
		Example: "  strongroom kms app quota array-7 --operations 1000 --period 1h",
		Args:    exactArgs("the application's name"),
		RunE: env.withClient("change the application", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			setPeriod(req.Quota, period)
			a, err := client.Call(cmd.Context(), c.KMS().SetKMSApplicationQuota, req)
			if err != nil {
				return err
			}
			return env.printDone(a, "quota of application %s changed", a.GetName())
		}),
	}
	addOperations(cmd, req.Quota, &period)
	return cmd
}

// usageFields tells what was done, and how much more may be.
func (env *Env) usageFields(u *strongroomv1.KMSUsage, q *strongroomv1.KMSQuota, keys string) []field {
	number := fmt.Sprint(u.GetKeys())
	if q.GetKeys() > 0 {
		number += fmt.Sprintf(" of %d", q.GetKeys())
	}
	fields := []field{{keys, number}, {"Operations", fmt.Sprint(u.GetOperations())}}
	if q.GetOperations() > 0 {
		fields = append(fields, field{"In this period", fmt.Sprintf("%d of %d, until %s", u.GetPeriodOperations(), q.GetOperations(), env.when(u.GetPeriodEnds()))})
	}
	return append(fields, field{"Refused by quota", fmt.Sprint(u.GetRefused())}, field{"Last used", env.when(u.GetLastUse())})
}
