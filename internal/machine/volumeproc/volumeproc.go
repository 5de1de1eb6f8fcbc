// Package volumeproc starts the volume process of a VM (internal/role/volumed),
// finds it again after this program was restarted, and ends it.
//
// Invariants: the process gets no secret at its start, no environment, and no
// descriptors but its control socket and what [Config.Hold] names; it cannot gain
// privileges; it lives in its own session and on when this program ends.
//
// A [Process] is safe for concurrent use. Its goroutine ends with Close, or with
// the process.
package volumeproc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/volumectl"
	"strongroom/internal/errs"
	"strongroom/internal/machine/process"
)

// startTimeout bounds the time until the process answers. It takes 10 ms.
const startTimeout = 15 * time.Second

// Errors that callers branch on.
var (
	// ErrNotRunning: there is no volume process in the run directory.
	ErrNotRunning = errors.New("volume process is not running")
	// ErrRunning: there is one already.
	ErrRunning = errors.New("volume process is already running")
)

// Config says how a volume process is started.
type Config struct {
	// VM names the VM, without spaces; it is visible in the process list.
	VM string
	// RunDir holds its sockets and its log. It is made if it is missing; only
	// its owner may enter. Absolute; at most 90 bytes, for the names of sockets.
	RunDir string
	// Hold are descriptors that the process keeps open and does not use: the VM's
	// lock, so that it is held as long as the VM's disks are open. They stay the
	// caller's.
	Hold []*os.File
	// Command is the program and its first arguments. Empty: this program's
	// subcommand "volumed".
	Command []string
}

// Process is a volume process and its control connection. It must be closed.
type Process struct {
	*volumectl.Client

	runDir  string
	process *process.Process
	ended   chan struct{} // closed when the process has ended
	stopped chan struct{} // closed when the goroutine has ended
	exit    string        // how it ended, set before ended is closed
}

// NBDSocket returns the path at which the volume process of runDir serves NBD.
func NBDSocket(runDir string) string { return filepath.Join(runDir, "nbd.sock") }

// VhostSocket returns the path at which the volume process of runDir serves a
// disk over vhost-user, after [Process.ServeVhostUser].
func VhostSocket(runDir, disk string) string { return filepath.Join(runDir, disk+".vhost") }

func controlSocket(runDir string) string { return filepath.Join(runDir, "volume.sock") }

func logPath(runDir string) string { return filepath.Join(runDir, "volumed.log") }

// Start starts a volume process, which then serves NBD at [NBDSocket]. It has no
// disks yet. It returns [ErrRunning] if there is one in the run directory.
func Start(ctx context.Context, c Config) (*Process, error) {
	p, err := start(ctx, &c)
	if err != nil {
		return nil, errs.Wrap(err, "cannot start volume process of %s", c.VM)
	}
	return p, nil
}

func start(ctx context.Context, c *Config) (*Process, error) {
	if c.VM == "" || !filepath.IsAbs(c.RunDir) {
		return nil, errs.New(errs.Invalid, "a volume process needs the name of a VM and an absolute run directory")
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := os.MkdirAll(c.RunDir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(c.RunDir, 0o700); err != nil {
		return nil, err
	}
	if client, err := volumectl.Dial(ctx, controlSocket(c.RunDir)); err == nil {
		client.Close()
		return nil, ErrRunning
	} else if !isAbsent(err) {
		return nil, err
	}
	control, err := bind(controlSocket(c.RunDir))
	if err != nil {
		return nil, err
	}
	held, err := launch(c, control)
	control.Close()
	if err != nil {
		return nil, err
	}
	p, err := connect(ctx, held, c.RunDir)
	if err != nil {
		held.Kill()
		held.Wait()
		status := held.Reap()
		held.Close()
		return nil, fmt.Errorf("%w (%s): %s", err, status, process.LogTail(logPath(c.RunDir)))
	}
	if err := p.listen(ctx); err != nil {
		p.Kill(context.WithoutCancel(ctx))
		p.Close()
		return nil, err
	}
	return p, nil
}

// isAbsent tells that nobody listens on a unix socket.
func isAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}

// bind makes the control socket. The volume process itself calls listen, so
// that the kernel names it as the owner.
func bind(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot make socket %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// launch runs the process, detached from us.
func launch(c *Config, control *os.File) (*process.Process, error) {
	log, err := os.OpenFile(logPath(c.RunDir), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	command := c.Command
	if len(command) == 0 {
		// Also right after this program's file was replaced by an upgrade.
		command = []string{"/proc/self/exe", "volumed"}
	}
	cmd := exec.Command(command[0], append(command[1:len(command):len(command)], "--vm", c.VM, "--run-dir", c.RunDir)...)
	cmd.Args[0] = "strongroom"
	cmd.Dir = "/"
	cmd.Env = []string{} // not nil, which would mean ours
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = append([]*os.File{control}, c.Hold...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := startWithoutPrivileges(cmd); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	cmd.Process.Release() // it is waited for by its pidfd
	p, err := process.Open(pid)
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
		unix.Wait4(pid, nil, 0, nil)
		return nil, err
	}
	return p, nil
}

// startWithoutPrivileges starts cmd with no_new_privs. That is a property of a
// thread, which its children inherit and which cannot be undone: so it is done
// on a thread that ends with this.
func startWithoutPrivileges(cmd *exec.Cmd) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = cmd.Start()
		}
		result <- err
	}()
	return <-result
}

// connect waits until the process listens.
func connect(ctx context.Context, held *process.Process, runDir string) (*Process, error) {
	for delay := time.Millisecond; ; delay = min(2*delay, 10*time.Millisecond) {
		client, err := volumectl.Dial(ctx, controlSocket(runDir))
		if err == nil {
			return newProcess(held, client, runDir), nil
		}
		if held.HasEnded() {
			return nil, errors.New("it ended at once")
		}
		if !isAbsent(err) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("it does not answer: %w", err)
		case <-time.After(delay):
		}
	}
}

// listen gives the process a socket at NBDSocket.
func (p *Process) listen(ctx context.Context) error {
	return handListener(NBDSocket(p.runDir), func(file *os.File) error { return p.Listen(ctx, file) })
}

// ServeVhostUser makes the process serve a disk that it has at [VhostSocket] also,
// beside NBD. That path must fit a unix socket, and the disk's name a serial
// number of 20 bytes.
func (p *Process) ServeVhostUser(ctx context.Context, disk string) error {
	return handListener(VhostSocket(p.runDir, disk), func(file *os.File) error { return p.ListenVhostUser(ctx, disk, file) })
}

// handListener makes a socket at path and hands it over. Clients of whoever
// listened there before find the new one.
func handListener(path string, hand func(*os.File) error) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	listener.SetUnlinkOnClose(false) // it lives on in the process
	defer listener.Close()
	file, err := listener.File()
	if err != nil {
		return err
	}
	defer file.Close()
	return hand(file)
}

// WhileSuspended runs f while the files of all disks stay as they are, at one point
// in time ([volumectl.Client.Suspend]), for at most limit. An error says that f
// failed, or that the disks may have been written before it was done. If this
// program ends meanwhile, the disks go on at once.
func (p *Process) WhileSuspended(ctx context.Context, limit time.Duration, f func() error) error {
	// A connection of its own: nobody else waits, and with it the suspension ends.
	client, err := volumectl.Dial(ctx, controlSocket(p.runDir))
	if err != nil {
		return err
	}
	defer client.Close()
	if client.PID() != p.PID() {
		return errs.New(errs.Unavailable, "the volume process was started again").WithHint("try again")
	}
	if err := client.Suspend(ctx, limit); err != nil {
		return err
	}
	err = f()
	if late := client.Resume(ctx); err == nil {
		err = late
	}
	return err
}

// Adopt finds the volume process that an earlier process of this program
// started in runDir for that VM. It returns [ErrNotRunning] if there is none.
func Adopt(ctx context.Context, runDir, vm string) (*Process, error) {
	p, err := adopt(ctx, runDir, vm)
	if err != nil {
		return nil, errs.Wrap(err, "cannot adopt volume process of %s", vm)
	}
	return p, nil
}

func adopt(ctx context.Context, runDir, vm string) (*Process, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	client, err := volumectl.Dial(ctx, controlSocket(runDir))
	if isAbsent(err) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	held, err := process.Open(client.PID())
	if errors.Is(err, process.ErrEnded) {
		err = ErrNotRunning
	}
	if err == nil {
		// An answer after that shows that the PID is still its own.
		if _, err = client.Status(ctx); err == nil && client.VM() != vm {
			err = errs.New(errs.InvalidState, "process %d serves the disks of %s", client.PID(), client.VM())
		}
		if err == nil {
			return newProcess(held, client, runDir), nil
		}
		held.Close()
	}
	client.Close()
	return nil, err
}

func newProcess(held *process.Process, client *volumectl.Client, runDir string) *Process {
	p := &Process{
		Client: client, runDir: runDir, process: held,
		ended: make(chan struct{}), stopped: make(chan struct{}),
	}
	go func() {
		defer close(p.stopped)
		if held.Wait() == nil {
			p.exit = held.Reap()
			close(p.ended)
		}
	}()
	return p
}

// Ended is closed when the process has ended. It is not closed by Close.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Exit says how the process ended, such as "exit status 0", with the end of its
// log; "" while it runs. The first part is missing if it was not our child.
func (p *Process) Exit() string {
	select {
	case <-p.ended:
		return p.exit + ": " + process.LogTail(logPath(p.runDir))
	default:
		return ""
	}
}

// Stop ends the process in good order: everything is durable when it returns
// nil. When ctx ends first it returns an error and the process may run on.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Shutdown(ctx); err != nil {
		select {
		case <-p.ended:
			return nil
		default:
			return err
		}
	}
	return p.wait(ctx)
}

// Kill ends the process at once, as a crash would.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.process.Kill(); err != nil {
		return fmt.Errorf("cannot kill volume process: %w", err)
	}
	return p.wait(ctx)
}

func (p *Process) wait(ctx context.Context) error {
	select {
	case <-p.stopped:
	case <-ctx.Done():
		return fmt.Errorf("cannot wait for the end of the volume process: %w", ctx.Err())
	}
	select {
	case <-p.ended:
		return nil
	default:
		return os.ErrClosed
	}
}

// Close lets go of the process, which lives on. It is idempotent and never
// fails.
func (p *Process) Close() error {
	p.Client.Close()
	p.process.Close()
	<-p.stopped
	return nil
}
