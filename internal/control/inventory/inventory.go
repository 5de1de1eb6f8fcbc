// Package inventory is what the controller knows of the world: clusters, hosts,
// datastores, VMs with their disks, and key providers, as typed records with
// the invariants between them.
//
// Invariants, each kept by one transaction of the store:
//   - Names are unique per kind of object. A provider's name is never used for
//     other key material, not even after the provider was deleted.
//   - At most one provider is the default, and it exists. Deleting it leaves
//     none; the product never picks another.
//   - What refers to another object refers to one that exists and that fits: a
//     VM's host and datastore belong to its cluster.
//   - A disk has a key reference if and only if it is encrypted.
//
// It holds no key material, only addresses of keys. All methods are safe for
// concurrent use. The words are vSphere's.
package inventory

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// MaxName is the longest name of an object, in bytes.
const MaxName = 80

// Inventory gives access to the records. Use [New].
type Inventory struct {
	db         *store.DB
	clusters   *store.Table[Cluster]      // by id
	hosts      *store.Table[Host]         // by id
	datastores *store.Table[Datastore]    // by name
	vms        *store.Table[VM]           // by id
	providers  *store.Table[Provider]     // by name
	names      *store.Table[nameOwner]    // by kind "/" name; VM folders too
	burnt      *store.Table[providerName] // by name, for ever
	retired    *store.Table[Retired]      // by retiredKey
	kept       *store.Table[KeptVM]       // by folderKey
	alive      *store.Table[presence]     // by host id, bound to a lease
	now        func() time.Time
	controller []string // see [Inventory.NameController]

	mu     sync.Mutex              // guards leases
	leases map[string]*store.Lease // by host id
}

// nameOwner says which object has a name.
type nameOwner struct {
	ID string `json:"id"`
}

// New returns the inventory kept in db.
func New(db *store.DB) *Inventory {
	return &Inventory{
		db:         db,
		clusters:   store.NewTable[Cluster](db, "cluster", 1),
		hosts:      store.NewTable[Host](db, "host", 1),
		datastores: store.NewTable[Datastore](db, "datastore", 1),
		vms:        store.NewTable[VM](db, "vm", 1),
		providers:  store.NewTable[Provider](db, "provider", 3),
		names:      store.NewTable[nameOwner](db, "name", 1),
		burnt:      store.NewTable[providerName](db, "provider-name", 1),
		retired:    store.NewTable[Retired](db, "retired-key", 1),
		kept:       store.NewTable[KeptVM](db, "kept-vm", 1),
		alive:      store.NewTable[presence](db, "presence", 1),
		now:        func() time.Time { return time.Now().UTC() },
		leases:     map[string]*store.Lease{},
	}
}

// CheckName says why name cannot name an object, or nil: 1 to [MaxName] letters,
// digits, '.', '_' and '-', beginning with a letter or digit. Such a name is
// also safe as a folder and in a shell.
func CheckName(kind, name string) error {
	const alnum = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	ok := name != "" && len(name) <= MaxName
	for i, r := range name {
		ok = ok && (strings.ContainsRune(alnum, r) || i > 0 && strings.ContainsRune("._-", r))
	}
	if !ok {
		return errs.New(errs.Invalid, "%q is no name for a %s: it takes 1 to %d letters, digits, '.', '_' and '-', the first a letter or digit", name, kind, MaxName)
	}
	return nil
}

// claim gives name to the object id inside tx, or returns an Exists error.
func (inv *Inventory) claim(ctx context.Context, tx *store.Tx, kind, name, id string) error {
	if err := CheckName(kind, name); err != nil {
		return err
	}
	err := inv.names.In(tx).Create(ctx, kind+"/"+name, nameOwner{ID: id})
	if errors.Is(err, store.ErrExists) {
		return errs.New(errs.Exists, "%s %s exists already", kind, name)
	}
	return err
}

// release gives the name back.
func (inv *Inventory) release(ctx context.Context, tx *store.Tx, kind, name string) error {
	return inv.names.In(tx).Delete(ctx, kind+"/"+name)
}

// byName finds the record of t that has name.
func byName[T any](ctx context.Context, inv *Inventory, t *store.Table[T], kind, name string) (T, error) {
	var v T
	err := inv.db.View(ctx, func(tx *store.Tx) error {
		owner, err := inv.names.In(tx).Get(ctx, kind+"/"+name)
		if err != nil {
			return missing(err, kind, name)
		}
		v, err = t.In(tx).Get(ctx, owner.ID)
		return missing(err, kind, name)
	})
	return v, err
}

// missing turns the store's "not found" into the user's.
func missing(err error, kind, name string) error {
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) {
		return errs.New(errs.NotFound, "no %s %s", kind, name).WithHint("strongroom %s ls", kind)
	}
	return err
}

// Cluster is a group of hosts that share keys and datastores.
type Cluster struct {
	ID   string `json:"id"`   // UUID
	Name string `json:"name"` // immutable
	// DefaultProvider overrides the default key provider for this cluster; empty
	// means the default one.
	DefaultProvider string `json:"default_provider,omitempty"`
	// HostKey is the key that protects core dumps of the cluster's hosts.
	HostKey *KeyRef   `json:"host_key,omitempty"`
	Created time.Time `json:"created"`
}

// CreateCluster makes a cluster.
func (inv *Inventory) CreateCluster(ctx context.Context, name string) (Cluster, error) {
	c := Cluster{ID: newID(), Name: name, Created: inv.now()}
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		if err := inv.claim(ctx, tx, "cluster", name, c.ID); err != nil {
			return err
		}
		return inv.clusters.In(tx).Create(ctx, c.ID, c)
	})
	if err != nil {
		return Cluster{}, errs.Wrap(err, "cannot create cluster %s", name)
	}
	return c, nil
}

// Cluster returns the cluster called name.
func (inv *Inventory) Cluster(ctx context.Context, name string) (Cluster, error) {
	return byName(ctx, inv, inv.clusters, "cluster", name)
}

// ClusterByID returns the cluster with that id.
func (inv *Inventory) ClusterByID(ctx context.Context, id string) (Cluster, error) {
	c, err := inv.clusters.Get(ctx, id)
	return c, missing(err, "cluster", id)
}

// Clusters returns all clusters.
func (inv *Inventory) Clusters(ctx context.Context) ([]Cluster, error) { return inv.clusters.List(ctx) }

// SetClusterDefaultProvider makes provider the default for the VMs of a
// cluster; an empty provider leaves the choice to the default one.
func (inv *Inventory) SetClusterDefaultProvider(ctx context.Context, cluster, provider string) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		owner, err := inv.names.In(tx).Get(ctx, "cluster/"+cluster)
		if err != nil {
			return missing(err, "cluster", cluster)
		}
		c, err := inv.clusters.In(tx).Get(ctx, owner.ID)
		if err != nil {
			return err
		}
		if provider != "" {
			if _, err := inv.providers.In(tx).Get(ctx, provider); err != nil {
				return missing(err, "provider", provider)
			}
		}
		c.DefaultProvider = provider
		return inv.clusters.In(tx).Put(ctx, c.ID, c)
	})
	return errs.Wrap(err, "cannot set default provider of cluster %s", cluster)
}

// DeleteCluster removes a cluster that has no hosts, datastores or VMs.
func (inv *Inventory) DeleteCluster(ctx context.Context, name string) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		owner, err := inv.names.In(tx).Get(ctx, "cluster/"+name)
		if err != nil {
			return missing(err, "cluster", name)
		}
		hosts, err := inv.hosts.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, h := range hosts {
			if h.ClusterID == owner.ID {
				return inUse("cluster", name, "host "+h.Name)
			}
		}
		stores, err := inv.datastores.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, d := range stores {
			if d.ClusterID == owner.ID {
				return inUse("cluster", name, "datastore "+d.Name)
			}
		}
		vms, err := inv.vms.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, v := range vms {
			if v.ClusterID == owner.ID {
				return inUse("cluster", name, "VM "+v.Name)
			}
		}
		if err := inv.clusters.In(tx).Delete(ctx, owner.ID); err != nil {
			return err
		}
		return inv.release(ctx, tx, "cluster", name)
	})
	return errs.Wrap(err, "cannot delete cluster %s", name)
}

func inUse(kind, name, by string) error {
	return errs.New(errs.InvalidState, "%s %s still has %s", kind, name, by).WithReason("ResourceInUse")
}

// Datastore is a place for VM folders, on all hosts of a cluster.
type Datastore struct {
	Name      string    `json:"name"`           // immutable
	Type      string    `json:"type"`           // "dir"
	UUID      string    `json:"uuid,omitempty"` // of what is mounted there, to notice a wrong disk
	ClusterID string    `json:"cluster_id"`
	Path      string    `json:"path"`                 // absolute, on every host
	HostPaths HostPaths `json:"host_paths,omitempty"` // where a host has it elsewhere
	// CapacityBytes and FreeBytes are what a host last reported; 0 is unknown.
	CapacityBytes uint64    `json:"capacity_bytes,omitempty"`
	FreeBytes     uint64    `json:"free_bytes,omitempty"`
	Created       time.Time `json:"created"`
}

// HostPaths maps a host's id to a path.
type HostPaths map[string]string

// PathOn returns where host id has the datastore.
func (d Datastore) PathOn(hostID string) string {
	if p := d.HostPaths[hostID]; p != "" {
		return p
	}
	return d.Path
}

// CreateDatastore adds d, whose name, type, cluster and path are set. An empty
// UUID is filled in.
func (inv *Inventory) CreateDatastore(ctx context.Context, d Datastore) (Datastore, error) {
	if d.UUID == "" {
		d.UUID = newID()
	}
	d.Created = inv.now()
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		if err := CheckName("datastore", d.Name); err != nil {
			return err
		}
		if d.Type != "dir" {
			return errs.New(errs.Invalid, "no datastore type %q: it is \"dir\"", d.Type)
		}
		if !strings.HasPrefix(d.Path, "/") || strings.ContainsRune(d.Path, 0) || len(d.Path) > 4096 {
			return errs.New(errs.Invalid, "%q is no absolute path", d.Path)
		}
		if _, err := inv.clusters.In(tx).Get(ctx, d.ClusterID); err != nil {
			return missing(err, "cluster", d.ClusterID)
		}
		err := inv.datastores.In(tx).Create(ctx, d.Name, d)
		if errors.Is(err, store.ErrExists) {
			return errs.New(errs.Exists, "datastore %s exists already", d.Name)
		}
		return err
	})
	if err != nil {
		return Datastore{}, errs.Wrap(err, "cannot create datastore %s", d.Name)
	}
	return d, nil
}

// Datastore returns the datastore called name.
func (inv *Inventory) Datastore(ctx context.Context, name string) (Datastore, error) {
	d, err := inv.datastores.Get(ctx, name)
	return d, missing(err, "datastore", name)
}

// Datastores returns all datastores.
func (inv *Inventory) Datastores(ctx context.Context) ([]Datastore, error) {
	return inv.datastores.List(ctx)
}

// UpdateDatastore has f change the datastore; its name and cluster stay.
func (inv *Inventory) UpdateDatastore(ctx context.Context, name string, f func(*Datastore) error) (Datastore, error) {
	d, err := inv.datastores.Update(ctx, name, func(d *Datastore) error {
		before := *d
		if err := f(d); err != nil {
			return err
		}
		if d.Name != before.Name || d.ClusterID != before.ClusterID {
			return errs.New(errs.Invalid, "a datastore's name and cluster do not change")
		}
		return nil
	})
	return d, errs.Wrap(missing(err, "datastore", name), "cannot update datastore %s", name)
}

// DeleteDatastore removes a datastore that has no registered VMs. What is on it
// stays.
func (inv *Inventory) DeleteDatastore(ctx context.Context, name string) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		vms, err := inv.vms.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, v := range vms {
			if v.Datastore == name {
				return inUse("datastore", name, "VM "+v.Name)
			}
		}
		return missing(inv.datastores.In(tx).Delete(ctx, name), "datastore", name)
	})
	return errs.Wrap(err, "cannot delete datastore %s", name)
}

// describe is used in messages that list some of many.
func describe(names []string) string {
	const shown = 5
	if len(names) <= shown {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
}
