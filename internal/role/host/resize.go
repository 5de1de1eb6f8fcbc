package host

import (
	"context"
	"errors"
	"log/slog"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/qemu"
	"strongroom/internal/machine/recrypt"
)

// resizeDisk makes a disk of a VM larger, in any power state. A guest that runs
// sees it at once; what is new reads as zeros. The file is durable at its new size
// before vm.json tells of it, so an interrupted call can be made again.
func (h *Host) resizeDisk(ctx context.Context, id, disk string, size int64) error {
	m, err := h.machine(id)
	if err != nil {
		return err
	}
	if _, on := m.state(); on {
		err = h.resizeRunning(ctx, m, disk, size)
	} else {
		err = h.resizeOffline(ctx, id, disk, size)
	}
	return errs.Wrap(err, "cannot resize %s", disk)
}

// growing returns the index of the disk, which may be resized to size bytes, and
// vm.json with that size.
func (o *offline) growing(disk string, size int64) (int, *bundle.VM, error) {
	indices, err := chosen(o.vm, []string{disk})
	if err != nil {
		return 0, nil, err
	}
	i := indices[0]
	if d := o.vm.Disks[i]; size < d.SizeBytes {
		return 0, nil, errs.New(errs.Invalid, "a disk cannot shrink: it has %d bytes, more than %d", d.SizeBytes, size)
	}
	next := o.vm.Clone()
	next.Disks[i].SizeBytes = size
	if err := next.Validate(); err != nil {
		return 0, nil, err
	}
	return i, next, o.notRekeying([]string{disk})
}

// resizeRunning has the volume process resize a disk that its guest uses.
func (h *Host) resizeRunning(ctx context.Context, m *machine, disk string, size int64) error {
	release, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	running := m.run()
	if running == nil {
		return errs.New(errs.Unavailable, "the VM was powered off meanwhile").WithHint("try again")
	}
	o, err := h.online(m)
	if err != nil {
		return err
	}
	i, next, err := o.growing(disk, size)
	if err != nil {
		return err
	}
	if over := running.interfaces[disk]; over != qemu.VhostUser {
		return errs.New(errs.InvalidState, "the guest reaches it over NBD, which does not tell it of a new size").WithHint("strongroom vm power-off %s", o.vm.Name)
	}
	p := running.process()
	if p == nil {
		return errs.New(errs.Unavailable, "the volume process is being started again").WithHint("try again")
	}
	if err := p.Resize(ctx, disk, size); err != nil {
		return err
	}
	if err := p.Flush(ctx, disk); err != nil {
		return err
	}
	return h.resized(ctx, o, i, next)
}

func (h *Host) resizeOffline(ctx context.Context, id, disk string, size int64) error {
	o, err := h.takeOffline(ctx, id, "resizing a disk")
	if err != nil {
		return err
	}
	defer o.release()
	i, next, err := o.growing(disk, size)
	if err != nil {
		return err
	}
	dev, err := h.openDisk(ctx, o, o.vm.Disks[i])
	if err != nil {
		return err
	}
	if size < dev.Size() {
		err = errs.New(errs.Invalid, "a disk cannot shrink: it has %d bytes, more than %d", dev.Size(), size)
	} else if err = dev.Resize(size); err == nil {
		err = dev.Flush()
	}
	if err := errors.Join(err, dev.Close()); err != nil {
		return err
	}
	return h.resized(ctx, o, i, next)
}

func (h *Host) openDisk(ctx context.Context, o *offline, d bundle.Disk) (blockdev.Resizer, error) {
	if d.Format != bundle.FormatLUKS {
		return o.folder().Open(d.File)
	}
	v, _, err := recrypt.OpenVolume(ctx, o.folder(), d.File, h.kek)
	return v, err
}

// resized records the new size of a disk.
func (h *Host) resized(ctx context.Context, o *offline, i int, next *bundle.VM) error {
	if err := bundle.Write(o.dir, next); err != nil {
		return err
	}
	d := next.Disks[i]
	h.log.LogAttrs(ctx, slog.LevelInfo, "disk resized", slog.String("vm", next.Name), slog.String("disk", d.Name), slog.Int64("bytes", d.SizeBytes))
	return nil
}
