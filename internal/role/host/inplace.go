package host

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// encryptInPlace encrypts the plain ones among the disks named, of a VM that is
// off, in their own files, and goes on with those that were begun. From before the
// first byte of a disk is changed until all are encrypted vm.json says that it is
// under way: so nothing takes it for a plain disk, or for a volume, whatever the
// moment of a crash.
func (h *Host) encryptInPlace(ctx context.Context, id string, disks []string, ref keysafe.Ref, rate int64, r report) error {
	if err := h.haveKEK(ctx, ref); err != nil {
		return err
	}
	o, err := h.takeOffline(ctx, id, "an encryption in place")
	if err != nil {
		return err
	}
	defer h.notify() // also of what is left unfinished
	defer o.release()
	if err := o.withoutSnapshots(); err != nil {
		return err
	}
	indices, err := o.plainOrBegun(disks)
	if err != nil {
		return err
	}
	p := newDisksProgress(r, o.vm, indices, 1)
	for _, i := range indices {
		d := o.vm.Disks[i]
		progress, done := p.disk("encrypting "+d.Name+" in place", d.SizeBytes)
		if err := h.encryptDiskInPlace(ctx, o, i, ref, rate, progress); err != nil {
			return errs.Wrap(err, "cannot encrypt %s of %s in place", d.Name, o.vm.Name)
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "disk encrypted", slog.String("op", "in place"), slog.String("vm", o.vm.Name), slog.String("disk", d.Name),
			slog.String("provider", ref.Provider), slog.String("key_id", ref.KeyID))
		done()
	}
	return nil
}

// plainOrBegun returns those among the disks named that an encryption in place has
// to do with.
func (o *offline) plainOrBegun(disks []string) ([]int, error) {
	indices, err := chosen(o.vm, disks)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, i := range indices {
		if d := o.vm.Disks[i]; d.Format == bundle.FormatRaw || d.Encrypting != "" {
			out = append(out, i)
		}
	}
	return out, nil
}

func (h *Host) encryptDiskInPlace(ctx context.Context, o *offline, i int, ref keysafe.Ref, rate int64, progress recrypt.Progress) error {
	if o.vm.Disks[i].Encrypting == "" {
		if err := o.beginInPlace(i, ref); err != nil {
			return err
		}
	}
	d := o.vm.Disks[i]
	undone, err := recrypt.EncryptInPlace(ctx, o.folder(), d.Encrypting, d.File, d.SizeBytes, ref, h.kek, rate, progress)
	switch {
	case err == nil:
		return o.endInPlace(i, ref)
	case undone:
		return errors.Join(err, o.undoInPlace(i))
	}
	return errs.New(errs.KindOf(explain(err)), "it is not finished: %w", err).
		WithReason(strongroomv1.ReasonEncryptionInProgress).WithHint("it goes on with: strongroom vm encrypt %s --in-place", o.vm.Name)
}

// beginInPlace makes vm.json say that a plain disk is being encrypted in place.
func (o *offline) beginInPlace(i int, ref keysafe.Ref) error {
	d := o.vm.Disks[i]
	encrypted := bundle.DiskFile(d.Name, bundle.FormatLUKS)
	stat, err := os.Lstat(filepath.Join(o.dir, d.File))
	if err != nil {
		return err
	}
	taken, err := o.folder().Exists(encrypted)
	switch {
	case err != nil:
		return err
	case taken:
		return errs.New(errs.Exists, "file %s is in the way", encrypted).WithHint("move it out of the VM folder if it is not wanted")
	case !stat.Mode().IsRegular():
		return errs.New(errs.Invalid, "%s is not a regular file, and cannot grow", d.File).WithHint("encrypt it without --in-place")
	case stat.Size() != d.SizeBytes:
		return errs.New(errs.InvalidState, "%s has %d bytes, and not the disk's %d", d.File, stat.Size(), d.SizeBytes).WithHint("encrypt it without --in-place")
	}
	next := o.vm.Clone()
	disk := &next.Disks[i]
	disk.Encrypting, disk.File, disk.Format = d.File, encrypted, bundle.FormatLUKS
	if next.Key == nil {
		next.Key = bundle.KeyOf(ref)
	}
	return o.write(next)
}

// undoInPlace makes vm.json call a disk plain again of which nothing is encrypted.
func (o *offline) undoInPlace(i int) error {
	next := o.vm.Clone()
	disk := &next.Disks[i]
	disk.File, disk.Encrypting, disk.Format = disk.Encrypting, "", bundle.FormatRaw
	if !next.Encrypted() {
		next.Key = nil
	}
	return o.write(next)
}

// endInPlace makes vm.json call a disk encrypted that is.
func (o *offline) endInPlace(i int, ref keysafe.Ref) error {
	next := o.vm.Clone()
	next.Disks[i].Encrypting, next.Key = "", bundle.KeyOf(ref)
	return o.write(next)
}

// write replaces vm.json.
func (o *offline) write(next *bundle.VM) error {
	if err := bundle.Write(o.dir, next); err != nil {
		return err
	}
	o.vm = next
	return nil
}

// notEncrypting returns an error if one of those disks is being encrypted in place,
// at this moment or not.
func notEncrypting(vm *bundle.VM, indices []int) error {
	for _, i := range indices {
		if d := vm.Disks[i]; d.Encrypting != "" {
			return errs.New(errs.InvalidState, "the encryption in place of %s of %s is not finished", d.Name, vm.Name).
				WithReason(strongroomv1.ReasonEncryptionInProgress).WithHint("finish it: strongroom vm encrypt %s --in-place", vm.Name)
		}
	}
	return nil
}
