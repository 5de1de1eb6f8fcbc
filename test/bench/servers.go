package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The servers, in the order of the tables.
const (
	ours    = "strongroom"
	plain   = "strongroom, not encrypted"
	daemon  = "qemu-storage-daemon, LUKS"
	kit     = "nbdkit, luks filter"
	ceiling = "no device at all"
)

// server is one process under test.
type server struct {
	name    string
	command []string // as it is started
	socket  string   // of NBD
	vhost   string   // of vhost-user; "" if it has none
	process *exec.Cmd
	errors  bytes.Buffer // what it says on standard error
}

// passphrase opens the peers' images. It protects nothing.
const passphrase = "measured, not hidden"

// medium is what the images are on.
type medium struct {
	dir    string
	direct bool // past the page cache; not on a tmpfs, and not with nbdkit, which cannot
}

// String is what the names of its measurements begin with.
func (m medium) String() string {
	if m.direct {
		return "disk/"
	}
	return ""
}

// startServers makes images of size bytes on m and starts a server for each.
func startServers(ctx context.Context, m medium, size int64) ([]*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	path := func(name string) string { return filepath.Join(m.dir, name) }
	if err := makeEncrypted(path("ours.luks"), path("key"), size); err != nil {
		return nil, err
	}
	if err := makePlain(path("plain.raw"), size); err != nil {
		return nil, err
	}
	if err := makePlain(path("nothing.raw"), size); err != nil {
		return nil, err
	}
	if err := os.WriteFile(path("passphrase"), []byte(passphrase), 0o600); err != nil {
		return nil, err
	}
	secret := "secret,id=s,file=" + path("passphrase")
	for _, image := range []string{"daemon.luks", "kit.luks"} {
		// Both peers read LUKS1 only; the cipher is the same as ours.
		make := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "luks", "--object", secret,
			"-o", "key-secret=s,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha512,iter-time=200",
			path(image), strconv.FormatInt(size, 10))
		if out, err := make.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("cannot make a LUKS image: %w: %s", err, out)
		}
	}

	open, cache := "cached", "off"
	if m.direct {
		open, cache = "direct", "on"
	}
	all := []*server{
		{name: ours, command: []string{self, "serve", "encrypted", open, path("ours.luks"), path("key"), path("ours.sock"), path("ours.vhost")}, socket: path("ours.sock"), vhost: path("ours.vhost")},
		{name: plain, command: []string{self, "serve", "plain", open, path("plain.raw"), "-", path("plain.sock"), path("plain.vhost")}, socket: path("plain.sock"), vhost: path("plain.vhost")},
		{name: daemon, socket: path("daemon.sock"), vhost: path("daemon.vhost"), command: []string{
			"qemu-storage-daemon", "--object", secret,
			"--blockdev", "driver=file,node-name=file,cache.direct=" + cache + ",filename=" + path("daemon.luks"),
			"--blockdev", "driver=luks,node-name=luks,file=file,key-secret=s",
			"--nbd-server", "addr.type=unix,addr.path=" + path("daemon.sock"),
			"--export", "type=nbd,id=e,node-name=luks,name=,writable=on",
			"--export", "type=vhost-user-blk,id=v,node-name=luks,addr.type=unix,addr.path=" + path("daemon.vhost") + ",writable=on",
		}},
		{name: kit, socket: path("kit.sock"), command: []string{
			"nbdkit", "--foreground", "--unix", path("kit.sock"), "--filter=luks", "file", path("kit.luks"), "passphrase=+" + path("passphrase"),
		}},
		{name: ceiling, command: []string{self, "serve", "nothing", open, path("nothing.raw"), "-", path("nothing.sock"), path("nothing.vhost")}, socket: path("nothing.sock"), vhost: path("nothing.vhost")},
	}
	if m.direct {
		all = all[:3] // neither nbdkit nor what does not reach the disk
	}
	for i, s := range all {
		if err := s.start(ctx); err != nil {
			stopServers(all[:i])
			return nil, err
		}
	}
	return all, nil
}

func (s *server) start(ctx context.Context) error {
	s.process = exec.Command(s.command[0], s.command[1:]...)
	s.process.Stderr = &s.errors
	// Whatever ends this program ends the servers.
	s.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := s.process.Start(); err != nil {
		return fmt.Errorf("cannot start %s: %w", s.name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		sock, err := net.Dial("unix", s.socket)
		if err == nil {
			return sock.Close()
		}
		select {
		case <-ctx.Done():
			s.stop()
			return fmt.Errorf("cannot reach %s: %w: %s", s.name, err, s.errors.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *server) stop() {
	_ = s.process.Process.Signal(syscall.SIGTERM) // it may have ended already
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.process.Wait() }() // the status of a killed process says nothing
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		_ = s.process.Process.Kill()
		<-ended
	}
}

func stopServers(all []*server) {
	for _, s := range all {
		s.stop()
	}
}

// cpu returns the processor time that the server has used.
func (s *server) cpu() (time.Duration, error) {
	return processorTime(s.process.Process.Pid)
}

// processorTime reads utime and stime of a process, in ticks of 10 ms.
func processorTime(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name before the last parenthesis may hold anything.
	_, rest, found := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')'):]), " ")
	fields := strings.Fields(rest)
	if !found || len(fields) < 13 {
		return 0, errors.New("cannot read the processor time: /proc/PID/stat has too few fields")
	}
	ticks := int64(0)
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("cannot read the processor time: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}
