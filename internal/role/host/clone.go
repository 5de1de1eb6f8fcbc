package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// cloning is the name of the folder, beside that of a VM that runs, with its disks
// as they were at one moment, of which the VM with an id is made. It is no valid
// name of a VM folder.
func cloning(id string) string { return ".cloning-" + id }

// cloneVM makes a VM of the disks and settings of one in any power state, and
// registers it. The DEKs of encrypted disks stay, wrapped under the clone's own
// KEK, or with recrypt become new ones. It is repeatable like createVM.
func (h *Host) cloneVM(ctx context.Context, req *strongroomv1.AgentCloneVMRequest, r report) error {
	vm := &bundle.VM{Version: bundle.Version, ID: req.GetId(), Name: req.GetName(), Created: time.Now().UTC().Truncate(time.Second)}
	if !bundle.ValidName(vm.Name) {
		return errs.New(errs.Invalid, "%.64q cannot be the name of a VM", vm.Name)
	}
	if !bundle.ValidID(vm.ID) {
		return errs.New(errs.Invalid, "VM id %.64q is not a UUID", vm.ID)
	}
	return h.makeFolder(ctx, req.GetDatastore(), vm, "VM cloned", func(work string) error {
		return h.cloneTo(ctx, work, vm, req, r)
	})
}

// cloneTo fills the folder of a clone. One that runs is copied first, so that it is
// reserved, and its guest waits, for a moment only.
func (h *Host) cloneTo(ctx context.Context, work string, vm *bundle.VM, req *strongroomv1.AgentCloneVMRequest, r report) (err error) {
	var copied *offline
	err = h.changing(ctx, req.GetSourceId(), func(o *offline) error {
		vm.Settings, vm.Disks = o.vm.Settings, o.vm.Clone().Disks
		if o.running != nil {
			copied = &offline{m: o.m, dir: filepath.Join(filepath.Dir(o.dir), cloning(vm.ID)), vm: o.vm}
			return errs.Wrap(h.copyToClone(ctx, o, copied.dir), "cannot clone VM %s, which runs", o.vm.Name)
		}
		return errs.Wrap(h.fillClone(ctx, o, work, vm, req, r), "cannot clone VM %s", o.vm.Name)
	})
	if copied == nil {
		return err
	}
	if err == nil {
		err = errs.Wrap(h.fillClone(ctx, copied, work, vm, req, r), "cannot clone VM %s", copied.vm.Name)
	}
	return errors.Join(err, os.RemoveAll(copied.dir))
}

// copyToClone copies the disks of a VM that runs to a new folder.
func (h *Host) copyToClone(ctx context.Context, o *offline, dir string) error {
	if err := o.notRekeying(nil); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil { // of an earlier call
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	var disks []recrypt.Original
	for _, d := range o.vm.Disks {
		disks = append(disks, recrypt.Original{To: d.File, From: d.File, Encrypted: d.Format == bundle.FormatLUKS})
	}
	return h.copyRunning(ctx, o, recrypt.Dir{Path: dir}, disks)
}

// fillClone makes the disks and, last, vm.json.
func (h *Host) fillClone(ctx context.Context, o *offline, work string, vm *bundle.VM, req *strongroomv1.AgentCloneVMRequest, r report) error {
	root, err := h.secrets.datastorePath(req.GetDatastore())
	if err != nil {
		return err
	}
	for _, boot := range []string{vm.Settings.Kernel, vm.Settings.Initrd} {
		if boot == "" || filepath.Dir(o.dir) == filepath.Clean(root) {
			continue // where the original finds it
		}
		if _, err := onDatastore(root, boot); err != nil {
			return err
		}
	}
	var key keysafe.Ref
	if vm.Encrypted() {
		key = ref(req.GetKey())
		if err := h.haveKEK(ctx, key); err != nil {
			return err
		}
		vm.Key = bundle.KeyOf(key)
	}
	if err := notEncrypting(o.vm, all(vm)); err != nil {
		return err
	}
	if !req.GetRecrypt() {
		if err := o.notRekeying(nil); err != nil {
			return err
		}
	}
	p := newDisksProgress(r, vm, all(vm), writtenAndVerified)
	to, from := recrypt.Dir{Path: work}, o.folder()
	for _, d := range vm.Disks {
		share := writtenAndVerified * d.SizeBytes
		add, done := p.disk("cloning "+d.Name, share)
		progress := func(done, total int64) { // of the file, which may have a header
			add(int64(float64(share)*float64(done)/float64(total)), share)
		}
		switch {
		case d.Format == bundle.FormatRaw:
			err = recrypt.ClonePlain(ctx, to, from, d.File, progress)
		case req.GetRecrypt():
			err = recrypt.CloneRecrypt(ctx, to, from, d.File, key, h.kek, progress)
		default:
			err = recrypt.Clone(ctx, to, from, d.File, key, h.kek, progress)
		}
		if err != nil {
			return errs.Wrap(err, "%s", d.Name)
		}
		done()
	}
	return bundle.Write(work, vm)
}
