package controller

import (
	"context"
	"log/slog"
	"reflect"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

const (
	// sweepEvery is how often the controller looks for hosts that fell silent.
	sweepEvery = 2 * time.Second
	// syncTimeout bounds putting one host right: a user may be waiting for it.
	syncTimeout = 5 * time.Second
	syncsMax    = 32 // hosts at a time
)

// remediate puts hosts, provider states and alarms right: at every
// kms.remediation_interval, and soon after something changed.
func (c *Controller) remediate(ctx context.Context) error {
	interval := time.NewTicker(time.Duration(c.cfg.KMS.RemediationInterval))
	defer interval.Stop()
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	for {
		if err := c.remediateOnce(ctx); err != nil && ctx.Err() == nil {
			c.log.LogAttrs(ctx, slog.LevelError, "remediation failed; it is tried again", slog.Any("err", err))
		}
		for wait := true; wait; {
			select {
			case <-ctx.Done():
				return nil
			case <-interval.C:
				wait = false
			case <-c.wake:
				wait = false
			case <-sweep.C:
				silent, err := c.inv.Sweep(ctx)
				if err != nil && ctx.Err() == nil {
					c.log.LogAttrs(ctx, slog.LevelError, "cannot look for silent hosts", slog.Any("err", err))
				}
				wait = len(silent) == 0
			}
		}
	}
}

// doubt notes that nobody knows what the VMs of hosts do that do not answer. It
// looks at all of them, so that one that a crash left out is found.
func (c *Controller) doubt(ctx context.Context, hosts []inventory.Host) error {
	silent := map[string]bool{}
	for _, h := range hosts {
		if h.State == inventory.NotResponding {
			silent[h.ID] = true
		}
	}
	if len(silent) == 0 {
		return nil
	}
	vms, err := c.inv.VMs(ctx, "")
	if err != nil {
		return err
	}
	for _, vm := range vms {
		if !silent[vm.HostID] || vm.PowerState == inventory.PowerUnknown {
			continue
		}
		_, err := c.inv.UpdateVM(ctx, vm.ID, func(v *inventory.VM) error {
			v.PowerState = inventory.PowerUnknown
			return nil
		})
		if err != nil && errs.KindOf(err) != errs.NotFound {
			return err
		}
		c.said.doubt(vm.HostID, vm.ID)
	}
	return nil
}

// remediateOnce puts everything right now. A host that does not answer is put
// right later.
func (c *Controller) remediateOnce(ctx context.Context) error {
	hosts, err := c.inv.Hosts(ctx, "")
	if err != nil {
		return err
	}
	if err := c.doubt(ctx, hosts); err != nil {
		return err
	}
	// Side by side: one host that hangs must not hold up the others.
	var group errgroup.Group
	group.SetLimit(syncsMax)
	for _, h := range hosts {
		if h.State != inventory.Connected {
			continue
		}
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, syncTimeout)
			defer cancel()
			if err := c.syncHost(ctx, h.ID); err != nil && errs.KindOf(err) != errs.NotFound {
				c.log.LogAttrs(ctx, slog.LevelWarn, "host not put right", slog.String("host", h.Name), slog.Any("err", err))
			}
			return nil
		})
	}
	_ = group.Wait()
	ring(c.stray)
	return c.refresh(ctx)
}

// refresh computes provider states and alarms anew.
func (c *Controller) refresh(ctx context.Context) error {
	changes, err := c.inv.RefreshProviderStates(ctx)
	if err != nil {
		return err
	}
	for _, change := range changes {
		c.post(ctx, event.New{
			Type: event.ProviderStateChanged, Target: "provider/" + change.Provider.Name,
			Args: map[string]string{"from": string(change.Was), "to": string(change.Provider.State)},
		})
	}
	return c.events.Evaluate(ctx, c.inv)
}

// syncHost gives a host its wanted configuration and notes what it has then.
// KEKs that it lacks are sent later: a key server must not hold this up.
func (c *Controller) syncHost(ctx context.Context, id string) error {
	missing, err := c.syncKEKs(ctx, id, nil)
	if len(missing) > 0 {
		ring(c.starved)
	}
	return err
}

// syncKEKs is syncHost with the KEKs in got. It returns those that the host
// still lacks.
func (c *Controller) syncKEKs(ctx context.Context, id string, got keks) ([]inventory.KeyRef, error) {
	// One at a time for a host, each with what is wanted when its turn comes:
	// else an older configuration could overtake a newer one.
	unlock, err := c.agents.lock(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	h, err := c.inv.HostByID(ctx, id)
	if err != nil {
		return nil, err
	}
	req, err := c.wanted(ctx, h)
	if err != nil {
		return nil, err
	}
	wanted, err := c.wantedKEKs(ctx, h)
	if err != nil {
		return nil, err
	}
	if req.Keks, err = parcels(h, wanted, got); err != nil {
		return nil, err
	}
	res, err := callHost(ctx, h, c.agents.of(h).SyncHost, req)
	if err != nil {
		return nil, err
	}
	var missing []inventory.KeyRef
	for _, ref := range res.GetMissingKeks() {
		missing = append(missing, *keyFromAPI(ref))
	}
	return missing, c.noteSync(ctx, h, res)
}

// wanted is the configuration that a host should have.
func (c *Controller) wanted(ctx context.Context, h inventory.Host) (*strongroomv1.SyncHostRequest, error) {
	req := &strongroomv1.SyncHostRequest{}
	providers, err := c.inv.Providers(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range providers {
		if p.TPMRequired && !h.Capabilities[inventory.CapabilityTPM] {
			continue
		}
		want := &strongroomv1.WantedProvider{Name: p.Name, KeyId: p.KeyID, TpmRequired: p.TPMRequired, Created: stamp(p.Created), Standard: p.Standard != nil}
		if p.Standard == nil && !h.Holds(p.Name, p.KeyID) {
			native, err := c.keys.native(p.Name)
			if err != nil {
				return nil, errs.Wrap(err, "cannot give host %s provider %s", h.Name, p.Name)
			}
			if want.Parcel, err = native.Seal(controllerName, h.ID, h.ParcelPublicKey); err != nil {
				return nil, err
			}
		}
		if p.Standard != nil && p.Standard.HostAccess == inventory.HostsDirect {
			if want.KeyServers, err = c.keyServerAccess(h, p); err != nil { // its status says so too
				c.log.LogAttrs(ctx, slog.LevelError, "key servers not given to host", slog.String("host", h.Name), slog.String("provider", p.Name), slog.Any("err", err))
			}
		}
		req.Providers = append(req.Providers, want)
	}
	datastores, err := c.inv.Datastores(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range datastores {
		if d.ClusterID == h.ClusterID {
			req.Datastores = append(req.Datastores, &strongroomv1.WantedDatastore{Name: d.Name, Type: d.Type, Path: d.PathOn(h.ID)})
		}
	}
	return req, nil
}

// retire has a host that was removed forget all keys, if it can be reached; it
// has no VMs. Its certificate is worth nothing here any more.
func (c *Controller) retire(ctx context.Context, h inventory.Host) error {
	defer c.agents.drop(h.ID)
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	unlock, err := c.agents.lock(ctx, h.ID)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = callHost(ctx, h, c.agents.of(h).SyncHost, &strongroomv1.SyncHostRequest{})
	return err
}

func (c *Controller) noteSync(ctx context.Context, h inventory.Host, res *strongroomv1.SyncHostResponse) error {
	if held := heldFromAPI(res.GetProviders()); !slices.Equal(h.Held, held) {
		if _, err := c.inv.UpdateHost(ctx, h.ID, func(h *inventory.Host) error {
			h.Held = held
			if len(held) > 0 {
				h.CryptoState = inventory.HostSafe
			}
			return nil
		}); err != nil {
			return err
		}
	}
	for _, d := range res.GetDatastores() {
		if !d.GetAccessible() {
			c.log.LogAttrs(ctx, slog.LevelWarn, "datastore is not accessible", slog.String("host", h.Name), slog.String("datastore", d.GetName()), slog.String("err", d.GetError()))
			continue
		}
		if _, err := c.inv.UpdateDatastore(ctx, d.GetName(), func(ds *inventory.Datastore) error {
			ds.CapacityBytes, ds.FreeBytes = d.GetCapacityBytes(), d.GetFreeBytes()
			return nil
		}); err != nil && errs.KindOf(err) != errs.NotFound {
			return err
		}
	}
	return nil
}

// post stores an event. The operation that it tells of has happened, so a
// failure to tell is logged and not returned.
func (c *Controller) post(ctx context.Context, n event.New) {
	if n.Principal == "" {
		n.Principal = callerName(ctx)
	}
	if _, err := c.events.Post(context.WithoutCancel(ctx), n); err != nil {
		c.log.LogAttrs(ctx, slog.LevelError, "event not stored", slog.String("type", n.Type), slog.Any("err", err))
	}
}

// noteVM takes over what a host says of a VM, unless it has said something later.
// One that the inventory does not know is not taken in: somebody unregistered it,
// or must register it.
func (c *Controller) noteVM(ctx context.Context, hostID string, said *strongroomv1.VM) error {
	return c.noteVMAs(ctx, hostID, said, nil)
}

// noteVMAs is noteVM of a heartbeat, for which the VM has that digest.
func (c *Controller) noteVMAs(ctx context.Context, hostID string, said *strongroomv1.VM, digest []byte) error {
	old, err := c.inv.VMByID(ctx, said.GetId())
	if errs.KindOf(err) == errs.NotFound || err == nil && old.HostID != hostID {
		c.said.noted(hostID, said.GetId(), digest)
		return nil
	}
	if err != nil {
		return err
	}
	last, done, err := c.heard.turn(ctx, hostID, said.GetId())
	if err != nil {
		return err
	}
	defer done()
	if last.stale(said.GetDescription()) {
		return nil
	}
	if err := c.takeOver(ctx, said); err != nil {
		return err
	}
	last.note(said.GetDescription())
	c.said.noted(hostID, said.GetId(), digest)
	return nil
}

// takeOver changes a VM as its host says.
func (c *Controller) takeOver(ctx context.Context, said *strongroomv1.VM) error {
	old, err := c.inv.VMByID(ctx, said.GetId())
	if err != nil {
		return err
	}
	next := old
	apply(&next, said)
	if reflect.DeepEqual(old, next) {
		return nil
	}
	if err := c.mayNeed(ctx, next, old.Keys()); err != nil {
		return err
	}
	// What it was just before this change: a heartbeat and a task may tell the
	// same change, and it is told to users once.
	var keys []inventory.KeyRef
	next, err = c.inv.UpdateVM(ctx, old.ID, func(v *inventory.VM) error {
		old, keys = *v, v.Keys()
		apply(v, said)
		return nil
	})
	if err != nil {
		return err
	}
	if !slices.Equal(keys, next.Keys()) {
		c.poke() // other hosts need them too, and it may have to follow its provider
	}
	if old.PowerState != next.PowerState && old.PowerState != inventory.PowerUnknown && next.PowerState != inventory.PowerUnknown {
		kind := event.VMPoweredOff
		if next.PowerState == inventory.PoweredOn {
			kind = event.VMPoweredOn
		}
		c.post(ctx, event.New{Type: kind, Target: "vm/" + old.Name, Args: map[string]string{"host": said.GetHost()}})
	}
	evaluate := old.CryptoState != next.CryptoState
	if !evaluate && !slices.Equal(keys, next.Keys()) {
		parts, err := c.inv.Parts(ctx, next) // it may wait for itself now, or not any more
		if err != nil {
			return err
		}
		evaluate = len(parts) > 0
	}
	if evaluate {
		return c.events.Evaluate(ctx, c.inv)
	}
	return nil
}
