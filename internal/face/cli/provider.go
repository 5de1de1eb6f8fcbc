package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

func newProviderCmd(env *Env) *cobra.Command {
	return newGroup("provider", "Key providers",
		`A key provider supplies the keys (KEKs) that wrap the data encryption keys (DEKs)
of virtual machines. A native provider derives them from one key of its own (the
KDK), which the hosts of the cluster hold: no key server is needed, and hosts
work without the controller. The keys of a standard provider are made and kept
by a key management server (KMS), which is asked over KMIP; hosts have them in
memory only.

A provider cannot be renamed, and the key of a native one never changes: to rotate,
create a new one, make it the default, and rekey the VMs to it. A standard one has
a key for each VM, or one wrapping key, which it can replace at intervals.`,
		newProviderCreateNativeCmd(env), newProviderBackupCmd(env), newProviderImportCmd(env),
		newProviderAddStandardCmd(env), newProviderTrustCmd(env), newProviderUpdateCmd(env),
		newProviderSetClientCmd(env), newProviderClientCertCmd(env), newProviderCheckCmd(env),
		newProviderDefaultCmd(env), newProviderLsCmd(env), newProviderShowCmd(env),
		newProviderUsageCmd(env), newProviderRotateCmd(env), newProviderOrphansCmd(env),
		newProviderDeleteCmd(env))
}

func newProviderCreateNativeCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateNativeProviderRequest{}
	cmd := &cobra.Command{
		Use:   "create-native NAME",
		Short: "Create a native key provider",
		Long: `Create a native key provider with a new key. It cannot be used before it was
backed up: "strongroom provider backup".

Its key is kept on the hosts. Whoever steals a host without a TPM can read the
VMs under it; where hosts are not physically safe, use --tpm-required or a
standard provider.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider create-native kp-1
  strongroom provider backup kp-1 --out kp-1.p12`,
		Args: exactArgs("the provider's name"),
		RunE: env.withClient("create the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			made, err := client.Call(cmd.Context(), c.Provider().CreateNativeProvider, req)
			if err != nil {
				return err
			}
			if err := env.printDone(made, "provider %s created", made.GetName()); err != nil {
				return err
			}
			env.notef("It can be used once it is backed up: strongroom provider backup %s --out %s.p12", made.GetName(), made.GetName())
			return nil
		}),
	}
	cmd.Flags().BoolVar(&req.TpmRequired, "tpm-required", false, "use it only on hosts with a TPM 2.0")
	return cmd
}

func newProviderImportCmd(env *Env) *cobra.Command {
	var (
		dryRun       bool
		passwordFile string
	)
	cmd := &cobra.Command{
		Use:   "import FILE.p12",
		Short: "Restore a native provider from its backup",
		Long: `Restore a native provider from its backup, here or on another controller. VMs that
are locked for want of it are unlocked. A provider of the same name with another
key is left alone, and the import refused.

With --dry-run say what the backup holds, and that it can be opened: test your
backups. Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider import kp-1.p12 --dry-run
  strongroom provider import kp-1.p12 --password-file pw`,
		Args: exactArgs("the backup file"),
		RunE: env.withClient("import the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			p12, err := readBackup(args[0])
			if err != nil {
				return err
			}
			defer clear(p12)
			req := &strongroomv1.ImportProviderRequest{P12: p12, DryRun: dryRun}
			if passwordFile != "" {
				if req.Password, err = env.passwordFile(passwordFile); err != nil {
					return err
				}
			}
			defer func() { clear(req.GetPassword()) }()
			res, err := client.Call(cmd.Context(), c.Provider().ImportProvider, req)
			if errs.ReasonOf(err) == apierr.ReasonPasswordNeeded && env.Interactive {
				if req.Password, err = env.password("Password of "+args[0], "", false); err != nil {
					return err
				}
				res, err = client.Call(cmd.Context(), c.Provider().ImportProvider, req)
			}
			if err != nil {
				return cannot(err, "import %s", args[0])
			}
			return env.printImport(res, dryRun)
		}),
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be restored, and change nothing")
	cmd.Flags().StringVar(&passwordFile, "password-file", "", "`file` with the backup's password; - is standard input")
	cmd.ValidArgsFunction = cobra.FixedCompletions([]string{"p12"}, cobra.ShellCompDirectiveFilterFileExt)
	return cmd
}

// backupMax is the largest backup file, in bytes; a real one has about 2,000.
const backupMax = 1 << 20

func readBackup(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, errs.New(errs.NotFound, "cannot read the backup: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > backupMax {
		return nil, errs.New(errs.Invalid, "%s is not a provider's backup", file)
	}
	return os.ReadFile(file)
}

func (env *Env) printImport(res *strongroomv1.ImportProviderResponse, dryRun bool) error {
	if env.flags.output != outputTable {
		return env.printObject(res)
	}
	p := res.GetProvider()
	switch {
	case dryRun:
		env.resultf("provider %s, key id %s, exported %s, password %s: can be imported", p.GetName(), p.GetKeyId(), env.when(res.GetExported()), yesNo(res.GetPasswordProtected()))
	case !res.GetImported():
		env.donef("provider %s was here already, with the same key", p.GetName())
	default:
		env.donef("provider %s imported, %s", p.GetName(), p.GetState())
	}
	for _, vm := range res.GetUnlocked() {
		env.donef("%s unlocked", vm)
	}
	return nil
}

func newProviderDefaultCmd(env *Env) *cobra.Command {
	var none bool
	cmd := &cobra.Command{
		Use:   "default [NAME]",
		Short: "Choose the default provider",
		Long: `Make a provider the one that is used where none is named. VMs that use another
one keep it until they are rekeyed. With --clear there is no default.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom provider default kp-2
  strongroom provider default --clear`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 || (len(args) == 1) == none {
				return usageError(cmd, "%s needs either the provider's name or --clear", cmd.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("set the default provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req := &strongroomv1.SetDefaultProviderRequest{}
			if !none {
				req.Name = args[0]
			}
			res, err := client.Call(cmd.Context(), c.Provider().SetDefaultProvider, req)
			if err != nil {
				return err
			}
			if none {
				return env.printDone(res, "no provider is the default")
			}
			return env.printDone(res, "provider %s is the default", req.GetName())
		}),
	}
	cmd.Flags().BoolVar(&none, "clear", false, "have no default")
	return cmd
}

func newProviderLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List key providers",
		Long: `List the key providers, their states, and whether anything here uses them.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example: "  strongroom provider ls",
		Args:    noArgs,
		RunE: env.withClient("list the providers", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Provider().ListProviders, &strongroomv1.ListProvidersRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetProviders(), []column[*strongroomv1.Provider]{
				{"NAME", (*strongroomv1.Provider).GetName},
				{"TYPE", (*strongroomv1.Provider).GetType},
				{"STATE", (*strongroomv1.Provider).GetState},
				{"DEFAULT", func(v *strongroomv1.Provider) string { return yesNo(v.GetIsDefault()) }},
				{"IN USE", func(v *strongroomv1.Provider) string { return yesNo(v.GetInUse()) }},
				{"BACKED UP", func(v *strongroomv1.Provider) string { return env.when(v.GetBackedUp()) }},
				{"KEY ID", (*strongroomv1.Provider).GetKeyId},
			})
		}),
	}
}

func newProviderShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one key provider",
		Long: `Show a key provider, its state, and why it is not Active. Of a standard one also
each key server as it was found last: whether it is connected, whether each side
trusts the other, and how long the certificates are valid.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example:           "  strongroom provider show kp-1",
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("show the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			v, err := client.Call(cmd.Context(), c.Provider().GetProvider, &strongroomv1.GetProviderRequest{Name: args[0]})
			if err != nil {
				return err
			}
			fields := []field{
				{"Name", v.GetName()},
				{"Type", v.GetType()},
				{"State", v.GetState()},
				{"Default", yesNo(v.GetIsDefault())},
				{"In use", yesNo(v.GetInUse())},
				{"Created", env.when(v.GetCreated())},
			}
			if v.GetStandard() != nil {
				fields = append(fields, env.standardFields(v.GetStandard())...)
			} else {
				fields = append(fields, field{"Key id", v.GetKeyId()}, field{"TPM required", yesNo(v.GetTpmRequired())}, field{"Backed up", env.when(v.GetBackedUp())})
			}
			for _, d := range v.GetDetails() {
				fields = append(fields, field{"Detail", d})
			}
			return env.printOne(v, fields)
		}),
	}
}

func newProviderUsageCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "usage NAME",
		Short: "List what uses a key provider",
		Long: `List the VMs, disks and snapshots registered here that need the provider's keys.
Copies elsewhere (backups, replicas, other controllers) cannot be known.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example:           "  strongroom provider usage kp-1",
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("list the provider's users", func(cmd *cobra.Command, c *client.Client, args []string) error {
			res, err := client.Call(cmd.Context(), c.Provider().GetProviderUsage, &strongroomv1.GetProviderUsageRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetUsers(), []column[*strongroomv1.KeyUser]{
				{"VM", (*strongroomv1.KeyUser).GetVm},
				{"DISK", (*strongroomv1.KeyUser).GetDisk},
				{"SNAPSHOT", (*strongroomv1.KeyUser).GetSnapshot},
				{"KEY ID", (*strongroomv1.KeyUser).GetKeyId},
				{"HOST", (*strongroomv1.KeyUser).GetHost},
			})
		}),
	}
}

func newProviderDeleteCmd(env *Env) *cobra.Command {
	var yes, force bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a key provider",
		Long: `Delete a key provider here and its keys on all hosts. One that registered VMs use
is refused; with --force it is deleted, and those VMs are locked.

A native one can be imported again from its backup, and only from that. Keep the
backup as long as copies of VMs (backups, replicas) may need it; what those are
cannot be known from here. Better: first rekey all VMs to another provider. If it
is the default there is no default afterwards.

A standard one can be deleted whether or not its key server answers, and added
again under the same name; the keys stay at the key server.

Needs the privilege Cryptographer.ManageKeyServers.`,
		Example: `  strongroom vm rekey --all --provider kp-2
  strongroom provider delete kp-1`,
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("delete the provider", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if !yes {
				usage, err := client.Call(cmd.Context(), c.Provider().GetProviderUsage, &strongroomv1.GetProviderUsageRequest{Name: args[0]})
				if err != nil {
					return err
				}
				env.notef("%s", usageText(args[0], usage.GetUsers()))
			}
			if err := env.confirm(yes, "Delete provider %s and its keys on all hosts? Its backup, or the keys at its key server, must be kept.", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: args[0], Force: force})
			if err != nil {
				return err
			}
			return env.printDone(res, "provider %s deleted", args[0])
		}),
	}
	addYes(cmd, &yes)
	cmd.Flags().BoolVar(&force, "force", false, "delete it although VMs need it: they are locked from then on")
	return cmd
}

// usageText says what is known about a provider's users, and what is not.
func usageText(provider string, users []*strongroomv1.KeyUser) string {
	var vms []string
	seen := make(map[string]bool)
	for _, u := range users {
		if !seen[u.GetVm()] {
			seen[u.GetVm()] = true
			vms = append(vms, u.GetVm())
		}
	}
	text := fmt.Sprintf("No VM registered here uses provider %s.", provider)
	if len(vms) > 0 {
		text = fmt.Sprintf("Provider %s is used by %s.", provider, strings.Join(vms, ", "))
	}
	return text + " Backups and replicas elsewhere may need it too; that cannot be known from here."
}
