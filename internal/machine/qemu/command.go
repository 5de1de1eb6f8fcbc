package qemu

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// slotsFree is how many disks can be added to a running q35 machine beyond
// those it starts with: each needs a PCIe root port that exists from the start.
const slotsFree = 4

// arguments returns QEMU's command line without the program. Options that QEMU
// takes as JSON are given so, which needs no escaping.
func (c *Config) arguments() []string {
	accel := c.Accel
	if accel == "" {
		accel = TCG
	}
	args := []string{
		"-name", "guest=" + escape(c.Name),
		"-uuid", c.UUID.String(),
		"-nodefaults", "-no-user-config",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-S", // devices are complete and QMP is up before the first instruction
		"-machine", c.machine() + ",dump-guest-core=off" + c.memoryBackend(),
		"-accel", string(accel),
		"-cpu", cpuModel(accel),
		"-smp", c.smp(accel),
		"-m", strconv.Itoa(c.MemoryMiB) + "M",
		"-display", "none",
		"-rtc", "base=utc,driftfix=slew",
		"-boot", "strict=on",
		"-msg", "timestamp=on",
		"-chardev", "socket,id=qmp,path=" + escape(Socket(c.RunDir)) + ",server=on,wait=off",
		"-mon", "chardev=qmp,mode=control",
		"-object", `{"qom-type":"rng-random","id":"rng","filename":"/dev/urandom"}`,
		"-device", `{"driver":"virtio-rng-pci","rng":"rng"}`,
	}
	serial := "socket,id=serial,path=" + escape(serialSocket(c.RunDir)) + ",server=on,wait=off"
	if c.SerialLog != "" {
		args = append(args, "-add-fd", "fd=3,set=1") // see launch
		serial += ",logappend=on,logfile=/dev/fdset/1"
	}
	args = append(args, "-chardev", serial, "-serial", "chardev:serial")

	if c.sharesMemory() {
		args = append(args, "-object", encode(c.memory()))
	}
	if c.Kernel != "" {
		args = append(args, "-kernel", c.Kernel)
		if c.Initrd != "" {
			args = append(args, "-initrd", c.Initrd)
		}
		if c.Append != "" {
			args = append(args, "-append", c.Append)
		}
	}
	if c.machine() == "q35" {
		for i := range len(c.Disks) + slotsFree {
			args = append(args, "-device", rootPort(i))
		}
	}
	boot := 0
	for i, d := range c.Disks {
		bus := ""
		if c.machine() == "q35" {
			bus = portName(i)
		}
		if d.Bootable {
			boot++
		}
		if d.Interface == VhostUser {
			args = append(args, "-chardev", d.chardev())
		} else {
			args = append(args, "-object", encode(d.iothread()), "-blockdev", encode(d.blockdev()))
		}
		args = append(args, "-device", encode(d.device(bus, boot)))
	}
	for i, n := range c.NICs {
		args = append(args,
			"-netdev", encode(map[string]any{"type": "user", "id": fmt.Sprintf("net%d", i)}),
			"-device", encode(map[string]any{"driver": "virtio-net-pci", "netdev": fmt.Sprintf("net%d", i), "mac": n.MAC}))
	}
	return args
}

func (c *Config) machine() string {
	if c.Machine == "" {
		return "q35"
	}
	return c.Machine
}

const memoryID = "memory"

// memory returns guest memory that vhost-user servers can map.
func (c *Config) memory() map[string]any {
	return map[string]any{"qom-type": "memory-backend-memfd", "id": memoryID, "size": int64(c.MemoryMiB) << 20, "share": true, "dump": false}
}

func (c *Config) memoryBackend() string {
	if c.sharesMemory() {
		return ",memory-backend=" + memoryID
	}
	return ""
}

// smp returns the number of virtual CPUs. Under translation there is room for a
// second one: QEMU before 8.1 leaves the guest's memory barriers out where there
// can be only one, although threads and processes that serve its rings run beside
// it. A kick is then lost now and then, and the guest waits for ever.
func (c *Config) smp(accel Accel) string {
	if accel == TCG && c.CPUs == 1 {
		return "1,maxcpus=2"
	}
	return strconv.Itoa(c.CPUs)
}

// cpuModel returns the model with everything that the accelerator can do.
func cpuModel(accel Accel) string {
	if accel == KVM {
		return "host"
	}
	return "max"
}

func portName(i int) string { return fmt.Sprintf("rp%d", i) }

// rootPort returns the i-th hot-plug port. Eight of them share one PCI slot as
// its functions; slots 0 to 3 and 31 of q35 are the chipset's and ours.
func rootPort(i int) string {
	return encode(map[string]any{
		"driver": "pcie-root-port", "id": portName(i), "chassis": i + 1,
		"addr": fmt.Sprintf("0x%x.%d", 0x10+i/8, i%8), "multifunction": true,
		// Our devices have no I/O ports, and there are only 64 KiB of them.
		"io-reserve": 0,
	})
}

// The names of a disk's parts in QEMU.
func (d *Disk) threadID() string { return "io-" + d.ID }
func (d *Disk) nodeName() string { return "nbd-" + d.ID }
func (d *Disk) charID() string   { return "vhost-" + d.ID }
func (d *Disk) deviceID() string { return devicePrefix + d.ID }

const (
	devicePrefix = "disk-"
	nbdDriver    = "virtio-blk-pci"
	vhostDriver  = "vhost-user-blk-pci"
)

func (d *Disk) iothread() map[string]any {
	return map[string]any{"qom-type": "iothread", "id": d.threadID()}
}

func (d *Disk) blockdev() map[string]any {
	return map[string]any{
		"driver": "nbd", "node-name": d.nodeName(), "export": d.Export,
		"server":          map[string]any{"type": "unix", "path": d.Socket},
		"reconnect-delay": reconnectDelay,
		"read-only":       d.ReadOnly, "auto-read-only": false,
		"discard": "unmap",
	}
}

// vhostReconnect is how often QEMU looks for a vhost-user server that has gone, in
// seconds. It does so without end; the guest's requests wait.
const vhostReconnect = 1

// chardev returns the connection to a vhost-user server, for the command line,
// which takes no JSON here.
func (d *Disk) chardev() string {
	return fmt.Sprintf("socket,id=%s,path=%s,reconnect=%d", d.charID(), escape(d.Socket), vhostReconnect)
}

// chardevAdd returns the same for QMP.
func (d *Disk) chardevAdd() map[string]any {
	return map[string]any{"id": d.charID(), "backend": map[string]any{"type": "socket", "data": map[string]any{
		"addr":   map[string]any{"type": "unix", "data": map[string]any{"path": d.Socket}},
		"server": false, "reconnect": vhostReconnect,
	}}}
}

// device returns the guest's side of the disk. boot is its place in the boot
// order if it is bootable; bus may be empty for the default one.
func (d *Disk) device(bus string, boot int) map[string]any {
	device := map[string]any{
		"driver": nbdDriver, "id": d.deviceID(), "drive": d.nodeName(),
		"iothread": d.threadID(), "serial": d.ID,
		// The guest decides what an I/O error means; QEMU does not stop it.
		"rerror": "report", "werror": "report",
	}
	if d.Interface == VhostUser { // the server has the serial number, and reports errors
		device = map[string]any{"driver": vhostDriver, "id": d.deviceID(), "chardev": d.charID(), "num-queues": d.Queues}
	}
	if bus != "" {
		device["bus"] = bus
	}
	if d.Bootable && boot > 0 {
		device["bootindex"] = boot
	}
	return device
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings, numbers and booleans always encode
	}
	return string(b)
}

// escape doubles commas, which end a value in QEMU's key=value options.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }
