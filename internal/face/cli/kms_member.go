package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newKMSJoinCmd(env *Env, roles Roles) *cobra.Command {
	var (
		join      KMSJoin
		tokenFile string
	)
	cmd := &cobra.Command{
		Use:   "join",
		Short: "Make this machine a node of a key management server of several",
		Long: `Make this machine a node of the key management server that a join token is for.
The token holds the fingerprint of the server's certificate authority, so nothing
else need be known to trust it. The machine gets the key ring and the authority's
key and seals them under a root key of its own.

Its configuration must have a [cluster]. Run "strongroom kms run" afterwards. Undo
it with "strongroom kms member rm" on another node.`,
		Example: `  strongroom kms member join-token > token
  strongroom kms join --config /etc/strongroom/kms.toml --node kms-a.example:5698 --token-file token`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := env.passwordFile(tokenFile)
			if err != nil {
				return cannot(err, "join the KMS")
			}
			join.Token = strings.TrimSpace(string(token))
			if err := roles.JoinKMS(cmd.Context(), join); err != nil {
				return cannot(err, "join the KMS")
			}
			env.donef("joined %s; next: strongroom kms run --config %s", join.Server, join.ConfigFile)
			return nil
		},
	}
	addConfig(cmd, &join.ConfigFile, "/etc/strongroom/kms.toml")
	cmd.Flags().StringVar(&join.Server, "node", "", "a node that there is, by its address for other nodes, HOST:PORT")
	cmd.Flags().StringVar(&tokenFile, "token-file", "-", "`file` with the join token; - is standard input")
	must(cmd.MarkFlagRequired("node"))
	return cmd
}

func newKMSMemberCmd(env *Env) *cobra.Command {
	return newGroup("member", "Nodes of a key management server",
		`A key management server of several nodes goes on while a majority of them runs:
three nodes, in three zones, bear the loss of one.`,
		newKMSMemberLsCmd(env), newKMSMemberJoinTokenCmd(env), newKMSMemberRmCmd(env))
}

func newKMSMemberLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the nodes",
		Long: `List the nodes and what they are doing. A node with erasures due was away when keys
were destroyed: until it is back, its disk and its root key open them in an old
copy of the database. Bring it back, or remove it and erase its disk.

It changes nothing.`,
		Example: "  strongroom kms member ls",
		Args:    noArgs,
		RunE: env.withClient("list the nodes", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.KMSCluster().ListKMSMembers, &strongroomv1.ListKMSMembersRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetMembers(), []column[*strongroomv1.KMSMember]{
				{"NAME", (*strongroomv1.KMSMember).GetName},
				{"STATE", (*strongroomv1.KMSMember).GetState},
				{"RELEASE", (*strongroomv1.KMSMember).GetRelease},
				{"ADDRESS", (*strongroomv1.KMSMember).GetAddress},
				{"STORE ADDRESS", (*strongroomv1.KMSMember).GetStoreAddress},
				{"ERASURES DUE", func(m *strongroomv1.KMSMember) string { return strconv.FormatInt(m.GetErasuresDue(), 10) }},
				{"JOINED", func(m *strongroomv1.KMSMember) string { return env.when(m.GetJoined()) }},
			})
		}),
	}
}

func newKMSMemberJoinTokenCmd(env *Env) *cobra.Command {
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "join-token",
		Short: "Make a one-time token with which a machine becomes a node",
		Long: `Make a token with which one machine can become a node, once. A node has all keys,
so whoever has the token can have them: treat it as a root key.`,
		Example: "  strongroom kms member join-token --lifetime 10m > token",
		Args:    noArgs,
		RunE: env.withClient("create a join token", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.KMSCluster().CreateKMSJoinToken, &strongroomv1.CreateKMSJoinTokenRequest{LifetimeSeconds: int64(lifetime / time.Second)})
			if err != nil {
				return err
			}
			return env.printSecret(res, res.GetToken(), "for strongroom kms join --node "+res.GetAddress()+"; valid until "+env.when(res.GetExpires()))
		}),
	}
	addDuration(cmd, &lifetime, "lifetime", time.Hour, "how long it is valid, at most 24h")
	return cmd
}

func newKMSMemberRmCmd(env *Env) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "rm NAME",
		Short: "Remove a node for good",
		Long: `Remove a node, for good: one that is retired, or lost. The others go on without it;
it does not start any more. It is refused while it would leave no majority.

What is on the node's disk stays there and opens, with its root key, all keys that
it knew. Erase the disk.`,
		Example: "  strongroom kms member rm kms-c",
		Args:    exactArgs("the node's name"),
		RunE: env.withClient("remove the node", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Remove node %s for good?", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.KMSCluster().RemoveKMSMember, &strongroomv1.RemoveKMSMemberRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(res, "node %s removed; erase its data folder", args[0])
		}),
	}
	addYes(cmd, &yes)
	return cmd
}
