package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"strongroom/internal/machine/process"
	"strongroom/internal/machine/qemu/qmp"
)

// startTimeout bounds the time until QEMU answers: it starts in 50 ms to 300 ms
// and waits at most for its disks' servers.
const startTimeout = 30 * time.Second

// adoptTimeout bounds the time until a running QEMU greets: it does at once,
// unless another program has its control connection.
const adoptTimeout = 5 * time.Second

// Machine is a running virtual machine. It must be closed.
type Machine struct {
	runDir  string
	process *process.Process
	client  *qmp.Client
	ended   chan struct{} // closed when QEMU has ended
	stopped chan struct{} // closed when the monitor has ended
	plug    sync.Mutex    // held while disks are added or removed

	exit Exit // set before ended is closed
}

// Exit tells how a machine ended.
type Exit struct {
	// Reason is QEMU's: "guest-shutdown", "guest-reset", "guest-panic",
	// "host-qmp-quit", "host-signal", ...; empty if QEMU gave none, which
	// means that it was killed or crashed.
	Reason string
	// Status is the process's, such as "exit status 0" or "signal: killed";
	// empty if the process was not our child.
	Status string
	// Log is the end of QEMU's own messages, at most 2 KiB.
	Log string
}

// Status is the run state of a machine.
type Status string

// Run states that callers tell apart; QEMU has more.
const (
	Running   Status = "running"
	Paused    Status = "paused"
	Prelaunch Status = "prelaunch" // paused before its first instruction
)

// Start starts a machine and returns when it runs (or, with c.Paused, is
// ready to). It returns [ErrRunning] if the run directory is in use. When QEMU
// ends before it is up, the error holds the end of its messages.
func Start(ctx context.Context, c Config) (*Machine, error) {
	m, err := start(ctx, &c)
	if err != nil {
		return nil, fmt.Errorf("cannot start virtual machine %s: %w", c.Name, err)
	}
	return m, nil
}

func start(ctx context.Context, c *Config) (*Machine, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := prepareRunDir(ctx, c.RunDir); err != nil {
		return nil, err
	}
	for i := range c.Disks {
		if c.Disks[i].Interface == VhostUser {
			if err := c.Disks[i].reach(ctx); err != nil {
				return nil, err
			}
		}
	}
	p, err := launch(c)
	if err != nil {
		return nil, err
	}
	m, err := connect(ctx, p, c.RunDir)
	if err == nil && !c.Paused {
		err = m.Cont(ctx)
	}
	if err == nil {
		return m, nil
	}
	p.Kill()
	if m != nil {
		<-m.ended
		m.Close()
		return nil, withLog(err, m.exit.Status, c.RunDir)
	}
	p.Wait()
	status := p.Reap()
	p.Close()
	return nil, withLog(err, status, c.RunDir)
}

// withLog adds what QEMU said and how it ended to err.
func withLog(err error, status, runDir string) error {
	if log := process.LogTail(logPath(runDir)); log != "" {
		return fmt.Errorf("%w (QEMU: %s): %s", err, status, log)
	}
	return fmt.Errorf("%w (QEMU: %s)", err, status)
}

// prepareRunDir makes the directory, private to us, and removes the socket of a
// machine that has ended.
func prepareRunDir(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	// QEMU may be busy with another client, but its socket accepts.
	if conn, err := new(net.Dialer).DialContext(ctx, "unix", Socket(dir)); err == nil {
		conn.Close()
		return ErrRunning
	} else if !isAbsent(err) {
		return fmt.Errorf("%w: %w", ErrRunning, err)
	}
	if err := os.Remove(Socket(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// isAbsent tells that nobody listens on a unix socket.
func isAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}

// openSerialLog opens the file that gets what the guest writes. A folder from
// elsewhere may have a link in its place, by which the guest would write anywhere.
func openSerialLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is not a regular file", path), err, f.Close())
	}
	return f, nil
}

// launch runs QEMU, detached from us: own session, own log, and of our files that
// for the serial port.
func launch(c *Config) (*process.Process, error) {
	binary := c.Binary
	if binary == "" {
		var err error
		if binary, err = exec.LookPath("qemu-system-x86_64"); err != nil {
			return nil, err
		}
	}
	log, err := os.OpenFile(logPath(c.RunDir), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, c.arguments()...)
	cmd.Dir = c.RunDir
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if c.SerialLog != "" {
		serial, err := openSerialLog(c.SerialLog)
		if err != nil {
			return nil, err
		}
		defer serial.Close()
		cmd.ExtraFiles = []*os.File{serial}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	cmd.Process.Release() // it is waited for by its pidfd
	p, err := process.Open(pid)
	if err == nil {
		if err = unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil); err == nil || errors.Is(err, unix.ESRCH) {
			return p, nil
		}
		p.Close()
	}
	unix.Kill(pid, unix.SIGKILL)
	unix.Wait4(pid, nil, 0, nil)
	return nil, err
}

// connect waits until QEMU listens and returns its Machine, which then owns p.
func connect(ctx context.Context, p *process.Process, runDir string) (*Machine, error) {
	for delay := time.Millisecond; ; delay = min(2*delay, 10*time.Millisecond) {
		client, err := qmp.Dial(ctx, Socket(runDir))
		if err == nil {
			cred, err := process.Peer(client.Conn())
			if err == nil && int(cred.Pid) != p.PID() {
				err = fmt.Errorf("its socket belongs to process %d", cred.Pid)
			}
			if err != nil {
				client.Close()
				return nil, err
			}
			return newMachine(p, client, runDir), nil
		}
		// Not there yet, or gone again with QEMU.
		if p.HasEnded() {
			return nil, errors.New("QEMU ended at once")
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("QEMU does not answer: %w", err)
		case <-time.After(delay):
		}
	}
}

// Adopt finds the machine that an earlier process of this program started in
// runDir. It returns [ErrNotRunning] if there is none, and another error if
// what runs there is not the machine with that UUID or is not ours.
func Adopt(ctx context.Context, runDir string, id uuid.UUID) (*Machine, error) {
	m, err := adopt(ctx, runDir, id)
	if err != nil {
		return nil, fmt.Errorf("cannot adopt virtual machine %s: %w", id, err)
	}
	return m, nil
}

func adopt(ctx context.Context, runDir string, id uuid.UUID) (*Machine, error) {
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	client, err := qmp.Dial(ctx, Socket(runDir))
	if isAbsent(err) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	m, err := identify(ctx, client, runDir, id)
	if err != nil {
		client.Close()
	}
	return m, err
}

// identify makes sure who answers: the kernel names the process that listens,
// a pidfd holds it, and the answer that comes after that shows that it is this
// process, alive, and which machine it is.
func identify(ctx context.Context, client *qmp.Client, runDir string, id uuid.UUID) (*Machine, error) {
	cred, err := process.Peer(client.Conn())
	if err != nil {
		return nil, err
	}
	if int(cred.Uid) != os.Getuid() {
		return nil, fmt.Errorf("process %d belongs to user %d", cred.Pid, cred.Uid)
	}
	p, err := process.Open(int(cred.Pid))
	if errors.Is(err, process.ErrEnded) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	var answer struct {
		UUID uuid.UUID `json:"UUID"`
	}
	if err = client.Do(ctx, "query-uuid", nil, &answer); err == nil && answer.UUID != id {
		err = fmt.Errorf("process %d runs virtual machine %s", p.PID(), answer.UUID)
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return newMachine(p, client, runDir), nil
}

func newMachine(p *process.Process, client *qmp.Client, runDir string) *Machine {
	m := &Machine{
		runDir: runDir, process: p, client: client,
		ended: make(chan struct{}), stopped: make(chan struct{}),
	}
	go m.monitor(client.Watch("SHUTDOWN"))
	return m
}

// monitor learns why and when QEMU ends. It ends then, or by Close.
func (m *Machine) monitor(shutdowns *qmp.Watch) {
	defer close(m.stopped)
	reason := ""
	for event := range shutdowns.Events() {
		var data struct{ Reason string }
		if json.Unmarshal(event.Data, &data) == nil {
			reason = data.Reason
		}
	}
	if err := m.process.Wait(); err != nil {
		return // closed: QEMU runs on without us
	}
	m.exit = Exit{Reason: reason, Status: m.process.Reap(), Log: process.LogTail(logPath(m.runDir))}
	close(m.ended)
}

// do runs a QMP command; [ErrNotRunning] if QEMU has ended.
func (m *Machine) do(ctx context.Context, command string, args, result any) error {
	err := m.client.Do(ctx, command, args, result)
	if !errors.Is(err, qmp.ErrClosed) {
		return err
	}
	// QEMU closes its socket a moment before it ends.
	select {
	case <-m.stopped:
	case <-ctx.Done():
	case <-time.After(time.Second):
	}
	if m.hasEnded() {
		return ErrNotRunning
	}
	return err
}

func (m *Machine) hasEnded() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

// PID returns the process ID of QEMU.
func (m *Machine) PID() int { return m.process.PID() }

// Status returns the run state, or [ErrNotRunning].
func (m *Machine) Status(ctx context.Context) (Status, error) {
	var answer struct{ Status Status }
	err := m.do(ctx, "query-status", nil, &answer)
	return answer.Status, err
}

// Cont lets a paused machine run on.
func (m *Machine) Cont(ctx context.Context) error { return m.do(ctx, "cont", nil, nil) }

// Stop pauses a running machine. Its requests to disks are completed first.
func (m *Machine) Stop(ctx context.Context) error { return m.do(ctx, "stop", nil, nil) }

// PowerDown presses the machine's power button and waits until it has powered
// off. A guest may take long or ignore it: then it returns ctx's error, and the
// machine runs on.
func (m *Machine) PowerDown(ctx context.Context) error {
	if err := m.do(ctx, "system_powerdown", nil, nil); err != nil {
		return err
	}
	if _, err := m.Wait(ctx); err != nil {
		return fmt.Errorf("the guest did not power down: %w", err)
	}
	return nil
}

// Kill ends the machine at once, as if its power failed, and waits for it. It
// returns [os.ErrClosed] after Close.
func (m *Machine) Kill(ctx context.Context) error {
	if err := m.process.Kill(); err != nil {
		if m.hasEnded() {
			return nil
		}
		return fmt.Errorf("cannot end QEMU: %w", err)
	}
	_, err := m.Wait(ctx)
	return err
}

// Wait returns how the machine ended, once it has, or [os.ErrClosed] if it is
// closed before.
func (m *Machine) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	case <-m.stopped:
	}
	if m.hasEnded() {
		return m.exit, nil
	}
	return Exit{}, os.ErrClosed
}

// Ended is closed when QEMU has ended. It is not closed by Close.
func (m *Machine) Ended() <-chan struct{} { return m.ended }

// Watch collects QEMU's events of the given names; see [qmp.Client.Watch].
func (m *Machine) Watch(names ...string) *qmp.Watch { return m.client.Watch(names...) }

// Close lets go of the machine, which runs on, and waits for our goroutines.
// It is idempotent and never fails.
func (m *Machine) Close() error {
	m.client.Close()
	m.process.Close()
	<-m.stopped
	return nil
}
