package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"strongroom/test/lab"
)

// TestMemoryIsPrivate runs everything as an ordinary user and shows that another
// process of that very user cannot read the memory of those that hold keys: 13.
func TestMemoryIsPrivate(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	if os.Geteuid() == 0 {
		l.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		must(t, os.Chown(l.Dir, 65534, 65534))
	}
	s := newSite(t, l, "")
	own(t, l, s.store)
	password := s.passwordFile(t)
	own(t, l, filepath.Join(l.Dir, "backups"))
	s.ok(t, "provider", "create-native", "kp-1")
	s.ok(t, "provider", "backup", "kp-1", "--out", s.backupOf("kp-1"), "--password-file", password)
	s.ok(t, encryptedVM("web-1", "--provider", "kp-1")...)
	s.ok(t, "vm", "power-on", "web-1")

	// What it looks like where memory is not private: the probe works.
	open := exec.CommandContext(t.Context(), "sleep", "600")
	open.SysProcAttr = &syscall.SysProcAttr{Credential: l.Credential, Pdeathsig: syscall.SIGKILL}
	must(t, open.Start())
	defer func() {
		_ = open.Process.Kill()
		_ = open.Wait()
	}()
	if err := readMemory(t, l, open.Process.Pid); err != nil {
		t.Fatalf("the memory of sleep cannot be read either: %v", err)
	}
	for name, pid := range map[string]int{
		"controller": s.controller.PID(), "host": s.host.PID(), "volume process": s.only(t, "strongroom").pid,
	} {
		if uid := uidOf(t, pid); l.Credential != nil && uid != "65534" {
			t.Errorf("the %s runs as user %s", name, uid)
		}
		if err := readMemory(t, l, pid); err == nil || !strings.Contains(err.Error(), "ermission denied") {
			t.Errorf("the memory of the %s can be read (%v)", name, err)
		}
	}
	s.ok(t, "vm", "power-off", "web-1", "--hard")
}

// own gives a tree to the user of the lab.
func own(t *testing.T, l *lab.Lab, root string) {
	t.Helper()
	if l.Credential == nil {
		return
	}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, int(l.Credential.Uid), int(l.Credential.Gid)))
	}))
}

// readMemory has a process of the lab's user read the start of the program that
// a process runs, from its memory.
func readMemory(t *testing.T, l *lab.Lab, pid int) error {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", fmt.Sprintf(`
		start=$(head -n 1 /proc/%[1]d/maps | cut -d- -f1) && test -n "$start" &&
		dd if=/proc/%[1]d/mem bs=4096 skip=$((0x$start / 4096)) count=1 status=none | head -c 4`, pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: l.Credential}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil && string(out) == "\x7fELF" {
		return nil
	}
	return fmt.Errorf("%w: %q: %s", errors.Join(err, errors.New("cannot read its memory")), out, stderr.String())
}

// uidOf returns the effective user of a process, by its status: the owner of
// its files in /proc is root when it is not dumpable.
func uidOf(t *testing.T, pid int) string {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	must(t, err)
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); len(fields) == 5 && fields[0] == "Uid:" {
			return fields[2]
		}
	}
	t.Fatalf("no user in %s", status)
	return ""
}
