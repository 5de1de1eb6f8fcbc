package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// mountTmpfs mounts a file system of a few MiB until the test ends. scripts/setup.sh
// has sudo for those who are not root.
func mountTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	privileged := func(args ...string) {
		t.Helper()
		if os.Geteuid() != 0 {
			args = append([]string{"sudo", "-n"}, args...)
		}
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	must(t, os.MkdirAll(dir, 0o755))
	privileged("mount", "-t", "tmpfs", "-o", "mode=1777,size="+size, "tmpfs", dir)
	t.Cleanup(func() { privileged("umount", "--lazy", dir) })
}

// fill takes up all but about leave bytes of a file system.
func fill(t *testing.T, dir string, leave int64) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	var st syscall.Statfs_t
	must(t, syscall.Statfs(dir, &st))
	part := make([]byte, st.Bsize)
	for left := int64(st.Bavail)*st.Bsize - leave; left > 0; left -= st.Bsize {
		if _, err := f.Write(part); errors.Is(err, syscall.ENOSPC) {
			break
		} else {
			must(t, err)
		}
	}
	return func() { must(t, os.Remove(path)) }
}

// TestFullDatastore runs out of space in every operation that writes a disk: the
// VM stays as it was and usable, and the same command works once there is room.
func TestFullDatastore(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	s.provider(t, "kp-2")
	s.store = filepath.Join(s.lab.Dir, "small")
	mountTmpfs(t, s.store, "64m")
	must(t, os.Mkdir(filepath.Join(s.store, "images"), 0o755))
	s.ok(t, "datastore", "create", "small", "--cluster", "lab", "--path", s.store)
	sum := s.image(t, "data.raw", 20)
	noSpace := refusal{1, "no space left", "free space on the datastore"}
	unchanged := func(t *testing.T, encrypted bool) {
		t.Helper()
		if v := s.show(t, "web-1"); v.Encrypted != encrypted || v.CryptoState != "unlocked" {
			t.Errorf("web-1 is %+v", v)
		}
		if s.content(t, "web-1", "disk-0") != sum {
			t.Error("the content has changed")
		}
		if left := s.leftovers(t); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}

	create := []string{"vm", "create", "web-1", "--datastore", "small", "--disk", "format=raw,image=images/data.raw"}
	for _, args := range [][]string{create, append(create, "--encrypt")} {
		free := fill(t, s.store, 8<<20)
		s.refused(t, noSpace, args...)
		if _, err := os.Lstat(s.folder("web-1")); !os.IsNotExist(err) {
			t.Error("there is a folder of the VM that was not created")
		}
		if left := s.leftovers(t); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
		free()
	}
	s.ok(t, create...)
	must(t, os.Remove(filepath.Join(s.store, "images", "data.raw")))

	for _, c := range []struct {
		name   string
		args   []string
		before bool // encrypted
		after  bool
	}{
		{"encrypt", []string{"vm", "encrypt", "web-1"}, false, true},
		{"decrypt", []string{"vm", "decrypt", "web-1", "--yes"}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			free := fill(t, s.store, 8<<20)
			s.refused(t, noSpace, c.args...)
			unchanged(t, c.before)
			free()
			s.ok(t, c.args...)
			unchanged(t, c.after)
			if c.after { // it works in place, and needs room for a journal
				free := fill(t, s.store, 8<<20)
				s.ok(t, "vm", "rekey", "web-1", "--deep")
				unchanged(t, true)
				free()
			}
		})
	}
	t.Run("encrypt in place", func(t *testing.T) { // needs twice the length of a header
		encrypt := []string{"vm", "encrypt", "web-1", "--in-place"}
		free := fill(t, s.store, 8<<20)
		s.refused(t, noSpace, encrypt...)
		unchanged(t, false)
		free()
		free = fill(t, s.store, 22<<20) // enough for one zone
		s.refused(t, refusal{1, "it is not finished", "strongroom vm encrypt web-1 --in-place"}, encrypt...)
		free()
		s.ok(t, encrypt...)
		unchanged(t, true)
		s.ok(t, "vm", "decrypt", "web-1", "--yes")
		unchanged(t, false)
	})
	// While the VM runs, its disk works on.
	for _, c := range []struct {
		name   string
		args   []string
		before bool
		after  bool
	}{
		{"encrypt live", []string{"vm", "encrypt", "web-1"}, false, true},
		{"decrypt live", []string{"vm", "decrypt", "web-1", "--yes"}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.ok(t, "vm", "power-on", "web-1")
			free := fill(t, s.store, 8<<20)
			s.refused(t, noSpace, c.args...)
			s.ok(t, "vm", "power-off", "web-1", "--hard")
			unchanged(t, c.before)
			free()
			s.ok(t, "vm", "power-on", "web-1")
			s.ok(t, c.args...)
			s.ok(t, "vm", "power-off", "web-1", "--hard")
			unchanged(t, c.after)
		})
	}
	t.Run("clone", func(t *testing.T) {
		s.ok(t, "vm", "encrypt", "web-1")
		for _, args := range [][]string{{"vm", "clone", "web-1", "web-2"}, {"vm", "clone", "web-1", "web-2", "--recrypt"}} {
			free := fill(t, s.store, 8<<20)
			s.refused(t, noSpace, args...)
			unchanged(t, true)
			s.refused(t, refusal{3, "web-2", "strongroom vm ls"}, "vm", "show", "web-2")
			free()
			s.ok(t, args...)
			if s.content(t, "web-2", "disk-0") != sum {
				t.Error("the clone does not hold what its original does")
			}
			s.ok(t, "vm", "delete", "web-2", "--yes")
		}
		s.ok(t, "vm", "decrypt", "web-1", "--yes")
	})
	t.Run("deep rekey", func(t *testing.T) { // in place, it needs room for its journal only
		s.ok(t, "vm", "encrypt", "web-1")
		deep := []string{"vm", "rekey", "web-1", "--deep"}
		free := fill(t, s.store, 0)
		s.refused(t, noSpace, deep...)
		unchanged(t, true)
		if s.show(t, "web-1").Disks[0].Rekey != nil {
			t.Error("a rekey is under way")
		}
		free()
		free = fill(t, s.store, 8<<20)
		s.ok(t, deep...)
		unchanged(t, true)
		free()
		s.ok(t, "vm", "decrypt", "web-1", "--yes")
		unchanged(t, false)
	})
	t.Run("nothing left", func(t *testing.T) {
		s.ok(t, "vm", "encrypt", "web-1")
		free := fill(t, s.store, 0)
		// It rewrites nothing but headers in place, and vm.json.
		if r, err := s.controller.CLI(t.Context(), "vm", "rekey", "web-1", "--provider", "kp-2"); err != nil || r.Code != 0 {
			must(t, err)
			noSpace.check(t, r, []string{"vm", "rekey"})
		}
		unchanged(t, true)
		s.ok(t, "vm", "power-on", "web-1")
		s.ok(t, "vm", "power-off", "web-1", "--hard")
		free()
		s.ok(t, "vm", "rekey", "web-1", "--provider", "kp-2")
		unchanged(t, true)
		if s.showProvider(t, "kp-1").InUse {
			t.Error("kp-1 counts as in use")
		}
	})
	if n := strings.Count(s.ok(t, "event", "ls").Stdout, "no room on datastore small"); n < 5 {
		t.Errorf("%d events tell that there is no room, want 5 or more", n)
	}
}
