// Package swtpm gives tests a TPM 2.0 of their own: swtpm with an empty state,
// on a unix socket.
package swtpm

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TPM is a running swtpm. It is used by one goroutine.
type TPM struct {
	t   testing.TB
	dir string
	cmd *exec.Cmd
}

// Start starts a TPM that ends with the test.
func Start(t testing.TB) *TPM {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	e := &TPM{t: t, dir: dir}
	e.start()
	t.Cleanup(e.Stop)
	return e
}

// Socket returns the path of the socket for commands, which serves one
// connection after another.
func (e *TPM) Socket() string { return filepath.Join(e.dir, "s") }

func (e *TPM) start() {
	e.t.Helper()
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir+",mode=0600", "--server", "type=unixio,path="+e.Socket()+",mode=0600",
		"--ctrl", "type=unixio,path="+filepath.Join(e.dir, "c")+",mode=0600", "--flags", "not-need-init,startup-clear")
	out := &bytes.Buffer{}
	e.cmd.Stdout, e.cmd.Stderr = out, out
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		conn, err := net.Dial("unix", e.Socket())
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("swtpm does not answer: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Stop ends the TPM. It is idempotent.
func (e *TPM) Stop() {
	if e.cmd != nil {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait() // it was killed
		e.cmd = nil
	}
	os.Remove(e.Socket())
	os.Remove(filepath.Join(e.dir, "c"))
}

// Reboot starts the same TPM again: its PCRs are reset, its keys are not.
func (e *TPM) Reboot() {
	e.t.Helper()
	e.Stop()
	e.start()
}
