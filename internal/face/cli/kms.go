package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newKMSCmd(env *Env, roles Roles) *cobra.Command {
	return newGroup("kms", "A key management server (KMIP)",
		`A key management server keeps keys for KMIP clients: vCenter, Strongroom's
standard key providers, storage arrays, databases; and for programs that ask by
HTTP. A client is an application with credentials; applications of one group share
keys.

Its administration is on a local socket, for root and the user that it runs as:
--server unix:/PATH, by default kms.sock in its data folder. With api_listen in its
configuration it has users, as a controller has: "strongroom login --server
https://HOST:PORT", then "strongroom user", "strongroom role", "strongroom token".`,
		newKMSRunCmd(roles), newKMSJoinCmd(env, roles), newKMSMemberCmd(env), newKMSDevCmd(roles), newKMSBackupCmd(env, roles), newKMSRestoreCmd(env, roles), newKMSShowCmd(env), newKMSUnsealCmd(env), newKMSRootCmd(env), newKMSAccountCmd(env), newKMSGroupCmd(env), newKMSAppCmd(env), newKMSCredentialCmd(env), newKMSParcelCmd(env), newKMSApprovalCmd(env), newKMSAuditCmd(env))
}

func newKMSRunCmd(roles Roles) *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run a key management server on this machine",
		Long: `Run a key management server until SIGINT or SIGTERM. The first time it makes its
root key, certificate authority and database.

What it keeps is lost without its root key and its vault (kms.key and kms.vault).
Back it up with "strongroom kms backup".

If its root key comes from people ("strongroom kms root"), it is sealed when it
starts: it serves nothing until "strongroom kms unseal".`,
		Example: "  strongroom kms run --config /etc/strongroom/kms.toml",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(roles.RunKMS(cmd.Context(), config), "run the KMS")
		},
	}
	addConfig(cmd, &config, "/etc/strongroom/kms.toml")
	return cmd
}

func newKMSDevCmd(roles Roles) *cobra.Command {
	var dir, listen, apiListen string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a key management server in one folder, to try things",
		Long: `Run a key management server until SIGINT or SIGTERM. All state is in one folder:
run it again and everything is there. The first time it makes an application whose
KMIP client finds there what it needs: ca.pem, client.pem and client.key. The
password of its first user, administrator, is there too, in initial-admin-password:
"strongroom login --ca ca.pem --server https://HOST:PORT" as it is printed.

For a laptop and for tests. For production use "strongroom kms run".`,
		Example: "  strongroom kms dev --dir ~/strongroom-kms --listen 127.0.0.1:5696",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(roles.RunKMSDev(cmd.Context(), dir, listen, apiListen), "run the KMS")
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "strongroom-kms", "the `folder` for all state")
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:5696", "the address for KMIP clients, HOST:PORT")
	cmd.Flags().StringVar(&apiListen, "api-listen", "", "the address for users, HOST:PORT (default: that of --listen with its port + 4, or a free one)")
	must(cmd.MarkFlagDirname("dir"))
	return cmd
}

func newKMSShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Show a key management server's address and certificate",
		Long: `Show where KMIP clients reach the server, and the fingerprint of its certificate:
compare it when a client asks whether to trust the server.

It changes nothing.`,
		Example: "  strongroom kms show --server unix:/var/lib/strongroom/kms/kms.sock",
		Args:    noArgs,
		RunE: env.withClient("show the KMS", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			k, err := client.Call(cmd.Context(), c.KMS().GetKMS, &strongroomv1.GetKMSRequest{})
			if err != nil {
				return err
			}
			return env.printOne(k, []field{
				{"Address", k.GetAddress()},
				{"Certificate", "sha256:" + k.GetCertificateSha256()},
				{"Valid until", env.when(k.GetCertificateExpires())},
				{"Version", k.GetVersion()},
			})
		}),
	}
}

func newKMSGroupCmd(env *Env) *cobra.Command {
	return newGroup("group", "Groups of applications that share keys",
		`A group's applications see the same keys, and no other's. Its policy says what they
may do.`,
		newKMSGroupCreateCmd(env), newKMSGroupLsCmd(env), newKMSGroupShowCmd(env), newKMSGroupPolicyCmd(env), newKMSGroupQuotaCmd(env), newKMSGroupRotationCmd(env), newKMSGroupQuorumCmd(env), newKMSGroupDeleteCmd(env))
}

// addPolicy adds the flags of a group's policy.
func addPolicy(cmd *cobra.Command, p *strongroomv1.KMSPolicy) {
	cmd.Flags().StringSliceVar(&p.Operations, "operations", nil, "the KMIP operations allowed, such as Create,Get (default: all)")
	cmd.Flags().StringSliceVar(&p.KeyTypes, "key-types", nil, "the keys allowed, such as AES-256,HMAC-SHA256 (default: all objects)")
	cmd.Flags().BoolVar(&p.NoExport, "no-export", false, "key material does not leave the server: it is used there")
}

func newKMSGroupCreateCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateKMSGroupRequest{Policy: &strongroomv1.KMSPolicy{}}
	var account string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create a group",
		Long: `Create a group. Its name cannot be changed: it is where its keys belong. In an
account its whole name is ACCOUNT/NAME, and by that other commands know it.`,
		Example: `  strongroom kms group create backup --title Backups --operations Create,Activate,Get,Locate --key-types AES-256
  strongroom kms group create vsphere --account acme`,
		Args: exactArgs("the group's name"),
		RunE: env.withClient("create the group", func(cmd *cobra.Command, c *client.Client, args []string) (err error) {
			if req.Name, err = inAccount(account, args[0]); err != nil {
				return err
			}
			g, err := client.Call(cmd.Context(), c.KMS().CreateKMSGroup, req)
			if err != nil {
				return err
			}
			return env.printDone(g, "group %s created", g.GetName())
		}),
	}
	cmd.Flags().StringVar(&req.Title, "title", "", "a title for people")
	cmd.Flags().StringVar(&req.Description, "description", "", "what it is for")
	addAccount(cmd, &account)
	addPolicy(cmd, req.Policy)
	return cmd
}

func newKMSGroupPolicyCmd(env *Env) *cobra.Command {
	req := &strongroomv1.SetKMSGroupPolicyRequest{Policy: &strongroomv1.KMSPolicy{}}
	cmd := &cobra.Command{
		Use:   "policy NAME",
		Short: "Replace a group's policy",
		Long: `Replace what a group's applications may do, from their next request on. What is
not given is not restricted: without flags everything is allowed.`,
		Example: "  strongroom kms group policy backup --operations Get,Locate",
		Args:    exactArgs("the group's name"),
		RunE: env.withClient("change the group", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			g, err := client.Call(cmd.Context(), c.KMS().SetKMSGroupPolicy, req)
			if err != nil {
				return err
			}
			return env.printDone(g, "policy of group %s changed", g.GetName())
		}),
	}
	addPolicy(cmd, req.Policy)
	return cmd
}

func newKMSGroupLsCmd(env *Env) *cobra.Command {
	req := &strongroomv1.ListKMSGroupsRequest{}
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List groups and their policies",
		Long:    "List the groups that you may see, and what their applications may do. It changes\nnothing.",
		Example: "  strongroom kms group ls",
		Args:    noArgs,
		RunE: env.withClient("list the groups", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.KMS().ListKMSGroups, req)
			if err != nil {
				return err
			}
			return printList(env, res, res.GetGroups(), []column[*strongroomv1.KMSGroup]{
				{"NAME", (*strongroomv1.KMSGroup).GetName},
				{"TITLE", (*strongroomv1.KMSGroup).GetTitle},
				{"OPERATIONS", func(g *strongroomv1.KMSGroup) string { return orAll(g.GetPolicy().GetOperations()) }},
				{"KEY TYPES", func(g *strongroomv1.KMSGroup) string { return orAll(g.GetPolicy().GetKeyTypes()) }},
				{"EXPORT", func(g *strongroomv1.KMSGroup) string { return yesNo(!g.GetPolicy().GetNoExport()) }},
				{"KEYS", func(g *strongroomv1.KMSGroup) string { return fmt.Sprint(g.GetUsage().GetKeys()) }},
			})
		}),
	}
	cmd.Flags().StringVar(&req.Account, "account", "", "only those of one account")
	return cmd
}

func orAll(list []string) string {
	if len(list) == 0 {
		return "all"
	}
	return strings.Join(list, ",")
}

func newKMSGroupShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show a group, its policy and its usage",
		Long: `Show a group, what its applications may do, and what they did: keys that there are,
operations, also those of applications that have been deleted. After a crash of the
server the operations of its last 10 seconds are missing.

It changes nothing.`,
		Example: "  strongroom kms group show vsphere",
		Args:    exactArgs("the group's name"),
		RunE: env.withClient("show the group", func(cmd *cobra.Command, c *client.Client, args []string) error {
			g, err := client.Call(cmd.Context(), c.KMS().GetKMSGroup, &strongroomv1.GetKMSGroupRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printOne(g, append([]field{
				{"Name", g.GetName()},
				{"Title", g.GetTitle()},
				{"Description", g.GetDescription()},
				{"Created", env.when(g.GetCreated())},
				{"Operations allowed", orAll(g.GetPolicy().GetOperations())},
				{"Key types", orAll(g.GetPolicy().GetKeyTypes())},
				{"Export", yesNo(!g.GetPolicy().GetNoExport())},
				{"Keys rotated", days("every", g.GetRotation().GetEveryDays())},
				{"Replaced keys deactivated", days("after", g.GetRotation().GetDeactivateAfterDays())},
				{"Quorum", quorumText(g.GetQuorum())},
			}, env.usageFields(g.GetUsage(), g.GetQuota(), "Keys")...))
		}),
	}
}
