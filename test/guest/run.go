package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Kind is what an [Event] tells.
type Kind string

// The kinds.
const (
	Start  Kind = "start"  // a step begins
	Note   Kind = "note"   // progress or a result of a step
	OK     Kind = "ok"     // a step succeeded
	Fail   Kind = "fail"   // a step failed
	Done   Kind = "done"   // all steps succeeded; the guest powers off
	Failed Kind = "failed" // not all did; the guest powers off
)

// Event is a line of result on a guest's serial console.
type Event struct {
	Kind Kind
	Step string // name of the step; "-" for the guest itself
	Text string // may be empty
}

// ParseEvent returns the event in a line of a guest's serial console; kernel
// messages and output of programs have none.
func ParseEvent(line string) (Event, bool) {
	_, line, ok := strings.Cut(line, "STRONGROOM ")
	if !ok {
		return Event{}, false
	}
	kind, line, _ := strings.Cut(strings.TrimRight(line, "\r\n "), " ")
	step, text, _ := strings.Cut(line, " ")
	switch Kind(kind) {
	case Start, Note, OK, Fail, Done, Failed:
		return Event{Kind: Kind(kind), Step: step, Text: text}, true
	}
	return Event{}, false
}

// Machine is a virtual machine that [Run] starts, without anything of
// Strongroom but what serves its disks.
type Machine struct {
	Image Image
	// Drives are values of QEMU's option -drive, without "if="; the first is
	// /dev/vda. Example: "file=disk.img,format=raw".
	Drives []string
	Args   []string // further arguments of QEMU
	Memory int      // MiB; 0: 192
	// OnEvent, if not nil, is called for every event, one at a time.
	OnEvent func(Event)
}

// Run runs a guest to its end, and returns what it wrote to its serial
// console. It returns an error unless all steps succeeded; ctx ends it early.
func Run(ctx context.Context, m Machine) (console string, err error) {
	if m.Memory == 0 {
		m.Memory = 192
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		// Without room for a second CPU, QEMU before 8.1 leaves memory barriers out.
		"-accel", "tcg", "-cpu", "max", "-smp", "1,maxcpus=2", "-m", strconv.Itoa(m.Memory),
		"-kernel", m.Image.Kernel, "-initrd", m.Image.Initrd, "-append", m.Image.Append,
		"-serial", "stdio",
	}
	for i, drive := range m.Drives {
		args = append(args, "-drive", fmt.Sprintf("if=none,id=drive%d,%s", i, drive), "-device", fmt.Sprintf("virtio-blk-pci,drive=drive%d", i))
	}
	args = append(args, m.Args...)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("cannot start QEMU: %w", err)
	}
	console, last := watch(stdout, m.OnEvent)
	if err := cmd.Wait(); err != nil {
		return console, fmt.Errorf("QEMU ended with %w\n%s%s", errors.Join(err, ctx.Err()), console, stderr.String())
	}
	if last.Kind != Done {
		return console, fmt.Errorf("the guest failed: %s\n%s%s", last.Text, console, stderr.String())
	}
	return console, nil
}

// watch reads a console to its end and returns it with the last event.
func watch(r io.Reader, onEvent func(Event)) (console string, last Event) {
	var all strings.Builder
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		all.WriteString(line)
		if event, ok := ParseEvent(line); ok {
			last = event
			if onEvent != nil {
				onEvent(event)
			}
		}
		if err != nil {
			return all.String(), last
		}
	}
}
