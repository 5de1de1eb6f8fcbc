package inventory

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// HostState is whether the controller hears from a host.
type HostState string

// The states of a host's connection, as in vSphere.
const (
	Connected     HostState = "connected"
	Disconnected  HostState = "disconnected"  // taken out of service by an operator
	NotResponding HostState = "notResponding" // it should be there, and is not
)

// HostCryptoState is a host's readiness for encryption.
type HostCryptoState string

// The crypto states of a host, as in vSphere.
const (
	HostIncapable HostCryptoState = "incapable"
	HostPrepared  HostCryptoState = "prepared"
	HostSafe      HostCryptoState = "safe"
)

// HeldKey names a provider whose key a host said it holds.
type HeldKey struct {
	Provider string `json:"provider"`
	KeyID    string `json:"key_id"`
}

// Host is a machine that runs VMs.
type Host struct {
	ID          string          `json:"id"`   // UUID, in its certificate
	Name        string          `json:"name"` // immutable
	Address     string          `json:"address"`
	ClusterID   string          `json:"cluster_id"`
	State       HostState       `json:"state"`
	CryptoState HostCryptoState `json:"crypto_state"`
	Version     string          `json:"version,omitempty"`
	BootID      string          `json:"boot_id,omitempty"`
	// Instance is this start of its agent: KEKs in memory are gone with it.
	Instance string `json:"instance,omitempty"`
	// Capabilities by vSphere's names: "cryptoSupported", "tpmSupported", ...
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	// ParcelPublicKey is the HPKE public key that provider keys are sealed to.
	ParcelPublicKey []byte    `json:"parcel_public_key,omitempty"`
	Held            []HeldKey `json:"held,omitempty"`
	// LastSeen is when the host was last heard of, to about a minute.
	LastSeen time.Time `json:"last_seen"`
	Joined   time.Time `json:"joined"`
}

// CapabilityTPM is the capability that a provider with TPMRequired asks for.
const CapabilityTPM = "tpmSupported"

// Holds reports whether the host said that it holds the provider's key.
func (h Host) Holds(provider, keyID string) bool {
	return slices.Contains(h.Held, HeldKey{Provider: provider, KeyID: keyID})
}

func newID() string { return uuid.Must(uuid.NewRandom()).String() }

// AddHost adds h, whose name, cluster, address and keys are set. An empty id is
// filled in; a certificate issued before has it already. An empty state is
// [NotResponding]: the first heartbeat makes it connected.
func (inv *Inventory) AddHost(ctx context.Context, h Host) (Host, error) {
	if h.ID == "" {
		h.ID = newID()
	}
	if h.State == "" {
		h.State = NotResponding
	}
	if h.CryptoState == "" {
		h.CryptoState = HostIncapable
	}
	h.Joined = inv.now()
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		if err := checkHost(h); err != nil {
			return err
		}
		if _, err := inv.clusters.In(tx).Get(ctx, h.ClusterID); err != nil {
			return missing(err, "cluster", h.ClusterID)
		}
		if err := inv.claim(ctx, tx, "host", h.Name, h.ID); err != nil {
			return err
		}
		return inv.hosts.In(tx).Create(ctx, h.ID, h)
	})
	if err != nil {
		return Host{}, errs.Wrap(err, "cannot add host %s", h.Name)
	}
	return h, nil
}

func checkHost(h Host) error {
	switch h.State {
	case Connected, Disconnected, NotResponding:
	default:
		return errs.New(errs.Invalid, "no host state %q", h.State)
	}
	switch h.CryptoState {
	case HostIncapable, HostPrepared, HostSafe:
	default:
		return errs.New(errs.Invalid, "no host crypto state %q", h.CryptoState)
	}
	return nil
}

// Host returns the host called name.
func (inv *Inventory) Host(ctx context.Context, name string) (Host, error) {
	return byName(ctx, inv, inv.hosts, "host", name)
}

// HostByID returns the host with that id.
func (inv *Inventory) HostByID(ctx context.Context, id string) (Host, error) {
	h, err := inv.hosts.Get(ctx, id)
	return h, missing(err, "host", id)
}

// Hosts returns all hosts, or those of the cluster with id clusterID if it is
// not empty.
func (inv *Inventory) Hosts(ctx context.Context, clusterID string) ([]Host, error) {
	hosts, err := inv.hosts.List(ctx)
	if clusterID != "" {
		hosts = slices.DeleteFunc(hosts, func(h Host) bool { return h.ClusterID != clusterID })
	}
	return hosts, err
}

// UpdateHost has f change the host with that id; f may run more than once. Its
// id, name and cluster stay.
func (inv *Inventory) UpdateHost(ctx context.Context, id string, f func(*Host) error) (Host, error) {
	h, err := inv.hosts.Update(ctx, id, func(h *Host) error {
		before := *h
		if err := f(h); err != nil {
			return err
		}
		if h.ID != before.ID || h.Name != before.Name || h.ClusterID != before.ClusterID {
			return errs.New(errs.Invalid, "a host's id, name and cluster do not change")
		}
		return checkHost(*h)
	})
	return h, errs.Wrap(missing(err, "host", id), "cannot update host %s", id)
}

// DeleteHost removes the host called name, which must have no registered VMs.
func (inv *Inventory) DeleteHost(ctx context.Context, name string) error {
	var id string
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		owner, err := inv.names.In(tx).Get(ctx, "host/"+name)
		if err != nil {
			return missing(err, "host", name)
		}
		id = owner.ID
		vms, err := inv.vms.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, v := range vms {
			if v.HostID == id {
				return inUse("host", name, "VM "+v.Name)
			}
		}
		if err := inv.hosts.In(tx).Delete(ctx, id); err != nil {
			return err
		}
		return inv.release(ctx, tx, "host", name)
	})
	if err == nil {
		err = inv.forget(ctx, id)
	}
	return errs.Wrap(err, "cannot remove host %s", name)
}

// presence is a sign of life that ends by itself.
type presence struct{}

// seenEvery is how exact Host.LastSeen is: a heartbeat must not cost a write.
const seenEvery = time.Minute

// Beat notes that the host with that id is alive, for ttl from now (at least a
// second), and has it [Connected] if it was [NotResponding].
func (inv *Inventory) Beat(ctx context.Context, id string, ttl time.Duration) error {
	h, err := inv.HostByID(ctx, id)
	if err != nil {
		return err
	}
	if err := inv.renew(ctx, id, ttl); err != nil {
		return errs.Wrap(err, "cannot note heartbeat of host %s", h.Name)
	}
	now := inv.now()
	if h.State != NotResponding && now.Sub(h.LastSeen) < seenEvery {
		return nil
	}
	_, err = inv.UpdateHost(ctx, id, func(h *Host) error {
		if h.State == NotResponding {
			h.State = Connected
		}
		h.LastSeen = now
		return nil
	})
	return err
}

func (inv *Inventory) renew(ctx context.Context, id string, ttl time.Duration) error {
	inv.mu.Lock()
	l := inv.leases[id]
	inv.mu.Unlock()
	if l != nil {
		err := l.Renew(ctx)
		if !errors.Is(err, store.ErrLeaseExpired) {
			return err
		}
	}
	l, err := inv.db.NewLease(ctx, ttl)
	if err != nil {
		return err
	}
	if err := inv.alive.PutLeased(ctx, id, presence{}, l); err != nil {
		return err
	}
	inv.mu.Lock()
	inv.leases[id] = l
	inv.mu.Unlock()
	return nil
}

func (inv *Inventory) forget(ctx context.Context, id string) error {
	inv.mu.Lock()
	l := inv.leases[id]
	delete(inv.leases, id)
	inv.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.Revoke(ctx)
}

// Sweep makes [NotResponding] each connected host whose last [Inventory.Beat]
// ran out, and returns those.
func (inv *Inventory) Sweep(ctx context.Context) ([]Host, error) {
	hosts, err := inv.hosts.List(ctx)
	if err != nil {
		return nil, errs.Wrap(err, "cannot look for lost hosts")
	}
	var lost []Host
	for _, h := range hosts {
		if h.State != Connected {
			continue
		}
		changed := false
		err := inv.db.Txn(ctx, func(tx *store.Tx) error {
			changed = false
			alive, err := inv.alive.In(tx).Has(ctx, h.ID)
			if err != nil || alive {
				return err
			}
			now, err := inv.hosts.In(tx).Get(ctx, h.ID)
			if errors.Is(err, store.ErrNotFound) {
				return nil
			}
			if err != nil || now.State != Connected {
				return err
			}
			now.State = NotResponding
			h, changed = now, true
			return inv.hosts.In(tx).Put(ctx, h.ID, now)
		})
		if err != nil {
			return lost, errs.Wrap(err, "cannot look for lost hosts")
		}
		if changed {
			lost = append(lost, h)
		}
	}
	return lost, nil
}
