package cli

import (
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newClusterCmd(env *Env) *cobra.Command {
	return newGroup("cluster", "Clusters: hosts that share keys and datastores",
		`A cluster is a set of hosts that share key providers and datastores. A host must
be in a cluster, and one host is enough for one.`,
		newClusterCreateCmd(env), newClusterLsCmd(env), newClusterShowCmd(env))
}

func newClusterCreateCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "create NAME",
		Short: "Create a cluster",
		Long: `Create a cluster without hosts. Add hosts with "strongroom host join-token" and
"strongroom host join".

Needs the privilege Host.Inventory.CreateCluster.`,
		Example: "  strongroom cluster create lab",
		Args:    exactArgs("the cluster's name"),
		RunE: env.withClient("create the cluster", func(cmd *cobra.Command, c *client.Client, args []string) error {
			made, err := client.Call(cmd.Context(), c.Cluster().CreateCluster, &strongroomv1.CreateClusterRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(made, "cluster %s created", made.GetName())
		}),
	}
}

func newClusterLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List clusters",
		Long: `List the clusters and their hosts.

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom cluster ls",
		Args:    noArgs,
		RunE: env.withClient("list the clusters", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Cluster().ListClusters, &strongroomv1.ListClustersRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetClusters(), []column[*strongroomv1.Cluster]{
				{"NAME", (*strongroomv1.Cluster).GetName},
				{"HOSTS", func(v *strongroomv1.Cluster) string { return strings.Join(v.GetHosts(), ",") }},
				{"CREATED", func(v *strongroomv1.Cluster) string { return env.when(v.GetCreated()) }},
			})
		}),
	}
}

func newClusterShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one cluster",
		Long: `Show a cluster and its hosts.

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom cluster show lab",
		Args:              exactArgs("the cluster's name"),
		ValidArgsFunction: env.completeFirst(clusterNames),
		RunE: env.withClient("show the cluster", func(cmd *cobra.Command, c *client.Client, args []string) error {
			v, err := client.Call(cmd.Context(), c.Cluster().GetCluster, &strongroomv1.GetClusterRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printOne(v, []field{
				{"Name", v.GetName()},
				{"ID", v.GetId()},
				{"Hosts", strings.Join(v.GetHosts(), ", ")},
				{"Created", env.when(v.GetCreated())},
			})
		}),
	}
}
