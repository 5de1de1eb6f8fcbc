package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"strongroom/test/guest"
	"strongroom/test/keyscan"
)

// marker is what guests write in plain text.
const marker = "E2E-PLAINTEXT-MARKER-of-the-guest"

// TestGuest takes one encrypted VM through its life: each subtest goes on where
// the one before ended.
func TestGuest(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	boot := s.bootFiles(t, "workload", guest.Workload(marker))
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "192M", "--encrypt"}, boot...)...)
	if v := s.show(t, "web-1"); !v.Encrypted || v.Key.KeyID == "" || v.Key.Provider != "kp-1" { // 152, 165
		t.Fatalf("web-1 was created with --encrypt and is %+v", v)
	}
	for _, part := range []struct {
		name string
		run  func(*testing.T, *site)
	}{
		{"first boot", firstBoot},
		{"plain text is found where it is", plainIsFound},
		{"second boot", secondBoot},
		{"nothing of keys in the process list", processList},
		{"host agent restarts under a writing guest", agentRestarts},
		{"volume process dies under a writing guest", volumeProcessDies},
		{"live rekey and power off", liveRekey},
		{"controller down", controllerDown},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(t, s) }) {
			t.FailNow()
		}
	}
}

// firstBoot has the guest make a file system and write, and looks for plain text
// and keys on disk then: 2, 5, 13, 14, 16, 55, 142, 154.
func firstBoot(t *testing.T, s *site) {
	began := time.Now()
	c := s.powerOn(t, "web-1")
	t.Logf("cold start: power-on of an encrypted VM, by the command line, took %v; a bare QEMU needs %v until it answers",
		time.Since(began).Round(time.Millisecond), bareQEMU(t, s).Round(time.Millisecond))
	c.await(t, guest.OK, "write", "")
	c.writes(t)
	s.reaches(t, "web-1", "vhost-user")
	s.ok(t, "vm", "power-off", "web-1")
	c.await(t, guest.Note, "churn", "blocks read as written last")
	c.await(t, guest.Done, "", "")
	s.reaches(t, "web-1", "")

	var scan keyscan.Scanner
	scan.AddMarker("plain text of the guest", []byte(marker))
	if n := s.addKeys(t, &scan); n != 1 {
		t.Fatalf("%d encrypted disks, want 1", n)
	}
	if found := s.scan(t, &scan); len(found) > 0 {
		t.Errorf("found %v", found)
	}
}

// plainIsFound proves that the scan would have found something: the same disk
// decrypted has the marker, and encrypted again it has not. The new DEK is another
// one: 219.
func plainIsFound(t *testing.T, s *site) {
	old := s.dek(t, filepath.Join(s.folder("web-1"), "disk-0.luks"))
	s.ok(t, "vm", "decrypt", "web-1", "--yes")
	if v := s.show(t, "web-1"); v.Encrypted || v.Key.KeyID != "" {
		t.Errorf("after decryption web-1 is %+v", v)
	}
	var plain keyscan.Scanner
	plain.AddMarker("plain text of the guest", []byte(marker))
	found := s.scan(t, &plain)
	if len(found) == 0 || slices.ContainsFunc(found, func(f keyscan.Finding) bool { return filepath.Base(f.File) != "disk-0.raw" }) {
		t.Errorf("in a plain disk the marker is found at %v", found)
	}

	s.ok(t, "vm", "encrypt", "web-1")
	if s.dek(t, filepath.Join(s.folder("web-1"), "disk-0.luks")).Equal(old) {
		t.Error("encrypted again, the disk has its old DEK")
	}
	if found := s.scan(t, &plain); len(found) > 0 {
		t.Errorf("encrypted again: found %v", found)
	}
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// secondBoot verifies what the first one wrote: 157.
func secondBoot(t *testing.T, s *site) {
	c := s.powerOn(t, "web-1")
	if e := c.await(t, guest.Note, "verify", "verified"); !strings.HasPrefix(e.Text, "verified 21 files") {
		t.Errorf("the guest %s, want 21 files", e.Text)
	}
	c.writes(t)
}

// processList looks at what others see of the processes: 13.
func processList(t *testing.T, s *site) {
	var scan keyscan.Scanner
	s.addKeys(t, &scan)
	pids := map[string]int{
		"controller": s.controller.PID(), "host": s.host.PID(),
		"volume process": s.only(t, "strongroom").pid, "QEMU": s.only(t, "qemu").pid,
	}
	for name, pid := range pids {
		for _, file := range []string{"cmdline", "environ"} {
			found, n, err := scan.Tree(fmt.Sprintf("/proc/%d/%s", pid, file), 10)
			must(t, err)
			if file == "cmdline" && n == 0 {
				t.Errorf("command line of the %s is empty", name)
			}
			if len(found) > 0 {
				t.Errorf("%s: found %v", name, found)
			}
		}
		if limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid)); err != nil || !noCore(string(limits)) {
			t.Errorf("the %s may dump core (%v):\n%s", name, err, limits)
		}
	}
}

// noCore reports whether /proc/PID/limits says that no core file is written.
func noCore(limits string) bool {
	for line := range strings.Lines(limits) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
			return slices.Equal(strings.Fields(rest), []string{"0", "0", "bytes"})
		}
	}
	return false
}

// agentRestarts ends the agent, in good order and by a crash: the guest goes on
// and the next agent finds the VM.
func agentRestarts(t *testing.T, s *site) {
	c := s.console("web-1")
	volumes, qemu := s.only(t, "strongroom").pid, s.only(t, "qemu").pid
	for _, end := range []struct {
		name string
		do   func() error
	}{
		{"SIGTERM", func() error { return s.host.Stop() }},
		{"SIGKILL", func() error { s.host.Kill(); return nil }},
	} {
		must(t, end.do())
		c.writes(t) // nobody serves it but the volume process
		must(t, s.host.Start())
		c.writes(t)
		if v, q := s.only(t, "strongroom").pid, s.only(t, "qemu").pid; v != volumes || q != qemu {
			t.Errorf("after %s: volume process %d and QEMU %d are not the old ones, %d and %d", end.name, v, q, volumes, qemu)
		}
		await(t, "web-1 to be known as powered on", func() bool { return s.show(t, "web-1").PowerState == "poweredOn" })
		s.connected(t)
		s.reaches(t, "web-1", "vhost-user")
		s.ok(t, "vm", "power-on", "web-1") // it runs: nothing to do
		s.ok(t, "vm", "rekey", "web-1")
	}
	c.writes(t)
	c.noIOErrors(t)
}

func (s *site) connected(t *testing.T) {
	t.Helper()
	await(t, "the host to be connected", func() bool {
		var h struct{ ConnectionState string }
		must(t, s.ok(t, "host", "show", s.host.Name, "-o", "json").JSON(&h))
		return h.ConnectionState == "connected"
	})
}

// volumeProcessDies kills the volume process: the guest waits until the host has
// started another one, and sees no error.
func volumeProcessDies(t *testing.T, s *site) {
	c := s.console("web-1")
	for range 4 {
		s.killVolumes(t)
		c.writes(t)
	}
	c.noIOErrors(t)
	// While nobody can start it again, the guest waits too.
	s.host.Kill()
	must(t, syscall.Kill(s.only(t, "strongroom").pid, syscall.SIGKILL))
	must(t, s.host.Start())
	c.writes(t)
	c.noIOErrors(t)
	s.connected(t)
}

// killVolumes kills the only volume process and waits for the next one.
func (s *site) killVolumes(t *testing.T) {
	t.Helper()
	old := s.only(t, "strongroom").pid
	must(t, syscall.Kill(old, syscall.SIGKILL))
	await(t, "a new volume process", func() bool {
		now := s.children(t, "strongroom")
		return len(now) == 1 && now[0].pid != old
	})
}

// reaches waits until a VM is said to reach its first disk so.
func (s *site) reaches(t *testing.T, vm, over string) {
	t.Helper()
	await(t, fmt.Sprintf("%s to reach its disk over %q", vm, over), func() bool { return s.show(t, vm).Disks[0].Interface == over })
}

// TestDiskInterface runs VMs that have chosen theirs, with two processors: the
// guest goes on when the volume process dies, on NBD and on vhost-user.
func TestDiskInterface(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	boot := s.bootFiles(t, "workload", guest.Workload(marker))
	for _, over := range []string{"nbd", "vhost-user"} {
		s.ok(t, append([]string{
			"vm", "create", over, "--datastore", "ds", "--disk", "64M", "--encrypt", "--cpus", "2", "--disk-interface", over,
		}, boot...)...)
		c := s.powerOn(t, over)
		c.await(t, guest.OK, "write", "")
		s.reaches(t, over, over)
		args := strings.Join(s.only(t, "qemu").args, " ")
		if shares := strings.Contains(args, "memory-backend-memfd"); shares != (over == "vhost-user") || over == "vhost-user" && !strings.Contains(args, `"num-queues":2`) {
			t.Errorf("on %s, QEMU has the arguments %s", over, args)
		}
		c.writes(t)
		for range 2 {
			s.killVolumes(t)
			c.writes(t)
		}
		if over == "nbd" { // its guest could not see it
			s.refused(t, refusal{1, "over NBD", "strongroom vm power-off nbd"}, "disk", "resize", over, "disk-0", "--size", "128M")
		}
		s.ok(t, "vm", "power-off", over)
		c.await(t, guest.Note, "churn", "blocks read as written last")
		c.await(t, guest.Done, "", "")
		c.noIOErrors(t)
		s.reaches(t, over, "")
	}
}

// liveRekey gives the VM another provider while the guest writes (211, 214), and
// has the guest check all it wrote through all of this.
func liveRekey(t *testing.T, s *site) {
	s.provider(t, "kp-2")
	disk := filepath.Join(s.folder("web-1"), "disk-0.luks")
	before := inspect(t, disk)
	dek := s.dek(t, disk)
	c := s.console("web-1")
	c.writes(t)
	s.ok(t, "vm", "rekey", "web-1", "--provider", "kp-2")
	c.writes(t)
	after := inspect(t, disk)
	if safe := after.Safes[0]; safe.KEK.Provider != "kp-2" || safe.Generation <= before.Safes[0].Generation || after.UUID != before.UUID || !s.dek(t, disk).Equal(dek) {
		t.Errorf("after the shallow rekey the header says %+v, before %+v; or the DEK is another one", after, before)
	}
	if len(after.Damage) > 0 {
		t.Errorf("header copies: %v", after.Damage)
	}
	s.ok(t, "vm", "power-off", "web-1")
	c.await(t, guest.Note, "churn", "blocks read as written last")
	c.await(t, guest.Done, "", "")
	c.noIOErrors(t)
	if left := s.children(t, ""); len(left) > 0 {
		t.Errorf("processes of the VM after its end: %v", left)
	}
	if p := s.showProvider(t, "kp-1"); p.InUse {
		t.Error("kp-1 counts as in use")
	}
}

// controllerDown restarts the host while the controller is down, and uses the VM
// through the host's local socket: 104, 105, 264.
func controllerDown(t *testing.T, s *site) {
	must(t, s.controller.Stop())
	must(t, s.host.Stop())
	must(t, s.host.Start())
	local := func(want refusal, args ...string) string {
		t.Helper()
		r, err := s.host.CLI(t.Context(), args...)
		must(t, err)
		if want.code == 0 && r.Code != 0 {
			t.Fatalf("strongroom %v: exit code %d\n%s", args, r.Code, r.Stderr)
		}
		if want.code != 0 {
			want.check(t, r, args)
		}
		return r.Stdout
	}
	if out := local(refusal{}, "vm", "ls"); !strings.Contains(out, "web-1") || !strings.Contains(out, "poweredOff") || !strings.Contains(out, "kp-2") {
		t.Errorf("vm ls: %s", out)
	}
	if out := local(refusal{}, "vm", "show", "web-1"); !strings.Contains(out, "kp-2") {
		t.Errorf("vm show: %s", out)
	}
	local(refusal{3, `no VM "web-2"`, "strongroom vm ls"}, "vm", "show", "web-2")
	alone := refusal{1, "a host alone cannot do this", "ask the controller"}
	for _, args := range [][]string{
		{"vm", "encrypt", "web-1"},
		{"vm", "rekey", "web-1"},
		{"vm", "create", "web-2", "--datastore", "ds", "--disk", "1M"},
		{"vm", "delete", "web-1", "--yes"},
	} {
		local(alone, args...)
	}
	if out := local(refusal{}, "whoami"); !strings.Contains(out, "local administrator") {
		t.Errorf("whoami: %s", out)
	}
	for _, args := range [][]string{{"provider", "ls"}, {"host", "ls"}, {"task", "ls"}} {
		r, err := s.host.CLI(t.Context(), args...)
		must(t, err)
		if r.Code == 0 || !strings.Contains(r.Stderr, "strongroom: cannot ") {
			t.Errorf("strongroom %v of a host: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
		}
	}

	c := s.console("web-1")
	c.seen = len(c.events(t))
	began := time.Now()
	local(refusal{}, "vm", "power-on", "web-1")
	t.Logf("cold start: power-on by the local socket took %v", time.Since(began).Round(time.Millisecond))
	if e := c.await(t, guest.Note, "verify", "verified"); !strings.HasPrefix(e.Text, "verified 41 files") {
		t.Errorf("the guest %s, want 41 files", e.Text)
	}
	c.await(t, guest.OK, "write", "")

	must(t, s.controller.Start())
	await(t, "the controller to know that web-1 runs", func() bool { return s.show(t, "web-1").PowerState == "poweredOn" })
	local(refusal{}, "vm", "power-off", "web-1")
	c.await(t, guest.Done, "", "")
	await(t, "the controller to know that web-1 is off", func() bool { return s.show(t, "web-1").PowerState == "poweredOff" })
	c.noIOErrors(t)
}
