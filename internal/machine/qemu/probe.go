package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/machine/process"
)

// probeTimeout is how long the probe's guest may take. It needs 0.3 s under KVM; a
// /dev/kvm that does not work can hang for ever, or be a thousand times too slow.
const probeTimeout = 5 * time.Second

// vhostTimeout is how long it may take without acceleration: 1 s on a quiet
// machine. What cannot work ends at once.
const vhostTimeout = 30 * time.Second

// Prober finds out once what works here.
type Prober struct {
	binary string
	dir    string
	once   sync.Once
	accel  Accel
	why    error

	vhostOnce sync.Once
	vhostWhy  error
}

// NewProber returns a Prober for the QEMU at path binary, or the one in PATH if
// it is empty. The folder at path dir is the Prober's own, and there only while it
// tries something; what a killed process left of it is removed.
func NewProber(binary, dir string) *Prober {
	if binary == "" {
		binary = "qemu-system-x86_64"
	}
	return &Prober{binary: binary, dir: dir}
}

// Probe returns [KVM] if a guest really runs under it, else [TCG] and why not
// KVM. The first call takes up to [probeTimeout], later ones no time. It
// does not look at whether TCG works.
func (p *Prober) Probe() (Accel, error) {
	p.once.Do(func() {
		p.accel = KVM
		if p.why = try(p.binary, p.dir, KVM, probeTimeout); p.why != nil {
			p.accel = TCG
		}
	})
	return p.accel, p.why
}

// VhostUser returns nil if a guest really boots from a disk that this process
// serves over vhost-user, else why not: a QEMU without it, a system without memfd,
// a confinement of QEMU that forbids it. The first call takes a second, later
// ones no time.
func (p *Prober) VhostUser() error {
	accel, _ := p.Probe()
	p.vhostOnce.Do(func() { p.vhostWhy = tryVhostUser(p.binary, p.dir, accel) })
	return p.vhostWhy
}

// exitCode is what QEMU makes of 0x10 written to the debug-exit device.
const exitCode = 0x10<<1 | 1

// try boots a guest that ends at once, if it does in time.
func try(binary, dir string, accel Accel, timeout time.Duration) error {
	if accel == KVM {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f.Close()
	}
	if err := makeAnew(dir); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, bootSector(), 0o600); err != nil {
		return err
	}
	return boot(binary, dir, accel, timeout, "-machine", "pc", "-drive", "file="+escape(disk)+",format=raw,if=ide,snapshot=on")
}

// tryVhostUser boots the same guest from a vhost-user disk of ours.
func tryVhostUser(binary, dir string, accel Accel) (err error) {
	if err := makeAnew(dir); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// SeaBIOS reads nothing from a disk that is smaller than one of its cylinders.
	memory := blockdev.NewMemory(1<<20, 512)
	defer memory.Close()
	if _, err := memory.WriteAt(bootSector(), 0); err != nil {
		return err
	}
	server, err := vhostuser.NewServer(vhostuser.Config{Device: memory, Name: "probe", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	d := Disk{ID: "probe", Interface: VhostUser, Socket: filepath.Join(dir, "vhost.sock"), Queues: 1}
	listener, err := net.Listen("unix", d.Socket)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	defer func() { err = errors.Join(err, server.Close(), <-served) }()
	c := Config{MemoryMiB: 32, Machine: "q35", Disks: []Disk{d}}
	return boot(binary, dir, accel, vhostTimeout, "-machine", c.machine()+c.memoryBackend(), "-object", encode(c.memory()),
		"-chardev", d.chardev(), "-device", encode(d.device("", 1)))
}

func makeAnew(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.MkdirAll(dir, 0o700)
}

// boot runs a QEMU with the debug-exit device, and returns nil if its guest ends
// it by that in time.
func boot(binary, dir string, accel Accel, timeout time.Duration, args ...string) error {
	cmd := exec.Command(binary, append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", string(accel), "-cpu", cpuModel(accel), "-m", "32M", "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
	}, args...)...)
	// To a file: a pipe would have to be read, also from a QEMU that hangs.
	messages, err := os.Create(logPath(dir))
	if err != nil {
		return err
	}
	defer messages.Close()
	cmd.Stdout, cmd.Stderr = messages, messages
	// A guest that hangs must not outlive us and spin. The signal is sent when the
	// thread ends that started it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	select {
	case err = <-ended:
	case <-ctx.Done():
		cmd.Process.Kill()
		select {
		case <-ended:
		case <-time.After(time.Second):
			// Stuck in the kernel; the goroutine waits for it until we end.
		}
		return fmt.Errorf("a guest did not boot within %v", timeout)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitCode {
		return nil
	}
	return fmt.Errorf("a guest did not boot (%v): %s", err, process.LogTail(logPath(dir)))
}
