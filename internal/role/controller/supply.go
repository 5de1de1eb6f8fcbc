package controller

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/inventory"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/standard"
)

// reasonUnknown is vSphere's name for why keys of a provider that is not here
// cannot be had; standard.Explain has the others.
const reasonUnknown = "KeyStateClusterInvalid"

const (
	fetchesMax = 8    // keys got at a time
	parcelsMax = 1000 // sent to a host at a time
)

// keks are KEKs in passing: from the key server to parcels. They must be closed.
type keks map[inventory.KeyRef]*keymem.Key

func (k keks) Close() {
	for _, kek := range k {
		kek.Close()
	}
}

// keyError tells a user why a key of a provider cannot be had, or made.
func keyError(doing, provider, keyID string, err error) error {
	what := "cannot " + doing
	if keyID != "" {
		what = "cannot " + doing + " " + keyID + " of key provider " + provider
	}
	kind := errs.Locked
	reason, hint, ok := standard.Explain(provider, err)
	switch {
	case errors.Is(err, keyprovider.ErrUnknownProvider), errors.Is(err, keyprovider.ErrClosed):
		reason, hint = reasonUnknown, "strongroom provider show "+provider
	case !ok:
		return errs.Wrap(err, "%s", what)
	}
	if keyID == "" {
		kind = errs.Unavailable // no object is locked, a new key cannot be had now
	}
	return errs.New(kind, "%s: %w", what, err).WithReason(reason).WithHint("%s", hint)
}

// fetch gets keys from their key servers, as many as can be had, and says of the
// others why not. A key server that does not answer is asked once.
func (c *Controller) fetch(ctx context.Context, refs []inventory.KeyRef) (keks, map[inventory.KeyRef]error) {
	var mu sync.Mutex
	got, failures, down := keks{}, map[inventory.KeyRef]error{}, map[string]error{}
	var group errgroup.Group
	group.SetLimit(fetchesMax)
	for _, ref := range refs {
		group.Go(func() error {
			mu.Lock()
			err := down[ref.Provider]
			mu.Unlock()
			var kek *keymem.Key
			if err == nil {
				kek, err = c.getKEK(ctx, ref)
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				got[ref] = kek
				return nil
			}
			if errors.Is(err, keyprovider.ErrUnavailable) {
				down[ref.Provider] = err
			}
			failures[ref] = keyError("get key", ref.Provider, ref.KeyID, err)
			return nil
		})
	}
	_ = group.Wait()
	return got, failures
}

func (c *Controller) getKEK(ctx context.Context, ref inventory.KeyRef) (*keymem.Key, error) {
	p, err := c.servers.Lookup(ref.Provider)
	if err != nil {
		return nil, err
	}
	kek, err := p.KEK(ctx, safeRef(ref))
	if errors.Is(err, standard.ErrNotActive) {
		// Of a backup, perhaps: it is opened, and follows to the key of now.
		if is, lookErr := c.inv.Provider(ctx, ref.Provider); lookErr == nil && is.Standard != nil && is.Standard.Wrapping.WasReplaced(ref.KeyID) {
			return p.SupersededKEK(ctx, safeRef(ref))
		}
	}
	return kek, err
}

// equip sees to it that a host has the KEKs at refs before it works with them.
// Those that it has are not asked for: its memory is as good as the key server.
func (c *Controller) equip(ctx context.Context, h inventory.Host, refs []inventory.KeyRef) error {
	refs, err := c.standardKeys(ctx, refs)
	if err != nil || len(refs) == 0 {
		return err
	}
	missing, err := c.syncKEKs(ctx, h.ID, nil)
	if err != nil {
		return err
	}
	missing = slices.DeleteFunc(missing, func(r inventory.KeyRef) bool { return !slices.Contains(refs, r) })
	if len(missing) == 0 {
		return nil
	}
	got, failures := c.fetch(ctx, missing)
	defer got.Close()
	for _, ref := range missing { // in order, so that the same one is told each time
		if failures[ref] != nil {
			return failures[ref]
		}
	}
	ring(c.starved) // the other hosts of the cluster need them too
	_, err = c.syncKEKs(ctx, h.ID, got)
	return err
}

// equipVM is equip with the keys that a VM needs to run and those given. What only
// a snapshot needs does not keep it from that.
func (c *Controller) equipVM(ctx context.Context, h inventory.Host, a vmArgs) error {
	return c.equipWith(ctx, h, a, inventory.VM.RunKeys)
}

// equipSnapshots is equipVM with the keys of the VM's snapshots, too.
func (c *Controller) equipSnapshots(ctx context.Context, h inventory.Host, a vmArgs) error {
	return c.equipWith(ctx, h, a, inventory.VM.Keys)
}

func (c *Controller) equipWith(ctx context.Context, h inventory.Host, a vmArgs, keys func(inventory.VM) []inventory.KeyRef) error {
	var refs []inventory.KeyRef
	v, err := c.inv.VMByID(ctx, a.ID)
	if err == nil {
		refs = keys(v)
	} else if errs.KindOf(err) != errs.NotFound {
		return err
	}
	if a.Key != nil && !slices.Contains(refs, *a.Key) {
		refs = append(refs, *a.Key)
	}
	return c.equip(ctx, h, refs)
}

// mayNeed refuses that a VM, which needed the keys before, needs one that a VM of
// another cluster has for itself: a host says what its VMs need, and gets that, so
// that whoever has one host would get the keys of all. Those in its own cluster get
// them anyway.
func (c *Controller) mayNeed(ctx context.Context, v inventory.VM, before []inventory.KeyRef) error {
	fresh, err := c.standardKeys(ctx, slices.DeleteFunc(v.Keys(), func(k inventory.KeyRef) bool { return slices.Contains(before, k) }))
	if err != nil || len(fresh) == 0 {
		return err
	}
	vms, err := c.inv.VMs(ctx, "")
	if err != nil {
		return err
	}
	for _, other := range vms {
		if other.ClusterID == v.ClusterID {
			continue
		}
		for _, k := range other.Keys() {
			if !slices.Contains(fresh, k) {
				continue
			}
			if p, err := c.inv.Provider(ctx, k.Provider); err != nil {
				return err
			} else if p.Standard == nil || !p.Standard.Wrapping.Holds(k.KeyID) {
				return errs.New(errs.Invalid, "key %s of key provider %s, which VM %s is said to need, is that of VM %s in another cluster", k.KeyID, k.Provider, v.Name, other.Name).
					WithHint("if one is a copy of the other, give the original another key: strongroom vm rekey %s", other.Name)
			}
		}
	}
	return nil
}

// standardKeys returns those of refs that standard providers have.
func (c *Controller) standardKeys(ctx context.Context, refs []inventory.KeyRef) ([]inventory.KeyRef, error) {
	if len(refs) == 0 {
		return nil, nil
	}
	all, err := c.inv.Providers(ctx)
	if err != nil {
		return nil, err
	}
	var out []inventory.KeyRef
	for _, ref := range refs {
		if slices.ContainsFunc(all, func(p inventory.Provider) bool { return p.Name == ref.Provider && p.Standard != nil }) {
			out = append(out, ref)
		}
	}
	return out, nil
}

// wantedKEKs returns the keys that a host should have in memory: those of all
// VMs of its cluster, powered off or on other hosts, too, and those that tasks
// are about to use.
func (c *Controller) wantedKEKs(ctx context.Context, h inventory.Host) ([]inventory.KeyRef, error) {
	vms, err := c.inv.VMs(ctx, "")
	if err != nil {
		return nil, err
	}
	wanted := map[inventory.KeyRef]bool{}
	for _, v := range vms {
		if v.ClusterID == h.ClusterID {
			for _, ref := range v.Keys() {
				wanted[ref] = true
			}
		}
	}
	made, err := c.keysOfTasks(ctx, h.ClusterID)
	if err != nil {
		return nil, err
	}
	for _, ref := range made {
		wanted[ref] = true
	}
	refs := slices.SortedFunc(maps.Keys(wanted), func(a, b inventory.KeyRef) int {
		return strings.Compare(a.Provider+"\x00"+a.KeyID, b.Provider+"\x00"+b.KeyID)
	})
	return c.standardKeys(ctx, refs)
}

// supply gives hosts the KEKs that they lack, whenever one does. A key server
// that is away is asked again with the next remediation, or when it is back.
func (c *Controller) supply(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.starved:
		}
		if err := c.supplyOnce(ctx); err != nil && ctx.Err() == nil {
			c.log.LogAttrs(ctx, slog.LevelError, "keys not sent; it is tried again", slog.Any("err", err))
		}
	}
}

func (c *Controller) supplyOnce(ctx context.Context) error {
	hosts, err := c.inv.Hosts(ctx, "")
	if err != nil {
		return err
	}
	lacking, all := map[string][]inventory.KeyRef{}, map[inventory.KeyRef]bool{}
	for _, h := range hosts {
		if h.State != inventory.Connected {
			continue
		}
		missing, err := c.syncKEKs(ctx, h.ID, nil)
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "host not asked for the keys that it lacks", slog.String("host", h.Name), slog.Any("err", err))
			continue
		}
		if len(missing) > parcelsMax {
			missing = missing[:parcelsMax]
			ring(c.starved) // for the rest
		}
		lacking[h.ID] = missing
		for _, ref := range missing {
			all[ref] = true
		}
	}
	if len(all) == 0 {
		return nil
	}
	got, failures := c.fetch(ctx, slices.Collect(maps.Keys(all)))
	defer got.Close()
	for _, err := range failures {
		c.log.LogAttrs(ctx, slog.LevelWarn, "keys that hosts lack cannot be had", slog.Int("keys", len(failures)), slog.Any("err", err))
		break // one tells enough: the alarms have the rest
	}
	for id, missing := range lacking {
		if !slices.ContainsFunc(missing, func(r inventory.KeyRef) bool { return got[r] != nil }) {
			continue
		}
		if _, err := c.syncKEKs(ctx, id, got); err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "keys not sent", slog.String("host", id), slog.Any("err", err))
		}
	}
	return nil
}

// parcels seals the keys of got that are wanted for a host.
func parcels(h inventory.Host, wanted []inventory.KeyRef, got keks) ([]*strongroomv1.WantedKEK, error) {
	out := make([]*strongroomv1.WantedKEK, 0, len(wanted))
	for _, ref := range wanted {
		w := &strongroomv1.WantedKEK{Key: keyToAPI(&ref)}
		if kek := got[ref]; kek != nil {
			var err error
			if w.Parcel, err = parcel.Seal(h.ParcelPublicKey, keyprovider.KEKContext(controllerName, h.ID, safeRef(ref)), kek); err != nil {
				return nil, errs.Wrap(err, "cannot give host %s a key", h.Name)
			}
		}
		out = append(out, w)
	}
	return out, nil
}
