package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"strongroom/internal/machine/process"
)

// probeTimeout is how long the probe's guest may take. It needs 0.3 s under KVM; a
// /dev/kvm that does not work can hang for ever, or be a thousand times too slow.
const probeTimeout = 5 * time.Second

// Prober finds out once which accelerator works here.
type Prober struct {
	binary string
	once   sync.Once
	accel  Accel
	why    error
}

// NewProber returns a Prober for the QEMU at path binary, or the one in PATH if
// it is empty.
func NewProber(binary string) *Prober {
	if binary == "" {
		binary = "qemu-system-x86_64"
	}
	return &Prober{binary: binary}
}

// Probe returns [KVM] if a guest really runs under it, else [TCG] and why not
// KVM. The first call takes up to [probeTimeout], later ones no time. It
// does not look at whether TCG works.
func (p *Prober) Probe() (Accel, error) {
	p.once.Do(func() {
		p.accel = KVM
		if p.why = try(p.binary, KVM); p.why != nil {
			p.accel = TCG
		}
	})
	return p.accel, p.why
}

// exitCode is what QEMU makes of 0x10 written to the debug-exit device.
const exitCode = 0x10<<1 | 1

// try boots a guest that ends at once.
func try(binary string, accel Accel) error {
	if accel == KVM {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f.Close()
	}
	dir, err := os.MkdirTemp("", "strongroom-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, bootSector(), 0o600); err != nil {
		return err
	}
	cmd := exec.Command(binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "pc", "-accel", string(accel), "-cpu", cpuModel(accel), "-m", "32M",
		"-drive", "file="+escape(disk)+",format=raw,if=ide,snapshot=on",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=1")
	// To a file: a pipe would have to be read, also from a QEMU that hangs.
	messages, err := os.Create(logPath(dir))
	if err != nil {
		return err
	}
	defer messages.Close()
	cmd.Stdout, cmd.Stderr = messages, messages
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
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
		return fmt.Errorf("a guest did not boot within %v", probeTimeout)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitCode {
		return nil
	}
	return fmt.Errorf("a guest did not boot (%v): %s", err, process.LogTail(logPath(dir)))
}
