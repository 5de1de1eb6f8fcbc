// Package cli is the command line: `strongroom NOUN VERB`. It knows the API
// through package client only; what runs in this process instead (roles and
// operations on a single volume) is wired in by main as [Roles].
//
// Invariants: commands are made by constructors and hold no global state;
// what they need of the process is in [Env]; terminal.go says what goes where.
// Nothing here is safe for concurrent use, except as a comment says.
package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"strongroom/client"
	"strongroom/internal/errs"
)

// Env is what commands see of the process they run in.
type Env struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Interactive tells that a person sits at Stdin and Stderr: commands may
	// ask, and draw bars.
	Interactive bool
	// ReadPassword shows prompt and reads a line without echo. The caller
	// wipes what it returns.
	ReadPassword func(prompt string) ([]byte, error)
	Getenv       func(string) string
	Now          func() time.Time
	// NewClient is [client.New], or a test's.
	NewClient func(client.Config) (*client.Client, error)
	Version   string

	flags globalFlags
}

// globalFlags are understood by every command.
type globalFlags struct {
	server string
	caFile string
	output string
	quiet  bool
}

// New returns the root command with everything below it.
func New(env *Env, roles Roles) *cobra.Command {
	root := newGroup("strongroom", "Data-at-rest encryption for QEMU/KVM virtual machines",
		`Strongroom encrypts virtual machines and datastores under keys that a key
provider guards, and looks after those keys: rekey, backup, recovery.

Commands go to a controller (see "strongroom login"), or, while it is away, to
a host on its local socket: --server unix:/PATH. "strongroom kms" commands go to
the local socket of a KMS.

Exit codes: 0 ok, 1 failed, 2 usage or invalid request, 3 not found, 4 denied,
5 locked (a key cannot be had), 6 unavailable (a retry may succeed).

Environment: STRONGROOM_SERVER, STRONGROOM_CA (file) and STRONGROOM_TOKEN stand
in for a login; STRONGROOM_CONFIG is the file in which logins are kept.`,
		newDevCmd(roles),
		newControllerCmd(roles),
		newHostCmd(env, roles),
		newKMSCmd(env, roles),
		newLoginCmd(env),
		newLogoutCmd(env),
		newWhoAmICmd(env),
		newClusterCmd(env),
		newProviderCmd(env),
		newDatastoreCmd(env),
		newVMCmd(env),
		newDiskCmd(env),
		newTaskCmd(env),
		newEventCmd(env),
		newAlarmCmd(env),
		newHealthCmd(env),
		newUserCmd(env),
		newRoleCmd(env),
		newTokenCmd(env),
		newAuditCmd(env, roles),
		newBenchmarkCmd(env, roles),
		newVolumeCmd(env, roles),
	)
	root.Version = env.Version
	root.SilenceErrors = true // Run prints them
	root.SilenceUsage = true
	root.DisableAutoGenTag = true
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetVersionTemplate("strongroom {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError(cmd, "%w", err) })

	f := root.PersistentFlags()
	f.StringVar(&env.flags.server, "server", "", `the server, "https://HOST:PORT" or "unix:/PATH" (default: the one logged in to last)`)
	f.StringVar(&env.flags.caFile, "ca", "", "PEM `file` of the certificate authority that the server must prove")
	f.StringVarP(&env.flags.output, "output", "o", "table", "how to print results: table, json or yaml")
	f.BoolVarP(&env.flags.quiet, "quiet", "q", false, "print results and errors only")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputFormats, cobra.ShellCompDirectiveNoFileComp)))
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		// Cobra checks the next two itself, later, and without a kind.
		if err := cmd.ValidateRequiredFlags(); err != nil {
			return usageError(cmd, "%w", err)
		}
		if err := cmd.ValidateFlagGroups(); err != nil {
			return usageError(cmd, "%w", err)
		}
		return env.checkOutput(cmd)
	}
	return root
}

// Run executes one command line and returns the exit code. It prints the error
// if there is one.
func Run(ctx context.Context, env *Env, roles Roles, args []string) int {
	root := New(env, roles)
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		env.printError(err)
		return ExitCode(err)
	}
	return 0
}

// ExitCode returns what the process exits with after err.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	switch errs.KindOf(err) {
	case errs.Invalid:
		return 2
	case errs.NotFound:
		return 3
	case errs.Denied:
		return 4
	case errs.Locked:
		return 5
	case errs.Unavailable:
		return 6
	default:
		return 1
	}
}

// newGroup returns a command that only holds others.
func newGroup(use, short, long string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, "%s needs a command", cmd.CommandPath())
			}
			err := usageError(cmd, "%s has no command %q", cmd.CommandPath(), args[0])
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				err = err.WithHint("%s %s", cmd.CommandPath(), near[0])
			}
			return err
		},
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(children...)
	return cmd
}

// usageError returns the error of a command line that cannot be meant.
func usageError(cmd *cobra.Command, format string, args ...any) *errs.Error {
	return errs.New(errs.Invalid, format, args...).WithHint("%s --help", cmd.CommandPath())
}

// exactArgs wants the arguments that the usage line names, as many as that.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usageError(cmd, "%s needs %s, got %d arguments", cmd.CommandPath(), strings.Join(names, " and "), len(args))
		}
		return nil
	}
}

// noArgs wants none.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError(cmd, "%s takes no argument, got %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// minArgs wants one name or more.
func minArgs(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError(cmd, "%s needs %s", cmd.CommandPath(), name)
		}
		return nil
	}
}

// must is for set-up that fails only if this package is wrong.
func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("cli: %v", err))
	}
}
