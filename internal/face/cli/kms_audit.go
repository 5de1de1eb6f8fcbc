package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// auditPage is how many records are asked for at a time.
const auditPage = 1000

func newKMSAuditCmd(env *Env) *cobra.Command {
	return newGroup("audit", "The audit log of a key management server: who did what",
		`Each node of a key management server has a hash-chained, signed log of what it was
asked. Whoever has the privilege Audit.Read on everything, as the roles
Administrator and Auditor give it, sees all; on an account, what concerns that
account.

"strongroom audit verify" checks a copy of a log offline.`,
		newKMSAuditLsCmd(env), newKMSAuditVerifyCmd(env))
}

func newKMSAuditLsCmd(env *Env) *cobra.Command {
	var (
		since, until string
		limit        int
	)
	req := &strongroomv1.ListKMSAuditRequest{}
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List records of the audit log",
		Long: `List records of the audit log that you may see, the newest first. --since and
--until take a time, such as 2026-11-27T09:00:00Z or 2026-11-27, or how long ago:
90m, 7d. --subject, --operation and --object take a part of who, what and with
what.

That you looked is on record. Needs the privilege Audit.Read.`,
		Example: `  strongroom kms audit ls --since 24h
  strongroom kms audit ls --account acme --operation kmip.Destroy --limit 1000
  strongroom kms audit ls --subject user:acme/ann --outcome denied -o json`,
		Args: noArgs,
		RunE: env.withClient("list the audit log", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			if limit < 1 {
				return errs.New(errs.Invalid, "--limit %d is not 1 or more", limit)
			}
			var err error
			if req.Since, err = timeOrAgo("since", since); err != nil {
				return err
			}
			if req.Until, err = timeOrAgo("until", until); err != nil {
				return err
			}
			all := &strongroomv1.ListKMSAuditResponse{}
			for len(all.Records) < limit {
				req.Before, req.Limit = all.Next, int32(min(auditPage, limit-len(all.Records)))
				page, err := client.Call(cmd.Context(), c.KMSAudit().ListKMSAudit, req)
				if err != nil {
					return err
				}
				all.Records, all.Next = append(all.Records, page.GetRecords()...), page.GetNext()
				if page.GetNext() == 0 {
					break
				}
			}
			return printList(env, all, all.GetRecords(), []column[*strongroomv1.KMSAuditRecord]{
				{"SEQ", func(r *strongroomv1.KMSAuditRecord) string { return fmt.Sprint(r.GetSeq()) }},
				{"TIME", func(r *strongroomv1.KMSAuditRecord) string { return env.when(r.GetTime()) }},
				{"SUBJECT", (*strongroomv1.KMSAuditRecord).GetSubject},
				{"OPERATION", (*strongroomv1.KMSAuditRecord).GetOperation},
				{"OBJECT", (*strongroomv1.KMSAuditRecord).GetObject},
				{"OUTCOME", (*strongroomv1.KMSAuditRecord).GetOutcome},
			})
		}),
	}
	flags := cmd.Flags()
	flags.StringVar(&req.Account, "account", "", "records of one account only")
	flags.StringVar(&since, "since", "", "from this `time` on")
	flags.StringVar(&until, "until", "", "before this `time`")
	flags.StringVar(&req.Subject, "subject", "", "who, in part")
	flags.StringVar(&req.Operation, "operation", "", "what, in part, such as kmip.Destroy")
	flags.StringVar(&req.Object, "object", "", "with what, in part, such as a key's identifier")
	flags.StringVar(&req.Outcome, "outcome", "", "success, denied, error, or a reason of KMIP")
	flags.IntVar(&limit, "limit", 100, "at most so many")
	return cmd
}

// timeOrAgo reads a time, or how long ago it was; nil for "".
func timeOrAgo(flag, text string) (*timestamppb.Timestamp, error) {
	if text == "" {
		return nil, nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return timestamppb.New(t), nil
		}
	}
	ago, err := parseDuration(text)
	if err != nil {
		return nil, errs.New(errs.Invalid, `--%s %q: want a time, such as "2026-11-27T09:00:00Z" or "2026-11-27", or how long ago, such as "90m" or "7d"`, flag, text)
	}
	return timestamppb.New(time.Now().Add(-ago)), nil
}

func newKMSAuditVerifyCmd(env *Env) *cobra.Command {
	req := &strongroomv1.VerifyKMSAuditRequest{}
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Verify the audit log of a key management server",
		Long: `Have the server follow the chain of its whole audit log and check the signatures.
If it is broken, the error says in which file, and after which record.

A server that was broken into can say what it likes: note the head that this prints
elsewhere, and verify a copy of the log offline, with "strongroom audit verify".

It changes nothing. Needs the privilege Audit.Read on everything.`,
		Example: "  strongroom kms audit verify",
		Args:    noArgs,
		RunE: env.withClient("vouch for the audit log", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			r, err := client.Call(cmd.Context(), c.KMSAudit().VerifyKMSAudit, req)
			if err != nil {
				return err
			}
			return env.printOne(r, []field{
				{"Log", r.GetLog()},
				{"Files", fmt.Sprint(r.GetFiles())},
				{"Records", fmt.Sprintf("%d to %d", r.GetFirst(), r.GetLast())},
				{"Head", r.GetHead()},
				{"Signatures", fmt.Sprint(r.GetCheckpoints())},
				{"Unsigned", fmt.Sprintf("%d records after the last signature", r.GetUnsigned())},
			})
		}),
	}
	cmd.Flags().StringVar(&req.Head, "head", "", "a `head` that was noted earlier, SEQ:HASH")
	cmd.Flags().BoolVar(&req.AllowPruned, "allow-pruned", false, "accept that old files were removed from the front")
	return cmd
}
