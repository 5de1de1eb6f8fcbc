package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
)

// An orphan is a key at a key server that this installation made and that
// nothing known here needs. To destroy one that something needs is to lose data
// for ever, so whatever is in doubt is no orphan: a key without our labels, one
// of a kind that is not known here, one that any host, task or unregistered VM
// names, and one whose age cannot be told.

const (
	taskDestroyOrphans = "provider.destroy-orphans"

	orphanAge    = 30 * 24 * time.Hour // that is asked for if none is said
	orphanAgeMin = 24 * time.Hour

	// What the audit log calls the end of a key's use, and of the key.
	actionDeactivate = "provider.deactivate-key"
	actionDestroy    = "provider.destroy-key"

	reasonHostSilent = "HostNotResponding"

	// So many keys are looked at before what is needed is asked anew, which costs
	// as much as there are VMs: fewer where they are destroyed next.
	orphanBatch, orphanListBatch = 256, 4096
	orphanMessage                = 32 // keys asked for in one go
)

// orphan is a key with the time when nothing has needed it since.
type orphan struct {
	standard.Key
	since time.Time
}

// need is all that is known to need keys of a provider.
type need struct {
	registered map[string]bool // key ids that registered VMs need
	other      map[string]bool // key ids that something else needs
	wrapping   map[string]bool // key ids of wrapping keys whose use was not ended
	names      map[string]bool // Names at the KMS of keys that tasks are making
	kept       []string        // unregistered VMs of the provider, for people
	silent     []string        // hosts that have not told what they have
	retired    map[string]inventory.Retired
}

// needed finds out what needs keys of a provider. Tasks are asked first: a key
// of a task that has ended by then is known to the inventory.
func (c *Controller) needed(ctx context.Context, provider string) (need, error) {
	n := need{registered: map[string]bool{}, other: map[string]bool{}, wrapping: map[string]bool{}, names: map[string]bool{}}
	active, err := c.tasks.List(ctx, 0, true)
	if err != nil {
		return n, err
	}
	for _, t := range active {
		var made madeKey
		var a vmArgs
		if len(t.Data) > 0 && json.Unmarshal(t.Data, &made) == nil && made.Object != "" {
			n.names[standard.NameOf(made.Object)] = true
		}
		if made.Key != nil && made.Key.Provider == provider {
			n.other[made.Key.KeyID] = true
		}
		if json.Unmarshal(t.Args, &a) == nil && a.Key != nil && a.Key.Provider == provider {
			n.other[a.Key.KeyID] = true
		}
	}
	hosts, err := c.inv.Hosts(ctx, "")
	if err != nil {
		return n, err
	}
	for _, h := range hosts {
		vms, told := c.said.keys(h.ID)
		for id, keys := range vms {
			if keys == nil {
				// What the inventory knows of it counts; of another, nothing is known.
				_, err := c.inv.VMByID(ctx, id)
				if err != nil && errs.KindOf(err) != errs.NotFound {
					return n, err
				}
				told = told && err == nil
			}
			for _, k := range keys {
				if k.Provider == provider {
					n.other[k.KeyID] = true
				}
			}
		}
		if !told {
			n.silent = append(n.silent, h.Name)
		}
	}
	vms, err := c.inv.KeptVMs(ctx)
	if err != nil {
		return n, err
	}
	for _, v := range vms {
		its := slices.DeleteFunc(v.Keys, func(k inventory.KeyRef) bool { return k.Provider != provider })
		for _, k := range its {
			n.other[k.KeyID] = true
		}
		if len(its) > 0 {
			n.kept = append(n.kept, fmt.Sprintf("%s (%s/%s)", v.Name, v.Datastore, v.Folder))
		}
	}
	users, err := c.inv.Usage(ctx, provider, "")
	if err != nil {
		return n, err
	}
	for _, u := range users {
		n.registered[u.Key.KeyID] = true
	}
	if n.retired, err = c.inv.Retired(ctx, provider); err != nil {
		return n, err
	}
	p, err := c.inv.Provider(ctx, provider)
	if err != nil || p.Standard == nil || p.Standard.Wrapping == nil {
		return n, err
	}
	if k := p.Standard.Wrapping.Current; k != nil {
		n.wrapping[k.KeyID] = true
	}
	for _, k := range p.Standard.Wrapping.Replaced {
		if k.Ended.IsZero() {
			n.wrapping[k.KeyID] = true
		} else if r := n.retired[k.KeyID]; k.Ended.After(r.Since) {
			n.retired[k.KeyID] = inventory.Retired{Key: inventory.KeyRef{Provider: provider, KeyID: k.KeyID}, VM: r.VM, Since: k.Ended}
		}
	}
	return n, nil
}

// orphan says whether a key is one, and since when.
func (n need) orphan(k standard.Key, before time.Time) (orphan, bool) {
	o := orphan{Key: k, since: k.Created}
	if r, ok := n.retired[k.ID]; ok && r.Since.After(o.since) {
		o.since = r.Since
	}
	known := slices.Contains([]string{standard.ComponentVM, standard.ComponentWrapping, standard.ComponentTrial}, k.Labels.Component)
	return o, known && !n.registered[k.ID] && !n.other[k.ID] && !n.wrapping[k.ID] && !n.names[k.Name] && !o.since.IsZero() && !o.since.After(before)
}

// orphans calls do with the orphans among the keys of those identifiers, some at a
// time. What is needed is found out after the key server listed them.
func (c *Controller) orphans(ctx context.Context, p *standard.Provider, ids []string, some int, before time.Time, do func(need, []orphan) error) error {
	for batch := range slices.Chunk(ids, some) {
		n, err := c.needed(ctx, p.Name())
		if err != nil {
			return err
		}
		batch = slices.DeleteFunc(slices.Clone(batch), func(id string) bool { return n.registered[id] || n.other[id] || n.wrapping[id] })
		var mu sync.Mutex
		found := map[string]orphan{}
		group, groupCtx := errgroup.WithContext(ctx)
		group.SetLimit(fetchesMax)
		for ids := range slices.Chunk(batch, orphanMessage) {
			group.Go(func() error {
				keys, err := p.Marks(groupCtx, ids)
				if err != nil {
					return err
				}
				mu.Lock()
				defer mu.Unlock()
				for _, k := range keys {
					if o, ok := n.orphan(k, before); ok {
						found[k.ID] = o
					}
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		list := slices.SortedFunc(maps.Values(found), func(a, b orphan) int { return a.since.Compare(b.since) })
		if err := do(n, list); err != nil {
			return err
		}
	}
	return nil
}

// standardProvider returns the connection to a standard provider's key servers.
func (c *Controller) standardProvider(ctx context.Context, name string) (*standard.Provider, error) {
	p, err := c.inv.Provider(ctx, name)
	if err != nil {
		return nil, err
	}
	if p.Standard == nil {
		return nil, errs.New(errs.InvalidState, "key provider %s is a %s one: it has no key server", name, p.Type)
	}
	open, err := c.servers.Lookup(name)
	if err != nil {
		return nil, keyError("list the keys of", name, "", err)
	}
	return open, nil
}

func (c providers) ListOrphanKeys(ctx context.Context, req *connect.Request[strongroomv1.ListOrphanKeysRequest], out *connect.ServerStream[strongroomv1.ListOrphanKeysResponse]) error {
	name := req.Msg.GetName()
	age := seconds(req.Msg.GetOlderThanSeconds())
	if age == 0 {
		age = orphanAge
	}
	if age < c.orphanAgeMin {
		return errs.New(errs.Invalid, "keys that were needed less than %v ago are no orphans", c.orphanAgeMin)
	}
	p, err := c.standardProvider(ctx, name)
	if err != nil {
		return err
	}
	ids, err := p.Mine(ctx)
	if errors.Is(err, standard.ErrNoLabels) {
		return errs.New(errs.InvalidState, "cannot list the keys of key provider %s: %w", name, err).WithReason("LabelsUnsupported").
			WithHint("it cannot say which keys are of this installation: clean up there, by the keys that strongroom provider usage %s does not show", name)
	}
	if err != nil {
		return keyError("list the keys of key provider "+name, name, "", err)
	}
	before := time.Now().Add(-age)
	err = c.orphans(ctx, p, ids, orphanListBatch, before, func(_ need, list []orphan) error {
		if len(list) == 0 {
			return nil
		}
		res := &strongroomv1.ListOrphanKeysResponse{}
		for _, o := range list {
			res.Keys = append(res.Keys, &strongroomv1.OrphanKey{
				KeyId: o.ID, Component: o.Labels.Component, Vm: o.Labels.Name, VmId: o.Labels.Identifier, Created: stamp(o.Created), UnusedSince: stamp(o.since),
			})
		}
		return out.Send(res)
	})
	if err != nil {
		return keyError("describe the keys of key provider "+name, name, "", err)
	}
	n, err := c.needed(ctx, name)
	if err != nil {
		return err
	}
	for _, id := range ids {
		delete(n.registered, id)
	}
	return out.Send(&strongroomv1.ListOrphanKeysResponse{
		Before: stamp(before), Unlabelled: uint64(len(n.registered)), KeptFor: n.kept, SilentHosts: n.silent,
	})
}

// orphanArgs are the arguments of a task that destroys orphans.
type orphanArgs struct {
	Provider string    `json:"provider"`
	Before   time.Time `json:"before"`
}

func (c providers) DestroyOrphanKeys(ctx context.Context, req *connect.Request[strongroomv1.DestroyOrphanKeysRequest]) (*connect.Response[strongroomv1.Task], error) {
	name, before := req.Msg.GetName(), req.Msg.GetBefore()
	if before == nil || !before.IsValid() || time.Since(before.AsTime()) < c.orphanAgeMin {
		return nil, errs.New(errs.Invalid, "cannot destroy orphans of key provider %s: keys that were needed less than %v ago are none", name, c.orphanAgeMin)
	}
	if _, err := c.standardProvider(ctx, name); err != nil {
		return nil, err
	}
	n, err := c.needed(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := n.heard(); err != nil {
		return nil, err
	}
	t, err := c.tasks.Submit(ctx, task.Request{
		Kind: taskDestroyOrphans, Target: "provider/" + name, Locks: []string{"provider/" + name + "/orphans"}, Owner: guard.CallerOf(ctx).Principal.String(),
		Args: orphanArgs{Provider: name, Before: before.AsTime()},
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(taskToAPI(t)), nil
}

// heard returns an error if a host has not told what it has.
func (n need) heard() error {
	if len(n.silent) == 0 {
		return nil
	}
	return errs.New(errs.Unavailable, "host %s has not told what VMs it has, so what keys are needed is not known", strings.Join(n.silent, ", ")).
		WithReason(reasonHostSilent).WithHint("strongroom host show %s", n.silent[0])
}

// destroyOrphans is the step that does it. It can be repeated: a key that is
// destroyed is listed no more.
func (c *Controller) destroyOrphans(ctx context.Context, r *task.Run) error {
	var a orphanArgs
	if err := r.Args(&a); err != nil {
		return err
	}
	var destroyed int64 // by earlier attempts, too
	if err := r.Data(&destroyed); err != nil {
		return err
	}
	err := c.destroyOrphansOf(ctx, r, a, &destroyed)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := r.SetData(ctx, destroyed); err != nil {
		return err
	}
	if errors.Is(err, keyprovider.ErrUnavailable) || errs.ReasonOf(err) == reasonHostSilent {
		return &task.Retry{After: lookAgainAfter, Reason: err.Error()}
	}
	t := r.Task()
	if err != nil {
		c.post(ctx, event.New{Type: event.TaskFailed, Principal: t.Owner, Target: t.Target, Args: map[string]string{"kind": t.Kind, "error": err.Error()}})
		return keyError("destroy orphans of key provider "+a.Provider, a.Provider, "", err)
	}
	c.post(ctx, event.New{Type: event.ProviderOrphansDestroyed, Principal: t.Owner, Target: t.Target, Args: map[string]string{"keys": fmt.Sprint(destroyed)}})
	return nil
}

// destroyOrphansOf adds to destroyed how many keys it destroyed.
func (c *Controller) destroyOrphansOf(ctx context.Context, r *task.Run, a orphanArgs, destroyed *int64) error {
	p, err := c.servers.Lookup(a.Provider)
	if err != nil {
		return err
	}
	ids, err := p.Mine(ctx)
	if err != nil {
		return err
	}
	return c.orphans(ctx, p, ids, orphanBatch, a.Before, func(n need, list []orphan) error {
		if err := n.heard(); err != nil {
			return err
		}
		for _, o := range list {
			err := c.destroyOrphan(ctx, p, r.Task(), o)
			if errors.Is(err, standard.ErrNotOurs) {
				continue // somebody else destroyed it meanwhile
			}
			if err != nil {
				return err
			}
			*destroyed++
			r.Progress(ctx, *destroyed, 0, "keys")
		}
		return nil
	})
}

// destroyOrphan ends the use of a key, records that it is about to be destroyed,
// and has it destroyed: whatever happens, a key that is gone is on record.
func (c *Controller) destroyOrphan(ctx context.Context, p *standard.Provider, t task.Task, o orphan) error {
	record := func(action, outcome string, err error) error {
		details := map[string]string{
			"task": t.ID, "provider": p.Name(), "key_id": o.ID, "component": o.Labels.Component, "vm": o.Labels.Name, "vm_id": o.Labels.Identifier,
			"unused_since": o.since.UTC().Format(time.RFC3339),
		}
		if err != nil {
			details["error"] = err.Error()
		}
		_, auditErr := c.audit.Append(audit.Entry{Actor: t.Owner, Action: action, Object: "/" + t.Target, Outcome: outcome, Details: details})
		return errs.Wrap(auditErr, "cannot write the audit log")
	}
	if err := p.Deactivate(ctx, o.ID); err != nil {
		return errors.Join(err, record(actionDeactivate, audit.Failed, err))
	}
	if err := record(actionDeactivate, audit.Success, nil); err != nil {
		return err
	}
	if err := p.Destroy(ctx, o.ID); err != nil {
		return errors.Join(err, record(actionDestroy, audit.Failed, err))
	}
	if err := record(actionDestroy, audit.Success, nil); err != nil {
		return err
	}
	return c.inv.ForgetRetired(ctx, inventory.KeyRef{Provider: p.Name(), KeyID: o.ID})
}
