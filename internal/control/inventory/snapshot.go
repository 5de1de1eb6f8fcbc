package inventory

import (
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"strongroom/internal/errs"
)

// Snapshot is a VM's disks and settings as they were at a time.
type Snapshot struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"` // unique in its VM
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	// Parent is the id of the snapshot that the disks then came from; empty if of
	// none.
	Parent   string   `json:"parent,omitempty"`
	Settings Settings `json:"settings"`
	// Disks have the keys that they need now. That of an encrypted one is nil if it
	// was never known.
	Disks []Disk `json:"disks,omitempty"`
	// LockReason says why the VM cannot be reverted to it now; empty if it can.
	LockReason string `json:"lock_reason,omitempty"`
}

// FindSnapshot returns the snapshot of that name, or an error of kind
// [errs.NotFound].
func (v VM) FindSnapshot(name string) (Snapshot, error) {
	i := slices.IndexFunc(v.Snapshots, func(s Snapshot) bool { return s.Name == name })
	if i < 0 {
		return Snapshot{}, errs.New(errs.NotFound, "VM %s has no snapshot %q", v.Name, name).WithHint("strongroom vm snapshot ls %s", v.Name)
	}
	return v.Snapshots[i], nil
}

// descriptionMax is the longest description of a snapshot, in bytes.
const descriptionMax = 1024

// CheckSnapshot returns an error of kind [errs.Invalid] unless name and
// description can be those of a snapshot.
func CheckSnapshot(name, description string) error {
	if err := CheckName("snapshot", name); err != nil {
		return err
	}
	bad := func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }
	if len(description) > descriptionMax || strings.ContainsFunc(description, bad) {
		return errs.New(errs.Invalid, "the description of a snapshot is one line of at most %d bytes of printable characters", descriptionMax)
	}
	return nil
}

// checkSnapshots is the part of checkVM that is about snapshots.
func checkSnapshots(v VM) error {
	ids, names := map[string]bool{"": true}, map[string]bool{"": true}
	for _, s := range v.Snapshots {
		switch {
		case ids[s.ID] || names[s.Name]:
			return errs.New(errs.Invalid, "snapshot %q has no id or name of its own", s.Name)
		case !ids[s.Parent]:
			return errs.New(errs.Invalid, "snapshot %s comes before its parent", s.Name)
		}
		for _, d := range s.Disks {
			if d.Format == Raw && d.Key != nil || d.Format != Raw && d.Format != LUKS || d.SizeBytes < 0 || d.AllocatedBytes < 0 {
				return errs.New(errs.Invalid, "disk %s of snapshot %s has format %q, key %+v and %d bytes", d.Name, s.Name, d.Format, d.Key, d.SizeBytes)
			}
		}
		ids[s.ID], names[s.Name] = true, true
	}
	if !ids[v.Snapshot] {
		return errs.New(errs.Invalid, "the disks come from snapshot %q, which is not there", v.Snapshot)
	}
	return nil
}

// diskUsers returns the uses of keys by disks of the VM, or of the snapshot of
// that name.
func (v VM) diskUsers(disks []Disk, snapshot string) []KeyUser {
	var users []KeyUser
	for _, d := range disks {
		u := KeyUser{VMID: v.ID, VM: v.Name, HostID: v.HostID, Disk: d.Name, Snapshot: snapshot}
		if d.Key != nil {
			u.Key = *d.Key
			users = append(users, u)
		}
		if d.Rekey != nil {
			u.Key = d.Rekey.Key
			users = append(users, u)
		}
	}
	return users
}
