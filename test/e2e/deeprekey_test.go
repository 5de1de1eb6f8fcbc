package e2e

import (
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/test/guest"
)

// rekeyed returns how far the deep rekey of a VM's first disk is, in bytes, and
// whether one is under way.
func (s *site) rekeyed(t *testing.T, vm string) (done int64, underWay bool) {
	t.Helper()
	info := inspect(t, filepath.Join(s.folder(vm), "disk-0.luks"))
	if info.Rekey == nil {
		return 0, false
	}
	return info.Rekey.Done, true
}

// moves waits until the deep rekey of a VM has moved on.
func (s *site) moves(t *testing.T, vm string) {
	t.Helper()
	before, _ := s.rekeyed(t, vm)
	await(t, "the rekey to go on", func() bool {
		now, underWay := s.rekeyed(t, vm)
		if !underWay {
			t.Fatal("the rekey is not under way")
		}
		return now > before
	})
}

// opensWith checks that a disk opens with one DEK alone and not with another.
func opensWith(t *testing.T, path string, dek, gone *keymem.Key) {
	t.Helper()
	for _, key := range []*keymem.Key{dek, gone} {
		dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
		must(t, err)
		v, err := volume.Open(dev, key, volume.Options{ReadOnly: true})
		if (err == nil) != (key == dek) {
			t.Errorf("opening it with the new DEK, or the old one, gives %v", err)
		}
		if err == nil {
			must(t, v.Close())
		} else {
			must(t, dev.Close())
		}
	}
}

// slowRekey are the arguments of a rekey to kp-2 that moves a zone of 4 MiB when
// it begins, or begins anew, and the next one half a minute later.
var slowRekey = []string{"vm", "rekey", "web-1", "--deep", "--provider", "kp-2", "--rate", "128K"}

// TestDeepRekey gives a VM new DEKs while its guest writes, and ends each process
// that takes part in the middle of it, the VM too.
func TestDeepRekey(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	s.provider(t, "kp-2")
	workload := guest.Workload(marker)
	for i, step := range workload.Steps {
		if step.Name == "write" { // a dozen zones each time
			workload.Steps[i].Command = "agent write-files /mnt/$(cat /proc/sys/kernel/random/uuid) 20 1500000 " + marker
		}
	}
	boot := s.bootFiles(t, "deep", workload)
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "256M", "--encrypt"}, boot...)...)
	disk := filepath.Join(s.folder("web-1"), "disk-0.luks")
	old := s.dek(t, disk)
	oldKey := s.show(t, "web-1").Key.KeyID
	c := s.powerOn(t, "web-1")
	c.await(t, guest.OK, "write", "")
	c.writes(t)

	id := s.begin(t, slowRekey...)
	await(t, "the first zone", func() bool { done, _ := s.rekeyed(t, "web-1"); return done > 0 })
	c.writes(t)
	await(t, "the VM to show it", func() bool {
		r := s.show(t, "web-1").Disks[0].Rekey
		return r != nil && r.Key.Provider == "kp-2" && r.TotalBytes == "268435456"
	})
	if !s.showProvider(t, "kp-2").InUse || !s.showProvider(t, "kp-1").InUse {
		t.Error("a provider of one of the keys does not count as in use")
	}

	for _, kill := range []struct {
		name string
		do   func()
	}{
		{"volume process", func() { must(t, syscall.Kill(s.only(t, "strongroom").pid, syscall.SIGKILL)) }},
		{"controller", func() { s.controller.Kill(); must(t, s.controller.Start()) }},
		{"host agent and volume process", func() {
			s.host.Kill()
			must(t, syscall.Kill(s.only(t, "strongroom").pid, syscall.SIGKILL))
			must(t, s.host.Start())
		}},
	} {
		kill.do()
		t.Logf("killed: %s", kill.name)
		s.moves(t, "web-1")
		c.writes(t)
		c.noIOErrors(t)
	}
	s.connected(t)

	// Without power it goes on in the host, until the power is back.
	must(t, syscall.Kill(s.only(t, "qemu").pid, syscall.SIGKILL))
	await(t, "the VM to be off", func() bool { return s.show(t, "web-1").PowerState == "poweredOff" })
	s.moves(t, "web-1")
	c = s.powerOn(t, "web-1")
	c.await(t, guest.Note, "verify", "verified")
	s.moves(t, "web-1")
	c.await(t, guest.OK, "write", "")
	c.writes(t)
	s.ok(t, "vm", "power-off", "web-1")
	c.await(t, guest.Note, "churn", "blocks read as written last")
	if state := s.task(t, id); state.State != "running" {
		t.Fatalf("the task is %+v", state)
	}

	s.ok(t, "task", "cancel", id)
	s.refused(t, refusal{1, "ended as canceled", ""}, "task", "wait", id)
	await(t, "the rekey to stop", func() bool {
		return exec.CommandContext(t.Context(), "flock", "-n", filepath.Join(s.folder("web-1"), ".lock"), "true").Run() == nil
	})
	underWay := refusal{1, "a deep rekey of disk-0 of web-1 is under way", "finish it first: strongroom vm rekey web-1 --deep"}
	s.refused(t, underWay, "vm", "decrypt", "web-1", "--yes")
	s.refused(t, underWay, "vm", "rekey", "web-1")
	elsewhere(t, s)

	// It goes on where it was, under the key that it had.
	next, sum := s.show(t, "web-1").Disks[0].Rekey, s.content(t, "web-1", "disk-0")
	if next == nil {
		t.Fatal("no rekey is under way")
	}
	s.ok(t, "vm", "rekey", "web-1", "--deep")
	v := s.show(t, "web-1")
	if v.Key.KeyID == oldKey || v.Key.Provider != "kp-2" || v.Disks[0].Key != v.Key || v.Disks[0].Key != next.Key || v.Disks[0].Rekey != nil {
		t.Errorf("after the rekey: %+v", v)
	}
	if s.content(t, "web-1", "disk-0") != sum {
		t.Error("the rekey has changed the disk")
	}
	if s.showProvider(t, "kp-1").InUse {
		t.Error("kp-1 counts as in use")
	}
	info := inspect(t, disk)
	if len(info.Safes) != 1 || info.Safes[0].KEK.Provider != "kp-2" || len(info.Damage) > 0 {
		t.Errorf("the header says %+v", info)
	}
	opensWith(t, disk, s.dek(t, disk), old)
}

// elsewhere registers a copy of a VM that was made in the middle of a rekey: it
// boots, and has its own rekey brought to its end.
func elsewhere(t *testing.T, s *site) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "cp", "-r", "--sparse=always", s.folder("web-1"), s.folder("copy")).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	s.ok(t, "vm", "unregister", "web-1", "--yes")
	s.ok(t, "vm", "register", "copy", "--datastore", "ds", "--name", "copy")
	if v := s.show(t, "copy"); v.CryptoState != "unlocked" || v.Disks[0].Rekey == nil {
		t.Errorf("the copy: %+v", v)
	}
	c := s.console("copy")
	c.seen = len(c.events(t))
	s.ok(t, "vm", "power-on", "copy")
	c.await(t, guest.Note, "verify", "verified")
	// It would take half an hour, and ends when its rate is changed.
	id := s.begin(t, "vm", "rekey", "copy", "--deep", "--rate", "128K")
	s.ok(t, "vm", "rekey", "copy", "--rate", "0")
	s.ok(t, "task", "wait", id)
	c.await(t, guest.OK, "write", "")
	c.writes(t)
	s.ok(t, "vm", "power-off", "copy")
	c.await(t, guest.Note, "churn", "blocks read as written last")
	c.noIOErrors(t)
	if v := s.show(t, "copy"); v.Key.Provider != "kp-2" || v.Disks[0].Rekey != nil {
		t.Errorf("the copy after its rekey: %+v", v)
	}
	s.ok(t, "vm", "delete", "copy", "--yes")
	s.ok(t, "vm", "register", "web-1", "--datastore", "ds")
}

// TestDeepRekeyCrashes rewrites a disk of a VM that is off and kills the
// controller, and the host, on the way.
func TestDeepRekeyCrashes(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	sum := s.image(t, "data.raw", interruptedMiB)
	for name, crash := range map[string]func(){
		"controller": func() { s.controller.Kill(); must(t, s.controller.Start()) },
		"host":       func() { s.host.Kill(); must(t, s.host.Start()) },
	} {
		s.ok(t, "vm", "create", "web-1", "--datastore", "ds", "--disk", "image=images/data.raw,format=raw", "--encrypt")
		disk := filepath.Join(s.folder("web-1"), "disk-0.luks")
		old := s.dek(t, disk)
		id := s.begin(t, "vm", "rekey", "web-1", "--deep", "--rate", "32M")
		await(t, "the first zone", func() bool { done, _ := s.rekeyed(t, "web-1"); return done > 0 })
		crash()
		if _, underWay := s.rekeyed(t, "web-1"); !underWay {
			t.Fatalf("%s: it was not interrupted", name)
		}
		s.ok(t, "task", "wait", id)
		if s.content(t, "web-1", "disk-0") != sum {
			t.Errorf("%s: the disk has changed", name)
		}
		opensWith(t, disk, s.dek(t, disk), old)
		s.ok(t, "vm", "delete", "web-1", "--yes")
	}
}
