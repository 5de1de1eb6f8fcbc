package cli

import "github.com/spf13/cobra"

func newDevCmd(roles Roles) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a controller and one host in this process, to try things",
		Long: `Run a controller with an embedded store and one host in this process until SIGINT
or SIGTERM. All state is in one folder: run it again and everything is there. The
first time it makes an administrator, a cluster, a host and a datastore, and it
prints how to go on.

For a laptop and for tests. For production run the roles apart.`,
		Example: "  strongroom dev --dir ~/strongroom",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(roles.RunDev(cmd.Context(), dir), "run strongroom")
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "strongroom-dev", "the `folder` for all state")
	must(cmd.MarkFlagDirname("dir"))
	return cmd
}

func newControllerCmd(roles Roles) *cobra.Command {
	return newGroup("controller", "The controller role",
		`The controller keeps the inventory, the key providers, users, tasks and events,
and serves the API.`,
		newControllerRunCmd(roles))
}

func newControllerRunCmd(roles Roles) *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the controller role on this machine",
		Long: `Run the controller role until SIGINT or SIGTERM. Tasks that are running then go on
when it starts again; VMs never notice.`,
		Example: "  strongroom controller run --config /etc/strongroom/controller.toml",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(roles.RunController(cmd.Context(), config), "run the controller")
		},
	}
	addConfig(cmd, &config, "/etc/strongroom/controller.toml")
	return cmd
}
