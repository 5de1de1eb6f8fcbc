package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

// completeTimeout bounds what pressing Tab costs when the server is away.
const completeTimeout = 2 * time.Second

// namesOf asks the server for names to complete.
type namesOf func(ctx context.Context, c *client.Client) ([]string, error)

// complete offers names for every argument of a command.
func (env *Env) complete(names namesOf) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		c, err := env.connect()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, completeTimeout)
		defer cancel()
		all, err := names(ctx, c)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return without(all, args), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFirst offers names for the first argument only.
func (env *Env) completeFirst(names namesOf) cobra.CompletionFunc {
	all := env.complete(names)
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return all(cmd, args, begun)
	}
}

// completeFlag offers names for a flag's value.
func (env *Env) completeFlag(cmd *cobra.Command, flag string, names namesOf) {
	all := env.complete(names)
	must(cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		return all(cmd, nil, begun)
	}))
}

func (env *Env) completeTasks(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	return env.complete(func(ctx context.Context, c *client.Client) ([]string, error) {
		res, err := client.Call(ctx, c.Task().ListTasks, &strongroomv1.ListTasksRequest{})
		return pick(res.GetTasks(), (*strongroomv1.Task).GetId), err
	})(cmd, args, begun)
}

func vmNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.VM().ListVMs, &strongroomv1.ListVMsRequest{})
	return pick(res.GetVms(), (*strongroomv1.VM).GetName), err
}

func providerNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Provider().ListProviders, &strongroomv1.ListProvidersRequest{})
	return pick(res.GetProviders(), (*strongroomv1.Provider).GetName), err
}

func clusterNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Cluster().ListClusters, &strongroomv1.ListClustersRequest{})
	return pick(res.GetClusters(), (*strongroomv1.Cluster).GetName), err
}

func hostNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Host().ListHosts, &strongroomv1.ListHostsRequest{})
	return pick(res.GetHosts(), (*strongroomv1.Host).GetName), err
}

func datastoreNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Datastore().ListDatastores, &strongroomv1.ListDatastoresRequest{})
	return pick(res.GetDatastores(), (*strongroomv1.Datastore).GetName), err
}

func userNames(ctx context.Context, c *client.Client) ([]string, error) {
	res, err := client.Call(ctx, c.Access().ListUsers, &strongroomv1.ListUsersRequest{})
	return pick(res.GetUsers(), (*strongroomv1.User).GetName), err
}

func pick[T any](all []T, name func(T) string) []string {
	names := make([]string, len(all))
	for i, v := range all {
		names[i] = name(v)
	}
	return names
}

func without(all, taken []string) []string {
	used := make(map[string]bool, len(taken))
	for _, t := range taken {
		used[t] = true
	}
	var rest []string
	for _, a := range all {
		if !used[a] {
			rest = append(rest, a)
		}
	}
	return rest
}
