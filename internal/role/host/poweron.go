package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

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
	qemu      *qemu.Machine
	startTook time.Duration // how long QEMU's own start took; 0 if an earlier agent started it
	// interfaces says how the guest reaches its disks.
	interfaces map[string]qemu.Interface
	gone       chan struct{} // closed when the VM is off and all of it is cleaned up

	// folder is held while vm.json changes or the volume process is started again,
	// which looks into it. It is taken before mu.
	folder sync.Mutex

	mu      sync.Mutex // guards what follows
	volumes *volumeproc.Process
	ordered bool // we are ending it
}

// process returns the volume process, or nil while there is none.
func (r *running) process() *volumeproc.Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.volumes
}

func (r *running) setProcess(p *volumeproc.Process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.volumes = p
}

// order notes that the VM ends by our wish.
func (r *running) order() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ordered = true
}

func (r *running) wasOrdered() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ordered
}

// powerOn starts a VM: it unwraps the DEKs with the KEKs that are here, hands
// them with the open disks to a new volume process, and starts QEMU on that. A
// VM that runs is no error. When it fails, nothing of the VM runs.
func (h *Host) powerOn(ctx context.Context, what string) error {
	m, err := h.machine(what)
	if err != nil {
		return err
	}
	release, err := m.acquireFirst(ctx)
	if err != nil {
		return err
	}
	defer release()
	reg, on := m.state()
	if on {
		return nil
	}
	begin := time.Now()
	r, err := h.start(ctx, reg)
	if err != nil {
		return errs.Wrap(err, "cannot power on VM %s", reg.Name)
	}
	h.watch(m, r)
	h.log.LogAttrs(ctx, slog.LevelInfo, "VM powered on", slog.String("vm", reg.Name),
		slog.Duration("took", time.Since(begin)), slog.Duration("qemu_took", r.startTook))
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
	vm, volumes, err := h.startVolumes(ctx, reg, dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, volumes.Kill(context.WithoutCancel(ctx)), volumes.Close())
		}
	}()
	config, err := h.qemuConfig(reg, vm, root, dir)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	machine, err := qemu.Start(ctx, config)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%w", err).WithHint("look at the end of its log: %s", filepath.Join(dir, bundle.LogName))
	}
	r := &running{qemu: machine, startTook: time.Since(begin), volumes: volumes, interfaces: map[string]qemu.Interface{}, gone: make(chan struct{})}
	for _, d := range config.Disks {
		r.interfaces[d.ID] = d.Interface
	}
	return r, nil
}

// startVolumes starts the volume process of a VM with all its disks. The process
// holds the VM's lock from then on.
func (h *Host) startVolumes(ctx context.Context, reg registered, dir string) (_ *bundle.VM, _ *volumeproc.Process, err error) {
	lock, err := bundle.Acquire(dir)
	if err != nil {
		return nil, nil, err
	}
	defer lock.Release() // the volume process has it by then
	vm, err := readVM(reg, dir)
	if err != nil {
		return nil, nil, err
	}
	if err := tidy(dir, vm); err != nil { // the next start or change tries again
		h.log.LogAttrs(ctx, slog.LevelWarn, "former file of a disk not deleted", slog.String("vm", reg.Name), slog.Any("err", err))
	}
	if err := notEncrypting(vm, all(vm)); err != nil {
		return nil, nil, err
	}
	volumes, err := volumeproc.Start(ctx, volumeproc.Config{VM: reg.Name, RunDir: h.runDir(reg), Hold: []*os.File{lock.File()}})
	if err != nil {
		return nil, nil, errs.New(errs.Unavailable, "cannot start its volume process: %w", err)
	}
	if status, err := volumes.Status(ctx); err == nil && status.Sandbox.Missing != nil {
		h.log.LogAttrs(ctx, slog.LevelWarn, "the kernel lacks walls of the volume process's sandbox", slog.String("vm", reg.Name), slog.Any("missing", status.Sandbox.Missing))
	}
	for _, d := range vm.Disks {
		err := h.addDisk(ctx, volumes, dir, d)
		if err == nil && fitsVhostUser(h.runDir(reg), d.Name) {
			// Also for a guest on NBD: the process need not know what it is.
			err = volumes.ServeVhostUser(ctx, d.Name)
		}
		if err != nil {
			err = errs.Wrap(err, "disk %s", d.Name)
			return nil, nil, errors.Join(err, volumes.Kill(context.WithoutCancel(ctx)), volumes.Close())
		}
	}
	return vm, volumes, nil
}

// addDisk opens a disk and gives it to the volume process, with its DEK, or with
// both if a deep rekey is under way.
func (h *Host) addDisk(ctx context.Context, volumes *volumeproc.Process, dir string, d bundle.Disk) error {
	path := filepath.Join(dir, d.File)
	spec := volumectl.Disk{Name: d.Name, Format: volumectl.Raw, SizeMin: d.SizeBytes}
	var dek, next *keymem.Key
	if d.Format == bundle.FormatLUKS {
		spec.Format = volumectl.LUKS
		var err error
		if dek, next, err = h.unwrap(ctx, path); err != nil {
			return err
		}
		defer dek.Close()
		defer next.Close()
	}
	// A folder from elsewhere must not make us open anything but its own files.
	flags := os.O_RDWR | unix.O_NOFOLLOW | unix.O_NONBLOCK
	if h.cfg.DirectIO {
		flags |= unix.O_DIRECT // the volume process sees it by the descriptor
	}
	file, err := os.OpenFile(path, flags, 0)
	if h.cfg.DirectIO && errors.Is(err, unix.EINVAL) {
		return errs.New(errs.Invalid, "the file system of %s does no direct I/O", path).
			WithHint("set direct_io = false in the host's configuration, or move the VM to another datastore")
	}
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err == nil {
		err = isStorage(info)
	}
	if err != nil {
		return err
	}
	return volumes.AddDisk(ctx, spec, file, dek, next)
}

// unwrap returns the DEK of the volume at path, and the one that a deep rekey
// leads to, or nil. The caller closes them.
func (h *Host) unwrap(ctx context.Context, path string) (dek, next *keymem.Key, err error) {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true, NoFollow: true})
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	dek, next, _, err = recrypt.UnwrapDEKs(ctx, file, h.kek)
	return dek, next, err
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
	c.Disks, err = h.qemuDisks(reg, vm)
	return c, err
}

// macOf returns a MAC address in QEMU's range that stays with the VM.
func macOf(id uuid.UUID) string {
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", id[13], id[14], id[15])
}

// runDir is where the sockets of a VM are. Its name is short, because a socket's
// path must be.
func (h *Host) runDir(reg registered) string { return filepath.Join(h.cfg.RunDir, reg.ID[:runNameLen]) }

// runNameLen is how much of a VM's id names its folder for sockets, in bytes.
const runNameLen = 13

// reviveEvery is how long a volume process that cannot be started is waited for
// before the next attempt. QEMU holds the guest's requests back meanwhile.
const reviveEvery = time.Second

// watch makes the VM known as powered on, starts its volume process again if it
// ends before QEMU, and cleans up when the VM is off.
func (h *Host) watch(m *machine, r *running) {
	m.setRunning(r)
	h.watchers.Go(func() {
		reg, _ := m.state()
		log := h.log.With(slog.String("vm", reg.Name))
		for {
			var lost <-chan struct{}
			retry := time.NewTimer(reviveEvery)
			if p := r.process(); p != nil {
				lost = p.Ended()
				retry.Stop()
			}
			select {
			case <-h.life.Done():
				retry.Stop()
				return // the agent ends; the VM does not
			case <-r.qemu.Ended():
				retry.Stop()
				h.cleanUp(m, r, log)
				return
			case <-lost:
			case <-retry.C:
			}
			h.revive(reg, r, log)
		}
	})
}

// revive starts a VM's volume process again. The guest waits and loses nothing:
// what it was told is durable is on disk, and QEMU repeats the rest.
func (h *Host) revive(reg registered, r *running, log *slog.Logger) {
	if old := r.process(); old != nil {
		log.LogAttrs(h.life, slog.LevelError, "volume process ended before its VM; it is started again", slog.String("status", old.Exit()))
		old.Close()
		r.setProcess(nil)
	}
	r.folder.Lock()
	defer r.folder.Unlock()
	dir, err := h.folder(reg)
	if err == nil {
		var volumes *volumeproc.Process
		if _, volumes, err = h.startVolumes(h.life, reg, dir); err == nil {
			r.setProcess(volumes)
			log.LogAttrs(h.life, slog.LevelInfo, "volume process runs again")
			return
		}
	}
	log.LogAttrs(h.life, slog.LevelError, "volume process not started; it is tried again", slog.Any("err", err))
}

// cleanUp ends the volume process of a VM that is off and makes that known.
func (h *Host) cleanUp(m *machine, r *running, log *slog.Logger) {
	if exit, err := r.qemu.Wait(h.life); err == nil {
		level := slog.LevelInfo
		if exit.Reason == "" && !r.wasOrdered() {
			level = slog.LevelError
		}
		log.LogAttrs(h.life, level, "VM powered off", slog.String("reason", exit.Reason), slog.String("status", exit.Status), slog.String("output", exit.Log))
	}
	if p := r.process(); p != nil {
		if err := p.Stop(h.life); err != nil {
			log.LogAttrs(h.life, slog.LevelError, "volume process did not end well", slog.Any("err", err))
			_ = p.Kill(h.life) // it must not keep the VM's lock
		}
	}
	r.letGo()
	m.setRunning(nil)
	close(r.gone)
	h.notify()
}

// letGo closes what the agent holds of a VM; the VM itself is not touched.
func (r *running) letGo() {
	r.qemu.Close()
	if p := r.process(); p != nil {
		p.Close()
	}
}

// letGo is called when the agent ends.
func (h *Host) letGo() {
	for _, m := range h.all() {
		if r := m.run(); r != nil {
			r.letGo()
		}
	}
}

// adoptAll finds the VMs that an earlier agent started. A volume process that
// is missing is started again; one without its QEMU is ended, because it would
// keep the VM locked.
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
		case qemuErr == nil:
			if volErr != nil {
				volumes = nil // started by the watcher
			} else if err := h.settle(ctx, reg, volumes); err != nil {
				h.log.LogAttrs(ctx, slog.LevelError, "conversion of a disk not settled", slog.String("vm", reg.Name), slog.Any("err", err))
			}
			interfaces, err := machine.Disks(ctx)
			if err != nil { // told to users only
				h.log.LogAttrs(ctx, slog.LevelWarn, "cannot tell how a guest reaches its disks", slog.String("vm", reg.Name), slog.Any("err", err))
			}
			h.watch(m, &running{qemu: machine, volumes: volumes, interfaces: interfaces, gone: make(chan struct{})})
			h.log.LogAttrs(ctx, slog.LevelInfo, "running VM found", slog.String("vm", reg.Name))
		case volErr == nil:
			h.log.LogAttrs(ctx, slog.LevelInfo, "volume process without its VM is ended", slog.String("vm", reg.Name))
			if err := volumes.Stop(ctx); err != nil {
				_ = volumes.Kill(ctx)
			}
			volumes.Close()
		}
	}
}
