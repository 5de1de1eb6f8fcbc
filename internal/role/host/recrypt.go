package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"

	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// report tells the progress of an operation: what is being done, and how much
// of all of it. It is called from one goroutine at a time.
type report func(step string, done, total int64, unit string)

// The units of progress.
const (
	unitBytes = "bytes"
	unitItems = "items"
)

// disksProgress turns the progress of one disk after another into that of all.
type disksProgress struct {
	report report
	base   int64 // bytes of the disks that are done
	total  int64
}

func newDisksProgress(r report, vm *bundle.VM, indices []int, verb int64) *disksProgress {
	p := &disksProgress{report: r}
	for _, i := range indices {
		p.total += verb * vm.Disks[i].SizeBytes
	}
	return p
}

// disk returns the progress function for a disk, and one that ends it.
func (p *disksProgress) disk(step string, size int64) (recrypt.Progress, func()) {
	p.report(step, p.base, p.total, unitBytes)
	return func(done, _ int64) { p.report(step, p.base+done, p.total, unitBytes) },
		func() { p.base += size }
}

// writtenAndVerified is how often the bytes of a disk count in the progress of
// an operation that rewrites it.
const writtenAndVerified = 2

// encryptVM encrypts the plain ones among the disks named, under the KEK at ref, in
// any power state. rate bounds what is copied a second while the VM runs, in bytes;
// 0: it is not bounded.
func (h *Host) encryptVM(ctx context.Context, id string, disks []string, ref keysafe.Ref, rate int64, r report) error {
	if err := h.haveKEK(ctx, ref); err != nil {
		return err
	}
	return h.convert(ctx, id, disks, conversion{bundle.FormatLUKS, ref, rate}, r, func() error {
		return h.encryptOffline(ctx, id, disks, ref, r)
	})
}

// convert converts disks as the VM's power state demands. Should that change
// meanwhile, it goes on the other way.
func (h *Host) convert(ctx context.Context, id string, disks []string, c conversion, r report, offline func() error) error {
	m, err := h.machine(id)
	if err != nil {
		return err
	}
	for {
		if m.run() != nil {
			err = h.convertRunning(ctx, m, disks, c, r)
		} else {
			err = offline()
		}
		if !errors.Is(err, errPowerChanged) || ctx.Err() != nil {
			return err
		}
	}
}

// takeConvertible reserves a VM that is off for a conversion, until it is to be
// powered on. release must be called.
func (h *Host) takeConvertible(ctx context.Context, id string, disks []string) (_ context.Context, _ *offline, release func(), err error) {
	o, err := h.takeOffline(ctx, id, "this")
	if errors.Is(err, errPoweredOn) {
		err = errPowerChanged
	}
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, end := o.m.interruptible(ctx)
	release = func() {
		end()
		o.release()
	}
	err = o.notRekeying(disks)
	if err == nil {
		err = o.withoutSnapshots()
	}
	if err != nil {
		release()
		return nil, nil, nil, err
	}
	return ctx, o, release, nil
}

func (h *Host) encryptOffline(ctx context.Context, id string, disks []string, ref keysafe.Ref, r report) error {
	ctx, o, release, err := h.takeConvertible(ctx, id, disks)
	if err != nil {
		return err
	}
	defer release()
	indices, err := o.inFormat(bundle.FormatRaw, disks)
	if err != nil {
		return err
	}
	p := newDisksProgress(r, o.vm, indices, writtenAndVerified)
	for _, i := range indices {
		d := o.vm.Disks[i]
		progress, done := p.disk("encrypting "+d.Name, writtenAndVerified*d.SizeBytes)
		file := bundle.DiskFile(d.Name, bundle.FormatLUKS)
		if err := recrypt.Encrypt(ctx, o.folder(), d.File, file, ref, h.kek, progress); err != nil {
			return errs.Wrap(err, "cannot encrypt %s of %s", d.Name, o.vm.Name)
		}
		if err := o.replaceDisk(i, file, bundle.FormatLUKS, bundle.KeyOf(ref)); err != nil {
			return err
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "disk encrypted", slog.String("vm", o.vm.Name), slog.String("disk", d.Name),
			slog.String("provider", ref.Provider), slog.String("key_id", ref.KeyID))
		done()
	}
	return nil
}

// decryptVM decrypts the encrypted ones among the disks named, as encryptVM does.
func (h *Host) decryptVM(ctx context.Context, id string, disks []string, rate int64, r report) error {
	return h.convert(ctx, id, disks, conversion{format: bundle.FormatRaw, rate: rate}, r, func() error {
		return h.decryptOffline(ctx, id, disks, r)
	})
}

func (h *Host) decryptOffline(ctx context.Context, id string, disks []string, r report) error {
	ctx, o, release, err := h.takeConvertible(ctx, id, disks)
	if err != nil {
		return err
	}
	defer release()
	indices, err := o.inFormat(bundle.FormatLUKS, disks)
	if err != nil {
		return err
	}
	p := newDisksProgress(r, o.vm, indices, writtenAndVerified)
	for _, i := range indices {
		d := o.vm.Disks[i]
		progress, done := p.disk("decrypting "+d.Name, writtenAndVerified*d.SizeBytes)
		file := bundle.DiskFile(d.Name, bundle.FormatRaw)
		if err := recrypt.Decrypt(ctx, o.folder(), d.File, file, h.kek, progress); err != nil {
			return errs.Wrap(err, "cannot decrypt %s of %s", d.Name, o.vm.Name)
		}
		if err := o.replaceDisk(i, file, bundle.FormatRaw, o.vm.Key); err != nil {
			return err
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "disk decrypted", slog.String("vm", o.vm.Name), slog.String("disk", d.Name))
		done()
	}
	return nil
}

// inFormat returns those among the disks named that have a format. The others
// need nothing: an earlier call has changed them, or they were so before.
func (o *offline) inFormat(format string, disks []string) ([]int, error) {
	indices, err := chosen(o.vm, disks)
	return slices.DeleteFunc(indices, func(i int) bool { return o.vm.Disks[i].Format != format }), err
}

// replaceDisk makes vm.json name the new file of a disk and retire the old one,
// then deletes that.
func (o *offline) replaceDisk(i int, file, format string, key *bundle.Key) error {
	next := o.vm.Clone()
	next.Retired = append(next.Retired, next.Disks[i].File)
	next.Disks[i].File, next.Disks[i].Format = file, format
	next.Key = key
	if !next.Encrypted() {
		next.Key = nil
	}
	if err := bundle.Write(o.dir, next); err != nil {
		// If the VM is as it was, the new file is only in the way of the next attempt.
		if now, readErr := bundle.Read(o.dir); readErr == nil && !now.HasFile(file) {
			err = errors.Join(err, o.folder().Remove(file))
		}
		return err
	}
	vm, err := sweep(o.dir, next)
	o.vm = vm
	return err
}

// sweep deletes the files that a VM's disks had before: after an encryption
// that is the plain disk. It returns the VM as it is then.
func sweep(dir string, vm *bundle.VM) (*bundle.VM, error) {
	if len(vm.Retired) == 0 {
		return vm, nil
	}
	folder := recrypt.Dir{Path: dir}
	// The vm.json that retires them may not be durable yet.
	if err := folder.Sync(); err != nil {
		return vm, err
	}
	for _, name := range vm.Retired {
		if err := folder.Remove(name); err != nil {
			return vm, errs.Wrap(err, "cannot delete a disk's former file")
		}
	}
	next := vm.Clone()
	next.Retired = nil
	if err := bundle.Write(dir, next); err != nil {
		return vm, err
	}
	return next, nil
}

// depth says what a rekey changes.
type depth struct {
	deep bool  // the DEK too
	rate int64 // bytes a second that a deep one may rewrite; 0: any number
	own  bool  // of a shallow one: the VM's own key too, although disks are named, and that alone if none are
}

// rekeyVM gives the encrypted ones among the disks named a new KEK, and if it is
// deep a new DEK too. Both work in any power state.
func (h *Host) rekeyVM(ctx context.Context, id string, disks []string, ref keysafe.Ref, depth depth, r report) error {
	if err := h.haveKEK(ctx, ref); err != nil {
		return err
	}
	if depth.deep {
		return h.deepRekeyVM(ctx, id, disks, ref, depth.rate, r)
	}
	m, err := h.machine(id)
	if err != nil {
		return err
	}
	_, on := m.state()
	switch {
	case depth.own && len(disks) == 0:
		return h.rekeyOwn(ctx, m, ref)
	case on:
		return h.shallowRekeyRunning(ctx, m, disks, ref, depth.own, r)
	}
	return h.shallowRekeyOffline(ctx, id, disks, ref, depth.own, r)
}

// rekeyOwn changes the key of an encrypted VM itself, in any power state, and none
// of its disks.
func (h *Host) rekeyOwn(ctx context.Context, m *machine, ref keysafe.Ref) error {
	if _, on := m.state(); !on {
		o, err := h.takeOffline(ctx, m.id, "a rekey of a VM that is being powered on or off")
		if err != nil {
			return err
		}
		defer o.release()
		if _, err := o.encrypted(nil); err != nil {
			return err
		}
		return o.setKey(true, ref)
	}
	release, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	running := m.run()
	if running == nil {
		return poweredOff(m)
	}
	running.folder.Lock()
	defer running.folder.Unlock()
	o, err := h.online(m)
	if err == nil {
		_, err = o.encrypted(nil)
	}
	if err != nil {
		return err
	}
	return o.setKey(true, ref)
}

func poweredOff(m *machine) error {
	reg, _ := m.state()
	return errs.New(errs.Unavailable, "VM %s was powered off meanwhile", reg.Name).WithHint("try again")
}

func (h *Host) shallowRekeyOffline(ctx context.Context, id string, disks []string, ref keysafe.Ref, own bool, r report) error {
	o, err := h.takeOffline(ctx, id, "a rekey of a VM that is being powered on or off")
	if err != nil {
		return err
	}
	defer o.release()
	err = h.shallowRekeyDisks(ctx, o, disks, ref, r, func(d bundle.Disk) error {
		return recrypt.ShallowRekey(ctx, o.folder(), d.File, ref, h.kek)
	})
	if err != nil {
		return err
	}
	return o.setKey(own || len(disks) == 0, ref)
}

// shallowRekeyRunning rewraps the DEKs of a VM that runs: its volume process,
// which has the disks, replaces the key safes.
func (h *Host) shallowRekeyRunning(ctx context.Context, m *machine, disks []string, ref keysafe.Ref, own bool, r report) error {
	release, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	running := m.run()
	if running == nil {
		return poweredOff(m)
	}
	o, err := h.online(m)
	if err != nil {
		return err
	}
	err = h.shallowRekeyDisks(ctx, o, disks, ref, r, func(d bundle.Disk) error {
		safes, _, err := peek(filepath.Join(o.dir, d.File))
		if err != nil {
			return err
		}
		next, err := recrypt.Rewrap(ctx, safes.Current, ref, h.kek)
		if err != nil {
			return err
		}
		return replaceSafe(ctx, running, d.Name, next) // also if it is in place: perhaps in one copy of the header only
	})
	if err != nil {
		return err
	}
	running.folder.Lock()
	defer running.folder.Unlock()
	return o.setKey(own || len(disks) == 0, ref)
}

// shallowRekeyDisks rewraps the DEKs of the encrypted ones among the disks named,
// first in snapshots, then by rewrap in each disk itself.
func (h *Host) shallowRekeyDisks(ctx context.Context, o *offline, disks []string, ref keysafe.Ref, r report, rewrap func(bundle.Disk) error) error {
	indices, err := o.encrypted(disks)
	if err == nil {
		err = o.notRekeying(disks)
	}
	if err != nil {
		return err
	}
	kept := len(encryptedInSnapshots(o.vm, disks))
	total := int64(kept + len(indices))
	err = h.shallowRekeySnapshots(ctx, o, disks, ref, func(step string, done int) { r(step, int64(done), total, unitItems) })
	if err != nil {
		return err
	}
	for n, i := range indices {
		d := o.vm.Disks[i]
		r("rekeying "+d.Name, int64(kept+n), total, unitItems)
		if err := rewrap(d); err != nil {
			return errs.Wrap(err, "cannot rekey %s of %s", d.Name, o.vm.Name)
		}
		h.logRekey(ctx, o.vm, d, ref, "shallow")
	}
	return nil
}

// replaceSafe has the volume process of a running VM replace a key safe.
func replaceSafe(ctx context.Context, r *running, disk string, safe *keysafe.Safe) error {
	p := r.process()
	if p == nil {
		return errs.New(errs.Unavailable, "the volume process is being started again").WithHint("try again")
	}
	return p.ReplaceSafe(ctx, disk, safe)
}

// encrypted returns the encrypted ones among the disks named. A VM with none is
// an error: it has no key that could be changed.
func (o *offline) encrypted(disks []string) ([]int, error) {
	indices, err := chosen(o.vm, disks)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, i := range indices {
		if o.vm.Disks[i].Format == bundle.FormatLUKS {
			out = append(out, i)
		} else if len(disks) > 0 {
			return nil, errs.New(errs.InvalidState, "%s of %s is not encrypted", o.vm.Disks[i].Name, o.vm.Name).
				WithHint("strongroom vm encrypt %s --disk %s", o.vm.Name, o.vm.Disks[i].Name)
		}
	}
	if len(out) == 0 {
		return nil, errs.New(errs.InvalidState, "VM %s is not encrypted", o.vm.Name).WithHint("strongroom vm encrypt %s", o.vm.Name)
	}
	return out, notEncrypting(o.vm, out)
}

// setKey records the VM's KEK, after the disks have it. A rekey of chosen disks
// leaves the VM's own key alone, unless that was asked for.
func (o *offline) setKey(own bool, ref keysafe.Ref) error {
	if !own || o.vm.Key != nil && o.vm.Key.Ref() == ref {
		return nil
	}
	next := o.vm.Clone()
	next.Key = bundle.KeyOf(ref)
	if err := bundle.Write(o.dir, next); err != nil {
		return fmt.Errorf("cannot record the new key: %w", err)
	}
	o.vm = next
	return nil
}

func (h *Host) logRekey(ctx context.Context, vm *bundle.VM, d bundle.Disk, ref keysafe.Ref, depth string) {
	h.log.LogAttrs(ctx, slog.LevelInfo, "disk rekeyed", slog.String("op", depth), slog.String("vm", vm.Name), slog.String("disk", d.Name),
		slog.String("provider", ref.Provider), slog.String("key_id", ref.KeyID))
}
