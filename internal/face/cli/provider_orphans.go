package cli

import (
	"context"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

func newProviderOrphansCmd(env *Env) *cobra.Command {
	var destroy, yes bool
	var wait waitFlags
	older := durationValue(30 * day)
	cmd := &cobra.Command{
		Use:   "orphans NAME",
		Short: "List keys at a key server that nothing needs, or destroy them",
		Long: `List the keys at a standard provider's key server that this installation made and
that nothing known here needs: keys of VMs that were rekeyed, decrypted or
deleted, wrapping keys that were replaced, and keys of tasks that were cut off.
Never listed are keys that other controllers or vCenters made, those that a
registered VM needs, powered off or locked, and those of a VM that was
unregistered, whose folder can be registered again ("strongroom vm forget" if that
is gone).

With --destroy they are destroyed: the key server deactivates and then forgets
each of them, which nobody can take back, and the audit log has a record of each.
Backups and replicas of VMs may need them: that cannot be known from here. So a
key is listed only when nothing has needed it for the time --older-than; let that
be longer than the age of your oldest backup.

A key server that takes no labels (x-Vendor, x-Controller, ...) cannot say whose
its keys are: none of them are listed.

To list needs the privilege Cryptographer.ReadKeyServersInfo, to destroy also
Cryptographer.ManageKeys.`,
		Example: `  strongroom provider orphans kms-1
  strongroom provider orphans kms-1 --older-than 400d --destroy`,
		Args:              exactArgs("the provider's name"),
		ValidArgsFunction: env.completeFirst(providerNames),
		RunE: env.withClient("list the orphans", func(cmd *cobra.Command, c *client.Client, args []string) error {
			found, err := orphansOf(cmd.Context(), c, args[0], time.Duration(older))
			if err != nil {
				return err
			}
			if !destroy {
				err = printList(env, found, found.GetKeys(), env.orphanColumns())
				env.noteOrphans(found)
				return err
			}
			if len(found.GetKeys()) == 0 {
				env.noteOrphans(found)
				return env.printDone(found, "provider %s has no key that nothing needed for %s", args[0], older.String())
			}
			if !yes {
				env.notef("%d keys of provider %s were made here, and nothing known here needed them for %s.", len(found.GetKeys()), args[0], older.String())
				env.noteOrphans(found)
			}
			if err := env.confirm(yes, "Destroy them for ever? A backup of a VM that needs one of them cannot be read then."); err != nil {
				return err
			}
			return env.runTasks(cmd.Context(), c, wait, verb{"destroy the orphans of provider", "has no orphans left", func(ctx context.Context, name string) (*strongroomv1.Task, error) {
				return client.Call(ctx, c.Provider().DestroyOrphanKeys, &strongroomv1.DestroyOrphanKeysRequest{Name: name, Before: found.GetBefore()})
			}}, args)
		}),
	}
	cmd.Flags().Var(&older, "older-than", "how long nothing must have needed a key, one day at least")
	cmd.Flags().BoolVar(&destroy, "destroy", false, "destroy the keys for ever, after a confirmation")
	addYes(cmd, &yes)
	wait.add(cmd)
	return cmd
}

// orphansOf returns all orphans of a provider as one list.
func orphansOf(ctx context.Context, c *client.Client, name string, older time.Duration) (*strongroomv1.ListOrphanKeysResponse, error) {
	if older < day {
		return nil, errs.New(errs.Invalid, "--older-than %s is less than one day", formatDuration(older))
	}
	stream, err := c.Provider().ListOrphanKeys(ctx, connect.NewRequest(&strongroomv1.ListOrphanKeysRequest{Name: name, OlderThanSeconds: int64(older / time.Second)}))
	if err != nil {
		return nil, apierr.From(err)
	}
	defer stream.Close()
	all := &strongroomv1.ListOrphanKeysResponse{}
	for stream.Receive() {
		m := stream.Msg()
		all.Keys = append(all.Keys, m.GetKeys()...)
		all.Before, all.Unlabelled, all.KeptFor, all.SilentHosts = m.GetBefore(), m.GetUnlabelled(), m.GetKeptFor(), m.GetSilentHosts()
	}
	if err := stream.Err(); err != nil {
		return nil, apierr.From(err)
	}
	return all, nil
}

func (env *Env) orphanColumns() []column[*strongroomv1.OrphanKey] {
	return []column[*strongroomv1.OrphanKey]{
		{"KEY ID", (*strongroomv1.OrphanKey).GetKeyId},
		{"FOR", (*strongroomv1.OrphanKey).GetComponent},
		{"VM", (*strongroomv1.OrphanKey).GetVm},
		{"CREATED", func(k *strongroomv1.OrphanKey) string { return env.when(k.GetCreated()) }},
		{"UNUSED SINCE", func(k *strongroomv1.OrphanKey) string { return env.when(k.GetUnusedSince()) }},
	}
}

// noteOrphans says what the list does not show.
func (env *Env) noteOrphans(found *strongroomv1.ListOrphanKeysResponse) {
	if n := found.GetUnlabelled(); n > 0 {
		env.notef("%d keys that VMs need bear no label of this installation: the key server takes none, or another installation made them. Such keys are never listed.", n)
	}
	if vms := found.GetKeptFor(); len(vms) > 0 {
		env.notef("Not listed: keys of VMs that were unregistered and can be registered again: %s.", strings.Join(vms, ", "))
	}
	if hosts := found.GetSilentHosts(); len(hosts) > 0 {
		env.notef("Hosts that have not told what VMs they have: %s. Nothing can be destroyed before they do.", strings.Join(hosts, ", "))
	}
}
