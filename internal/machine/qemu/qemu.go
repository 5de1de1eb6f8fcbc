// Package qemu runs virtual machines: one QEMU process each, controlled by QMP
// over a unix socket.
//
// Invariants: no secret is ever in QEMU's command line, environment or files
// (disks are reached over unix sockets, already decrypted by the volume process);
// QEMU runs under its seccomp sandbox, without defaults and without
// core dumps of guest memory; it runs in its own session and lives on when this
// program ends, to be found again by [Adopt].
//
// A [Machine] is safe for concurrent use. Its goroutines end with Close, or with
// QEMU.
package qemu

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/google/uuid"
)

// Errors that callers branch on.
var (
	// ErrNotRunning: there is no such QEMU process (any more).
	ErrNotRunning = errors.New("virtual machine is not running")
	// ErrRunning: a QEMU process already uses the run directory.
	ErrRunning = errors.New("virtual machine is already running")
	// ErrNoSlot: every slot for disks is taken.
	ErrNoSlot = errors.New("no free slot for a disk")
	// ErrExists: the machine already has a disk of that name.
	ErrExists = errors.New("disk is already attached")
	// ErrNotFound: the machine has no disk of that name.
	ErrNotFound = errors.New("disk is not attached")
)

// Accel is how guest instructions are run.
type Accel string

// The accelerators.
const (
	KVM Accel = "kvm" // by the processor
	TCG Accel = "tcg" // translated, many times slower
)

// Config describes a machine. It holds no secret.
type Config struct {
	Name      string    // for people and the process list: no control characters, 1 to 128 bytes
	UUID      uuid.UUID // the guest sees it as its system UUID; not zero
	CPUs      int       // 1 to CPUsMax
	MemoryMiB int       // 16 to MemoryMiBMax
	Machine   string    // "q35" or "pc"; empty is q35
	Accel     Accel     // from [Prober]; empty is TCG
	Disks     []Disk    // at most DisksMax
	NICs      []NIC     // at most NICsMax

	// Kernel boots a Linux kernel directly instead of from a disk: paths of the
	// kernel and, optionally, an initramfs, and the kernel's command line.
	Kernel, Initrd, Append string

	// RunDir holds the machine's sockets and QEMU's own log. It is made if it
	// is missing; only its owner may enter. One machine per directory. Its
	// path must leave room for socket names: at most 90 bytes.
	RunDir string
	// SerialLog gets what the guest writes to its first serial port, appended: a
	// regular file, made if it is missing. The port can also be used live at
	// RunDir/serial.sock. Empty: no log.
	SerialLog string

	// Paused leaves the machine stopped before its first instruction; it runs
	// on [Machine.Cont].
	Paused bool

	// Binary is QEMU's path; empty looks for qemu-system-x86_64 in PATH.
	Binary string
}

// Limits of a machine.
const (
	CPUsMax      = 288
	MemoryMiBMax = 16 << 20
	DisksMax     = 64
	NICsMax      = 8
	QueuesMax    = 8
)

// Interface is how a guest reaches a disk's server.
type Interface string

// The interfaces.
const (
	// NBD: QEMU passes the guest's requests on. It works with every QEMU.
	NBD Interface = "nbd"
	// VhostUser: the server works on the guest's memory, and no data go through
	// QEMU. All of the guest's memory is shared with it.
	VhostUser Interface = "vhost-user"
)

// Disk is a virtual disk, served on a unix socket.
type Disk struct {
	// ID names the disk in QEMU and is its serial number in the guest
	// (/dev/disk/by-id/virtio-ID): 1 to 20 of a-z, 0-9, '.', '_', '-', the
	// first a letter or digit.
	ID string
	// Interface is that of the server at Socket; empty is NBD. A VhostUser disk
	// can be added only to a machine that was started with one. The ID is then
	// the server's business: it should tell the guest the same serial number.
	Interface Interface
	Socket    string
	Export    string // name at the NBD server
	Queues    int    // of a VhostUser disk: 1 to QueuesMax, and at most the server's
	// Bootable disks are tried in their order by the firmware.
	Bootable bool
	ReadOnly bool
}

// NIC is a virtual network card on QEMU's user-mode network: the guest reaches
// out, nothing reaches in.
type NIC struct {
	MAC string // such as 52:54:00:12:34:56
}

// sharesMemory reports whether the guest's memory must be one that other
// processes can map.
func (c *Config) sharesMemory() bool {
	return slices.ContainsFunc(c.Disks, func(d Disk) bool { return d.Interface == VhostUser })
}

// reconnectDelay is how long QEMU holds the guest's requests while the NBD
// server is away, in seconds, before it fails them: enough to restart a volume
// process. Guests do not time out requests to a virtio disk; they only wait.
const reconnectDelay = 60

var (
	diskID  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,19}$`)
	macForm = regexp.MustCompile(`^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$`)
)

// SocketPathMax is what fits in sockaddr_un with its terminating zero, in bytes.
const SocketPathMax = 107

func (c *Config) validate() error {
	switch {
	case c.Name == "" || len(c.Name) > 128 || strings.ContainsFunc(c.Name, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("name %q must have 1 to 128 printable characters", c.Name)
	case c.UUID == uuid.Nil:
		return errors.New("UUID is missing")
	case c.CPUs < 1 || c.CPUs > CPUsMax:
		return fmt.Errorf("%d CPUs: it must be 1 to %d", c.CPUs, CPUsMax)
	case c.MemoryMiB < 16 || c.MemoryMiB > MemoryMiBMax:
		return fmt.Errorf("%d MiB of memory: it must be 16 to %d", c.MemoryMiB, MemoryMiBMax)
	case c.Machine != "" && c.Machine != "q35" && c.Machine != "pc":
		return fmt.Errorf("machine type %q: it must be q35 or pc", c.Machine)
	case c.Accel != "" && c.Accel != KVM && c.Accel != TCG:
		return fmt.Errorf("accelerator %q: it must be kvm or tcg", c.Accel)
	case len(c.Disks) > DisksMax:
		return fmt.Errorf("%d disks: at most %d", len(c.Disks), DisksMax)
	case len(c.NICs) > NICsMax:
		return fmt.Errorf("%d network cards: at most %d", len(c.NICs), NICsMax)
	case !filepath.IsAbs(c.RunDir):
		return fmt.Errorf("run directory %q must be an absolute path", c.RunDir)
	case len(serialSocket(c.RunDir)) > SocketPathMax:
		return fmt.Errorf("run directory %q has a path too long for a unix socket", c.RunDir)
	case c.Kernel == "" && (c.Initrd != "" || c.Append != ""):
		return errors.New("an initramfs or kernel command line needs a kernel")
	}
	seen := make(map[string]bool)
	for _, d := range c.Disks {
		if err := d.validate(); err != nil {
			return err
		}
		if seen[d.ID] {
			return fmt.Errorf("disk %s: %w", d.ID, ErrExists)
		}
		seen[d.ID] = true
	}
	for _, n := range c.NICs {
		if !macForm.MatchString(n.MAC) {
			return fmt.Errorf("MAC address %q must be six lower-case octets, not multicast", n.MAC)
		}
	}
	return nil
}

func (d *Disk) validate() error {
	switch {
	case !diskID.MatchString(d.ID):
		return fmt.Errorf("disk ID %q must be 1 to 20 of a-z, 0-9, '.', '_' and '-'", d.ID)
	case d.Interface != "" && d.Interface != NBD && d.Interface != VhostUser:
		return fmt.Errorf("disk %s: interface %q: it must be nbd or vhost-user", d.ID, d.Interface)
	case d.Interface == VhostUser && (d.Queues < 1 || d.Queues > QueuesMax):
		return fmt.Errorf("disk %s: %d queues: they must be 1 to %d", d.ID, d.Queues, QueuesMax)
	case !filepath.IsAbs(d.Socket) || len(d.Socket) > SocketPathMax:
		return fmt.Errorf("disk %s: socket %q must be an absolute path of at most %d bytes", d.ID, d.Socket, SocketPathMax)
	}
	return nil
}

// Socket returns the path of the QMP socket of the machine in runDir.
func Socket(runDir string) string { return filepath.Join(runDir, "qmp.sock") }

func serialSocket(runDir string) string { return filepath.Join(runDir, "serial.sock") }

func logPath(runDir string) string { return filepath.Join(runDir, "qemu.log") }
