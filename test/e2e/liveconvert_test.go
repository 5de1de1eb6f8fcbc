package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"strongroom/test/guest"
)

// TestLiveConversion encrypts and decrypts the disk of a guest that writes to it
// and checks what it reads, and ends whatever takes part in the middle of it. Each
// subtest goes on where the one before ended.
func TestLiveConversion(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	boot := s.bootFiles(t, "workload", guest.Workload(marker))
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "32M"}, boot...)...)
	c := s.powerOn(t, "web-1")
	c.await(t, guest.OK, "write", "")
	for _, part := range []struct {
		name string
		run  func(*testing.T, *site, *console)
	}{
		{"encrypted while it runs", encryptedLive},
		{"decrypted while it runs", decryptedLive},
		{"cancelled", cancelledLive},
		{"volume process killed", volumesKilledLive},
		{"host agent killed", hostKilledLive},
		{"powered off", poweredOffLive},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(t, s, c) }) {
			t.FailNow()
		}
	}
}

// onlyDisk checks that the VM's disk is in a file, alone in the folder.
func (s *site) onlyDisk(t *testing.T, file string) {
	t.Helper()
	v := s.show(t, "web-1")
	if d := v.Disks[0]; d.File != file || d.Encrypted != strings.HasSuffix(file, ".luks") {
		t.Errorf("the disk is %+v, want %s", d, file)
	}
	files, err := filepath.Glob(filepath.Join(s.folder("web-1"), "disk-*"))
	must(t, err)
	if !slices.Equal(files, []string{filepath.Join(s.folder("web-1"), file)}) {
		t.Errorf("the folder holds %v, want %s only", files, file)
	}
}

// isWritten waits until the new file of a conversion that was begun grows.
func (s *site) isWritten(t *testing.T, file string) {
	t.Helper()
	path := filepath.Join(s.folder("web-1"), file+".new")
	await(t, path+" to be written", func() bool { return allocated(path) > 2<<20 })
}

func encryptedLive(t *testing.T, s *site, c *console) {
	c.writes(t)
	qemu := s.only(t, "qemu").pid
	s.ok(t, "vm", "encrypt", "web-1")
	s.onlyDisk(t, "disk-0.luks")
	c.writes(t)
	c.noIOErrors(t)
	if s.only(t, "qemu").pid != qemu {
		t.Error("it is another QEMU")
	}
	// It is an encrypted disk in every respect.
	s.ok(t, "vm", "rekey", "web-1")
	c.writes(t)
	text, err := os.ReadFile(filepath.Join(s.folder("web-1"), "disk-0.luks"))
	must(t, err)
	if strings.Contains(string(text), marker) {
		t.Error("the encrypted disk holds plain text")
	}
	if out := s.ok(t, "vm", "ls").Stdout; !strings.Contains(out, "encrypted") {
		t.Errorf("vm ls: %s", out)
	}
}

func decryptedLive(t *testing.T, s *site, c *console) {
	s.ok(t, "vm", "decrypt", "web-1", "--yes")
	s.onlyDisk(t, "disk-0.raw")
	if v := s.show(t, "web-1"); v.Encrypted || v.Key.KeyID != "" {
		t.Errorf("decrypted, the VM is %+v", v)
	}
	c.writes(t)
	c.noIOErrors(t)
}

func cancelledLive(t *testing.T, s *site, c *console) {
	id := s.begin(t, "vm", "encrypt", "web-1", "--rate", "2M")
	s.isWritten(t, "disk-0.luks")
	s.ok(t, "task", "cancel", id)
	if r, err := s.controller.CLI(t.Context(), "task", "wait", id); err != nil || r.Code == 0 {
		t.Errorf("a cancelled task: %d, %v", r.Code, err)
	}
	await(t, "the new file to be deleted", func() bool { return len(s.leftovers(t)) == 0 })
	s.onlyDisk(t, "disk-0.raw")
	c.writes(t)
}

func volumesKilledLive(t *testing.T, s *site, c *console) {
	id := s.begin(t, "vm", "encrypt", "web-1", "--rate", "16M")
	for range 2 {
		s.isWritten(t, "disk-0.luks")
		s.killVolumes(t)
		c.writes(t)
	}
	s.ok(t, "task", "wait", id)
	s.onlyDisk(t, "disk-0.luks")
	c.writes(t)
	c.noIOErrors(t)
}

func hostKilledLive(t *testing.T, s *site, c *console) {
	id := s.begin(t, "vm", "decrypt", "web-1", "--yes", "--rate", "16M")
	s.isWritten(t, "disk-0.raw")
	s.host.Kill()
	c.writes(t)
	must(t, s.host.Start())
	s.ok(t, "task", "wait", id)
	s.onlyDisk(t, "disk-0.raw")
	c.writes(t)
	// Both at once.
	id = s.begin(t, "vm", "encrypt", "web-1", "--rate", "16M")
	s.isWritten(t, "disk-0.luks")
	s.host.Kill()
	must(t, syscall.Kill(s.only(t, "strongroom").pid, syscall.SIGKILL))
	must(t, s.host.Start())
	c.writes(t)
	s.ok(t, "task", "wait", id)
	s.onlyDisk(t, "disk-0.luks")
	c.writes(t)
	c.noIOErrors(t)
}

// poweredOffLive shuts the guest down in the middle: it has checked what it reads
// then, and the task goes on without it. What the guest wrote is there when it
// boots again.
func poweredOffLive(t *testing.T, s *site, c *console) {
	id := s.begin(t, "vm", "decrypt", "web-1", "--yes", "--rate", "2M")
	s.isWritten(t, "disk-0.raw")
	r, err := s.host.CLI(t.Context(), "vm", "power-off", "web-1")
	must(t, err)
	if r.Code != 0 {
		t.Fatalf("power-off at the host: %s", r.Stderr)
	}
	c.await(t, guest.Note, "churn", "blocks read as written last")
	c.await(t, guest.Done, "", "")
	s.ok(t, "task", "wait", id)
	s.onlyDisk(t, "disk-0.raw")
	c = s.powerOn(t, "web-1")
	c.await(t, guest.Note, "verify", "verified 21 files")
	c.writes(t)
	s.ok(t, "vm", "power-off", "web-1")
	c.await(t, guest.Note, "churn", "blocks read as written last")
	c.noIOErrors(t)
}
