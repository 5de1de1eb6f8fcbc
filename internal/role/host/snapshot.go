package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/blockdev"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// Snapshots: docs/spec/vm-folder.md.

// createSnapshot keeps the disks and settings of a VM, in any power state: of one
// that runs, what its disks hold at one moment. A call that is repeated is known by
// the snapshot's id.
func (h *Host) createSnapshot(ctx context.Context, req *strongroomv1.AgentCreateSnapshotRequest, r report) error {
	s := bundle.Snapshot{
		ID: req.GetSnapshotId(), Name: req.GetSnapshot(), Description: req.GetDescription(), Created: time.Now().UTC().Truncate(time.Second),
	}
	return h.changing(ctx, req.GetId(), func(o *offline) error {
		if o.vm.FindSnapshot(s.ID) != nil {
			return nil
		}
		return errs.Wrap(h.takeSnapshot(ctx, o, s, r), "cannot make snapshot %s of VM %s", s.Name, o.vm.Name)
	})
}

func (h *Host) takeSnapshot(ctx context.Context, o *offline, s bundle.Snapshot, r report) error {
	if err := o.freeName(s); err != nil {
		return err
	}
	s.Parent, s.Settings, s.Disks = o.vm.Snapshot, o.vm.Settings, slices.Clone(o.vm.Disks)
	for i, d := range s.Disks {
		s.Disks[i].File = bundle.SnapshotFile(s.ID, d.Name, d.Format)
	}
	next := o.vm.Clone()
	next.Snapshots, next.Snapshot = append(next.Snapshots, s), s.ID
	if err := o.notRekeying(nil); err != nil {
		return err
	}
	if err := next.Validate(); err != nil {
		return err
	}
	if err := h.copyDisks(ctx, o, s.Disks, o.vm.Disks, next, "copying", r); err != nil {
		return err
	}
	h.log.LogAttrs(ctx, slog.LevelInfo, "snapshot made", slog.String("vm", o.vm.Name), slog.String("snapshot", s.Name), slog.Bool("live", o.running != nil))
	return nil
}

// revertToSnapshot gives a VM that is powered off the disks and settings of a
// snapshot. A call that is repeated is known by the revert's id.
func (h *Host) revertToSnapshot(ctx context.Context, id, snapshotID, revertID string, r report) error {
	o, err := h.takeOffline(ctx, id, "a revert to a snapshot")
	if err != nil {
		return err
	}
	defer o.release()
	s := o.vm.FindSnapshot(snapshotID)
	if s == nil {
		return errs.New(errs.NotFound, "VM %s has no snapshot with id %.64q", o.vm.Name, snapshotID).WithHint("strongroom vm snapshot ls %s", o.vm.Name)
	}
	if !bundle.ValidID(revertID) {
		return errs.New(errs.Invalid, "id %.64q of a revert is not a UUID", revertID)
	}
	return errs.Wrap(h.revert(ctx, o, *s, revertID, r), "cannot revert VM %s to snapshot %s", o.vm.Name, s.Name)
}

func (h *Host) revert(ctx context.Context, o *offline, s bundle.Snapshot, id string, r report) error {
	next := o.vm.Clone()
	next.Disks, next.Settings, next.Snapshot = slices.Clone(s.Disks), s.Settings, s.ID
	for i, d := range next.Disks {
		next.Disks[i].File = bundle.RevertedFile(id, d.Name, d.Format)
	}
	if len(next.Disks) > 0 && o.vm.HasFile(next.Disks[0].File) {
		return nil // done by an earlier call
	}
	for _, d := range o.vm.Disks {
		next.Retired = append(next.Retired, d.File)
	}
	var err error
	if next.Key, err = keyAfterRevert(o, s); err != nil {
		return err
	}
	if err := next.Validate(); err != nil {
		return err
	}
	if err := h.copyDisks(ctx, o, next.Disks, s.Disks, next, "reverting", r); err != nil {
		return err
	}
	h.log.LogAttrs(ctx, slog.LevelInfo, "VM reverted", slog.String("vm", o.vm.Name), slog.String("snapshot", s.Name))
	o.vm, err = sweep(o.dir, o.vm)
	return err
}

// keyAfterRevert is the VM's KEK once it has the disks of a snapshot: the one that
// it has, if they need one at all.
func keyAfterRevert(o *offline, s bundle.Snapshot) (*bundle.Key, error) {
	i := slices.IndexFunc(s.Disks, func(d bundle.Disk) bool { return d.Format == bundle.FormatLUKS })
	switch {
	case i < 0:
		return nil, nil
	case o.vm.Key != nil:
		return o.vm.Key, nil
	}
	_, safes, err := recrypt.Inspect(o.folder(), s.Disks[i].File)
	if err != nil {
		return nil, errs.Wrap(err, "%s", s.Disks[i].Name)
	}
	return bundle.KeyOf(safes.Current.KEK), nil
}

// copyDisks makes the files of the disks to as copies of those of the disks from,
// and then the VM what next says. After an error vm.json is as it was, and the
// copies are gone, or it is as next says.
func (h *Host) copyDisks(ctx context.Context, o *offline, to, from []bundle.Disk, next *bundle.VM, verb string, r report) error {
	err := h.makeCopies(ctx, o, to, from, verb, r)
	if err == nil {
		err = bundle.Write(o.dir, next)
	}
	if err == nil {
		o.vm = next
		return nil
	}
	// What failed may have been done nevertheless, and then the files count.
	now, readErr := bundle.Read(o.dir)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	for _, d := range to {
		if !now.Names(d.File) {
			err = errors.Join(err, o.folder().Remove(d.File))
		}
	}
	return err
}

// makeCopies is the first half of copyDisks.
func (h *Host) makeCopies(ctx context.Context, o *offline, to, from []bundle.Disk, verb string, r report) error {
	p := &disksProgress{report: r}
	for _, d := range from {
		p.total += writtenAndVerified * d.SizeBytes
	}
	if o.running != nil {
		p.report(verb+" the disks", 0, p.total, unitBytes)
		var disks []recrypt.Original
		for i, d := range from {
			disks = append(disks, recrypt.Original{To: to[i].File, From: d.File, Encrypted: d.Format == bundle.FormatLUKS})
		}
		return h.copyRunning(ctx, o, o.folder(), disks)
	}
	for i, d := range from {
		share := writtenAndVerified * d.SizeBytes
		add, done := p.disk(verb+" "+d.Name, share)
		progress := func(done, total int64) { // of the file, which may have a header
			add(int64(float64(share)*float64(done)/float64(total)), share)
		}
		var err error
		if d.Format == bundle.FormatLUKS {
			err = recrypt.Copy(ctx, o.folder(), to[i].File, d.File, h.kek, progress)
		} else {
			err = recrypt.CopyPlain(ctx, o.folder(), to[i].File, d.File, progress)
		}
		if err != nil {
			return errs.Wrap(err, "%s", d.Name)
		}
		done()
	}
	return nil
}

// suspendLimit is how long the guest of a VM may have to wait for its disks while
// they are copied. Guests give a disk 30 s and more.
const suspendLimit = 10 * time.Second

// copyRunning copies disks of a VM that runs, as they are at one moment, to a folder
// on the same file system.
func (h *Host) copyRunning(ctx context.Context, o *offline, to recrypt.Folder, disks []recrypt.Original) error {
	process := o.running.process()
	if process == nil {
		return errRestarting()
	}
	err := recrypt.CopyTogether(ctx, to, o.folder(), disks, h.kek, func(clone func() error) error {
		return process.WhileSuspended(ctx, suspendLimit, clone)
	})
	if errors.Is(err, blockdev.ErrNoClone) {
		return errs.New(errs.InvalidState, "the file system of the datastore cannot share blocks between files, and the guest cannot wait for a copy: %w", err).
			WithHint("strongroom vm power-off %s; or have the VM on XFS or Btrfs", o.vm.Name)
	}
	return err
}

// renameSnapshot gives a snapshot its name and description, in any power state.
func (h *Host) renameSnapshot(ctx context.Context, req *strongroomv1.AgentRenameSnapshotRequest) error {
	return h.changing(ctx, req.GetId(), func(o *offline) error {
		next := o.vm.Clone()
		s := next.FindSnapshot(req.GetSnapshotId())
		if s == nil {
			return errs.New(errs.NotFound, "VM %s has no snapshot with id %.64q", o.vm.Name, req.GetSnapshotId()).WithHint("strongroom vm snapshot ls %s", o.vm.Name)
		}
		former := s.Name
		s.Name, s.Description = req.GetSnapshot(), req.GetDescription()
		if err := o.freeName(*s); err != nil {
			return err
		}
		if err := next.Validate(); err != nil {
			return err
		}
		if err := bundle.Write(o.dir, next); err != nil {
			return errs.Wrap(err, "cannot rename snapshot %s of VM %s", former, o.vm.Name)
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "snapshot renamed", slog.String("vm", o.vm.Name), slog.String("snapshot", former), slog.String("name", s.Name))
		return nil
	})
}

// freeName returns an error if another snapshot has the name of s.
func (o *offline) freeName(s bundle.Snapshot) error {
	if slices.ContainsFunc(o.vm.Snapshots, func(other bundle.Snapshot) bool { return other.Name == s.Name && other.ID != s.ID }) {
		return errs.New(errs.Exists, "there is a snapshot %s already", s.Name).WithHint("strongroom vm snapshot ls %s", o.vm.Name)
	}
	return nil
}

// deleteSnapshot deletes a snapshot, in any power state. One that is not there is
// no error: then what an interrupted creation left of it is deleted.
func (h *Host) deleteSnapshot(ctx context.Context, id, snapshotID string) error {
	if !bundle.ValidID(snapshotID) {
		return errs.New(errs.Invalid, "snapshot id %.64q is not a UUID", snapshotID)
	}
	return h.changing(ctx, id, func(o *offline) error {
		s := o.vm.FindSnapshot(snapshotID)
		if s == nil {
			return o.removeStrays(func(file string) bool { return bundle.OfSnapshot(file, snapshotID) })
		}
		gone := *s
		next := o.vm.Clone()
		next.DropSnapshot(snapshotID)
		if err := o.retire(next, gone.Disks); err != nil {
			return errs.Wrap(err, "cannot delete snapshot %s of VM %s", gone.Name, o.vm.Name)
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "snapshot deleted", slog.String("vm", o.vm.Name), slog.String("snapshot", gone.Name))
		return nil
	})
}

// consolidateSnapshots deletes the files of snapshots and reverts that vm.json
// does not name, in any power state.
func (h *Host) consolidateSnapshots(ctx context.Context, id string) error {
	return h.changing(ctx, id, func(o *offline) error {
		err := o.removeStrays(func(file string) bool {
			h.log.LogAttrs(ctx, slog.LevelInfo, "file that no snapshot has is deleted", slog.String("vm", o.vm.Name), slog.String("file", file))
			return true
		})
		return errs.Wrap(err, "cannot consolidate VM %s", o.vm.Name)
	})
}

// changing runs f with a VM in any power state, reserved for it. f may change
// vm.json and files that are no running disk's.
func (h *Host) changing(ctx context.Context, id string, f func(*offline) error) error {
	for {
		o, err := h.takeOffline(ctx, id, "this")
		if err == nil {
			defer o.release()
			return f(o)
		}
		if !errors.Is(err, errPoweredOn) {
			return err
		}
		if again, err := h.changingRunning(ctx, id, f); !again {
			return err
		}
	}
}

// changingRunning is changing for a VM that runs. It reports whether the VM was
// powered off meanwhile.
func (h *Host) changingRunning(ctx context.Context, id string, f func(*offline) error) (again bool, err error) {
	m, release, err := h.reserve(ctx, id)
	if err != nil {
		return false, err
	}
	defer release()
	running := m.run()
	if running == nil {
		return true, nil
	}
	running.folder.Lock()
	defer running.folder.Unlock()
	o, err := h.online(m)
	if err != nil {
		return false, err
	}
	o.running = running
	return false, f(o)
}

// retire makes the VM what next says, which retires the files of those disks, and
// deletes them. What else is retired is left alone: in a VM that runs it may be in
// use still.
func (o *offline) retire(next *bundle.VM, disks []bundle.Disk) error {
	if err := bundle.Write(o.dir, next); err != nil {
		return err
	}
	o.vm = next
	for _, d := range disks {
		if err := o.folder().Remove(d.File); err != nil {
			return err
		}
	}
	next = next.Clone()
	next.Retired = slices.DeleteFunc(next.Retired, func(file string) bool {
		return slices.ContainsFunc(disks, func(d bundle.Disk) bool { return d.File == file })
	})
	if err := bundle.Write(o.dir, next); err != nil {
		return err
	}
	o.vm = next
	return nil
}

// removeStrays deletes those of the files that vm.json does not name which are
// chosen.
func (o *offline) removeStrays(chosen func(file string) bool) error {
	// What vm.json names must be durable before what it does not name goes.
	if err := o.folder().Sync(); err != nil {
		return err
	}
	strays, err := bundle.Strays(o.dir, o.vm)
	if err != nil {
		return err
	}
	for _, file := range strays {
		if chosen(file) {
			if err := o.folder().Remove(file); err != nil {
				return err
			}
		}
	}
	return nil
}

// withoutSnapshots returns an error if the VM has snapshots: a conversion or a
// deep rekey would leave those under the old keys, or have to rewrite them all.
func (o *offline) withoutSnapshots() error {
	if len(o.vm.Snapshots) == 0 {
		return nil
	}
	return errs.New(errs.InvalidState, "VM %s has snapshots, which this would leave as they are", o.vm.Name).
		WithReason(strongroomv1.ReasonHasSnapshots).WithHint("delete them first: strongroom vm snapshot ls %s", o.vm.Name)
}

// snapshotDisk is an encrypted disk of a snapshot.
type snapshotDisk struct {
	snapshot string // its name
	disk     bundle.Disk
}

// encryptedInSnapshots returns the encrypted ones among the disks named, of all
// snapshots.
func encryptedInSnapshots(vm *bundle.VM, disks []string) []snapshotDisk {
	var out []snapshotDisk
	for _, s := range vm.Snapshots {
		for _, d := range s.Disks {
			if d.Format == bundle.FormatLUKS && (len(disks) == 0 || slices.Contains(disks, d.Name)) {
				out = append(out, snapshotDisk{s.Name, d})
			}
		}
	}
	return out
}

// shallowRekeySnapshots gives the disks named a new KEK in all snapshots. Nobody
// has their files open, in any power state. before is told how many are done.
func (h *Host) shallowRekeySnapshots(ctx context.Context, o *offline, disks []string, ref keysafe.Ref, before func(step string, done int)) error {
	for n, s := range encryptedInSnapshots(o.vm, disks) {
		before(fmt.Sprintf("rekeying %s of snapshot %s", s.disk.Name, s.snapshot), n)
		if err := recrypt.ShallowRekey(ctx, o.folder(), s.disk.File, ref, h.kek); err != nil {
			return errs.Wrap(err, "cannot rekey %s of snapshot %s of %s", s.disk.Name, s.snapshot, o.vm.Name)
		}
		h.logRekey(ctx, o.vm, s.disk, ref, "shallow")
	}
	return nil
}
