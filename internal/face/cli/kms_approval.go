package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

func newKMSGroupQuorumCmd(env *Env) *cobra.Command {
	var (
		operations []string
		expiry     time.Duration
	)
	req := &strongroomv1.SetKMSGroupQuorumRequest{Quorum: &strongroomv1.KMSQuorum{}}
	cmd := &cobra.Command{
		Use:   "quorum NAME",
		Short: "Replace who must approve what is asked of a group's keys",
		Long: `Replace how many of which users must approve before a key of the group is
destroyed (--for Destroy) or its material given out, wrapped or not (--for
Export). Changes of the group's policy and of the quorum itself then need the
same approval. Without --approvers there is no quorum.

An approver has the role KeyCustodian or Administrator, and has changed the
password that it was given.

What is refused for want of approval is a request: "strongroom kms approval ls".
Once it is approved, whoever asked may do it once: repeat the command.`,
		Example: "  strongroom kms group quorum vsphere --approvers ann,bob,eve --needed 2 --for Destroy,Export",
		Args:    exactArgs("the group's name"),
		RunE: env.withClient("change the group", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			q := req.GetQuorum()
			for _, op := range operations {
				switch {
				case strings.EqualFold(op, "Destroy"):
					q.Destroy = true
				case strings.EqualFold(op, "Export"):
					q.Export = true
				default:
					return errs.New(errs.Invalid, "--for %s: it is Destroy or Export", op)
				}
			}
			if len(q.GetApprovers()) > 0 {
				q.ExpirySeconds = int64(expiry / time.Second)
			} else if q.GetNeeded() > 0 || len(operations) > 0 {
				return errs.New(errs.Invalid, "no approvers are named").WithHint("strongroom kms group quorum %s --approvers USER,USER --needed 2", args[0])
			}
			if q.GetNeeded() == 0 && len(q.GetApprovers()) > 0 {
				return errs.New(errs.Invalid, "how many of the approvers must approve is not said").WithHint("strongroom kms group quorum %s --approvers %s --needed 2", args[0], strings.Join(q.GetApprovers(), ","))
			}
			g, err := client.Call(cmd.Context(), c.KMS().SetKMSGroupQuorum, req)
			if err != nil {
				return err
			}
			return env.printDone(g, "quorum of group %s changed", g.GetName())
		}),
	}
	cmd.Flags().StringSliceVar(&req.Quorum.Approvers, "approvers", nil, "the users who may approve (default: there is no quorum)")
	cmd.Flags().Int32Var(&req.Quorum.Needed, "needed", 0, "how many of them must")
	cmd.Flags().StringSliceVar(&operations, "for", nil, "what needs approval beside changes of policy and quorum: Destroy, Export")
	addDuration(cmd, &expiry, "expiry", 24*time.Hour, "when a request expires, from 1m to 30d")
	return cmd
}

// quorumText is a quorum in one line.
func quorumText(q *strongroomv1.KMSQuorum) string {
	if q.GetNeeded() == 0 {
		return "none"
	}
	what := []string{}
	if q.GetDestroy() {
		what = append(what, "Destroy")
	}
	if q.GetExport() {
		what = append(what, "Export")
	}
	what = append(what, "SetPolicy", "SetQuorum")
	return fmt.Sprintf("%d of %s, within %s, for %s", q.GetNeeded(), strings.Join(q.GetApprovers(), ","), formatDuration(time.Duration(q.GetExpirySeconds())*time.Second), strings.Join(what, ","))
}

func policyText(p *strongroomv1.KMSPolicy) string {
	return fmt.Sprintf("operations %s; key types %s; export %s", orAll(p.GetOperations()), orAll(p.GetKeyTypes()), yesNo(!p.GetNoExport()))
}

func newKMSApprovalCmd(env *Env) *cobra.Command {
	return newGroup("approval", "Requests for approval: what a group's quorum is asked for",
		`What is refused because a group's quorum ("strongroom kms group quorum") has not
approved it is a request. Approvers log in to the server's API as users and
approve or deny it. Once enough have approved, whoever asked may do it, once,
until the request expires.`,
		newKMSApprovalLsCmd(env), newKMSApprovalShowCmd(env), newKMSApprovalApproveCmd(env), newKMSApprovalDenyCmd(env))
}

// objectText is what a request is about.
func objectText(a *strongroomv1.KMSApproval) string {
	switch {
	case a.GetPolicy() != nil:
		return policyText(a.GetPolicy())
	case a.GetQuorum() != nil:
		return quorumText(a.GetQuorum())
	case a.GetObjectName() != "":
		return a.GetObject() + " (" + a.GetObjectName() + ")"
	}
	return a.GetObject()
}

func newKMSApprovalLsCmd(env *Env) *cobra.Command {
	req := &strongroomv1.ListKMSApprovalsRequest{}
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List requests for approval",
		Long: `List the requests for approval that are open, the latest first.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example: "  strongroom kms approval ls --all",
		Args:    noArgs,
		RunE: env.withClient("list the requests", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.KMSApproval().ListKMSApprovals, req)
			if err != nil {
				return err
			}
			return printList(env, res, res.GetApprovals(), []column[*strongroomv1.KMSApproval]{
				{"ID", (*strongroomv1.KMSApproval).GetId},
				{"STATE", (*strongroomv1.KMSApproval).GetState},
				{"APPROVED", func(a *strongroomv1.KMSApproval) string { return fmt.Sprintf("%d/%d", a.GetApproved(), a.GetNeeded()) }},
				{"GROUP", (*strongroomv1.KMSApproval).GetGroup},
				{"OPERATION", (*strongroomv1.KMSApproval).GetOperation},
				{"REQUESTER", (*strongroomv1.KMSApproval).GetRequester},
				{"EXPIRES", func(a *strongroomv1.KMSApproval) string { return env.when(a.GetExpires()) }},
				{"OBJECT", objectText},
			})
		}),
	}
	cmd.Flags().BoolVar(&req.All, "all", false, "also those that were used or have expired")
	return cmd
}

func (env *Env) approvalFields(a *strongroomv1.KMSApproval) []field {
	fields := []field{
		{"Request", a.GetId()},
		{"State", fmt.Sprintf("%s, %d of %d needed approvals", a.GetState(), a.GetApproved(), a.GetNeeded())},
		{"Group", a.GetGroup()},
		{"Operation", a.GetOperation()},
		{"Object", objectText(a)},
		{"Requester", a.GetRequester()},
		{"Credential", a.GetCredential()},
		{"Address", a.GetAddress()},
		{"Created", env.when(a.GetCreated())},
		{"Expires", env.when(a.GetExpires())},
	}
	for _, d := range a.GetDecisions() {
		what := "denied"
		if d.GetApproved() {
			what = "approved"
		}
		if d.GetReason() != "" {
			what += ": " + d.GetReason()
		}
		fields = append(fields, field{d.GetUser(), what + ", " + env.when(d.GetTime())})
	}
	if a.GetUsed() != nil {
		fields = append(fields, field{"Used", env.when(a.GetUsed())})
	}
	return fields
}

func newKMSApprovalShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show a request for approval and what was decided",
		Long: `Show a request for approval: who asked for what, when it expires, and who has
approved or denied it.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example: "  strongroom kms approval show 0123456789abcdef",
		Args:    exactArgs("the request's id"),
		RunE: env.withClient("show the request", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return env.printOne(a, env.approvalFields(a))
		}),
	}
}

func newKMSApprovalApproveCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "approve ID",
		Short: "Approve a request, as the user who is logged in",
		Long: `Approve a request, as the user who is logged in: an approver of its group, and
not the one who asked. It replaces a denial by the same user.

Needs the privilege KeyServer.ApproveOperations.`,
		Example: "  strongroom kms approval approve 0123456789abcdef",
		Args:    exactArgs("the request's id"),
		RunE: env.withClient("approve", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMSApproval().ApproveKMSRequest, &strongroomv1.ApproveKMSRequestRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(a, "request %s has %d of %d approvals and is %s", a.GetId(), a.GetApproved(), a.GetNeeded(), a.GetState())
		}),
	}
}

func newKMSApprovalDenyCmd(env *Env) *cobra.Command {
	req := &strongroomv1.DenyKMSRequestRequest{}
	cmd := &cobra.Command{
		Use:   "deny ID",
		Short: "Deny a request, as the user who is logged in",
		Long: `Deny a request, as the user who is logged in, whatever others decide. It stands
until the request expires, or the same user approves it. It takes an approval
back that was not used yet.

Needs the privilege KeyServer.ApproveOperations.`,
		Example: "  strongroom kms approval deny 0123456789abcdef --reason unexpected",
		Args:    exactArgs("the request's id"),
		RunE: env.withClient("deny", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Id = args[0]
			a, err := client.Call(cmd.Context(), c.KMSApproval().DenyKMSRequest, req)
			if err != nil {
				return err
			}
			return env.printDone(a, "request %s is %s", a.GetId(), a.GetState())
		}),
	}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "why, for whoever asked and for the record")
	return cmd
}
