package cli

import (
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newHostCmd(env *Env, roles Roles) *cobra.Command {
	return newGroup("host", "Hosts: the machines that run the virtual machines",
		`A host runs VMs and holds the keys that they need, in memory and in its sealed
configuration. It joins a cluster with a one-time token.`,
		newHostRunCmd(roles), newHostJoinCmd(env, roles), newHostJoinTokenCmd(env),
		newHostLsCmd(env), newHostShowCmd(env), newHostRemoveCmd(env))
}

func newHostRunCmd(roles Roles) *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the host role on this machine",
		Long: `Run the host role until SIGINT or SIGTERM. VMs go on running when it ends, and
it finds them again when it starts.

The machine must have joined a cluster: "strongroom host join".`,
		Example: "  strongroom host run --config /etc/strongroom/host.toml",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(roles.RunHost(cmd.Context(), config), "run the host")
		},
	}
	addConfig(cmd, &config, "/etc/strongroom/host.toml")
	return cmd
}

func newHostJoinCmd(env *Env, roles Roles) *cobra.Command {
	var (
		join      HostJoin
		tokenFile string
	)
	cmd := &cobra.Command{
		Use:   "join",
		Short: "Make this machine a host of a cluster",
		Long: `Make this machine a host of the cluster that a join token is for. The token holds
the fingerprint of the controller's certificate authority, so nothing else need
be known to trust the controller. The machine makes its own keys; the controller
gets the public halves.

Run "strongroom host run" afterwards. Undo it with "strongroom host remove".`,
		Example: `  strongroom host join-token --cluster lab > token
  strongroom host join --controller https://controller.example:7443 --token-file token`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := env.passwordFile(tokenFile)
			if err != nil {
				return cannot(err, "join the cluster")
			}
			join.Token = strings.TrimSpace(string(token))
			if err := roles.JoinHost(cmd.Context(), join); err != nil {
				return cannot(err, "join the cluster")
			}
			env.donef("joined %s", join.Controller)
			return nil
		},
	}
	addConfig(cmd, &join.ConfigFile, "/etc/strongroom/host.toml")
	cmd.Flags().StringVar(&join.Controller, "controller", "", `the controller, "https://HOST:PORT"`)
	cmd.Flags().StringVar(&tokenFile, "token-file", "-", "`file` with the join token; - is standard input")
	cmd.Flags().StringVar(&join.Name, "name", "", "the host's name (default: the machine's)")
	must(cmd.MarkFlagRequired("controller"))
	return cmd
}

func newHostJoinTokenCmd(env *Env) *cobra.Command {
	var (
		cluster  string
		lifetime time.Duration
	)
	cmd := &cobra.Command{
		Use:   "join-token",
		Short: "Make a one-time token with which a machine joins a cluster",
		Long: `Make a token with which one machine can join a cluster, once. Whoever has it can
make a machine a host, which then gets the cluster's keys: treat it as a password.

Needs the privilege Host.Inventory.AddHostToCluster.`,
		Example: "  strongroom host join-token --cluster lab --lifetime 10m > token",
		Args:    noArgs,
		RunE: env.withClient("create a join token", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Host().CreateJoinToken, &strongroomv1.CreateJoinTokenRequest{
				Cluster: cluster, LifetimeSeconds: int64(lifetime / time.Second),
			})
			if err != nil {
				return err
			}
			return env.printSecret(res, res.GetToken(), "valid until "+env.when(res.GetExpires()))
		}),
	}
	cmd.Flags().StringVar(&cluster, "cluster", "", "the cluster to join")
	addDuration(cmd, &lifetime, "lifetime", time.Hour, "how long it is valid, at most 24h")
	must(cmd.MarkFlagRequired("cluster"))
	env.completeFlag(cmd, "cluster", clusterNames)
	return cmd
}

func newHostLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List hosts",
		Long: `List the hosts, whether they are connected, and whether they can encrypt.

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom host ls",
		Args:    noArgs,
		RunE: env.withClient("list the hosts", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Host().ListHosts, &strongroomv1.ListHostsRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetHosts(), []column[*strongroomv1.Host]{
				{"NAME", (*strongroomv1.Host).GetName},
				{"CLUSTER", (*strongroomv1.Host).GetCluster},
				{"STATE", (*strongroomv1.Host).GetConnectionState},
				{"CRYPTO", (*strongroomv1.Host).GetCryptoState},
				{"PROVIDERS", func(v *strongroomv1.Host) string { return strings.Join(v.GetProviders(), ",") }},
				{"ADDRESS", (*strongroomv1.Host).GetAddress},
				{"VERSION", (*strongroomv1.Host).GetVersion},
			})
		}),
	}
}

func newHostShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one host",
		Long: `Show a host, what it can do, and which providers' keys it holds.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom host show host-1",
		Args:              exactArgs("the host's name"),
		ValidArgsFunction: env.completeFirst(hostNames),
		RunE: env.withClient("show the host", func(cmd *cobra.Command, c *client.Client, args []string) error {
			v, err := client.Call(cmd.Context(), c.Host().GetHost, &strongroomv1.GetHostRequest{Name: args[0]})
			if err != nil {
				return err
			}
			var can []string
			for name, ok := range v.GetCapabilities() {
				if ok {
					can = append(can, name)
				}
			}
			slices.Sort(can)
			return env.printOne(v, []field{
				{"Name", v.GetName()},
				{"ID", v.GetId()},
				{"Cluster", v.GetCluster()},
				{"State", v.GetConnectionState()},
				{"Crypto", v.GetCryptoState()},
				{"Address", v.GetAddress()},
				{"Version", v.GetVersion()},
				{"Last seen", env.when(v.GetLastSeen())},
				{"Providers", strings.Join(v.GetProviders(), ", ")},
				{"Capabilities", strings.Join(can, ", ")},
			})
		}),
	}
}

func newHostRemoveCmd(env *Env) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Take a host out of its cluster",
		Long: `Take a host that runs no VM out of its cluster. Its certificate is no longer
accepted, and the cluster's keys are no longer sent to it; those in its sealed
configuration are dropped when it next hears of it. If the machine was stolen,
move the VMs to a new provider: "strongroom vm rekey --all --provider NEW".

It can join again with a new token. Needs the privilege
Host.Inventory.RemoveHostFromCluster.`,
		Example:           "  strongroom host remove host-2 --yes",
		Args:              exactArgs("the host's name"),
		ValidArgsFunction: env.completeFirst(hostNames),
		RunE: env.withClient("remove the host", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Take host %s out of its cluster?", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.Host().RemoveHost, &strongroomv1.RemoveHostRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(res, "host %s removed", args[0])
		}),
	}
	addYes(cmd, &yes)
	return cmd
}

// addConfig adds --config, a role's configuration file.
func addConfig(cmd *cobra.Command, config *string, byDefault string) {
	cmd.Flags().StringVar(config, "config", byDefault, "the configuration `file`, TOML")
	must(cmd.MarkFlagFilename("config", "toml"))
}
