package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/test/guest"
)

// encryptedInPlace returns how many bytes of a VM's first disk, of size bytes, are
// encrypted, while that is under way.
func (s *site) encryptedInPlace(t *testing.T, vm string, size int64) int64 {
	t.Helper()
	dev, err := blockdev.OpenFile(filepath.Join(s.folder(vm), "disk-0.raw"), blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	must(t, err)
	defer dev.Close()
	state, err := volume.InspectEncryption(dev, size)
	if err != nil || state == nil {
		return 0 // it is being written
	}
	return state.Done
}

// TestEncryptInPlace encrypts a guest's disk in its own file. The host is killed in
// the middle of it, the task cancelled, and the folder registered anew: all refuse
// the disk until it is done, and then the guest finds its data.
func TestEncryptInPlace(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	const size = 33 << 20 // three zones
	areas := []area{{0, 1 << 20, 1}, {15<<20 + 512, 2 << 20, 2}, {size - 65536, 65536, 3}}
	boot := s.bootFiles(t, "verify", guest.Options{Steps: verifySteps("/dev/vda", areas)})
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "format=raw,image=" + s.patternImage(t, "plain", "raw", size, areas)}, boot...)...)
	c := s.powerOn(t, "web-1")
	s.refused(t, refusal{1, "powered off", "strongroom vm power-off web-1"}, "vm", "encrypt", "web-1", "--in-place")
	c.await(t, guest.Done, "", "")
	s.reaches(t, "web-1", "")

	// A zone whenever it begins, and the next one hours later.
	id := s.begin(t, "vm", "encrypt", "web-1", "--in-place", "--rate", "1K")
	goesOn := func(from int64) (done int64) {
		t.Helper()
		await(t, "the encryption to go on", func() bool { done = s.encryptedInPlace(t, "web-1", size); return done > from })
		return done
	}
	first := goesOn(0)
	s.host.Kill()
	must(t, s.host.Start())
	second := goesOn(first)
	if second == size {
		t.Fatal("it was not interrupted")
	}
	s.refused(t, refusal{1, "", "strongroom task"}, "vm", "power-on", "web-1")
	s.ok(t, "task", "cancel", id)
	s.refused(t, refusal{1, "ended as canceled", ""}, "task", "wait", id)

	const finish = "strongroom vm encrypt web-1 --in-place"
	refused := func(args ...string) {
		t.Helper()
		s.refused(t, refusal{1, "the encryption in place of disk-0 of web-1 is not finished", finish}, args...)
	}
	refused("vm", "power-on", "web-1")
	s.ok(t, "vm", "unregister", "web-1", "--yes")
	s.ok(t, "vm", "register", "web-1", "--datastore", "ds")
	if v := s.show(t, "web-1"); v.CryptoState != "unlocked" || v.Disks[0].Encryption == nil || v.Disks[0].Key.Provider != "kp-1" {
		t.Errorf("registered as %+v", v)
	}
	refused("vm", "rekey", "web-1")
	refused("disk", "resize", "web-1", "disk-0", "--size", "64M")
	if done := s.encryptedInPlace(t, "web-1", size); done != second {
		t.Errorf("%d bytes are encrypted, want %d", done, second)
	}

	s.ok(t, "vm", "encrypt", "web-1", "--in-place")
	s.onlyDisk(t, "disk-0.luks")
	if info, err := os.Stat(filepath.Join(s.folder("web-1"), "disk-0.luks")); err != nil || info.Size() != size+16<<20 {
		t.Errorf("the file is %v, %v", info, err)
	}
	s.powerOn(t, "web-1").await(t, guest.Done, "", "")
	s.ok(t, "vm", "rekey", "web-1", "--deep")
	s.holds(t, "web-1", "disk-0", areas)
}
