package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"strongroom/internal/machine/qemu/qmp"
)

// QOM paths, as QEMU names its objects.
const (
	peripherals = "/machine/peripheral"
	portType    = "child<pcie-root-port>"
	nbdType     = "child<" + nbdDriver + ">"
	vhostType   = "child<" + vhostDriver + ">"
)

// child is an entry of qom-list.
type child struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

func (m *Machine) devices(ctx context.Context) ([]child, error) {
	var devices []child
	err := m.do(ctx, "qom-list", map[string]any{"path": peripherals}, &devices)
	return devices, err
}

// Disks returns the IDs of the disks that the machine has, each with its
// interface.
func (m *Machine) Disks(ctx context.Context) (map[string]Interface, error) {
	devices, err := m.devices(ctx)
	if err != nil {
		return nil, err
	}
	disks := make(map[string]Interface)
	for _, d := range devices {
		if id, ok := strings.CutPrefix(d.Name, devicePrefix); ok && d.isDisk() {
			disks[id] = NBD
			if d.Type == vhostType {
				disks[id] = VhostUser
			}
		}
	}
	return disks, nil
}

func (c *child) isDisk() bool { return c.Type == nbdType || c.Type == vhostType }

// AddDisk attaches a disk to the running machine. Its server must be up. It
// returns [ErrExists] or [ErrNoSlot] where that is the reason. When it fails,
// nothing of the disk is left.
func (m *Machine) AddDisk(ctx context.Context, d Disk) error {
	m.plug.Lock()
	defer m.plug.Unlock()
	if err := m.addDisk(ctx, &d); err != nil {
		return fmt.Errorf("cannot attach disk %s: %w", d.ID, err)
	}
	return nil
}

func (m *Machine) addDisk(ctx context.Context, d *Disk) error {
	if err := d.validate(); err != nil {
		return err
	}
	bus, err := m.freePort(ctx, d)
	if err != nil {
		return err
	}
	// Undone also if ctx ends meanwhile.
	undo := context.WithoutCancel(ctx)
	if d.Interface == VhostUser {
		if err := d.reach(ctx); err != nil {
			return err
		}
		if err := m.do(ctx, "chardev-add", d.chardevAdd(), nil); err != nil {
			return err
		}
		if err := m.do(ctx, "device_add", d.device(bus, 0), nil); err != nil {
			return errors.Join(err, m.do(undo, "chardev-remove", map[string]any{"id": d.charID()}, nil))
		}
		return nil
	}
	if err := m.do(ctx, "object-add", d.iothread(), nil); err != nil {
		return err
	}
	if err := m.do(ctx, "blockdev-add", d.blockdev(), nil); err != nil {
		return errors.Join(err, m.removeParts(undo, d, false))
	}
	if err := m.do(ctx, "device_add", d.device(bus, 0), nil); err != nil {
		return errors.Join(err, m.removeParts(undo, d, true))
	}
	return nil
}

// freePort returns a root port without a device, or "" on a machine whose
// first PCI bus takes new devices itself.
func (m *Machine) freePort(ctx context.Context, d *Disk) (string, error) {
	devices, err := m.devices(ctx)
	if err != nil {
		return "", err
	}
	var ports []string
	used := make(map[string]bool)
	for _, device := range devices {
		switch {
		case device.Type == portType:
			ports = append(ports, device.Name)
		case device.isDisk():
			if device.Name == d.deviceID() {
				return "", ErrExists
			}
			var bus string
			if err := m.do(ctx, "qom-get", map[string]any{"path": peripherals + "/" + device.Name, "property": "parent_bus"}, &bus); err != nil {
				return "", err
			}
			for part := range strings.SplitSeq(bus, "/") {
				used[part] = true
			}
		}
	}
	if len(ports) == 0 {
		return "", nil
	}
	slices.Sort(ports)
	for _, port := range ports {
		if !used[port] {
			return port, nil
		}
	}
	return "", ErrNoSlot
}

// RemoveDisk detaches a disk from the running machine: it asks the guest to
// let go and waits until it has. A guest may not answer, above all while it
// boots: then it returns ctx's error, and the disk may still go later. It
// returns [ErrNotFound] for a disk that the machine does not have.
func (m *Machine) RemoveDisk(ctx context.Context, id string) error {
	m.plug.Lock()
	defer m.plug.Unlock()
	d := Disk{ID: id}
	if err := m.removeDisk(ctx, &d); err != nil {
		return fmt.Errorf("cannot detach disk %s: %w", id, err)
	}
	return nil
}

func (m *Machine) removeDisk(ctx context.Context, d *Disk) error {
	if !diskID.MatchString(d.ID) {
		return ErrNotFound
	}
	watch := m.Watch("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
	defer watch.Close()
	err := m.do(ctx, "device_del", map[string]any{"id": d.deviceID()}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) && refused.Class == "DeviceNotFound" {
		// Gone from the guest in an earlier call that gave up waiting.
		if m.removeAll(ctx, d) == nil {
			return nil
		}
		return ErrNotFound
	}
	if err != nil {
		return err
	}
	for {
		select {
		case event, ok := <-watch.Events():
			if !ok {
				return ErrNotRunning
			}
			var data struct{ Device string }
			if json.Unmarshal(event.Data, &data) != nil || data.Device != d.deviceID() {
				continue // such as the virtio device inside the PCI device
			}
			if event.Name != "DEVICE_DELETED" {
				return errors.New("the guest refused")
			}
			return m.removeAll(ctx, d)
		case <-ctx.Done():
			return fmt.Errorf("the guest did not let go: %w", ctx.Err())
		}
	}
}

// removeAll removes what stands behind the device of a disk of either interface.
func (m *Machine) removeAll(ctx context.Context, d *Disk) error {
	var chardevs []struct{ Label string }
	if err := m.do(ctx, "query-chardev", nil, &chardevs); err != nil {
		return err
	}
	for _, c := range chardevs {
		if c.Label == d.charID() {
			return m.do(ctx, "chardev-remove", map[string]any{"id": d.charID()}, nil)
		}
	}
	return m.removeParts(ctx, d, true)
}

// reach makes sure that somebody serves a vhost-user disk: QEMU would wait for
// its server without end, and do nothing else meanwhile.
func (d *Disk) reach(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", d.Socket)
	if err != nil {
		return fmt.Errorf("disk %s is not served: %w", d.ID, err)
	}
	return conn.Close()
}

// removeParts removes what stands behind the device of an NBD disk.
func (m *Machine) removeParts(ctx context.Context, d *Disk, node bool) error {
	var nodeErr error
	if node {
		nodeErr = m.do(ctx, "blockdev-del", map[string]any{"node-name": d.nodeName()}, nil)
	}
	return errors.Join(nodeErr, m.do(ctx, "object-del", map[string]any{"id": d.threadID()}, nil))
}
