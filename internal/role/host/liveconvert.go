package host

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
	"strongroom/internal/machine/volumeproc"
)

// Live conversion: docs/spec/live-conversion.md.

const (
	// convertPoll is how often a volume process is asked how far it is.
	convertPoll = 200 * time.Millisecond
	// settleTimeout bounds the decision, while which the guest's writes must reach
	// two files.
	settleTimeout = time.Minute
	// lostWait is how long the end of a process takes to be known after its
	// connection broke.
	lostWait = 5 * time.Second
	// convertAttempts is how often a disk is begun anew because its volume process
	// died.
	convertAttempts = 5
)

// errProcessLost: the volume process that converted a disk is gone, and with it
// the conversion. The disk is as it was.
var errProcessLost = errors.New("the volume process ended meanwhile")

// conversion says what disks become.
type conversion struct {
	format string      // the one they get
	ref    keysafe.Ref // the KEK of encrypted ones
	rate   int64       // bytes a second that may be copied while the VM runs; 0: any number
}

func (c conversion) verb() string {
	if c.format == bundle.FormatLUKS {
		return "encrypt"
	}
	return "decrypt"
}

// key is the VM's KEK after a disk of it was converted.
func (c conversion) key(vm *bundle.VM) *bundle.Key {
	switch {
	case c.format == bundle.FormatLUKS:
		return bundle.KeyOf(c.ref)
	case vm.Encrypted():
		return vm.Key
	}
	return nil
}

// convertRunning converts those of a running VM's disks that are not in the format
// yet, while the guest uses them.
func (h *Host) convertRunning(ctx context.Context, m *machine, disks []string, c conversion, r report) error {
	o, err := h.online(m)
	if err != nil {
		return err
	}
	dir, vm := o.dir, o.vm
	if err := o.notRekeying(disks); err != nil {
		return err
	}
	if err := o.withoutSnapshots(); err != nil {
		return err
	}
	indices, err := chosen(vm, disks)
	if err != nil {
		return err
	}
	indices = slices.DeleteFunc(indices, func(i int) bool { return vm.Disks[i].Format == c.format })
	p := newDisksProgress(r, vm, indices, writtenAndVerified)
	for _, i := range indices {
		d := vm.Disks[i]
		progress, done := p.disk(c.verb()+"ing "+d.Name, writtenAndVerified*d.SizeBytes)
		if err := h.convertDisk(ctx, m, dir, d, c, progress); err != nil {
			return errs.Wrap(err, "cannot %s %s of %s", c.verb(), d.Name, vm.Name)
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "disk "+c.verb()+"ed", slog.String("vm", vm.Name), slog.String("disk", d.Name), slog.Bool("live", true),
			slog.String("provider", c.ref.Provider), slog.String("key_id", c.ref.KeyID))
		done()
	}
	return nil
}

// convertDisk converts one disk of a running VM. It begins anew if the volume
// process dies, and returns [errPowerChanged] if the VM is off.
func (h *Host) convertDisk(ctx context.Context, m *machine, dir string, d bundle.Disk, c conversion, progress recrypt.Progress) error {
	for attempts := 0; ; {
		run := m.run()
		if run == nil {
			return errPowerChanged
		}
		began, err := h.tryConvert(ctx, m, run, dir, d, c, progress)
		switch {
		case began && errors.Is(err, errProcessLost):
			if attempts++; attempts == convertAttempts {
				return err
			}
			h.log.LogAttrs(ctx, slog.LevelWarn, "conversion is begun anew", slog.String("disk", d.Name), slog.Any("err", err))
		case began || !passing(err):
			return err
		}
		timer := time.NewTimer(reviveEvery)
		select {
		case <-timer.C:
		case <-run.gone:
			err = errPowerChanged
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		if timer.Stop(); ctx.Err() != nil || errors.Is(err, errPowerChanged) {
			return err
		}
	}
}

// passing reports whether err may pass by itself: the volume process is being
// started again, or another operation has the VM.
func passing(err error) bool {
	return errs.KindOf(err) == errs.Unavailable || errs.ReasonOf(err) == strongroomv1.ReasonVMBusy
}

// tryConvert converts a disk with the volume process that there is. It reports
// whether it got so far as to begin.
func (h *Host) tryConvert(ctx context.Context, m *machine, run *running, dir string, d bundle.Disk, c conversion, progress recrypt.Progress) (began bool, err error) {
	process, err := h.beginConversion(ctx, m, run, dir, d, c)
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.undoConversion(m, run, process, dir, d, c))
		}
	}()
	ticker := time.NewTicker(convertPoll)
	defer ticker.Stop()
	for {
		s, err := conversionOf(ctx, process, d.Name)
		if err != nil {
			return true, lost(process, err)
		}
		progress(s.Done, s.Total)
		switch s.Phase {
		case volumectl.Failed:
			return true, s.Failure.Err()
		case volumectl.Synced:
			if err := h.commitConversion(ctx, m, run, process, dir, d, c); errs.ReasonOf(err) != strongroomv1.ReasonVMBusy {
				return true, err
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return true, context.Cause(ctx)
		}
	}
}

// lost tells the end of a volume process from another failure to talk to it. A
// connection breaks a moment before the end is known.
func lost(process *volumeproc.Process, err error) error {
	timeout := time.NewTimer(lostWait)
	defer timeout.Stop()
	if errs.KindOf(err) != errs.Unavailable && !errors.Is(err, net.ErrClosed) {
		timeout.Reset(0)
	}
	select {
	case <-process.Ended():
		return errs.New(errs.Unavailable, "%w", errProcessLost).WithHint("try again")
	case <-timeout.C:
		return err
	}
}

// conversionOf returns how far the conversion of a disk is.
func conversionOf(ctx context.Context, process *volumeproc.Process, disk string) (*volumectl.Conversion, error) {
	status, err := process.Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range status.Disks {
		if d.Disk == disk && d.Conversion != nil {
			return d.Conversion, nil
		}
	}
	return nil, errs.New(errs.InvalidState, "the volume process is not converting disk %s", disk)
}

// beginConversion makes the new file and has the volume process fill it.
func (h *Host) beginConversion(ctx context.Context, m *machine, run *running, dir string, d bundle.Disk, c conversion) (*volumeproc.Process, error) {
	release, err := m.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	run.folder.Lock()
	defer run.folder.Unlock()
	process := run.process()
	if process == nil || m.run() != run {
		return nil, errRestarting()
	}
	// What an agent that died has begun.
	if err := process.StopConversion(ctx, d.Name); err != nil {
		return nil, lost(process, err)
	}
	reg, _ := m.state()
	vm, err := readVM(reg, dir)
	if err == nil { // one may have been made since the last disk was done
		err = (&offline{vm: vm}).withoutSnapshots()
	}
	if err == nil {
		_, err = sweep(dir, vm) // the new file's name may be among the retired ones
	}
	if err != nil {
		return nil, err
	}
	folder, name := recrypt.Dir{Path: dir}, bundle.DiskFile(d.Name, c.format)
	if err := recrypt.NewTarget(ctx, folder, name, d.SizeBytes, c.ref, h.kek); err != nil {
		return nil, err
	}
	if err := h.convertTo(ctx, process, filepath.Join(dir, name+recrypt.Unfinished), d, c); err != nil {
		return nil, errors.Join(lost(process, err), folder.Remove(name+recrypt.Unfinished))
	}
	return process, nil
}

// convertTo passes the new file on, with its DEK.
func (h *Host) convertTo(ctx context.Context, process *volumeproc.Process, path string, d bundle.Disk, c conversion) error {
	format := volumectl.Raw
	var dek *keymem.Key
	if c.format == bundle.FormatLUKS {
		format = volumectl.LUKS
		var err error
		if dek, _, err = h.unwrap(ctx, path); err != nil {
			return err
		}
		defer dek.Close()
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	return process.Convert(ctx, d.Name, format, file, dek, c.rate)
}

// commitConversion decides for the new file of a conversion that is synced. When
// it returns an error, vm.json names the old file.
func (h *Host) commitConversion(ctx context.Context, m *machine, run *running, process *volumeproc.Process, dir string, d bundle.Disk, c conversion) error {
	release, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	run.folder.Lock()
	defer run.folder.Unlock()
	// Half a decision helps nobody.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if m.run() != run || run.process() != process {
		return errs.New(errs.Unavailable, "%w", errProcessLost).WithHint("try again")
	}
	if err := process.HoldConversion(ctx, d.Name); err != nil {
		return lost(process, err)
	}
	reg, _ := m.state()
	vm, err := readVM(reg, dir)
	if err != nil {
		return err
	}
	next, err := renameAndSwitch(dir, vm, d.Name, c)
	if err != nil {
		return err
	}
	if err := switchDisk(ctx, recrypt.Dir{Path: dir}, process, d.Name); err != nil {
		// One that is started again opens the new file, and so does the next agent
		// that finds this one. Until then it must not lose the old one.
		h.log.LogAttrs(ctx, slog.LevelError, "disk not switched yet", slog.String("disk", d.Name), slog.Any("err", err))
		return nil
	}
	if _, err := sweep(dir, next); err != nil { // the next start or change tries again
		h.log.LogAttrs(ctx, slog.LevelWarn, "former file of a disk not deleted", slog.String("vm", reg.Name), slog.Any("err", err))
	}
	return nil
}

// renameAndSwitch makes vm.json name the new file of a disk, and returns what is
// in it then.
func renameAndSwitch(dir string, vm *bundle.VM, disk string, c conversion) (*bundle.VM, error) {
	next, steps, err := switchSteps(dir, vm, disk, c)
	if err != nil {
		return nil, err
	}
	for _, step := range steps {
		err = errors.Join(err, step())
		if err == nil {
			continue
		}
		// What failed may have been done nevertheless, and then it counts.
		now, readErr := bundle.Read(dir)
		if readErr == nil && now.HasFile(bundle.DiskFile(disk, c.format)) {
			return next, nil
		}
		return nil, errors.Join(err, readErr)
	}
	return next, nil
}

// switchSteps returns the steps of renameAndSwitch. Until the last one the new
// file's name is a retired one, so that whoever finds it deletes it.
func switchSteps(dir string, vm *bundle.VM, disk string, c conversion) (next *bundle.VM, steps []func() error, err error) {
	i := slices.IndexFunc(vm.Disks, func(d bundle.Disk) bool { return d.Name == disk })
	if i < 0 {
		return nil, nil, errs.New(errs.InvalidState, "the VM has no disk %s any more", disk)
	}
	file := bundle.DiskFile(disk, c.format)
	announced := vm.Clone()
	announced.Retired = append(announced.Retired, file)
	next = vm.Clone()
	next.Retired = append(next.Retired, next.Disks[i].File)
	next.Disks[i].File, next.Disks[i].Format = file, c.format
	next.Key = c.key(next)
	return next, []func() error{
		func() error { return bundle.Write(dir, announced) },
		func() error { return recrypt.Finish(recrypt.Dir{Path: dir}, file) },
		func() error { return bundle.Write(dir, next) },
	}, nil
}

// switchDisk ends the writing to the old file of a disk, once the vm.json that names the
// new one is durable: whoever wrote it may have been killed before, or failed at that.
// Until then a power loss may bring the old one back, and both files hold everything.
func switchDisk(ctx context.Context, folder interface{ Sync() error }, process interface {
	SwitchDisk(ctx context.Context, disk string) error
}, disk string,
) error {
	if err := folder.Sync(); err != nil {
		return err
	}
	return process.SwitchDisk(ctx, disk)
}

// undoConversion has the volume process drop the new file, and deletes it. The old
// one, which vm.json names, is the disk.
func (h *Host) undoConversion(m *machine, run *running, process *volumeproc.Process, dir string, d bundle.Disk, c conversion) error {
	run.folder.Lock()
	defer run.folder.Unlock()
	if m.run() != run || run.process() != process {
		return nil // it is gone, and who starts the VM again cleans up
	}
	ctx, cancel := context.WithTimeout(h.life, settleTimeout)
	defer cancel()
	if err := process.StopConversion(ctx, d.Name); err != nil {
		if errors.Is(lost(process, err), errProcessLost) {
			return nil
		}
		return err
	}
	reg, _ := m.state()
	vm, err := readVM(reg, dir)
	if err != nil {
		return err
	}
	_, err = sweep(dir, vm)
	return errors.Join(err, recrypt.Dir{Path: dir}.Remove(bundle.DiskFile(d.Name, c.format)+recrypt.Unfinished))
}

// settle ends the conversions that an agent which died has left to a volume
// process: vm.json tells which file of a disk counts. Whoever asked for a
// conversion that is dropped asks again.
func (h *Host) settle(ctx context.Context, reg registered, process *volumeproc.Process) error {
	status, err := process.Status(ctx)
	if err != nil {
		return err
	}
	dir, err := h.folder(reg)
	if err != nil {
		return err
	}
	vm, err := readVM(reg, dir)
	if err != nil {
		return err
	}
	for _, s := range status.Disks {
		if s.Conversion == nil {
			continue
		}
		i := slices.IndexFunc(vm.Disks, func(d bundle.Disk) bool { return d.Name == s.Disk })
		if decided := i >= 0 && vm.Disks[i].Format != string(s.Format); decided {
			err = switchDisk(ctx, recrypt.Dir{Path: dir}, process, s.Disk)
		} else {
			err = process.StopConversion(ctx, s.Disk)
		}
		if err != nil {
			return err
		}
	}
	return tidy(dir, vm)
}

// tidy deletes what an interrupted operation left in the folder of a VM that no
// operation works on.
func tidy(dir string, vm *bundle.VM) error {
	if _, err := sweep(dir, vm); err != nil {
		return err
	}
	names, err := bundle.Unfinished(dir)
	for _, name := range names {
		err = errors.Join(err, recrypt.Dir{Path: dir}.Remove(name))
	}
	return err
}
