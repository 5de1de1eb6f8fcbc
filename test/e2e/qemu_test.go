package e2e

import (
	"encoding/json"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// bareQEMU returns how long a QEMU like that of a VM, with the guest's processor
// stopped and without disks, takes from its start until it answers: what no
// power-on can be without.
func bareQEMU(t *testing.T, s *site) time.Duration {
	t.Helper()
	socket := filepath.Join(s.lab.Dir, "qmp")
	began := time.Now()
	cmd := exec.CommandContext(t.Context(), "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "tcg",
		"-cpu", "max", "-m", "192", "-kernel", filepath.Join(s.store, "boot", "vmlinuz"), "-S", "-qmp", "unix:"+socket+",server=on,wait=off")
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	var qmp net.Conn
	awaitEvery(t, time.Millisecond, "QEMU to answer", func() bool {
		var err error
		qmp, err = net.Dial("unix", socket)
		return err == nil
	})
	defer qmp.Close()
	var greeting map[string]any
	must(t, json.NewDecoder(qmp).Decode(&greeting))
	return time.Since(began)
}
