package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"strongroom/internal/machine/qemu"
)

// TestMain lets the test binary be a process that probes until it is killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "probe" {
		_ = qemu.TryWith(os.Args[2], os.Args[3])
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// config returns a small machine that boots nothing.
func config(t *testing.T) qemu.Config {
	return qemu.Config{
		Name: "web-1, the \"first\"", UUID: uuid.New(), CPUs: 1, MemoryMiB: 128,
		RunDir: filepath.Join(shortDir(t), "run"),
	}
}

// start runs a machine and makes sure that it does not outlive the test.
func start(t *testing.T, c qemu.Config) *qemu.Machine {
	t.Helper()
	m, err := qemu.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Kill(context.Background()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		m.Close()
	})
	return m
}

func TestStartAndKill(t *testing.T) {
	t.Parallel()
	for _, machine := range []string{"q35", "pc"} {
		t.Run(machine, func(t *testing.T) {
			t.Parallel()
			c := config(t)
			c.Machine = machine
			c.NICs = []qemu.NIC{{MAC: "52:54:00:12:34:56"}}
			c.Disks = []qemu.Disk{
				{ID: "disk-0", Socket: serveNBD(t), Bootable: true},
				{ID: "disk-1", Socket: serveNBD(t), ReadOnly: true},
				{ID: "disk-2", Interface: qemu.VhostUser, Socket: serveVhost(t), Queues: 2},
			}
			m := start(t, c)
			if status, err := m.Status(t.Context()); err != nil || status != qemu.Running {
				t.Fatalf("status %q, %v", status, err)
			}
			checkProcess(t, m.PID())
			want := map[string]qemu.Interface{"disk-0": qemu.NBD, "disk-1": qemu.NBD, "disk-2": qemu.VhostUser}
			if disks, err := m.Disks(t.Context()); err != nil || !maps.Equal(disks, want) {
				t.Errorf("disks %q, %v", disks, err)
			}
			if err := m.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			if status, _ := m.Status(t.Context()); status != qemu.Paused {
				t.Errorf("after Stop: %q", status)
			}
			if _, err := qemu.Start(t.Context(), c); !errors.Is(err, qemu.ErrRunning) {
				t.Errorf("second start: got %v, want ErrRunning", err)
			}
			if err := m.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			if exit, err := m.Wait(t.Context()); err != nil || exit.Reason != "" || exit.Status != "signal: killed" {
				t.Errorf("exit %+v, %v", exit, err)
			}
			if err := m.Kill(t.Context()); err != nil {
				t.Errorf("second Kill: %v", err)
			}
			if _, err := m.Status(t.Context()); !errors.Is(err, qemu.ErrNotRunning) {
				t.Errorf("status after Kill: %v", err)
			}
			if _, err := qemu.Adopt(t.Context(), c.RunDir, c.UUID); !errors.Is(err, qemu.ErrNotRunning) {
				t.Errorf("adopt after Kill: %v", err)
			}
			// What a killed machine leaves behind is no obstacle.
			start(t, c)
		})
	}
}

// TestSerialLogElsewhere: what a guest writes gets into the VM's log, or nowhere.
func TestSerialLogElsewhere(t *testing.T) {
	t.Parallel()
	c := config(t)
	dir := shortDir(t)
	link, fifo, outside := filepath.Join(dir, "link"), filepath.Join(dir, "fifo"), filepath.Join(dir, "outside")
	if err := errors.Join(os.Symlink(outside, link), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c.SerialLog = range []string{link, fifo, dir} {
		if m, err := qemu.Start(t.Context(), c); err == nil {
			t.Errorf("it started with %s as its log", c.SerialLog)
			if err := m.Kill(t.Context()); err != nil {
				t.Error(err)
			}
			m.Close()
		}
	}
	if _, err := os.Lstat(outside); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("QEMU has opened what a link leads to: %v", err)
	}
}

// checkProcess checks that QEMU runs as it must: sandboxed, in its own session,
// without core dumps, without our environment.
func checkProcess(t *testing.T, pid int) {
	t.Helper()
	read := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if status := read("status"); !strings.Contains(status, "Seccomp:\t2\n") || !strings.Contains(status, "NoNewPrivs:\t1\n") {
		t.Error("QEMU is not in its seccomp sandbox")
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("QEMU's session is %d (%v), want its own, %d", sid, err, pid)
	}
	for line := range strings.SplitSeq(read("limits"), "\n") {
		if fields := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && !slices.Equal(fields[4:6], []string{"0", "0"}) {
			t.Errorf("limit: %s", line)
		}
	}
	if environment := strings.Split(strings.TrimRight(read("environ"), "\x00"), "\x00"); len(environment) != 2 {
		t.Errorf("QEMU has the environment %q", environment)
	}
}

func TestDiesEarly(t *testing.T) {
	t.Parallel()
	c := config(t)
	c.Disks = []qemu.Disk{{ID: "disk-0", Socket: filepath.Join(shortDir(t), "nobody")}}
	_, err := qemu.Start(t.Context(), c)
	if err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("got %v, want QEMU's message and exit status", err)
	}
	if _, err := qemu.Adopt(t.Context(), c.RunDir, c.UUID); !errors.Is(err, qemu.ErrNotRunning) {
		t.Errorf("after a failed start: %v", err)
	}
	// QEMU itself would wait for a vhost-user server without end.
	c.Disks[0].Interface, c.Disks[0].Queues = qemu.VhostUser, 1
	if _, err := qemu.Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "disk disk-0 is not served") {
		t.Errorf("got %v, want that nobody serves the disk", err)
	}
}

func TestNeverAnswers(t *testing.T) {
	t.Parallel()
	c := config(t)
	c.Binary = filepath.Join(shortDir(t), "hang")
	if err := os.WriteFile(c.Binary, []byte("#!/bin/sh\necho starting >&2\nexec sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := qemu.Start(ctx, c)
	if err == nil || !strings.Contains(err.Error(), "does not answer") || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("got %v, want no answer and a killed process", err)
	}
}

func TestInvalidConfig(t *testing.T) {
	t.Parallel()
	cases := map[string]func(*qemu.Config){
		"name":            func(c *qemu.Config) { c.Name = "a\nb" },
		"UUID":            func(c *qemu.Config) { c.UUID = uuid.Nil },
		"CPUs":            func(c *qemu.Config) { c.CPUs = 0 },
		"memory":          func(c *qemu.Config) { c.MemoryMiB = 1 },
		"machine type":    func(c *qemu.Config) { c.Machine = "isapc" },
		"accelerator":     func(c *qemu.Config) { c.Accel = "xen" },
		"run directory":   func(c *qemu.Config) { c.RunDir = "run" },
		"path too long":   func(c *qemu.Config) { c.RunDir = "/" + strings.Repeat("x", 100) },
		"needs a kernel":  func(c *qemu.Config) { c.Append = "quiet" },
		"disk ID":         func(c *qemu.Config) { c.Disks = []qemu.Disk{{ID: "../x", Socket: "/s"}} },
		"socket":          func(c *qemu.Config) { c.Disks = []qemu.Disk{{ID: "x", Socket: "s"}} },
		"interface":       func(c *qemu.Config) { c.Disks = []qemu.Disk{{ID: "x", Socket: "/s", Interface: "ide"}} },
		"0 queues":        func(c *qemu.Config) { c.Disks = []qemu.Disk{{ID: "x", Socket: "/s", Interface: qemu.VhostUser}} },
		"already":         func(c *qemu.Config) { c.Disks = []qemu.Disk{{ID: "x", Socket: "/s"}, {ID: "x", Socket: "/s"}} },
		"MAC address":     func(c *qemu.Config) { c.NICs = []qemu.NIC{{MAC: "01:00:00:00:00:00"}} },
		"at most 8":       func(c *qemu.Config) { c.NICs = make([]qemu.NIC, 9) },
		"65 disks: at mo": func(c *qemu.Config) { c.Disks = make([]qemu.Disk, 65) },
	}
	for want, change := range cases {
		c := config(t)
		change(&c)
		if _, err := qemu.Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to name the %s", err, want)
		}
		if _, err := os.Stat(c.RunDir); err == nil {
			t.Errorf("%s: an invalid configuration made a directory", want)
		}
	}
}

// TestAdopt restarts the agent: it lets go of the machine and finds it again.
func TestAdopt(t *testing.T) {
	t.Parallel()
	c := config(t)
	c.Paused = true
	first := start(t, c)
	first.Close()
	first.Close()
	if _, err := first.Wait(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait after Close: %v", err)
	}

	if _, err := qemu.Adopt(t.Context(), c.RunDir, uuid.New()); err == nil || !strings.Contains(err.Error(), c.UUID.String()) {
		t.Errorf("adopted under another UUID: %v", err)
	}
	second, err := qemu.Adopt(t.Context(), c.RunDir, c.UUID)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	defer second.Kill(context.Background())
	if second.PID() != first.PID() {
		t.Errorf("adopted process %d, want %d", second.PID(), first.PID())
	}
	if status, err := second.Status(t.Context()); err != nil || status != qemu.Prelaunch {
		t.Errorf("status %q, %v", status, err)
	}
	if err := second.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := second.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-second.Ended()
}

// TestAdoptStranger finds something else at the socket.
func TestAdoptStranger(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	listener, err := net.Listen("unix", qemu.Socket(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		if conn, err := listener.Accept(); err == nil {
			fmt.Fprintln(conn, `{"QMP":{"version":{},"capabilities":[]}}`)
			fmt.Fprintln(conn, `{"return":{},"id":1}`)
			fmt.Fprintln(conn, `{"return":{"UUID":"garbage"},"id":2}`)
			conn.Close()
		}
	}()
	if _, err := qemu.Adopt(t.Context(), dir, uuid.New()); err == nil || errors.Is(err, qemu.ErrNotRunning) {
		t.Errorf("got %v, want a refusal", err)
	}
}

// TestGuest boots a real guest: disks come and go while it runs, and it powers
// off by its button.
func TestGuest(t *testing.T) {
	t.Parallel()
	c := config(t)
	c.Kernel, c.Initrd = guest(t)
	c.Append = "console=ttyS0 quiet panic=-1"
	c.SerialLog = filepath.Join(c.RunDir, "..", "vm,1.log")
	began := time.Now()
	c.Disks = []qemu.Disk{{ID: "first", Interface: qemu.VhostUser, Socket: serveVhost(t), Queues: 1}}
	m := start(t, c)
	started := time.Since(began)

	// Before the guest listens, its button does nothing.
	early, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := m.PowerDown(early); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("PowerDown of a booting guest: %v, want the deadline", err)
	}
	waitSerial(t, c.SerialLog, "guest-up")
	t.Logf("started in %v, guest up after %v", started, time.Since(began))

	socket := serveNBD(t)
	vhost := qemu.Disk{ID: "new-1", Interface: qemu.VhostUser, Socket: serveVhost(t), Queues: 1}
	for i := range 4 {
		d := qemu.Disk{ID: fmt.Sprintf("new-%d", i), Socket: socket}
		if d.ID == vhost.ID {
			d = vhost
		}
		if err := m.AddDisk(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.AddDisk(t.Context(), qemu.Disk{ID: "new-0", Socket: socket}); !errors.Is(err, qemu.ErrExists) {
		t.Errorf("got %v, want ErrExists", err)
	}
	if err := m.AddDisk(t.Context(), qemu.Disk{ID: "new-4", Socket: socket}); !errors.Is(err, qemu.ErrNoSlot) {
		t.Errorf("got %v, want ErrNoSlot", err)
	}
	if err := m.RemoveDisk(t.Context(), "none"); !errors.Is(err, qemu.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	// A disk is there for the guest about 5 s after it was plugged: a PCIe
	// hot-plug port waits that long for a change of mind.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := m.RemoveDisk(ctx, "new-1"); err != nil {
		t.Fatal(err)
	}
	want := map[string]qemu.Interface{"first": qemu.VhostUser, "new-0": qemu.NBD, "new-2": qemu.NBD, "new-3": qemu.NBD}
	if disks, err := m.Disks(ctx); err != nil || !maps.Equal(disks, want) {
		t.Errorf("disks %q, %v", disks, err)
	}
	bad := qemu.Disk{ID: "new-1", Socket: filepath.Join(c.RunDir, "nobody")}
	for _, bad.Interface = range []qemu.Interface{qemu.NBD, qemu.VhostUser} {
		bad.Queues = 1
		if err := m.AddDisk(ctx, bad); err == nil {
			t.Errorf("attached a disk that nobody serves over %s", bad.Interface)
		}
	}
	vhost.Queues = 200
	if err := m.AddDisk(ctx, vhost); err == nil {
		t.Error("attached a disk with 200 queues")
	}
	vhost.Queues = 1
	if err := m.AddDisk(ctx, vhost); err != nil {
		t.Errorf("after a failed attempt and a removal: %v", err)
	}

	if err := m.PowerDown(ctx); err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(ctx); err != nil || exit.Reason != "guest-shutdown" || exit.Status != "exit status 0" {
		t.Errorf("exit %+v, %v", exit, err)
	}
	waitSerial(t, c.SerialLog, "guest-button")
}

func TestProbe(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(shortDir(t), "probe")
	p := qemu.NewProber("", dir)
	accel, why := p.Probe()
	t.Logf("accelerator %s (%v)", accel, why)
	if (accel == qemu.KVM) != (why == nil) {
		t.Errorf("got %s and reason %v", accel, why)
	}
	// What would be tried would be tried in the folder.
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if again, whyAgain := p.Probe(); again != accel || whyAgain != why {
		t.Errorf("the second answer is %s, %v", again, whyAgain)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("the second answer was tried, too: %v", err)
	}
	if err := qemu.TryTCG(dir); err != nil {
		t.Errorf("translation does not work: %v", err)
	}
	began := time.Now()
	if err := p.VhostUser(); err != nil {
		t.Errorf("vhost-user does not work: %v", err)
	}
	t.Logf("vhost-user was tried in %v", time.Since(began))
	t.Log("a killed process left something")
	if err := os.MkdirAll(filepath.Join(dir, "vhost.sock"), 0o700); err != nil {
		t.Fatal(err)
	}
	broken := qemu.NewProber("/bin/false", dir)
	if accel, why := broken.Probe(); accel != qemu.TCG || why == nil {
		t.Errorf("with a broken QEMU: %s, %v", accel, why)
	}
	if err := broken.VhostUser(); err == nil {
		t.Error("vhost-user works with a broken QEMU")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
}

// TestProbeEndsWithUs: a guest that hangs in the probe does not outlive a process
// that is killed meanwhile.
func TestProbeEndsWithUs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hang, pidFile := filepath.Join(dir, "qemu"), filepath.Join(dir, "pid")
	if err := os.WriteFile(hang, []byte("#!/bin/sh\necho $$ >"+pidFile+".new && mv "+pidFile+".new "+pidFile+"\nexec sleep 300\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	prober := exec.Command(os.Args[0], "probe", hang, filepath.Join(dir, "probe"))
	if err := prober.Start(); err != nil {
		t.Fatal(err)
	}
	defer prober.Wait()
	defer prober.Process.Kill()
	await := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("waited too long for %s", what)
			}
		}
	}
	var pid int
	await("the probe to start its guest", func() bool {
		text, err := os.ReadFile(pidFile)
		if err != nil {
			return false
		}
		_, err = fmt.Sscan(string(text), &pid)
		return err == nil
	})
	prober.Process.Kill()
	await("the guest to end with it", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
}

// BenchmarkStart measures a power-on against QEMU's own start: the same
// command line run by hand until its QMP socket greets.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		dir, err := os.MkdirTemp("", "qemu")
		if err != nil {
			b.Fatal(err)
		}
		m, err := qemu.Start(b.Context(), qemu.Config{Name: "b", UUID: uuid.New(), CPUs: 1, MemoryMiB: 128, RunDir: dir})
		if err != nil {
			b.Fatal(err)
		}
		m.Kill(context.Background())
		m.Close()
		os.RemoveAll(dir)
	}
}

// BenchmarkQEMU is QEMU alone: from exec to the end by its own quit command.
func BenchmarkQEMU(b *testing.B) {
	for b.Loop() {
		cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-S", "-display", "none",
			"-machine", "q35", "-m", "128M", "-qmp", "stdio")
		cmd.Stdin = strings.NewReader(`{"execute":"qmp_capabilities"}{"execute":"quit"}`)
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
}
