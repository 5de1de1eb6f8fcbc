package controller

import (
	"context"
	"slices"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// What settings say of a standard provider's keys.
const (
	keysPerVM    = "per-vm"
	keysWrapping = "wrapping"
	rotateNever  = -1 // days
)

// checkKeys checks what settings say of the keys of a provider that is as w says.
func checkKeys(w *inventory.Wrapping, s *strongroomv1.StandardSettings) error {
	on := w.On()
	switch s.GetKeys() {
	case "":
	case keysPerVM:
		on = false
	case keysWrapping:
		on = true
	default:
		return errs.New(errs.Invalid, "%.32q is no choice of keys: it is %s or %s", s.GetKeys(), keysPerVM, keysWrapping)
	}
	switch days := s.GetRotateDays(); {
	case days == 0:
	case !on:
		return errs.New(errs.Invalid, "only a wrapping key is rotated at intervals").WithHint("add --wrapping-key")
	case days != rotateNever && (days < inventory.RotateDaysMin || days > inventory.RotateDaysMax):
		return errs.New(errs.Invalid, "a wrapping key is rotated every %d to %d days, not %d", inventory.RotateDaysMin, inventory.RotateDaysMax, days)
	}
	return nil
}

// applyKeys does what settings, which were checked, say of a provider's keys.
func (c *Controller) applyKeys(s *inventory.Standard, settings *strongroomv1.StandardSettings) error {
	if err := checkKeys(s.Wrapping, settings); err != nil { // it may be another one by now
		return err
	}
	switch settings.GetKeys() {
	case keysWrapping:
		if s.Wrapping == nil {
			s.Wrapping = &inventory.Wrapping{}
		}
		s.Wrapping.Off = false
	case keysPerVM:
		if s.Wrapping.On() {
			if err := s.Wrapping.Turn(nil, c.now().UTC()); err != nil {
				return err
			}
			s.Wrapping.Off = true
		}
	}
	switch days := settings.GetRotateDays(); {
	case days == rotateNever:
		s.Wrapping.RotateDays = 0
	case days > 0:
		s.Wrapping.RotateDays = uint32(days)
	}
	return nil
}

// wrappingToAPI tells of a provider's wrapping keys, of which users need some.
func (c *Controller) wrappingToAPI(ctx context.Context, p inventory.Provider, users []inventory.KeyUser) (*strongroomv1.Wrapping, error) {
	w := p.Standard.Wrapping
	vms := map[string]map[string]bool{} // by key id, the ids of VMs
	for _, u := range users {
		if vms[u.Key.KeyID] == nil {
			vms[u.Key.KeyID] = map[string]bool{}
		}
		vms[u.Key.KeyID][u.VMID] = true
	}
	key := func(k inventory.WrappingKey) *strongroomv1.WrappingKey {
		return &strongroomv1.WrappingKey{
			KeyId: k.KeyID, Made: stamp(k.Made), Replaced: stamp(k.Replaced), Ended: stamp(k.Ended), Vms: uint32(len(vms[k.KeyID])),
		}
	}
	out := &strongroomv1.Wrapping{On: w.On(), RotateDays: w.RotateDays, NextRotation: stamp(w.Next()), Problem: w.Problem}
	if w.Current != nil {
		out.Current = key(*w.Current)
	}
	for _, k := range w.Replaced {
		out.Replaced = append(out.Replaced, key(k))
	}
	all, err := c.inv.VMs(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, v := range all {
		if len(w.Strays(p.Name, v)) > 0 {
			out.VmsToFollow++
		}
	}
	return out, nil
}

// notShared returns an error if a shallow rekey of those disks would change
// nothing, because the key that it would give them is the one that they have.
func (c *Controller) notShared(ctx context.Context, args vmArgs, v inventory.VM, chosen []inventory.Disk) error {
	if args.Deep || args.NewKeyOf == "" {
		return nil
	}
	p, err := c.inv.Provider(ctx, args.NewKeyOf)
	if err != nil || p.Standard == nil || !p.Standard.Wrapping.On() || p.Standard.Wrapping.Current == nil {
		return err
	}
	has := func(k *inventory.KeyRef) bool {
		return k == nil || k.Provider == p.Name && k.KeyID == p.Standard.Wrapping.Current.KeyID
	}
	if len(args.Disks) == 0 && (!has(v.Key) || len(p.Standard.Wrapping.Strays(p.Name, v)) > 0) || slices.ContainsFunc(chosen, func(d inventory.Disk) bool { return !has(d.Key) }) {
		return nil
	}
	return errs.New(errs.InvalidState, "VM %s has the wrapping key of key provider %s, which all its VMs share, already", v.Name, p.Name).
		WithReason("WrappingKeyInUse").WithHint("for a new wrapping key: strongroom provider rotate %s; for a new data key: strongroom vm rekey %s --deep", p.Name, v.Name)
}
