package sandbox_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/role/volumed/sandbox"
	"strongroom/internal/role/volumed/sandbox/sandboxtest"
)

// TestMain lets the test binary be a process that enters the sandbox.
func TestMain(m *testing.M) {
	inside := map[string]func([]string) error{"refused": refused, "works": works, "hostile": hostile, "landlock": landlockAlone}
	if len(os.Args) > 1 && inside[os.Args[1]] != nil {
		if err := inside[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// thread runs what it gets on a thread of its own, which exists before the
// process enters the sandbox.
func thread() func(func() error) error {
	todo, done := make(chan func() error), make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- nil
		for f := range todo {
			done <- f()
		}
	}()
	<-done
	return func(f func() error) error { todo <- f; return <-done }
}

func enter() error {
	s, err := sandbox.Enter()
	if err == nil && s.Missing() != nil {
		err = fmt.Errorf("this kernel lacks %q: the test proves nothing", s.Missing())
	}
	return err
}

func refused([]string) error {
	older := thread()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	if err := enter(); err != nil {
		return err
	}
	attempt := func() error {
		if failures := sandboxtest.Failures(int(null.Fd())); failures != nil {
			return errors.New(strings.Join(failures, "\n"))
		}
		return nil
	}
	if err := attempt(); err != nil {
		return err
	}
	if err := older(attempt); err != nil {
		return fmt.Errorf("on a thread from before: %w", err)
	}
	if err := thread()(attempt); err != nil {
		return fmt.Errorf("on a thread from after: %w", err)
	}
	return nil
}

// hostile makes the system call whose number it gets, which must end the process.
func hostile(args []string) error {
	older := thread()
	call, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	if err := enter(); err != nil {
		return err
	}
	return older(func() error {
		_, _, errno := unix.RawSyscall6(uintptr(call), 0, 0, 0, 0, 0, 0)
		return fmt.Errorf("the process lives: %w", errno)
	})
}

// works does what a volume process does.
func works(args []string) error {
	file, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", args[0]+".sock")
	if err != nil {
		return err
	}
	go net.Dial("unix", args[0]+".sock") // from before: the kernel lets it wait
	zone := time.Now().Format(time.RFC3339)
	conn, err := listener.Accept()
	if err != nil {
		return err
	}
	if err := enter(); err != nil {
		return err
	}
	if after := time.Now().Format(time.RFC3339); after[19:] != zone[19:] {
		return fmt.Errorf("the time zone was %s and is %s", zone[19:], after[19:])
	}
	key, err := keymem.Random(64)
	if err != nil {
		return err
	}
	defer key.Close()
	fd := int(file.Fd())
	var failures []error
	try := func(what string, err error) {
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", what, err))
		}
	}
	_, err = file.WriteAt([]byte("data"), 1<<16)
	try("write", err)
	_, err = file.ReadAt(make([]byte, 4), 1<<16)
	try("read", err)
	try("fdatasync", unix.Fdatasync(fd))
	try("sync_file_range", unix.SyncFileRange(fd, 0, 1<<20, unix.SYNC_FILE_RANGE_WRITE))
	try("truncate", file.Truncate(1<<20))
	try("punch", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096))
	_, err = unix.Seek(fd, 0, unix.SEEK_DATA)
	try("seek data", err)
	var st unix.Statx_t
	if _, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(fd), 0, unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, uintptr(unsafe.Pointer(&st)), 0); errno != 0 && errno != unix.EFAULT { // before Linux 6.11
		try("statx of a descriptor", errno)
	}
	try("flock", unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB))
	try("lock", unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Len: 1}))
	memory, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	try("memfd", err)
	try("truncate a memfd", unix.Ftruncate(memory, 1<<20))
	guest, err := unix.Mmap(memory, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	try("map a memfd", err)
	try("unmap", unix.Munmap(guest))
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	try("eventfd", err)
	polled := os.NewFile(uintptr(event), "event")
	_, err = polled.Write(bytes.Repeat([]byte{1}, 8))
	try("write an event", err)
	_, err = polled.Read(make([]byte, 8))
	try("read an event", err)
	_, err = conn.Write([]byte("reply"))
	try("write to a connection", err)
	try("close a connection", conn.Close())
	_, err = rand.Read(make([]byte, 64))
	try("random", err)
	try("threads", threads())
	func() {
		// A page fault becomes a panic, as guest memory that goes away does.
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if recover() == nil {
				try("fault", errors.New("no panic"))
			}
		}()
		var nowhere *[1 << 20]byte
		nowhere[1<<19] = 1
	}()
	runtime.GC()
	return errors.Join(failures...)
}

// threads makes more threads than there are processors, which the scheduler
// then interrupts.
func threads() error {
	var wait sync.WaitGroup
	for range 50 {
		wait.Go(func() {
			runtime.LockOSThread()
			end := time.Now().Add(30 * time.Millisecond)
			for time.Now().Before(end) {
			}
		})
	}
	wait.Wait()
	return nil
}

// landlockAlone shows the second wall without the first, on a thread from before.
func landlockAlone(args []string) error {
	older := thread()
	file, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	version, err := sandbox.Restrict()
	if err != nil || version < 4 {
		return fmt.Errorf("version %d: %v", version, err)
	}
	var tcp net.ListenConfig
	tcp.SetMultipathTCP(false) // which Landlock does not know, but seccomp refuses
	attempts := map[string]func() error{
		"open":    func() error { _, err := os.Open("/etc/hostname"); return err },
		"list":    func() error { _, err := os.ReadDir("/tmp"); return err },
		"create":  func() error { return os.WriteFile(args[0]+".new", nil, 0o600) },
		"remove":  func() error { return os.Remove(args[0]) },
		"execute": func() error { return exec.Command("/bin/true").Run() },
		"connect": func() error { _, err := net.Dial("tcp", "127.0.0.1:1"); return err },
		"bind":    func() error { _, err := tcp.Listen(context.Background(), "tcp", "127.0.0.1:0"); return err },
	}
	for name, do := range attempts {
		if err := older(do); !errors.Is(err, unix.EACCES) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	// What was open stays usable.
	return errors.Join(file.Truncate(1<<20), file.Sync())
}

// run starts the test binary with that work inside, without the right to gain
// privileges unless it may.
func run(t *testing.T, mayGain bool, args ...string) (stderr string, err error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	var out bytes.Buffer
	cmd.Stderr = &out
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its privileges
		var err error
		if !mayGain {
			err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		}
		if err == nil {
			err = cmd.Run()
		}
		result <- err
	}()
	err = <-result
	return out.String(), err
}

func disk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInside(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"refused"}, {"works", disk(t)}, {"landlock", disk(t)}} {
		t.Run(args[0], func(t *testing.T) {
			t.Parallel()
			if out, err := run(t, false, args...); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func TestHostileCallsEndTheProcess(t *testing.T) {
	t.Parallel()
	calls := sandbox.Hostile()
	if len(calls) < 30 {
		t.Fatalf("%d calls are hostile", len(calls))
	}
	for _, call := range append(calls, 0x40000000) { // the last is x32's read
		if call == 0x40000000 && runtime.GOARCH != "amd64" {
			continue
		}
		out, err := run(t, false, "hostile", fmt.Sprint(call))
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS {
			t.Errorf("after call %d: %v, want the end by SIGSYS\n%s", call, err, out)
		}
	}
}

func TestNeedsNoNewPrivileges(t *testing.T) {
	t.Parallel()
	if out, err := run(t, true, "refused"); err == nil || !strings.Contains(out, "without the right to gain privileges") {
		t.Errorf("%v, %s", err, out)
	}
}

func TestMissing(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		state sandbox.State
		want  string
	}{
		{sandbox.State{Landlock: 7, Seccomp: true}, "[]"},
		{sandbox.State{Landlock: 3, Seccomp: true}, "[Landlock of network ports]"},
		{sandbox.State{}, "[Landlock seccomp filters]"},
	} {
		if got := fmt.Sprint(c.state.Missing()); got != c.want {
			t.Errorf("%+v lacks %s, want %s", c.state, got, c.want)
		}
	}
}

// TestReference: users can read which calls are made.
func TestReference(t *testing.T) {
	t.Parallel()
	reference, err := os.ReadFile("../../../../docs/reference/volume-process.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("calls.go")
	if err != nil {
		t.Fatal(err)
	}
	made, _, _ := strings.Cut(string(source), "var hostile =")
	calls := regexp.MustCompile(`unix\.SYS_(\w+)`).FindAllStringSubmatch(made, -1)
	if len(calls) < 50 {
		t.Errorf("%d calls in calls.go", len(calls))
	}
	for _, c := range calls {
		if name := strings.ToLower(c[1]); !strings.Contains(string(reference), "`"+name+"`") {
			t.Errorf("%s is not in docs/reference/volume-process.md", name)
		}
	}
}
