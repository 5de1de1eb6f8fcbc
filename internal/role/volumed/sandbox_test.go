package volumed_test

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/volumectl"
	"strongroom/internal/machine/volumeproc"
	"strongroom/internal/role/volumed/sandbox/sandboxtest"
)

// probe lets the process try on SIGUSR1 what the sandbox must refuse; the answer
// is in its log.
func probe() {
	told := make(chan os.Signal, 1)
	signal.Notify(told, unix.SIGUSR1)
	go func() {
		for range told {
			fmt.Fprintf(os.Stderr, "not refused: %q\n", sandboxtest.Failures(unix.Stderr))
		}
	}()
}

// TestSandbox tries from inside a volume process with a disk in use what it
// must not do, and then uses the disk.
func TestSandbox(t *testing.T) {
	t.Parallel()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir, Command: []string{"/proc/self/exe", "probed"}})
	path, dek, _, _ := newVolume(t)
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}, path, dek))
	qemuIO(t, uri(dir, "disk-0"), "write -P 0x5a 0 1M")

	status, err := p.Status(t.Context())
	check(t, err)
	if s := status.Sandbox; s.Landlock < 4 || !s.Seccomp || s.Missing != nil {
		t.Errorf("the status tells of the sandbox %+v", s)
	}
	check(t, unix.Kill(p.PID(), unix.SIGUSR1))
	log := ""
	for deadline := time.Now().Add(time.Minute); !strings.Contains(log, "not refused: "); time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(filepath.Join(dir, "volumed.log"))
		check(t, err)
		if log = string(b); time.Now().After(deadline) {
			t.Fatalf("no answer from inside: %s", log)
		}
	}
	if !strings.Contains(log, "not refused: []\n") {
		t.Errorf("from inside: %s", log)
	}
	qemuIO(t, uri(dir, "disk-0"), "read -P 0x5a 0 1M")
	check(t, p.Stop(t.Context()))
}
