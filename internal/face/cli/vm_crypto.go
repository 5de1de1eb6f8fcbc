package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// vmPick says which VMs, and which of their disks, a command works on.
type vmPick struct {
	all   bool
	disks []string
}

func (p *vmPick) add(env *Env, cmd *cobra.Command, which string) {
	cmd.Flags().BoolVar(&p.all, "all", false, "all VMs that are "+which)
	cmd.Flags().StringArrayVar(&p.disks, "disk", nil, "only this disk, such as disk-0; may be repeated (default: all disks)")
	cmd.ValidArgsFunction = env.complete(vmNames)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		switch {
		case p.all && len(args) > 0:
			return usageError(cmd, "--all and the names of VMs exclude each other")
		case p.all && len(p.disks) > 0:
			return usageError(cmd, "--all and --disk exclude each other")
		case !p.all && len(args) == 0:
			return usageError(cmd, "%s needs a VM's name, or --all", cmd.CommandPath())
		}
		return nil
	}
}

// names returns args, or with --all the names of all VMs for which match holds.
func (p *vmPick) names(ctx context.Context, c *client.Client, args []string, match func(*strongroomv1.VM) bool) ([]string, error) {
	if !p.all {
		return args, nil
	}
	res, err := client.Call(ctx, c.VM().ListVMs, &strongroomv1.ListVMsRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, v := range res.GetVms() {
		if match(v) {
			names = append(names, v.GetName())
		}
	}
	return names, nil
}

func newVMEncryptCmd(env *Env) *cobra.Command {
	var (
		wait     waitFlags
		pick     vmPick
		provider string
		rate     sizeValue
		inPlace  bool
		circular bool
	)
	cmd := &cobra.Command{
		Use:   "encrypt NAME...",
		Short: "Encrypt virtual machines",
		Long: `Encrypt the disks of VMs, running or not. Every disk is copied to a new,
encrypted file and verified before the plain one is deleted; the datastore needs
room for both. The guest of a running VM works on meanwhile and does not notice;
--rate leaves it more of the disk's speed. Interrupted at any point, each disk
is as it was, or encrypted.

With --in-place the disks of VMs that are powered off are encrypted in their own
files, for a datastore without room for a copy: a file grows by 32 MiB meanwhile,
and by 16 MiB in the end. What was encrypted is not read back and compared: have
a backup. Until a disk is done its VM cannot be powered on. Interrupted before
anything was encrypted, the disk is as it was; later, the same command goes on.
Holes stay holes: run "strongroom disk fill" before dm-crypt opens the disk.

A VM that runs the controller or a key server is not encrypted with keys that come
by way of it: see "strongroom vm set".

Undo it with "strongroom vm decrypt". Blocks that the plain disk left on the
storage are not overwritten: on a new datastore, or after a secure erase of the
old one, nothing of them remains. Needs the privilege Cryptographer.Encrypt.`,
		Example: `  strongroom vm encrypt web-1
  strongroom vm encrypt web-1 --rate 100M
  strongroom vm encrypt db-1 --disk disk-1 --provider kp-2
  strongroom vm encrypt old-1 --in-place`,
		RunE: env.withClient("encrypt the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			names, err := pick.names(cmd.Context(), c, args, func(v *strongroomv1.VM) bool { return vmEncryption(v) == "none" || inPlace && begunInPlace(v) })
			if err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "encrypt VM", participle: "encrypted",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: name, Provider: provider, Disks: pick.disks, Rate: int64(rate), InPlace: inPlace, AllowCircular: circular})
				},
			}, names)
		}),
	}
	wait.add(cmd)
	pick.add(env, cmd, "not encrypted")
	addRate(cmd, &rate)
	addAllowCircular(cmd, &circular)
	cmd.Flags().BoolVar(&inPlace, "in-place", false, "encrypt the disks of powered-off VMs in their own files, without room for a copy")
	cmd.Flags().StringVar(&provider, "provider", "", "the key provider (default: the default provider)")
	env.completeFlag(cmd, "provider", providerNames)
	return cmd
}

// begunInPlace reports whether an encryption in place of a disk is not finished.
func begunInPlace(v *strongroomv1.VM) bool {
	return slices.ContainsFunc(v.GetDisks(), func(d *strongroomv1.Disk) bool { return d.GetEncryption() != nil })
}

func newVMDecryptCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		pick vmPick
		yes  bool
		rate sizeValue
	)
	cmd := &cobra.Command{
		Use:   "decrypt NAME...",
		Short: "Decrypt virtual machines",
		Long: `Write the disks of VMs, running or not, as plain files: whoever reads the
datastore then reads their data. The guest of a running VM works on meanwhile.
Interrupted at any point, each disk is as it was, or decrypted.

Undo it with "strongroom vm encrypt", but copies of the plain files may remain.
Needs the privilege Cryptographer.Decrypt.`,
		Example: "  strongroom vm decrypt web-1 --yes",
		RunE: env.withClient("decrypt the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			names, err := pick.names(cmd.Context(), c, args, (*strongroomv1.VM).GetEncrypted)
			if err != nil {
				return err
			}
			if len(names) > 0 {
				if err := env.confirm(yes, "Leave the data of %s unencrypted on the datastore?", strings.Join(names, ", ")); err != nil {
					return err
				}
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "decrypt VM", participle: "decrypted",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().DecryptVM, &strongroomv1.DecryptVMRequest{Name: name, Disks: pick.disks, Rate: int64(rate)})
				},
			}, names)
		}),
	}
	wait.add(cmd)
	pick.add(env, cmd, "encrypted")
	addRate(cmd, &rate)
	addYes(cmd, &yes)
	return cmd
}

func newVMRekeyCmd(env *Env) *cobra.Command {
	var (
		wait     waitFlags
		pick     vmPick
		provider string
		deep     bool
		circular bool
		rate     sizeValue
	)
	cmd := &cobra.Command{
		Use:   "rekey NAME...",
		Short: "Change the keys of virtual machines",
		Long: `Give VMs a new key encryption key (shallow rekey): fast, in any power state, the
guest does not notice. With --deep give them new data encryption keys too: the
disks are rewritten in place, in any power state, while the guest goes on; its
requests go first. --rate bounds what a VM's rekey may rewrite; with --rate and
without --deep, a deep rekey that is under way changes its rate at once (0: no
bound), and nothing else happens.

A deep rekey that is interrupted goes on by itself; one that is canceled stops,
and the next one with --deep goes on with it. Until its
end the VM needs both keys, and "strongroom vm show" tells how far it is. Where no
data were moved yet it is undone.

With --provider the new key comes from another provider: this is how VMs move
to a new provider. Keep the backup of the old one as long as copies of the VMs
(backups, replicas) need it. Needs the privilege Cryptographer.Recrypt.`,
		Example: `  strongroom vm rekey web-1
  strongroom vm rekey --all --provider kp-2
  strongroom vm rekey web-1 --deep --rate 100M
  strongroom vm rekey web-1 --rate 20M`,
		RunE: env.withClient("rekey the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if cmd.Flags().Changed("rate") && !deep {
				if provider != "" || pick.all || len(pick.disks) > 0 || len(args) == 0 {
					return usageError(cmd, "--rate without --deep changes the rekey of the VMs named, and nothing else")
				}
				return env.setRekeyRate(cmd.Context(), c, int64(rate), args)
			}
			names, err := pick.names(cmd.Context(), c, args, (*strongroomv1.VM).GetEncrypted)
			if err != nil {
				return err
			}
			if pick.all && len(names) == 0 {
				env.notef("no VM is encrypted")
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "rekey VM", participle: "rekeyed",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: name, Provider: provider, Deep: deep, Disks: pick.disks, Rate: int64(rate), AllowCircular: circular})
				},
			}, names)
		}),
	}
	wait.add(cmd)
	pick.add(env, cmd, "encrypted")
	addAllowCircular(cmd, &circular)
	cmd.Flags().StringVar(&provider, "provider", "", "the provider of the new key (default: the one that each VM uses)")
	cmd.Flags().BoolVar(&deep, "deep", false, "change the data encryption keys too, and rewrite the disks")
	cmd.Flags().Var(&rate, "rate", "what a deep rekey may rewrite in a second, such as 100M (default: no bound); without --deep, of one that is under way")
	env.completeFlag(cmd, "provider", providerNames)
	return cmd
}

// setRekeyRate changes the rate of deep rekeys that are under way.
func (env *Env) setRekeyRate(ctx context.Context, c *client.Client, rate int64, names []string) error {
	var failed failures
	for _, name := range names {
		t, err := client.Call(ctx, c.VM().SetRekeyRate, &strongroomv1.SetRekeyRateRequest{Name: name, Rate: rate})
		if err != nil {
			failed = append(failed, cannot(err, "change the rekey of VM %s", name))
			continue
		}
		bound := "without a bound"
		if rate > 0 {
			bound = formatSize(rate) + " a second"
		}
		if err := env.printDone(t, "rekey of %s: %s", name, bound); err != nil {
			return err
		}
	}
	if len(failed) > 0 {
		return failed
	}
	return nil
}

func newVMUnlockCmd(env *Env) *cobra.Command {
	var (
		wait waitFlags
		pick vmPick
	)
	cmd := &cobra.Command{
		Use:   "unlock NAME...",
		Short: "Look for the keys of locked virtual machines again",
		Long: `Look again for the keys of VMs that are locked. Importing the missing provider
unlocks its VMs by itself; this is for when something else was put right.

It changes no data. Needs the privilege Cryptographer.RegisterVM.`,
		Example: `  strongroom provider import kp-1.p12
  strongroom vm unlock web-1`,
		RunE: env.withClient("unlock the VMs", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if len(pick.disks) > 0 {
				return errs.New(errs.Invalid, "a VM is unlocked as a whole, not disk by disk")
			}
			names, err := pick.names(cmd.Context(), c, args, func(v *strongroomv1.VM) bool { return v.GetCryptoState() == "locked" })
			if err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{
				infinitive: "unlock VM", participle: "unlocked",
				start: func(ctx context.Context, name string) (*strongroomv1.Task, error) {
					return client.Call(ctx, c.VM().UnlockVM, &strongroomv1.UnlockVMRequest{Name: name})
				},
			}, names)
		}),
	}
	wait.add(cmd)
	pick.add(env, cmd, "locked")
	return cmd
}

// addRate adds the flag that bounds how fast a disk in use is copied.
func addRate(cmd *cobra.Command, rate *sizeValue) {
	cmd.Flags().Var(rate, "rate", "copy at most this much a second while the VM runs, such as 100M (default: as fast as the guest leaves room)")
}

// addAllowCircular adds the flag that has a VM encrypted although it would wait for
// itself.
func addAllowCircular(cmd *cobra.Command, allow *bool) {
	cmd.Flags().BoolVar(allow, "allow-circular", false, "encrypt even a VM that could then not be started after its host was, as its keys come by way of it")
}

// addYes adds the flag that answers [Env.confirm].
func addYes(cmd *cobra.Command, yes *bool) {
	cmd.Flags().BoolVarP(yes, "yes", "y", false, "do not ask")
}
