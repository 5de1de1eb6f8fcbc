package controller

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
)

// A VM follows its provider: when it has another key than it is to have, because
// the provider has a new wrapping key, or gives each VM its own again, the
// controller rekeys it (shallow). What cannot be done now is done at a later
// pass; replaced keys that nothing needs any more are ended.

const (
	followsMax = 8 // VMs at a time, so that the engine has slots for people's tasks
	// followWait is how long a pass waits for one VM; its task goes on after that.
	followWait = time.Minute
	// A VM whose rekey failed is left alone for the first of these, and at last for
	// the second.
	followAgainMin = time.Minute
	followAgainMax = time.Hour
)

// reluctant are VMs that failed to follow. It is safe for concurrent use.
type reluctant struct {
	again time.Duration // the first pause
	mu    sync.Mutex
	vms   map[string]pause // by id
}

type pause struct {
	until time.Time
	next  time.Duration
}

// failed notes that a VM did not follow.
func (r *reluctant) failed(vm string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.vms[vm]
	p.next = min(max(2*p.next, r.again), followAgainMax)
	p.until = now.Add(p.next)
	r.vms[vm] = p
}

func (r *reluctant) followed(vm string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.vms, vm)
}

func (r *reluctant) paused(vm string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return now.Before(r.vms[vm].until)
}

// errFollowLater says that a VM is to be looked at again: it has another task now,
// or failed to follow.
var errFollowLater = errors.New("it follows later")

// follow has VMs follow their providers, after each remediation and each
// rotation.
func (c *Controller) follow(ctx context.Context) error {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.stray:
		case <-again:
		}
		err := c.followOnce(ctx)
		again = nil
		if errors.Is(err, errFollowLater) {
			again = time.After(c.reluctant.again)
		} else if err != nil && ctx.Err() == nil {
			c.log.LogAttrs(ctx, slog.LevelError, "VMs do not follow their key provider; it is tried again", slog.Any("err", err))
		}
	}
}

// followOnce has all follow that can. It returns [errFollowLater] if others may
// soon, and nothing else went wrong.
func (c *Controller) followOnce(ctx context.Context) error {
	all, err := c.inv.Providers(ctx)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(p inventory.Provider) bool { return p.Standard == nil || p.Standard.Wrapping == nil })
	if len(all) == 0 {
		return nil
	}
	vms, err := c.inv.VMs(ctx, "")
	if err != nil {
		return err
	}
	var group errgroup.Group
	var later atomic.Bool
	group.SetLimit(followsMax)
	for _, v := range vms {
		for _, p := range all {
			if ctx.Err() == nil && len(p.Standard.Wrapping.Strays(p.Name, v)) > 0 {
				if c.reluctant.paused(v.ID, time.Now()) {
					later.Store(true)
					continue
				}
				group.Go(func() error {
					err := c.followVM(ctx, v.ID, p.Name)
					if err != nil {
						later.Store(true)
					}
					if err != nil && !errors.Is(err, errFollowLater) && ctx.Err() == nil {
						c.reluctant.failed(v.ID, time.Now())
						c.log.LogAttrs(ctx, slog.LevelWarn, "VM does not follow its key provider; it is tried again", slog.String("vm", v.Name),
							slog.String("provider", p.Name), slog.Any("err", err))
					}
					return nil
				})
			}
		}
	}
	_ = group.Wait()
	var failed error
	for _, p := range all {
		if err := c.endReplaced(ctx, p.Name); err != nil && ctx.Err() == nil {
			failed = errors.Join(failed, errs.Wrap(err, "key provider %s", p.Name))
		}
	}
	if failed == nil && later.Load() {
		return errFollowLater
	}
	return failed
}

// followVM rekeys a VM to the key of a provider that it is to have. One that
// cannot be rekeyed now is left for later, with [errFollowLater] if that may be
// soon.
func (c *Controller) followVM(ctx context.Context, id, provider string) error {
	// As they are now: this VM's turn may have come long after the pass began.
	v, err := c.inv.VMByID(ctx, id)
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	p, err := c.inv.Provider(ctx, provider)
	if err != nil {
		return err
	}
	h, err := c.inv.HostByID(ctx, v.HostID)
	if err != nil {
		return err
	}
	strays := p.Standard.Wrapping.Strays(provider, v)
	rekeying := slices.ContainsFunc(v.Disks, func(d inventory.Disk) bool { return d.Rekey != nil })
	if len(strays) == 0 || h.State != inventory.Connected || v.CryptoState == inventory.Locked || rekeying {
		return nil
	}
	args := vmArgs{ID: v.ID, Name: v.Name, HostID: v.HostID, Datastore: v.Datastore, NewKeyOf: provider}
	if !onlyOf(v, provider) { // what has keys of other providers stays with those
		for _, u := range strays {
			if u.Disk == "" {
				args.OwnKey = true
			} else if !slices.Contains(args.Disks, u.Disk) {
				args.Disks = append(args.Disks, u.Disk)
			}
		}
	}
	t, err := c.tasks.Submit(ctx, task.Request{Kind: taskRekey, Target: "vm/" + v.Name, Locks: locks(taskRekey, v.Name, args), Owner: callerName(ctx), Args: args})
	if errs.ReasonOf(err) == "TaskInProgress" {
		return errFollowLater
	}
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, followWait)
	defer cancel()
	t, err = c.tasks.Wait(wait, t.ID)
	if wait.Err() != nil {
		return nil
	}
	if err == nil {
		err = t.Err()
	}
	if err == nil {
		v, err = c.inv.VMByID(ctx, id)
	}
	if err == nil && len(p.Standard.Wrapping.Strays(provider, v)) > 0 {
		err = errs.New(errs.InvalidState, "it was rekeyed, and still needs another key of the provider")
	}
	if err == nil {
		c.reluctant.followed(id)
	}
	return err
}

// onlyOf reports whether all keys of v are of that provider.
func onlyOf(v inventory.VM, provider string) bool {
	return !slices.ContainsFunc(v.Keys(), func(k inventory.KeyRef) bool { return k.Provider != provider })
}

// endReplaced ends the use of replaced wrapping keys that nothing known needs.
func (c *Controller) endReplaced(ctx context.Context, name string) error {
	p, err := c.inv.Provider(ctx, name)
	if err != nil || p.Standard == nil {
		return err
	}
	inUse := func(k inventory.WrappingKey) bool { return k.Ended.IsZero() }
	if w := p.Standard.Wrapping; w == nil || !slices.ContainsFunc(w.Replaced, inUse) {
		return nil
	}
	// After the list of keys: what was wrapped by one of them before it was replaced
	// is known by now.
	n, err := c.needed(ctx, name)
	if err != nil || len(n.silent) > 0 {
		return err
	}
	for _, k := range p.Standard.Wrapping.Replaced {
		if !inUse(k) || n.registered[k.KeyID] || n.other[k.KeyID] {
			continue
		}
		if err := c.endWrappingKey(ctx, name, k); err != nil {
			return err
		}
	}
	return nil
}

// endWrappingKey ends the use of a replaced key at the key server, and puts
// that on record. It can be repeated.
func (c *Controller) endWrappingKey(ctx context.Context, name string, k inventory.WrappingKey) error {
	object, err := uuid.Parse(k.Object)
	if err != nil {
		return errs.New(errs.Corrupt, "wrapping key %s: %w", k.KeyID, err)
	}
	open, err := c.servers.Lookup(name)
	if err == nil {
		err = open.Supersede(ctx, object)
	}
	if err != nil {
		return keyError("end the use of", name, k.KeyID, err)
	}
	if _, err := c.audit.Append(audit.Entry{
		Actor: callerName(ctx), Action: actionDeactivate, Object: "/provider/" + name, Outcome: audit.Success,
		Details: map[string]string{"provider": name, "key_id": k.KeyID, "component": "Wrapping Key", "reason": "Superseded"},
	}); err != nil {
		return errs.Wrap(err, "cannot write the audit log")
	}
	if _, err := c.updateStandard(ctx, name, func(s *inventory.Standard) error {
		for i, r := range s.Wrapping.Replaced {
			if r.KeyID == k.KeyID && r.Ended.IsZero() {
				s.Wrapping.Replaced[i].Ended = c.now().UTC()
			}
		}
		return nil
	}); err != nil {
		return err
	}
	c.post(ctx, event.New{Type: event.WrappingKeyEnded, Target: "provider/" + name, Args: map[string]string{"key_id": k.KeyID}})
	return nil
}
