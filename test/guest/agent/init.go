package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/test/guest/plan"
)

// runInit is the guest's first process. It never returns.
func runInit() {
	kind, text := "done", ""
	if err := boot(); err != nil {
		kind, text = "failed", err.Error()
	}
	report(kind, "-", text)
	unix.Sync()
	// What is in the serial port's buffer would be lost.
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1)
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		panic(err) // the kernel panics with us, and QEMU ends
	}
	select {}
}

func boot() error {
	for _, m := range []struct{ kind, dir string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"tmpfs", "/mnt"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.dir, err)
		}
	}
	p, err := plan.Read(plan.Path)
	if err != nil {
		return err
	}
	for _, name := range p.Modules {
		if err := loadModule(name); err != nil {
			return fmt.Errorf("cannot load module %s: %w", name, err)
		}
	}
	button := new(powerButton)
	if err := button.watch(); err != nil {
		return err
	}
	for _, step := range p.Steps {
		if err := runStep(step, button); err != nil {
			report("fail", step.Name, err.Error())
			return fmt.Errorf("step %s", step.Name)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// runStep runs one step in a shell of its own, which gets SIGTERM when the
// power button is pressed. The steps that follow run all the same: they unmount.
func runStep(step plan.Step, button *powerButton) error {
	report("start", step.Name, "")
	began := time.Now()
	// With a trap, the shell survives and waits for its command.
	cmd := exec.Command("/bin/sh", "-c", "trap : TERM\n"+step.Command)
	cmd.Env = []string{
		"PATH=/bin:/usr/sbin", "HOME=/", "STRONGROOM_STEP=" + step.Name,
		"DM_DISABLE_UDEV=1", // there is none, and device mapper would wait for it
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	button.group.Store(int64(cmd.Process.Pid))
	err := cmd.Wait()
	button.group.Store(0)
	if err != nil {
		return err
	}
	report("ok", step.Name, fmt.Sprintf("%.1fs", time.Since(began).Seconds()))
	return nil
}

// powerButton turns a press of the ACPI power button into a SIGTERM for the
// process group of the step that runs.
type powerButton struct {
	group atomic.Int64 // process group, 0: none
}

// watch starts one goroutine for each input device; they live as long as the guest.
func (b *powerButton) watch() error {
	devices, err := filepath.Glob("/dev/input/event*")
	if err != nil {
		return err
	}
	for _, name := range devices {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		go b.read(f)
	}
	return nil
}

func (b *powerButton) read(f *os.File) {
	const eventKey, keyPower = 1, 116
	event := make([]byte, 24) // struct input_event: time (16 bytes), type, code, value
	for {
		if n, err := f.Read(event); err != nil || n != len(event) {
			return
		}
		kind, code := binary.LittleEndian.Uint16(event[16:]), binary.LittleEndian.Uint16(event[18:])
		if kind != eventKey || code != keyPower || binary.LittleEndian.Uint32(event[20:]) != 1 {
			continue
		}
		report("note", "-", "power button")
		if group := b.group.Load(); group != 0 {
			_ = unix.Kill(-int(group), unix.SIGTERM)
		}
	}
}
