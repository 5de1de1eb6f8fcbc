package e2e

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"strongroom/internal/machine/bundle"
	"strongroom/test/guest"
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
