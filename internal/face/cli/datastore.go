package cli

import (
	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newDatastoreCmd(env *Env) *cobra.Command {
	return newGroup("datastore", "Datastores: where the folders of virtual machines are",
		`A datastore of type "dir" is a folder of any mounted file system (local, NFS,
CephFS) at the same path on every host of its cluster. VM encryption works on
it as on any other.`,
		newDatastoreCreateCmd(env), newDatastoreLsCmd(env), newDatastoreShowCmd(env))
}

func newDatastoreCreateCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateDatastoreRequest{}
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a folder known as a datastore",
		Long: `Make a folder, which must exist on every host of the cluster, known as a
datastore. Nothing in it is changed; VMs that are in it can be registered.

Needs the privilege Datastore.Config.`,
		Example: "  strongroom datastore create ds-1 --cluster lab --path /srv/vms",
		Args:    exactArgs("the datastore's name"),
		RunE: env.withClient("create the datastore", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			made, err := client.Call(cmd.Context(), c.Datastore().CreateDatastore, req)
			if err != nil {
				return err
			}
			return env.printDone(made, "datastore %s created", made.GetName())
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Type, "type", "dir", "its type: dir")
	f.StringVar(&req.Cluster, "cluster", "", "the cluster whose hosts have it")
	f.StringVar(&req.Path, "path", "", "the folder's absolute path on the hosts")
	must(cmd.MarkFlagRequired("cluster"))
	must(cmd.MarkFlagRequired("path"))
	env.completeFlag(cmd, "cluster", clusterNames)
	return cmd
}

func newDatastoreLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List datastores",
		Long: `List the datastores and their space.

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom datastore ls",
		Args:    noArgs,
		RunE: env.withClient("list the datastores", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Datastore().ListDatastores, &strongroomv1.ListDatastoresRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetDatastores(), []column[*strongroomv1.Datastore]{
				{"NAME", (*strongroomv1.Datastore).GetName},
				{"TYPE", (*strongroomv1.Datastore).GetType},
				{"CLUSTER", (*strongroomv1.Datastore).GetCluster},
				{"ENCRYPTED", func(v *strongroomv1.Datastore) string { return yesNo(v.GetEncrypted()) }},
				{"CAPACITY", func(v *strongroomv1.Datastore) string { return formatSize(int64(v.GetCapacityBytes())) }},
				{"FREE", func(v *strongroomv1.Datastore) string { return formatSize(int64(v.GetFreeBytes())) }},
				{"PATH", (*strongroomv1.Datastore).GetPath},
			})
		}),
	}
}

func newDatastoreShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one datastore",
		Long: `Show a datastore, its space, and whether it encrypts what is on it. (VMs on a
datastore that does not can be encrypted by themselves.)

It changes nothing. Needs the privilege System.Read.`,
		Example:           "  strongroom datastore show ds-1",
		Args:              exactArgs("the datastore's name"),
		ValidArgsFunction: env.completeFirst(datastoreNames),
		RunE: env.withClient("show the datastore", func(cmd *cobra.Command, c *client.Client, args []string) error {
			v, err := client.Call(cmd.Context(), c.Datastore().GetDatastore, &strongroomv1.GetDatastoreRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printOne(v, []field{
				{"Name", v.GetName()},
				{"Type", v.GetType()},
				{"Cluster", v.GetCluster()},
				{"Path", v.GetPath()},
				{"Encrypted", yesNo(v.GetEncrypted())},
				{"Capacity", formatSize(int64(v.GetCapacityBytes()))},
				{"Free", formatSize(int64(v.GetFreeBytes()))},
			})
		}),
	}
}
