package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// keysFlags say which keys a standard provider has made for its VMs.
type keysFlags struct {
	wrapping, perVM bool
	every           durationValue
}

func (f *keysFlags) add(cmd *cobra.Command, change bool) {
	flags := cmd.Flags()
	flags.BoolVar(&f.wrapping, "wrapping-key", false, "have one key at the key server wrap the keys of all VMs, instead of one for each VM")
	flags.Var(&f.every, "rotate-every", "replace the wrapping key at this age, 30d to 3650d; 0d: only by \"strongroom provider rotate\" (default 0d)")
	if change {
		flags.BoolVar(&f.perVM, "key-per-vm", false, "have one key for each VM again")
		cmd.MarkFlagsMutuallyExclusive("wrapping-key", "key-per-vm")
	}
}

// read puts the flags into s.
func (f *keysFlags) read(cmd *cobra.Command, s *strongroomv1.StandardSettings) error {
	switch {
	case f.wrapping:
		s.Keys = "wrapping"
	case f.perVM:
		s.Keys = "per-vm"
	}
	if !cmd.Flags().Changed("rotate-every") {
		return nil
	}
	switch every := time.Duration(f.every); {
	case every == 0:
		s.RotateDays = -1
	case every%day != 0 || every > 3650*day:
		return errs.New(errs.Invalid, "--rotate-every %s is not 30d to 3650d in whole days", f.every.String())
	default:
		s.RotateDays = int32(every / day)
	}
	return nil
}

func newProviderRotateCmd(env *Env) *cobra.Command {
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "rotate NAME",
		Short: "Give a standard provider a new wrapping key",
		Long: `Have the key server make a new wrapping key for a standard provider that has one
key for all its VMs. What is new is wrapped by it at once; the VMs follow in the
background, while they run: "strongroom provider show" tells how many are to. A
VM that is locked, or whose host is away, follows later.

When nothing known here needs the key before, the key server is told that it is
superseded: it wraps nothing any more, but opens a VM that comes from a backup. It
is destroyed by "strongroom provider orphans --destroy" only.

While the key server is away the key in use stays, and the rotation is tried again
until it succeeds or is canceled.

Needs the privilege Cryptographer.ManageKeys.`,
		Example:           "  strongroom provider rotate kms-1",
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("rotate the wrapping key", func(cmd *cobra.Command, c *client.Client, args []string) error {
			return env.runTasks(cmd.Context(), c, wait, verb{"rotate the wrapping key of provider", "has a new wrapping key", func(ctx context.Context, name string) (*strongroomv1.Task, error) {
				return client.Call(ctx, c.Provider().RotateProvider, &strongroomv1.RotateProviderRequest{Name: name})
			}}, args)
		}),
	}
	wait.add(cmd)
	return cmd
}

// wrappingFields are what `provider show` tells of wrapping keys.
func (env *Env) wrappingFields(w *strongroomv1.Wrapping) []field {
	if !w.GetOn() && len(w.GetReplaced()) == 0 {
		return []field{{"Keys", "one for each VM"}}
	}
	fields := []field{{"Keys", "one for each VM"}}
	if w.GetOn() {
		every := "on request"
		if n := w.GetRotateDays(); n > 0 {
			every = fmt.Sprintf("every %d days", n)
		}
		fields = []field{{"Keys", "one wrapping key, replaced " + every}}
		if k := w.GetCurrent(); k != nil {
			fields = append(fields, field{"Wrapping key", fmt.Sprintf("%s, since %s, VMs %d", k.GetKeyId(), env.when(k.GetMade()), k.GetVms())})
		}
		if w.GetNextRotation() != nil {
			fields = append(fields, field{"  next", env.when(w.GetNextRotation())})
		}
		if w.GetProblem() != "" {
			fields = append(fields, field{"  problem", w.GetProblem()})
		}
	}
	fields = append(fields, field{"  VMs to follow", fmt.Sprint(w.GetVmsToFollow())})
	for _, k := range w.GetReplaced() {
		use := fmt.Sprintf("in use, VMs %d", k.GetVms())
		if k.GetEnded() != nil {
			use = "ended " + env.when(k.GetEnded())
		}
		fields = append(fields, field{"  replaced key", fmt.Sprintf("%s, replaced %s, %s", k.GetKeyId(), env.when(k.GetReplaced()), use)})
	}
	return fields
}
