package inventory

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// KeyRef is the address of a KEK. The empty KeyRef is none.
type KeyRef struct {
	Provider string `json:"provider"`
	KeyID    string `json:"key_id"`
}

// PowerState of a VM.
type PowerState string

// The power states, as in vSphere; unknown while the host does not answer.
const (
	PoweredOff   PowerState = "poweredOff"
	PoweredOn    PowerState = "poweredOn"
	PowerUnknown PowerState = "unknown"
)

// CryptoState of a VM.
type CryptoState string

// The crypto states of a VM, as in vSphere.
const (
	Unlocked CryptoState = "unlocked"
	Locked   CryptoState = "locked" // a key cannot be had; nothing is lost
)

// DiskFormat is how a disk's file is written.
type DiskFormat string

// The formats of a disk.
const (
	Raw  DiskFormat = "raw"  // plain
	LUKS DiskFormat = "luks" // encrypted
)

// Disk is one virtual disk of a VM.
type Disk struct {
	Name           string     `json:"name"` // "disk-0", unique in its VM
	File           string     `json:"file"` // in the VM's folder
	Format         DiskFormat `json:"format"`
	SizeBytes      int64      `json:"size_bytes"`                // of the guest's disk
	AllocatedBytes int64      `json:"allocated_bytes,omitempty"` // on the datastore
	// Key is the KEK that wraps the disk's DEK: set if and only if Format is LUKS.
	Key        *KeyRef `json:"key,omitempty"`
	UUID       string  `json:"uuid,omitempty"`       // of the LUKS volume
	Generation uint64  `json:"generation,omitempty"` // of the key safe
	Cipher     string  `json:"cipher,omitempty"`
	Thin       bool    `json:"thin,omitempty"` // dm-crypt may not open it before it is filled
	// Interface is how the running guest reaches it; empty while powered off.
	Interface string `json:"interface,omitempty"`
	// Rekey is set while a deep rekey is under way: the disk needs both keys.
	Rekey *DiskRekey `json:"rekey,omitempty"`
	// Encryption is set while an encryption in place is not finished: the VM cannot
	// be powered on.
	Encryption *DiskEncryption `json:"encryption,omitempty"`
}

// DiskEncryption is how far the encryption in place of a disk has come.
type DiskEncryption struct {
	DoneBytes  int64 `json:"done_bytes"`
	TotalBytes int64 `json:"total_bytes"`
}

// DiskRekey is how far the deep rekey of a disk has come.
type DiskRekey struct {
	Key        KeyRef `json:"key"` // the KEK that wraps its next DEK
	DoneBytes  int64  `json:"done_bytes"`
	TotalBytes int64  `json:"total_bytes"`
}

// Settings of a VM's virtual hardware.
type Settings struct {
	CPUs      uint32 `json:"cpus"`
	MemoryMiB uint32 `json:"memory_mib"`
	Machine   string `json:"machine,omitempty"`
	Firmware  string `json:"firmware,omitempty"`
	Kernel    string `json:"kernel,omitempty"`
	Initrd    string `json:"initrd,omitempty"`
	Append    string `json:"append,omitempty"`
	Network   string `json:"network,omitempty"`
	// DiskInterface is "vhost-user", "nbd", or "auto": what works on the host.
	DiskInterface string `json:"disk_interface,omitempty"`
}

// VM is a registered virtual machine. Its folder on the datastore is the truth;
// this is what the host last said about it.
type VM struct {
	ID          string      `json:"id"`   // UUID, also in its vm.json
	Name        string      `json:"name"` // immutable
	ClusterID   string      `json:"cluster_id"`
	HostID      string      `json:"host_id"`
	Datastore   string      `json:"datastore"`
	Folder      string      `json:"folder"`
	PowerState  PowerState  `json:"power_state"`
	CryptoState CryptoState `json:"crypto_state"`
	// LockReason says why it is locked: which provider and key is wanted. Empty
	// if it is not.
	LockReason string `json:"lock_reason,omitempty"`
	// Key is the VM's own KEK (config.keyId in vSphere); nil if it has none.
	Key      *KeyRef   `json:"key,omitempty"`
	Disks    []Disk    `json:"disks,omitempty"`
	Settings Settings  `json:"settings"`
	Created  time.Time `json:"created"`
	// Snapshots are in an order in which each comes after its parent.
	Snapshots []Snapshot `json:"snapshots,omitempty"`
	// Snapshot is the id of the one that the disks come from; empty if of none.
	Snapshot string `json:"snapshot,omitempty"`
	// ConsolidationNeeded says that its folder has files of snapshots that it does
	// not have.
	ConsolidationNeeded bool `json:"consolidation_needed,omitempty"`
	// Runs are the parts of this site that people said it runs, sorted: a fact about
	// the site, so it is not in the VM's folder.
	Runs []string `json:"runs,omitempty"`
}

// Encrypted reports whether the VM or a disk of it has a key.
func (v VM) Encrypted() bool {
	return v.Key != nil || slices.ContainsFunc(v.Disks, func(d Disk) bool { return d.Key != nil })
}

// Keys returns each key that the VM and its snapshots need, once.
func (v VM) Keys() []KeyRef {
	var refs []KeyRef
	seen := map[KeyRef]bool{} // a host may tell of as many as it likes
	for _, u := range v.keyUsers() {
		if !seen[u.Key] {
			seen[u.Key] = true
			refs = append(refs, u.Key)
		}
	}
	return refs
}

// RunKeys returns each key that the VM needs to run, once: not those that only
// its snapshots need.
func (v VM) RunKeys() []KeyRef {
	v.Snapshots = nil
	return v.Keys()
}

// KeyUser is one object that needs a key: a VM itself (Disk empty), a disk, or
// that disk in a snapshot.
type KeyUser struct {
	VMID     string
	VM       string
	HostID   string
	Disk     string
	Snapshot string // its name; empty: none
	Key      KeyRef
}

func (v VM) keyUsers() []KeyUser {
	var users []KeyUser
	if v.Key != nil {
		users = append(users, KeyUser{VMID: v.ID, VM: v.Name, HostID: v.HostID, Key: *v.Key})
	}
	users = append(users, v.diskUsers(v.Disks, "")...)
	for _, s := range v.Snapshots {
		users = append(users, v.diskUsers(s.Disks, s.Name)...)
	}
	return users
}

// maxDisks is QEMU's comfortable number of virtio disks; vSphere has 60 a
// controller.
const maxDisks = 60

func checkVM(v VM) error {
	if v.ID == "" || v.Folder == "" || strings.ContainsAny(v.Folder, "/\x00") || v.Folder == "." || v.Folder == ".." {
		return errs.New(errs.Invalid, "a VM needs an id and a folder's name")
	}
	switch v.PowerState {
	case PoweredOff, PoweredOn, PowerUnknown:
	default:
		return errs.New(errs.Invalid, "no power state %q", v.PowerState)
	}
	switch {
	case v.CryptoState == Unlocked && v.LockReason == "":
	case v.CryptoState == Locked && v.LockReason != "":
	default:
		return errs.New(errs.Invalid, "crypto state %q with reason %q: a locked VM has a reason, another none", v.CryptoState, v.LockReason)
	}
	if v.Key != nil && (v.Key.Provider == "" || v.Key.KeyID == "") {
		return errs.New(errs.Invalid, "the VM's key has no provider or no id")
	}
	if len(v.Disks) > maxDisks {
		return errs.New(errs.Invalid, "%d disks, at most %d", len(v.Disks), maxDisks)
	}
	seen := map[string]bool{}
	for _, d := range v.Disks {
		if d.Name == "" || seen[d.Name] {
			return errs.New(errs.Invalid, "disk name %q is empty or there twice", d.Name)
		}
		seen[d.Name] = true
		switch {
		case d.Format == Raw && d.Key == nil:
		case d.Format == LUKS && d.Key != nil && d.Key.Provider != "" && d.Key.KeyID != "":
		default:
			return errs.New(errs.Invalid, "disk %s has format %q and key %+v: an encrypted disk has a key, a plain one none", d.Name, d.Format, d.Key)
		}
		if r := d.Rekey; r != nil && (d.Key == nil || r.Key.Provider == "" || r.Key.KeyID == "") {
			return errs.New(errs.Invalid, "disk %s has a rekey under way, and not two keys", d.Name)
		}
		if d.SizeBytes < 0 || d.AllocatedBytes < 0 {
			return errs.New(errs.Invalid, "disk %s has a negative size", d.Name)
		}
	}
	return checkSnapshots(v)
}

// CreateVM registers v. An empty id is filled in, as are empty states: powered
// off, unlocked.
func (inv *Inventory) CreateVM(ctx context.Context, v VM) (VM, error) {
	if v.ID == "" {
		v.ID = newID()
	}
	if v.PowerState == "" {
		v.PowerState = PoweredOff
	}
	if v.CryptoState == "" {
		v.CryptoState = Unlocked
	}
	if v.Created.IsZero() {
		v.Created = inv.now()
	}
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		if err := checkVM(v); err != nil {
			return err
		}
		if err := inv.checkPlace(ctx, tx, v); err != nil {
			return err
		}
		if err := inv.claimFolder(ctx, tx, v); err != nil {
			return err
		}
		if err := inv.claim(ctx, tx, "vm", v.Name, v.ID); err != nil {
			return err
		}
		err := inv.vms.In(tx).Create(ctx, v.ID, v)
		if errors.Is(err, store.ErrExists) {
			return errs.New(errs.Exists, "a VM with id %s is registered already", v.ID)
		}
		if err != nil {
			return err
		}
		return inv.unkeep(ctx, tx, v)
	})
	if err != nil {
		return VM{}, errs.Wrap(err, "cannot register VM %s", v.Name)
	}
	return v, nil
}

func folderKey(v VM) string { return "folder/" + v.Datastore + "/" + v.Folder }

// claimFolder sees to it that a folder is registered once: two VMs on one
// folder would write the same disks.
func (inv *Inventory) claimFolder(ctx context.Context, tx *store.Tx, v VM) error {
	err := inv.names.In(tx).Create(ctx, folderKey(v), nameOwner{ID: v.ID})
	if errors.Is(err, store.ErrExists) {
		return errs.New(errs.Exists, "folder %s on datastore %s is registered already", v.Folder, v.Datastore)
	}
	return err
}

// checkPlace checks that cluster, host and datastore exist and fit.
func (inv *Inventory) checkPlace(ctx context.Context, tx *store.Tx, v VM) error {
	if _, err := inv.clusters.In(tx).Get(ctx, v.ClusterID); err != nil {
		return missing(err, "cluster", v.ClusterID)
	}
	h, err := inv.hosts.In(tx).Get(ctx, v.HostID)
	if err != nil {
		return missing(err, "host", v.HostID)
	}
	d, err := inv.datastores.In(tx).Get(ctx, v.Datastore)
	if err != nil {
		return missing(err, "datastore", v.Datastore)
	}
	switch {
	case h.ClusterID != v.ClusterID:
		return errs.New(errs.Invalid, "host %s is not in the VM's cluster", h.Name)
	case d.ClusterID != v.ClusterID:
		return errs.New(errs.Invalid, "datastore %s is not in the VM's cluster", d.Name)
	}
	return nil
}

// VM returns the VM called name.
func (inv *Inventory) VM(ctx context.Context, name string) (VM, error) {
	return byName(ctx, inv, inv.vms, "vm", name)
}

// VMByID returns the VM with that id.
func (inv *Inventory) VMByID(ctx context.Context, id string) (VM, error) {
	v, err := inv.vms.Get(ctx, id)
	return v, missing(err, "vm", id)
}

// VMs returns all VMs, or those on the host with id hostID if it is not empty.
func (inv *Inventory) VMs(ctx context.Context, hostID string) ([]VM, error) {
	vms, err := inv.vms.List(ctx)
	if hostID != "" {
		vms = slices.DeleteFunc(vms, func(v VM) bool { return v.HostID != hostID })
	}
	return vms, err
}

// UpdateVM has f change the VM with that id; f may run more than once. Its id
// and name stay.
func (inv *Inventory) UpdateVM(ctx context.Context, id string, f func(*VM) error) (VM, error) {
	var out VM
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		v, err := inv.vms.In(tx).Get(ctx, id)
		if err != nil {
			return missing(err, "vm", id)
		}
		before, keys := v, v.Keys() // f may change what before shares with v
		if err := f(&v); err != nil {
			return err
		}
		if v.ID != before.ID || v.Name != before.Name {
			return errs.New(errs.Invalid, "a VM's id and name do not change")
		}
		if err := checkVM(v); err != nil {
			return err
		}
		if v.ClusterID != before.ClusterID || v.HostID != before.HostID || v.Datastore != before.Datastore {
			if err := inv.checkPlace(ctx, tx, v); err != nil {
				return err
			}
		}
		if folderKey(v) != folderKey(before) {
			if err := inv.names.In(tx).Delete(ctx, folderKey(before)); err != nil {
				return err
			}
			if err := inv.claimFolder(ctx, tx, v); err != nil {
				return err
			}
		}
		if err := inv.retireDropped(ctx, tx, v, keys); err != nil {
			return err
		}
		out = v
		return inv.vms.In(tx).Put(ctx, id, v)
	})
	if err != nil {
		return VM{}, errs.Wrap(err, "cannot update VM %s", id)
	}
	return out, nil
}

// DeleteVM forgets the VM with that id, whose folder is gone. Forgetting a VM
// that is not there is no error.
func (inv *Inventory) DeleteVM(ctx context.Context, id string) error {
	return errs.Wrap(inv.removeVM(ctx, id, false), "cannot delete VM %s", id)
}

// removeVM removes a VM's record; keep says that its folder is still there.
func (inv *Inventory) removeVM(ctx context.Context, id string, keep bool) error {
	return inv.db.Txn(ctx, func(tx *store.Tx) error {
		v, err := inv.vms.In(tx).Get(ctx, id)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		keys := v.Keys()
		if err := inv.retire(ctx, tx, v.Name, keys); err != nil {
			return err
		}
		if keep && len(keys) > 0 {
			if err := inv.keep(ctx, tx, v, keys); err != nil {
				return err
			}
		}
		if err := inv.vms.In(tx).Delete(ctx, id); err != nil {
			return err
		}
		if err := inv.names.In(tx).Delete(ctx, folderKey(v)); err != nil {
			return err
		}
		return inv.release(ctx, tx, "vm", v.Name)
	})
}
