package host

import (
	"fmt"

	"strongroom/internal/block/vhostuser"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/qemu"
	"strongroom/internal/machine/volumeproc"
)

// interfaceAuto is what users call the choice that a VM leaves to its host.
const interfaceAuto = "auto"

// qemuDisks returns the disks of a VM as QEMU reaches them: all over vhost-user,
// or all over NBD.
func (h *Host) qemuDisks(reg registered, vm *bundle.VM) ([]qemu.Disk, error) {
	over := qemu.NBD
	if vm.Settings.DiskInterface != bundle.InterfaceNBD && len(vm.Disks) > 0 {
		switch err := h.offersVhostUser(reg, vm); {
		case err == nil:
			over = qemu.VhostUser
		case vm.Settings.DiskInterface == bundle.InterfaceVhostUser:
			return nil, errs.New(errs.Unavailable, "its disks cannot be reached over vhost-user on this host: %w", err).
				WithHint("use another host, or a VM with --disk-interface auto")
		}
	}
	var disks []qemu.Disk
	for i, d := range vm.Disks {
		q := qemu.Disk{ID: d.Name, Interface: over, Bootable: i == 0}
		if over == qemu.VhostUser {
			// One for each processor: the guest's driver then needs no lock.
			q.Socket, q.Queues = volumeproc.VhostSocket(h.runDir(reg), d.Name), min(vm.Settings.CPUs, qemu.QueuesMax)
		} else {
			q.Socket, q.Export = volumeproc.NBDSocket(h.runDir(reg)), d.Name
		}
		disks = append(disks, q)
	}
	return disks, nil
}

// offersVhostUser returns why this host cannot serve the VM's disks over
// vhost-user, or nil if it can.
func (h *Host) offersVhostUser(reg registered, vm *bundle.VM) error {
	for _, d := range vm.Disks {
		if !fitsVhostUser(h.runDir(reg), d.Name) {
			return fmt.Errorf("the path of the socket of disk %s would be too long", d.Name)
		}
	}
	return h.prober.VhostUser()
}

// fitsVhostUser reports whether a disk's name can be its serial number and part
// of a socket's path.
func fitsVhostUser(runDir, disk string) bool {
	return len(disk) <= vhostuser.MaxSerial && len(volumeproc.VhostSocket(runDir, disk)) <= qemu.SocketPathMax
}
