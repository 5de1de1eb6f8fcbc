package e2e

import (
	be "encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"strongroom/internal/machine/bundle"
	"strongroom/test/guest"
	"strongroom/test/reflink"
)

// TestSnapshots goes back and on with a guest that writes another thing at each
// boot, and tells by it what it has found. A rekey on the way leaves nothing under
// the old key.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	boot := s.bootFiles(t, "snapshots", guest.Options{Steps: []guest.Step{{Name: "turn", Command: "agent await /dev/vda && " +
		"{ agent verify-pattern /dev/vda 0 4194304 1 && agent write-pattern /dev/vda 0 4194304 2 || agent write-pattern /dev/vda 0 4194304 1; }"}}})
	turn := func() {
		t.Helper()
		c := s.powerOn(t, "web-1")
		c.await(t, guest.Done, "", "")
		c.noIOErrors(t)
		s.reaches(t, "web-1", "")
	}
	holds := func(pattern int64) {
		t.Helper()
		s.holds(t, "web-1", "disk-0", []area{{0, 4 << 20, pattern}})
	}
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "ds", "--disk", "16M", "--encrypt"}, boot...)...)
	turn()
	s.ok(t, "vm", "snapshot", "create", "web-1", "first", "--description", "as it was first")
	s.refused(t, refusal{1, "has a snapshot first already", "strongroom vm snapshot ls web-1"}, "vm", "snapshot", "create", "web-1", "first")
	s.refused(t, refusal{1, "VM web-1 has snapshots", "strongroom vm snapshot ls web-1"}, "vm", "rekey", "web-1", "--deep")
	turn()
	holds(2)
	s.ok(t, "vm", "snapshot", "create", "web-1", "second")

	s.ok(t, "vm", "rekey", "web-1")
	v, err := bundle.Read(s.folder("web-1"))
	must(t, err)
	for _, file := range []string{v.Disks[0].File, v.Snapshots[0].Disks[0].File, v.Snapshots[1].Disks[0].File} {
		if kek := inspect(t, filepath.Join(s.folder("web-1"), file)).Safes[0].KEK; kek != v.Key.Ref() {
			t.Errorf("%s is under %v, not %v", file, kek, v.Key)
		}
	}

	s.ok(t, "vm", "snapshot", "revert", "web-1", "first", "--yes")
	holds(1)
	turn() // it finds what it was reverted to
	holds(2)
	s.ok(t, "vm", "snapshot", "create", "web-1", "third")
	out := s.ok(t, "vm", "snapshot", "ls", "web-1").Stdout
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 4 || !strings.HasPrefix(lines[1], "first ") || !strings.HasPrefix(lines[2], "  second ") || !strings.HasPrefix(lines[3], "  third ") {
		t.Errorf("the tree is\n%s", out)
	}
	s.ok(t, "vm", "snapshot", "delete", "web-1", "first", "--yes")
	s.ok(t, "vm", "snapshot", "revert", "web-1", "second", "--yes")
	holds(2)

	// The folder has all of it: registered again, its snapshots are there.
	s.ok(t, "vm", "unregister", "web-1", "--yes")
	s.ok(t, "vm", "register", "web-1", "--datastore", "ds")
	s.ok(t, "vm", "snapshot", "show", "web-1", "third")
	s.ok(t, "vm", "delete", "web-1", "--yes")
	if left, err := filepath.Glob(filepath.Join(s.store, "web-1*")); err != nil || slices.Contains(left, s.folder("web-1")) {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestSnapshotsRunning makes snapshots and clones of a guest that writes to two disks
// in turn, also while the host is killed. What comes of them is of one moment.
func TestSnapshotsRunning(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	s.store = reflink.Dir(t)
	s.ok(t, "datastore", "create", "shares", "--cluster", "lab", "--path", s.store)
	boot := s.bootFiles(t, "counts", guest.Options{Steps: []guest.Step{{Name: "count", Command: "agent await /dev/vdb && agent count /dev/vda /dev/vdb"}}})
	s.ok(t, append([]string{"vm", "create", "web-1", "--datastore", "shares", "--disk", "8M", "--disk", "8M", "--encrypt"}, boot...)...)
	c := s.powerOn(t, "web-1")
	// goesOn waits until the guest has counted on, and returns how far.
	goesOn := func() (n int) {
		t.Helper()
		for range 2 {
			e := c.await(t, guest.Note, "count", "counted ")
			_, err := fmt.Sscanf(e.Text, "counted %d", &n)
			must(t, err)
		}
		return n
	}
	// holds looks at the disks of a VM that is off.
	holds := func(vm string, before int) {
		t.Helper()
		var n [2]uint64
		for i, disk := range []string{"disk-0", "disk-1"} {
			dev := s.openDisk(t, vm, disk)
			var sector [512]byte
			_, err := dev.ReadAt(sector[:], 0)
			must(t, errors.Join(err, dev.Close()))
			n[i] = be.BigEndian.Uint64(sector[:])
		}
		if n[1] < uint64(before) || n[0] != n[1] && n[0] != n[1]+1 {
			t.Errorf("%s holds %d and %d, and both disks had %d when it was made", vm, n[0], n[1], before)
		}
	}

	atFirst := goesOn()
	s.ok(t, "vm", "snapshot", "create", "web-1", "first")
	s.refused(t, refusal{1, "powered off", "strongroom vm power-off web-1"}, "vm", "snapshot", "revert", "web-1", "first", "--yes")
	s.refused(t, refusal{1, "VM web-1 has snapshots", "strongroom vm snapshot ls web-1"}, "vm", "rekey", "web-1", "--deep")
	s.ok(t, "vm", "rekey", "web-1")
	atClone := goesOn()
	s.ok(t, "vm", "clone", "web-1", "web-2", "--recrypt")

	// Killed at any time: the guest goes on, and the task ends.
	atKill := goesOn()
	kills := []time.Duration{0, 30 * time.Millisecond}
	for i, after := range kills {
		id := s.begin(t, "vm", "snapshot", "create", "web-1", fmt.Sprint("killed-", i))
		time.Sleep(after)
		s.host.Kill()
		goesOn()
		must(t, s.host.Start())
		s.ok(t, "task", "wait", id)
	}
	goesOn()
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	s.ok(t, "vm", "power-off", "web-1")
	c.noIOErrors(t)

	holds("web-2", atClone)
	s.ok(t, "vm", "snapshot", "revert", "web-1", "first", "--yes")
	holds("web-1", atFirst)
	for i := range kills {
		s.ok(t, "vm", "snapshot", "revert", "web-1", fmt.Sprint("killed-", i), "--yes")
		holds("web-1", atKill)
	}
	// The guest looks for itself, and goes on.
	c = s.powerOn(t, "web-1")
	c.await(t, guest.Note, "count", "found ")
	goesOn()
}
