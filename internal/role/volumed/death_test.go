package volumed_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/machine/volumeproc"
	"strongroom/internal/role/volumed"
)

// dyingHost starts a volume process with one disk, whose key comes on standard
// input, says so, and waits to be killed.
func dyingHost(dir, disk string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	dek, err := keymem.Read(os.Stdin, volumectl.KeySize)
	if err != nil {
		fail(err)
	}
	lock, err := os.Create(filepath.Join(filepath.Dir(dir), "lock"))
	if err != nil {
		fail(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		fail(err)
	}
	p, err := volumeproc.Start(context.Background(), volumeproc.Config{VM: "web-1", RunDir: dir, Hold: []*os.File{lock}})
	if err != nil {
		fail(err)
	}
	if err := add(context.Background(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}, disk, dek); err != nil {
		fail(err)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until killed, or our parent has gone
	os.Exit(0)
}

// TestHostDies kills the host while a guest writes. The volume process goes on,
// holds the VM's lock, and is found by the next host, which replaces the key safe
// and stops it.
func TestHostDies(t *testing.T) {
	t.Parallel()
	dir := runDir(t)
	path, dek, oldKEK, safe := newVolume(t)
	host := exec.Command("/proc/self/exe", "dying-host", dir, path)
	host.Stderr = os.Stderr
	stdin, err := host.StdinPipe()
	check(t, err)
	stdout, err := host.StdoutPipe()
	check(t, err)
	check(t, host.Start())
	_, err = stdin.Write(dek.Bytes())
	check(t, err)
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("host said %q, %v", line, err)
	}

	fio := exec.CommandContext(t.Context(), "fio", "--name=guest", "--ioengine=nbd", "--uri="+uri(dir, "disk-0"),
		"--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=4M", "--loops=8", "--verify=crc32c", "--verify_backlog=64")
	var fioOut bytes.Buffer
	fio.Stdout, fio.Stderr = &fioOut, &fioOut
	fio.Dir = t.TempDir() // it leaves files behind
	check(t, fio.Start())
	fioEnded := make(chan error, 1)
	go func() { fioEnded <- fio.Wait() }()

	check(t, host.Process.Kill())
	host.Wait()
	p, err := volumeproc.Adopt(t.Context(), dir, "web-1")
	check(t, err)
	t.Cleanup(func() { p.Kill(context.Background()); p.Close() })
	lock, err := os.Open(filepath.Join(filepath.Dir(dir), "lock"))
	check(t, err)
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the VM's lock went with the host: %v", err)
	}
	if _, err := volumeproc.Adopt(t.Context(), dir, "web-2"); err == nil {
		t.Error("adopted as another VM's")
	}

	// Shallow rekey, again and again, for as long as the guest writes.
	var newKEK *keymem.Key
	rekeys := 0
	for writes := true; writes; rekeys++ {
		select {
		case err := <-fioEnded:
			if err != nil {
				t.Errorf("the guest noticed: %v\n%s", err, fioOut.Bytes())
			}
			writes = false
		default:
		}
		newKEK = keymemtest.Random(t, keysafe.KEKSize)
		safe, err = safe.Rewrap(oldKEK, newKEK, keysafe.Ref{Provider: "kp-2", KeyID: fmt.Sprint("k", rekeys)})
		check(t, err)
		check(t, p.ReplaceSafe(t.Context(), "disk-0", safe))
		checkSafe(t, path, safe)
		oldKEK = newKEK
	}
	status, err := p.Status(t.Context())
	check(t, err)
	t.Logf("%d rekeys during %d writes", rekeys, status.Disks[0].Writes)
	if d := status.Disks[0]; d.Writes < 100 || d.Failures != 0 || d.Damage != nil {
		t.Errorf("status %+v", d)
	}
	check(t, p.Stop(t.Context()))
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the VM's lock outlives its disks: %v", err)
	}
	if _, err := volumeproc.Adopt(t.Context(), dir, "web-1"); !errors.Is(err, volumeproc.ErrNotRunning) {
		t.Errorf("after the end: %v, want ErrNotRunning", err)
	}
}

// TestCrash kills the volume process under QEMU's block layer, which waits, finds
// the next one at the same socket, and loses nothing that was written.
func TestCrash(t *testing.T) {
	t.Parallel()
	dir := runDir(t)
	path, dek, _, _ := newVolume(t)
	disk := volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}
	first := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	check(t, add(t.Context(), first, disk, path, dek))

	guest := exec.CommandContext(t.Context(), "qemu-io", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+volumeproc.NBDSocket(dir)+",export=disk-0,reconnect-delay=60")
	stdin, err := guest.StdinPipe()
	check(t, err)
	stdout, err := guest.StdoutPipe()
	check(t, err)
	guest.Stderr = guest.Stdout
	check(t, guest.Start())
	t.Cleanup(func() { guest.Process.Kill(); guest.Wait() })
	lines := bufio.NewScanner(stdout)
	expect := func(want string) {
		t.Helper()
		for lines.Scan() {
			if strings.Contains(lines.Text(), "rror") || strings.Contains(lines.Text(), "failed") {
				t.Fatalf("the guest sees %q", lines.Text())
			}
			if strings.Contains(lines.Text(), want) {
				return
			}
		}
		t.Fatalf("no %q from qemu-io", want)
	}
	fmt.Fprintln(stdin, "write -P 0x5a 0 1M")
	expect("wrote 1048576/1048576")

	check(t, first.Kill(t.Context()))
	fmt.Fprintln(stdin, "write -P 0xa5 1M 1M") // to nobody
	second := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	check(t, add(t.Context(), second, disk, path, dek)) // the locks went with the process
	expect("wrote 1048576/1048576")
	fmt.Fprintln(stdin, "read -P 0x5a 0 1M")
	expect("read 1048576/1048576")
	fmt.Fprintln(stdin, "read -P 0xa5 1M 1M")
	expect("read 1048576/1048576")
	check(t, stdin.Close()) // it ends, before its disk does
	check(t, guest.Wait())
	check(t, second.Stop(t.Context()))
}

func waitReads(t *testing.T, p *volumeproc.Process) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(time.Minute); ; {
		status, err := p.Status(t.Context())
		check(t, err)
		if status.Disks[0].Reads > 0 {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("QEMU does not read")
		}
	}
}

// TestStartFails: what the process says is in the error, and nothing is left.
func TestStartFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		command []string
		want    string
	}{
		"ends":    {[]string{"/bin/sh", "-c", "echo no memory >&2; exit 3", "--"}, "exit status 3): no memory"},
		"missing": {[]string{"/nonexistent"}, "no such file"},
	} {
		dir := runDir(t)
		if _, err := volumeproc.Start(t.Context(), volumeproc.Config{VM: "web-1", RunDir: dir, Command: c.command}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
		if _, err := volumeproc.Adopt(t.Context(), dir, "web-1"); !errors.Is(err, volumeproc.ErrNotRunning) {
			t.Errorf("%s: then %v, want ErrNotRunning", name, err)
		}
	}
	if status := volumed.Main([]string{"--vm", "x", "extra"}); status != 1 {
		t.Errorf("started by hand it returns %d", status)
	}
	dir := runDir(t)
	check(t, os.Mkdir(dir, 0o700))
	stranger, err := net.Listen("unix", filepath.Join(dir, "volume.sock"))
	check(t, err)
	defer stranger.Close()
	if _, err := volumeproc.Start(t.Context(), volumeproc.Config{VM: "web-1", RunDir: dir}); err == nil {
		t.Error("started over somebody else's socket")
	}
}

// TestTerminated: the system shuts down.
func TestTerminated(t *testing.T) {
	t.Parallel()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	path, dek, _, _ := newVolume(t)
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}, path, dek))
	qemuIO(t, uri(dir, "disk-0"), "write -P 0x5a 0 1M")
	check(t, unix.Kill(p.PID(), unix.SIGTERM))
	select {
	case <-p.Ended():
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
	if exit := p.Exit(); !strings.HasPrefix(exit, "exit status 0") {
		t.Errorf("it ended with %s", exit)
	}
}
