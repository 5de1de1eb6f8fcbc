// Package volumed is the volume process: one per running VM, it stands between
// QEMU and the VM's disks and encrypts. The host starts it
// (internal/machine/volumeproc), controls it by docs/spec/volume-control.md and
// may go and come back meanwhile; QEMU reads and writes by vhost-user or NBD.
//
// Invariants: it can open no file by name and has no network (package sandbox):
// disks and sockets come as descriptors; it holds the DEKs of its VM's disks and no
// other key; its memory is in no core dump and open to no debugger of another user.
//
// [Main] is the whole process, [Run] its work.
package volumed

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/volumectl"
	"strongroom/internal/role/volumed/sandbox"
)

// ControlFD is the descriptor on which a volume process finds its control
// socket: bound, not yet listening, so that the kernel tells hosts that it is
// this process that listens.
const ControlFD = 3

// orphanTimeout is how long a volume process without any disk waits for its
// host, which may have died right after starting it.
const orphanTimeout = time.Minute

// gcPercent is how much the heap may grow before it is collected. Requests
// allocate nothing, so that collecting often costs nothing.
const gcPercent = 20

// Config of a volume process.
type Config struct {
	// VM names the VM, for logs and for the host.
	VM string
	// Control is the control socket, bound, of type SOCK_SEQPACKET. It belongs
	// to Run.
	Control *os.File
	// Sandbox is what the process is in, for the host to know.
	Sandbox sandbox.State
	// Log receives what happens. No key or data is ever in it.
	Log *slog.Logger

	program program
}

// Main runs a volume process with the arguments after its subcommand and
// returns its exit status. The arguments are written by internal/machine/volumeproc.
func Main(args []string) int {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	err := run(args, log)
	if err != nil {
		log.LogAttrs(context.Background(), slog.LevelError, "volume process failed", slog.Any("err", err))
		return 1
	}
	return 0
}

func run(args []string, log *slog.Logger) error {
	flags := flag.NewFlagSet("volumed", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	vm := flags.String("vm", "", "name of the VM")
	flags.String("run-dir", "", "folder of the VM's sockets; shown in the process list only")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *vm == "" || flags.NArg() > 0 {
		return errors.New("a volume process is started by a host, not by hand")
	}
	debug.SetGCPercent(gcPercent)
	program, err := findProgram()
	if err != nil {
		return err
	}
	box, err := sandbox.Enter()
	if err != nil {
		return err
	}
	// Descriptors above are of the host's choice, such as the VM's lock: held, not used.
	unix.CloseOnExec(ControlFD)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	// Signals of a terminal are for the host.
	signal.Ignore(unix.SIGINT, unix.SIGHUP)
	return Run(ctx, Config{VM: *vm, Control: os.NewFile(ControlFD, "control socket"), Log: log.With(slog.String("vm", *vm)), Sandbox: box, program: program})
}

// Run serves until a host shuts it down, ctx ends, or no disk comes within
// [orphanTimeout]; then it flushes and closes all disks.
func Run(ctx context.Context, c Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	listener, err := listen(c.Control)
	if err != nil {
		return fmt.Errorf("cannot listen for the host: %w", err)
	}
	e := newEngine(&c, cancel)
	orphan := time.AfterFunc(orphanTimeout, func() {
		if !e.used() {
			c.Log.LogAttrs(ctx, slog.LevelWarn, "no disk came: the host is gone")
			cancel()
		}
	})
	defer orphan.Stop()
	c.program.drop()
	c.Log.LogAttrs(ctx, slog.LevelInfo, "volume process runs", slog.Int("pid", os.Getpid()))
	if missing := c.Sandbox.Missing(); missing != nil {
		c.Log.LogAttrs(ctx, slog.LevelWarn, "the kernel lacks walls of the sandbox", slog.Any("missing", missing))
	}
	server := volumectl.Server{VM: c.VM, Handler: e, Log: c.Log}
	err = server.Serve(ctx, listener)
	return errors.Join(err, e.Shutdown(context.WithoutCancel(ctx)))
}

// listen makes a bound socket a listening one.
func listen(socket *os.File) (*net.UnixListener, error) {
	defer socket.Close() // FileListener duplicates it
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	var listenErr error
	if err := raw.Control(func(fd uintptr) {
		listenErr = unix.Listen(int(fd), volumectl.ConnectionsMax)
	}); err != nil {
		return nil, err
	}
	if listenErr != nil {
		return nil, listenErr
	}
	listener, err := net.FileListener(socket)
	if err != nil {
		return nil, err
	}
	l, ok := listener.(*net.UnixListener)
	if !ok || l.Addr().Network() != "unixpacket" {
		listener.Close()
		return nil, errors.New("it is not a unix socket of type SOCK_SEQPACKET")
	}
	return l, nil
}
