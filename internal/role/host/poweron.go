package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/qemu"
	"strongroom/internal/machine/recrypt"
	"strongroom/internal/machine/volumeproc"
)

// running is a VM that is powered on: its QEMU and its volume process. The lock
// of the VM folder is held by the volume process, so that it outlives the agent.
type running struct {
	qemu    *qemu.Machine
	volumes *volumeproc.Process
	gone    chan struct{} // closed when the VM is off and all of it is cleaned up
}

// powerOn starts a VM: it unwraps the DEKs with the KEKs that are here, hands
// them with the open disks to a new volume process, and starts QEMU on that. A
// VM that runs is no error. When it fails, nothing of the VM runs.
func (h *Host) powerOn(ctx context.Context, what string) error {
	m, err := h.machine(what)
	if err != nil {
		return err
	}
	release, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	reg, on := m.state()
	if on {
		return nil
	}
	r, err := h.start(ctx, reg)
	if err != nil {
		return errs.Wrap(err, "cannot power on VM %s", reg.Name)
	}
	h.watch(m, r)
	h.log.LogAttrs(ctx, slog.LevelInfo, "VM powered on", slog.String("vm", reg.Name))
	h.notify()
	return nil
}

func (h *Host) start(ctx context.Context, reg registered) (_ *running, err error) {
	root, err := h.secrets.datastorePath(reg.Datastore)
	if err != nil {
		return nil, err
	}
	dir, err := h.folder(reg)
	if err != nil {
		return nil, err
	}
	lock, err := bundle.Acquire(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Release() // the volume process has it by then
	vm, err := bundle.Read(dir)
	if err != nil {
		return nil, err
	}
	config, err := h.qemuConfig(reg, vm, root, dir)
	if err != nil {
		return nil, err
	}
	volumes, err := volumeproc.Start(ctx, volumeproc.Config{VM: reg.Name, RunDir: h.runDir(reg), Hold: []*os.File{lock.File()}})
	if err != nil {
		return nil, errs.New(errs.Unavailable, "cannot start its volume process: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, volumes.Kill(context.WithoutCancel(ctx)), volumes.Close())
		}
	}()
	for _, d := range vm.Disks {
		if err := h.addDisk(ctx, volumes, dir, d); err != nil {
			return nil, errs.Wrap(err, "disk %s", d.Name)
		}
	}
	machine, err := qemu.Start(ctx, config)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%w", err).WithHint("look at the end of its log: %s", filepath.Join(dir, bundle.LogName))
	}
	return &running{qemu: machine, volumes: volumes, gone: make(chan struct{})}, nil
}

// addDisk opens a disk and gives it to the volume process, with its DEK.
func (h *Host) addDisk(ctx context.Context, volumes *volumeproc.Process, dir string, d bundle.Disk) error {
	path := filepath.Join(dir, d.File)
	spec := volumectl.Disk{Name: d.Name, Format: volumectl.Raw, SizeMin: d.SizeBytes}
	var dek *keymem.Key
	if d.Format == bundle.FormatLUKS {
		spec.Format = volumectl.LUKS
		var err error
		if dek, err = h.unwrap(ctx, path); err != nil {
			return err
		}
		defer dek.Close()
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	return volumes.AddDisk(ctx, spec, file, dek)
}

// unwrap returns the DEK of the volume at path, which the caller closes.
func (h *Host) unwrap(ctx context.Context, path string) (*keymem.Key, error) {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	if err != nil {
		return nil, err
	}
	defer file.Close()
	dek, _, err := recrypt.UnwrapDEK(ctx, file, h.kek)
	return dek, err
}

func (h *Host) qemuConfig(reg registered, vm *bundle.VM, root, dir string) (qemu.Config, error) {
	id, err := uuid.Parse(vm.ID)
	if err != nil {
		return qemu.Config{}, err
	}
	accel, _ := h.prober.Probe() // why it is not KVM was logged at start
	s := vm.Settings
	c := qemu.Config{
		Name: reg.Name, UUID: id, CPUs: s.CPUs, MemoryMiB: s.MemoryMiB, Machine: s.Machine, Accel: accel,
		Append: s.Append, RunDir: h.runDir(reg), SerialLog: filepath.Join(dir, bundle.LogName),
	}
	for _, p := range []struct {
		name string
		to   *string
	}{{s.Kernel, &c.Kernel}, {s.Initrd, &c.Initrd}} {
		if p.name == "" {
			continue
		}
		if *p.to, err = onDatastore(root, p.name); err != nil {
			return qemu.Config{}, err
		}
	}
	if s.Network == "user" {
		c.NICs = []qemu.NIC{{MAC: macOf(id)}}
	}
	for i, d := range vm.Disks {
		c.Disks = append(c.Disks, qemu.Disk{ID: d.Name, Socket: volumeproc.NBDSocket(h.runDir(reg)), Export: d.Name, Bootable: i == 0})
	}
	return c, nil
}

// macOf returns a MAC address in QEMU's range that stays with the VM.
func macOf(id uuid.UUID) string {
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", id[13], id[14], id[15])
}

// runDir is where the sockets of a VM are. Its name is short, because a socket's
// path must be.
func (h *Host) runDir(reg registered) string { return filepath.Join(h.cfg.RunDir, reg.ID[:13]) }

// watch makes the VM known as powered on, and cleans up when it is off.
func (h *Host) watch(m *machine, r *running) {
	m.setRunning(r)
	h.watchers.Go(func() {
		reg, _ := m.state()
		log := h.log.With(slog.String("vm", reg.Name))
		exit, err := r.qemu.Wait(h.life)
		if err != nil {
			return // the agent ends; the VM does not
		}
		log.LogAttrs(h.life, slog.LevelInfo, "VM powered off", slog.String("reason", exit.Reason), slog.String("status", exit.Status))
		if exit.Reason == "" {
			log.LogAttrs(h.life, slog.LevelError, "QEMU ended unexpectedly", slog.String("status", exit.Status), slog.String("output", exit.Log))
		}
		if err := r.volumes.Stop(h.life); err != nil {
			log.LogAttrs(h.life, slog.LevelError, "volume process did not end well", slog.Any("err", err))
			_ = r.volumes.Kill(h.life) // it must not keep the VM's lock
		}
		r.letGo()
		m.setRunning(nil)
		close(r.gone)
		h.notify()
	})
}

// letGo closes what the agent holds of a VM; the VM itself is not touched.
func (r *running) letGo() {
	r.qemu.Close()
	r.volumes.Close()
}

// letGo is called when the agent ends.
func (h *Host) letGo() {
	for _, m := range h.all() {
		if r := m.run(); r != nil {
			r.letGo()
		}
	}
}

// adoptAll finds the VMs that an earlier agent started. What is left of a VM
// that is only half there is ended: QEMU without its disks can do nothing, and
// a volume process without QEMU would keep the VM locked.
func (h *Host) adoptAll(ctx context.Context) {
	for _, m := range h.all() {
		reg, _ := m.state()
		id, err := uuid.Parse(reg.ID)
		if err != nil {
			continue
		}
		machine, qemuErr := qemu.Adopt(ctx, h.runDir(reg), id)
		volumes, volErr := volumeproc.Adopt(ctx, h.runDir(reg), reg.Name)
		switch {
		case qemuErr == nil && volErr == nil:
			h.watch(m, &running{qemu: machine, volumes: volumes, gone: make(chan struct{})})
			h.log.LogAttrs(ctx, slog.LevelInfo, "running VM found", slog.String("vm", reg.Name))
		case qemuErr == nil:
			h.log.LogAttrs(ctx, slog.LevelError, "VM has lost its volume process and is ended", slog.String("vm", reg.Name), slog.Any("err", volErr))
			_ = machine.Kill(ctx)
			machine.Close()
		case volErr == nil:
			h.log.LogAttrs(ctx, slog.LevelInfo, "volume process without its VM is ended", slog.String("vm", reg.Name))
			if err := volumes.Stop(ctx); err != nil {
				_ = volumes.Kill(ctx)
			}
			volumes.Close()
		}
	}
}
