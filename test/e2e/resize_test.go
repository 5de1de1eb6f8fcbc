package e2e

import (
	"fmt"
	"testing"

	"strongroom/test/guest"
)

// TestDiskResize makes a disk larger under its guest, which sees that, writes to
// what is new and finds it after a restart; once the volume process dies right
// after. A disk of a VM that is off grows too.
func TestDiskResize(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	sees := func(name string, mib int, more string) guest.Step {
		return guest.Step{Name: name, Command: fmt.Sprintf(
			`agent await /dev/vda && while [ $(cat /sys/block/vda/size) != %d ]; do sleep 0.1; done && %s`, mib*2048, more)}
	}
	boot := s.bootFiles(t, "resize", guest.Options{Steps: []guest.Step{
		{Name: "write", Command: "agent await /dev/vda && agent write-pattern /dev/vda 0 4194304 1"},
		sees("grown", 48, "agent write-pattern /dev/vda 41943040 4194304 2"),
		sees("again", 64, "agent write-pattern /dev/vda 62914560 4194304 3"),
		{Name: "verify", Command: "agent verify-pattern /dev/vda 0 4194304 1 && agent verify-pattern /dev/vda 41943040 4194304 2 && agent verify-pattern /dev/vda 62914560 4194304 3"},
	}})
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "32M", "--encrypt"}, boot...)...)
	s.refused(t, refusal{2, "cannot shrink", ""}, "disk", "resize", "web-1", "disk-0", "--size", "16M")
	s.refused(t, refusal{3, "disk-7", "strongroom vm show web-1"}, "disk", "resize", "web-1", "disk-7", "--size", "64M")

	c := s.powerOn(t, "web-1")
	c.await(t, guest.OK, "write", "")
	s.ok(t, "disk", "resize", "web-1", "disk-0", "--size", "48M")
	c.await(t, guest.OK, "grown", "")
	s.ok(t, "disk", "resize", "web-1", "disk-0", "--size", "64M")
	s.killVolumes(t)
	c.await(t, guest.Done, "", "")
	c.noIOErrors(t)
	s.reaches(t, "web-1", "")

	// Off, it grows too, and holds all that was written.
	s.ok(t, "disk", "resize", "web-1", "disk-0", "--size", "96M")
	if v := s.show(t, "web-1"); v.Disks[0].SizeBytes != fmt.Sprint(96<<20) {
		t.Errorf("the disk is said to have %s bytes", v.Disks[0].SizeBytes)
	}
	s.holds(t, "web-1", "disk-0", []area{{0, 4 << 20, 1}, {40 << 20, 4 << 20, 2}, {60 << 20, 4 << 20, 3}})
	dev := s.openDisk(t, "web-1", "disk-0")
	defer dev.Close()
	if dev.Size() != 96<<20 {
		t.Errorf("the disk has %d bytes", dev.Size())
	}
}
