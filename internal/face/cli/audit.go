package cli

import (
	"strconv"

	"github.com/spf13/cobra"
)

// AuditVerify says which audit log to verify, and against what.
type AuditVerify struct {
	Dir     string // of the log's files
	KeyFile string // public key of the log's signer, PEM
	Head    string // "SEQ:HASH", a place noted earlier; may be empty
}

// AuditReport is what an intact audit log holds.
type AuditReport struct {
	Log         string `json:"log"`
	Files       int    `json:"files"`
	First       uint64 `json:"first"`
	Last        uint64 `json:"last"`
	Head        string `json:"head"` // "SEQ:HASH", to note elsewhere
	Checkpoints int    `json:"checkpoints"`
	Unsigned    uint64 `json:"unsigned"` // records after the last checkpoint
	TornBytes   int64  `json:"tornBytes"`
}

func newAuditCmd(env *Env, roles Roles) *cobra.Command {
	return newGroup("audit", "The audit log: who did what, provably",
		`The controller records every change and every denied call in a hash-chained,
signed log in its data folder. It can be verified without the controller.`,
		newAuditVerifyCmd(env, roles))
}

func newAuditVerifyCmd(env *Env, roles Roles) *cobra.Command {
	var v AuditVerify
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Verify an audit log offline",
		Long: `Verify that nothing was changed, removed or put in between in the audit log in
DIR, by its hash chain and its signatures. The files and the public key are all
it needs; a copy of both will do.

What follows the last signature could have been cut off by whoever can write the
files. Note the head that this prints somewhere else, and give it with --head the
next time: then that is found out too.

It changes nothing and needs no server.`,
		Example: `  strongroom audit verify /var/lib/strongroom/controller/audit --public-key /var/lib/strongroom/controller/audit-key.pem`,
		Args:    exactArgs("the folder of the log"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v.Dir = args[0]
			report, err := roles.VerifyAudit(cmd.Context(), v)
			if err != nil {
				return cannot(err, "vouch for the audit log")
			}
			return env.printOne(report, []field{
				{"Log", report.Log},
				{"Files", strconv.Itoa(report.Files)},
				{"Records", strconv.FormatUint(report.First, 10) + " to " + strconv.FormatUint(report.Last, 10)},
				{"Head", report.Head},
				{"Signatures", strconv.Itoa(report.Checkpoints)},
				{"Unsigned", strconv.FormatUint(report.Unsigned, 10) + " records after the last signature"},
			})
		},
	}
	cmd.Flags().StringVar(&v.KeyFile, "public-key", "", "public key of the log's signer, a PEM `file`")
	cmd.Flags().StringVar(&v.Head, "head", "", "a `head` that was noted earlier, SEQ:HASH")
	must(cmd.MarkFlagRequired("public-key"))
	return cmd
}
