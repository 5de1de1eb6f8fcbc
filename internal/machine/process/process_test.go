package process_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"strongroom/internal/machine/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// child runs a program that ends when its standard input does.
func child(t *testing.T) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid = cmd.Process.Pid
	cmd.Process.Release()
	t.Cleanup(func() { stdin.Close() })
	return pid, func() { stdin.Close() }
}

func open(t *testing.T, pid int) *process.Process {
	t.Helper()
	p, err := process.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func TestLife(t *testing.T) {
	t.Parallel()
	pid, end := child(t)
	p := open(t, pid)
	if p.PID() != pid || p.HasEnded() || p.Reap() != "" {
		t.Errorf("PID %d, ended %v", p.PID(), p.HasEnded())
	}
	waited := make(chan error)
	go func() { waited <- p.Wait() }()
	end()
	if err := <-waited; err != nil {
		t.Errorf("Wait: %v", err)
	}
	if !p.HasEnded() || p.Wait() != nil {
		t.Error("it has not ended for good")
	}
	if err := p.Kill(); err != nil { // a zombie takes signals
		t.Errorf("Kill after the end: %v", err)
	}
	if status := p.Reap(); status != "exit status 0" {
		t.Errorf("status %q", status)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("Kill after Reap: %v", err)
	}
	if status := p.Reap(); status != "" {
		t.Errorf("reaped twice: %q", status)
	}
	if _, err := process.Open(pid); !errors.Is(err, process.ErrEnded) {
		t.Errorf("opened an ended process: %v", err)
	}
}

func TestKillAndClose(t *testing.T) {
	t.Parallel()
	pid, _ := child(t)
	p := open(t, pid)
	other := open(t, pid)
	waited := make(chan error)
	go func() { waited <- other.Wait() }()
	other.Close()
	other.Close()
	if err := <-waited; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait during Close: %v", err)
	}
	if err := other.Kill(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Kill after Close: %v", err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if status := p.Reap(); status != "signal: killed" {
		t.Errorf("status %q", status)
	}
}

func TestLogTail(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	if tail := process.LogTail(path); tail != "" {
		t.Errorf("no log: %q", tail)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 5000)+"\nlast \xff words\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if tail := process.LogTail(path); len(tail) > 2<<10 || !strings.HasSuffix(tail, "x\nlast ? words") {
		t.Errorf("%d bytes: %.10q...%q", len(tail), tail, tail[max(0, len(tail)-20):])
	}
}
