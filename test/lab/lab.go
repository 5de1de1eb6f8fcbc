// Package lab runs real Strongroom processes (controllers, hosts, key servers, the CLI) in
// folders of their own, on loopback, for the end-to-end tests and the
// demonstration. It works only through the binary and its files, as an operator
// does.
package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"strongroom/test/port"
)

// startTimeout bounds the start of a process, on a machine that is busy with
// other tests.
const startTimeout = 60 * time.Second

// Lab is a folder with controllers, hosts and key servers. Its path must be short, because a
// unix socket's path has at most 107 bytes. Close ends all processes; the
// folder stays.
type Lab struct {
	Dir    string
	Binary string
	// Credential, if not nil, is whom all processes run as. What they need must
	// be theirs.
	Credential *syscall.Credential

	mu        sync.Mutex // guards processes
	processes []*Process
}

// New returns a lab in dir, which must exist.
func New(dir, binary string) *Lab { return &Lab{Dir: dir, Binary: binary} }

// Close ends all processes that still run. VMs outlive their host: those are
// ended by [Host.Crash].
func (l *Lab) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.processes {
		p.Kill()
	}
	l.processes = nil
}

// makeDir and writeFile make what the lab's user owns and nobody else can read.
func (l *Lab) makeDir(path string) error {
	return errors.Join(os.MkdirAll(path, 0o700), l.own(path))
}

func (l *Lab) writeFile(path, text string) error {
	return errors.Join(os.WriteFile(path, []byte(text), 0o600), l.own(path))
}

func (l *Lab) own(path string) error {
	if l.Credential == nil {
		return nil
	}
	return os.Chown(path, int(l.Credential.Uid), int(l.Credential.Gid))
}

// PIDs returns the processes that run.
func (l *Lab) PIDs() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var pids []string
	for _, p := range l.processes {
		if processRuns(p.PID()) {
			pids = append(pids, strconv.Itoa(p.PID()))
		}
	}
	return pids
}

// Process is a running role.
type Process struct {
	Name string
	Log  string // path of what it printed
	// ReadyAfter is how long it took from its start until it was ready.
	ReadyAfter time.Duration

	begun time.Time
	cmd   *exec.Cmd
	done  chan struct{} // closed when it has ended
}

// start runs the binary in the background.
func (l *Lab) start(name string, args ...string) (*Process, error) {
	p := &Process{Name: name, Log: filepath.Join(l.Dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd = exec.Command(l.Binary, args...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: l.Credential}
	p.begun = time.Now()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	l.mu.Lock()
	l.processes = append(l.processes, p)
	l.mu.Unlock()
	return p, nil
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process as a crash does (SIGKILL) and waits. It is idempotent.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop asks the process to end (SIGTERM) and waits.
func (p *Process) Stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(startTimeout):
		p.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM; see %s", p.Name, startTimeout, p.Log)
	}
}

// Wait returns when check does, or with an error when the process has ended or
// it took too long.
func (p *Process) wait(what string, check func() bool) error {
	deadline := time.Now().Add(startTimeout)
	for !check() {
		select {
		case <-p.done:
			return fmt.Errorf("%s ended before %s:\n%s", p.Name, what, tail(p.Log))
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not %s within %v:\n%s", p.Name, what, startTimeout, tail(p.Log))
		}
	}
	p.ReadyAfter = time.Since(p.begun)
	return nil
}

func tail(path string) string {
	text, _ := os.ReadFile(path)
	return string(text[max(0, len(text)-4000):])
}

// Result is what a command of the CLI did.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// JSON decodes the standard output.
func (r Result) JSON(v any) error {
	if err := json.Unmarshal([]byte(r.Stdout), v); err != nil {
		return fmt.Errorf("cannot decode %q: %w", r.Stdout, err)
	}
	return nil
}

// run executes the binary with the CLI configuration given.
func (l *Lab) run(ctx context.Context, config string, args ...string) (Result, error) {
	cmd := exec.CommandContext(ctx, l.Binary, args...)
	cmd.Env = append(os.Environ(), "STRONGROOM_CONFIG="+config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: l.Credential}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return r, err
	}
	return r, nil
}

// Controller is a controller and a CLI that is logged in to it.
type Controller struct {
	*Process
	Name    string
	Address string
	lab     *Lab
	dir     string
}

// StartController makes a controller with a cluster of the name "demo" and
// starts it.
func (l *Lab) StartController(ctx context.Context, name string) (*Controller, error) {
	address, err := port.Reserve()
	if err != nil {
		return nil, err
	}
	c := &Controller{Name: name, Address: address, lab: l, dir: filepath.Join(l.Dir, name)}
	if err := l.makeDir(c.dir); err != nil {
		return nil, err
	}
	config := fmt.Sprintf("data_dir = %q\nlisten = %q\n\n[kms]\nremediation_interval = \"2s\"\nstatus_interval = \"1s\"\n", c.DataDir(), c.Address)
	if err := l.writeFile(c.configPath(), config); err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	_, err = c.Must(ctx, "login", "--server", "https://"+c.Address, "--ca", filepath.Join(c.DataDir(), "ca.pem"),
		"--user", "administrator", "--password-file", filepath.Join(c.DataDir(), "initial-admin-password"))
	return c, err
}

func (c *Controller) configPath() string { return filepath.Join(c.dir, "controller.toml") }

// DataDir is where the controller keeps everything.
func (c *Controller) DataDir() string { return filepath.Join(c.dir, "data") }

// Start starts the controller again after it was stopped or killed.
func (c *Controller) Start() error {
	p, err := c.lab.start(c.Name, "controller", "run", "--config", c.configPath())
	if err != nil {
		return err
	}
	c.Process = p
	return p.wait("listening on "+c.Address, func() bool { return listening("tcp", c.Address) })
}

// CLIConfig is the command line's configuration, logged in as the administrator.
func (c *Controller) CLIConfig() string { return filepath.Join(c.dir, "cli.toml") }

// CLI runs a command as the administrator.
func (c *Controller) CLI(ctx context.Context, args ...string) (Result, error) {
	return c.lab.run(ctx, c.CLIConfig(), args...)
}

// Must runs a command that has to succeed.
func (c *Controller) Must(ctx context.Context, args ...string) (Result, error) {
	r, err := c.CLI(ctx, args...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("strongroom %s: exit code %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r, err
}

// Host is a host of a controller's cluster.
type Host struct {
	*Process
	Name string
	lab  *Lab
	dir  string
}

// StartHost joins a new host to a cluster of c and starts it.
func (c *Controller) StartHost(ctx context.Context, name, cluster string) (*Host, error) {
	address, err := port.Reserve()
	if err != nil {
		return nil, err
	}
	h := &Host{Name: name, lab: c.lab, dir: filepath.Join(c.lab.Dir, name)}
	if err := c.lab.makeDir(h.dir); err != nil {
		return nil, err
	}
	config := fmt.Sprintf("data_dir = %q\nrun_dir = %q\nlisten = %q\n", filepath.Join(h.dir, "data"), filepath.Join(h.dir, "run"), address)
	if err := c.lab.writeFile(h.configPath(), config); err != nil {
		return nil, err
	}
	r, err := c.Must(ctx, "host", "join-token", "--cluster", cluster, "-o", "json")
	if err != nil {
		return nil, err
	}
	var token struct{ Token string }
	if err := r.JSON(&token); err != nil {
		return nil, err
	}
	tokenFile := filepath.Join(h.dir, "join-token")
	if err := c.lab.writeFile(tokenFile, token.Token); err != nil {
		return nil, err
	}
	defer os.Remove(tokenFile)
	if _, err := c.Must(ctx, "host", "join", "--config", h.configPath(), "--controller", "https://"+c.Address, "--name", name, "--token-file", tokenFile); err != nil {
		return nil, err
	}
	if err := h.Start(); err != nil {
		return nil, err
	}
	return h, c.WaitFor(ctx, "host "+name+" to be connected", func() (bool, error) {
		r, err := c.Must(ctx, "host", "show", name, "-o", "json")
		return strings.Contains(r.Stdout, `"connected"`), err
	})
}

func (h *Host) configPath() string { return filepath.Join(h.dir, "host.toml") }

// DataDir is the folder of the host's sealed configuration.
func (h *Host) DataDir() string { return filepath.Join(h.dir, "data") }

// LocalSocket is where the host answers while its controller is away.
func (h *Host) LocalSocket() string { return filepath.Join(h.dir, "run", "host.sock") }

// Start starts the host again after it was stopped or killed.
func (h *Host) Start() error {
	p, err := h.lab.start(h.Name, "host", "run", "--config", h.configPath())
	if err != nil {
		return err
	}
	h.Process = p
	return p.wait("listening on "+h.LocalSocket(), func() bool { return listening("unix", h.LocalSocket()) })
}

// CLI runs a command against the host itself, without a controller.
func (h *Host) CLI(ctx context.Context, args ...string) (Result, error) {
	return h.lab.run(ctx, filepath.Join(h.dir, "cli.toml"), append([]string{"--server", "unix:" + h.LocalSocket()}, args...)...)
}

// Crash kills the host and every process of its VMs, as a power cut does.
func (h *Host) Crash() error {
	pids, err := h.Children()
	if err != nil {
		return err
	}
	h.Kill()
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	deadline := time.Now().Add(time.Minute)
	for _, pid := range pids {
		for processRuns(pid) {
			if time.Now().After(deadline) {
				return fmt.Errorf("process %d outlived SIGKILL", pid)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

// Children returns the processes that have a VM's run folder in their command
// line: the volume processes and QEMU. They live in sessions of their own, so their
// parent does not tell. A host that has just started also tries what QEMU can do.
func (h *Host) Children() ([]int, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, entry := range procs {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == h.PID() || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		run := filepath.Join(h.dir, "run")
		if bytes.Contains(cmdline, []byte(run)) && !bytes.Contains(cmdline, []byte(filepath.Join(run, "probe"))) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// processRuns reports whether the process exists and is no zombie.
func processRuns(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := bytes.Cut(stat, []byte(") "))
	return len(rest) > 0 && rest[0] != 'Z'
}

// KMS is the product's own key management server, `strongroom kms dev`.
type KMS struct {
	*Process
	Name    string
	Address string // of its KMIP port
	lab     *Lab
	dir     string
}

// StartKMS makes a key server with a first application and starts it.
func (l *Lab) StartKMS(name string) (*KMS, error) {
	address, err := port.Reserve()
	if err != nil {
		return nil, err
	}
	k := &KMS{Name: name, Address: address, lab: l, dir: filepath.Join(l.Dir, name)}
	if err := l.makeDir(k.dir); err != nil {
		return nil, err
	}
	return k, k.Start()
}

// Start starts the key server again after it was stopped or killed.
func (k *KMS) Start() error {
	p, err := k.lab.start(k.Name, "kms", "dev", "--dir", k.dir, "--listen", k.Address)
	if err != nil {
		return err
	}
	k.Process = p
	return p.wait("listening on "+k.Address, func() bool {
		_, err := os.Stat(k.File("client.pem")) // written last
		return err == nil && listening("tcp", k.Address)
	})
}

// File is the path of a file in the key server's folder: ca.pem, client.pem or
// client.key.
func (k *KMS) File(name string) string { return filepath.Join(k.dir, name) }

// AddProvider makes the key server a standard provider of c. It does as an
// operator who compares what c sees with what he knows of the server.
func (k *KMS) AddProvider(ctx context.Context, c *Controller, name string) error {
	r, err := c.CLI(ctx, "provider", "add-standard", name, "--server", k.Address)
	if err != nil {
		return err
	}
	_, pin, shown := strings.Cut(r.Stderr, "--trust-fingerprint ")
	if !shown || r.Code != 2 {
		return fmt.Errorf("a server's certificate was not shown to be confirmed: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	_, err = c.Must(ctx, "provider", "add-standard", name, "--server", k.Address, "--trust-fingerprint", strings.TrimSpace(pin),
		"--client-method", "upload", "--client-cert", k.File("client.pem"), "--client-key", k.File("client.key"))
	return err
}

// WaitFor calls check until it says true, at most two minutes.
func (c *Controller) WaitFor(ctx context.Context, what string, check func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		ok, err := check()
		if ok || err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited too long for %s: %w", what, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func listening(network, address string) bool {
	conn, err := net.DialTimeout(network, address, time.Second)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
