package host

import (
	"context"
	"path/filepath"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// cloneVM makes a VM of the disks and settings of one that is powered off, and
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
		o, err := h.takeOffline(ctx, req.GetSourceId(), "cloning")
		if err != nil {
			return err
		}
		defer o.release()
		vm.Settings, vm.Disks = o.vm.Settings, o.vm.Clone().Disks
		return errs.Wrap(h.fillClone(ctx, o, work, vm, req, r), "cannot clone VM %s", o.vm.Name)
	})
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
