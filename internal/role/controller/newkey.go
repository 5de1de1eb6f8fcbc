package controller

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
)

// stepNewKey is the step in which a task has a standard provider make a key; of
// other providers there is nothing to make.
const stepNewKey = "make the key"

// madeKey is the data of a task that makes a key. The object's id is stored
// before the key server is asked, so that whatever happens the key is found
// again by it.
type madeKey struct {
	Object string            `json:"object"` // UUID
	Key    *inventory.KeyRef `json:"key,omitempty"`
}

// keyStep is step for the work on a key that the task makes; a task that makes
// none does and tells nothing.
func (c *Controller) keyStep(do vmStep) func(context.Context, *task.Run) error {
	return func(ctx context.Context, r *task.Run) error {
		var a vmArgs
		if err := r.Args(&a); err != nil || a.NewKeyOf == "" {
			return err
		}
		return c.step(do)(ctx, r)
	}
}

func (c *Controller) makeKey(ctx context.Context, r *task.Run, _ inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if a.Key != nil {
		return nil, nil
	}
	var made madeKey
	if err := r.Data(&made); err != nil {
		return nil, err
	}
	if made.Object == "" && !a.Deep { // a deep rekey has a KEK of its own
		shared, key, err := c.wrappingKey(ctx, a.NewKeyOf)
		if err != nil {
			return nil, err
		}
		if shared {
			return nil, r.SetData(ctx, madeKey{Key: &key})
		}
	}
	if made.Object == "" {
		made.Object = uuid.NewString()
		if err := r.SetData(ctx, made); err != nil {
			return nil, err
		}
	}
	ref, err := c.newKey(ctx, a.NewKeyOf, made.Object, standard.Labels{Identifier: a.ID, Component: standard.ComponentVM, Name: a.Name})
	if err != nil {
		return nil, err
	}
	made.Key = &ref
	return nil, r.SetData(ctx, made)
}

// newKey has a provider make the key for an object (UUID), or finds the one that
// it made, and labels it.
func (c *Controller) newKey(ctx context.Context, provider, object string, labels standard.Labels) (inventory.KeyRef, error) {
	id, err := uuid.Parse(object)
	if err != nil {
		return inventory.KeyRef{}, errs.New(errs.Corrupt, "object of a key: %w", err)
	}
	p, err := c.servers.Lookup(provider)
	if err != nil {
		return inventory.KeyRef{}, keyError("make a key", provider, "", err)
	}
	ref, kek, err := p.NewKEK(ctx, id)
	if err != nil {
		return inventory.KeyRef{}, keyError("make a key", provider, "", err)
	}
	kek.Close() // got again when a host is sure to be there for it
	// Before the key is noted: a step that is cut off before that labels it again.
	if err := p.Label(ctx, ref, labels); err != nil {
		c.log.LogAttrs(ctx, slog.LevelInfo, "the key server takes no labels for its key", slog.String("key", ref.String()), slog.Any("err", err))
	}
	return inventory.KeyRef{Provider: ref.Provider, KeyID: ref.KeyID}, nil
}

// wrappingKey returns the key that wraps what is new, if the provider shares one
// among its VMs. While the first one is being made it asks for patience.
func (c *Controller) wrappingKey(ctx context.Context, provider string) (shared bool, key inventory.KeyRef, err error) {
	p, err := c.inv.Provider(ctx, provider)
	if err != nil || p.Standard == nil || !p.Standard.Wrapping.On() {
		return false, key, err
	}
	switch w := p.Standard.Wrapping; {
	case w.Current != nil:
		return true, inventory.KeyRef{Provider: provider, KeyID: w.Current.KeyID}, nil
	case w.Problem != "":
		return false, key, errs.New(errs.Unavailable, "key provider %s has no wrapping key yet: %s", provider, w.Problem).WithReason(standard.ReasonUnreachable).
			WithHint("strongroom provider check %s", provider)
	}
	ring(c.due)
	return false, key, &task.Retry{After: firstKeyWait, Reason: "the first wrapping key of key provider " + provider + " is being made"}
}

// firstKeyWait is how soon a task looks again for the first wrapping key.
const firstKeyWait = 200 * time.Millisecond

// unmakeKey destroys the key of a task that failed, unless something uses it or
// might: better a key too many at the key server than one too few.
func (c *Controller) unmakeKey(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	var made madeKey
	if err := r.Data(&made); err != nil || made.Object == "" {
		return nil, err
	}
	if made.Key != nil {
		if used, err := c.mayUse(ctx, h, a.ID, *made.Key); used || err != nil {
			c.log.LogAttrs(ctx, slog.LevelInfo, "the key of a failed task is kept: it may be in use", slog.String("task", r.Task().ID),
				slog.String("provider", made.Key.Provider), slog.String("key", made.Key.KeyID), slog.Any("err", err))
			return nil, nil
		}
	}
	return nil, c.discard(ctx, r, a.NewKeyOf, made.Object)
}

// discard destroys the key of that object at a provider, which a task made for
// nothing.
func (c *Controller) discard(ctx context.Context, r *task.Run, provider, object string) error {
	id, err := uuid.Parse(object)
	if err != nil {
		return errs.New(errs.Corrupt, "data of task %s: %w", r.Task().ID, err)
	}
	p, err := c.servers.Lookup(provider)
	if err == nil {
		err = p.Discard(ctx, id)
	}
	if err != nil {
		return keyError("destroy key "+standard.NameOf(object)+", which was made for nothing", provider, "", err)
	}
	return nil
}

// mayUse reports whether a VM uses a key, or cannot be said not to. The host answers
// when it is done with what a task that was canceled had it do.
func (c *Controller) mayUse(ctx context.Context, h inventory.Host, vm string, key inventory.KeyRef) (bool, error) {
	users, err := c.inv.Usage(ctx, key.Provider, key.KeyID)
	if err != nil || len(users) > 0 {
		return true, err
	}
	res, err := callHost(ctx, h, c.agents.of(h).GetVM, &strongroomv1.AgentGetVMRequest{Id: vm, Settled: true})
	if errs.KindOf(err) == errs.NotFound {
		// It came to no VM, or to none that was kept. Of one that is registered the
		// folder may be out of sight only.
		if _, err = c.inv.VMByID(ctx, vm); errs.KindOf(err) == errs.NotFound {
			return false, nil
		}
		return true, err
	}
	if err != nil {
		return true, err
	}
	said := res.GetVm()
	if unread(said) {
		return true, nil
	}
	is := func(k *strongroomv1.KeyRef) bool { return k.GetProvider() == key.Provider && k.GetKeyId() == key.KeyID }
	unknown := func(d *strongroomv1.Disk) bool {
		return d.GetEncrypted() && d.GetKey() == nil || is(d.GetKey()) || is(d.GetRekey().GetKey())
	}
	disks := said.GetDisks()
	for _, s := range said.GetSnapshots() {
		disks = append(disks, s.GetDisks()...)
	}
	return is(said.GetKey()) || slices.ContainsFunc(disks, unknown), nil
}

// keysOfTasks returns the keys that tasks on VMs of a cluster have had made and
// may be about to use: no VM tells of that need yet.
func (c *Controller) keysOfTasks(ctx context.Context, clusterID string) ([]inventory.KeyRef, error) {
	active, err := c.tasks.List(ctx, 0, true)
	if err != nil {
		return nil, err
	}
	var keys []inventory.KeyRef
	for _, t := range active {
		var made madeKey
		var a vmArgs
		if len(t.Data) == 0 || json.Unmarshal(t.Data, &made) != nil || made.Key == nil || json.Unmarshal(t.Args, &a) != nil || a.HostID == "" {
			continue // of another kind of task
		}
		if h, err := c.inv.HostByID(ctx, a.HostID); err == nil && h.ClusterID == clusterID {
			keys = append(keys, *made.Key)
		}
	}
	return keys, nil
}
