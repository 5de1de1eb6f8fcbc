package volumed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/qemu"
	"strongroom/internal/machine/volumeproc"
	"strongroom/internal/role/volumed"

	"github.com/google/uuid"
)

// TestMain lets the test binary be the volume process and a host that dies.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "volumed":
			os.Exit(volumed.Main(os.Args[2:]))
		case "probed":
			probe()
			os.Exit(volumed.Main(os.Args[2:]))
		case "dying-host":
			dyingHost(os.Args[2], os.Args[3])
		}
	}
	goleak.VerifyTestMain(m)
}

const (
	diskSize = 8 << 20
	diskUUID = "5c6f1a3e-8f0d-4d2b-9a1e-0f4f6d1b2c3d"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t *testing.T, err error, kind errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(err) != kind {
		t.Errorf("got %v (%v), want kind %v", err, errs.KindOf(err), kind)
	}
}

// runDir returns a directory whose path is short enough for sockets.
func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vol")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "run")
}

func start(t *testing.T, c volumeproc.Config) *volumeproc.Process {
	t.Helper()
	began := time.Now()
	p, err := volumeproc.Start(t.Context(), c)
	check(t, err)
	t.Logf("volume process up after %v", time.Since(began))
	t.Cleanup(func() {
		if err := p.Kill(context.Background()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		p.Close()
	})
	return p
}

// newVolume makes an encrypted disk and returns its path and DEK.
func newVolume(t *testing.T) (path string, dek *keymem.Key, kek *keymem.Key, safe *keysafe.Safe) {
	t.Helper()
	dek, kek = keymemtest.Random(t, volumectl.KeySize), keymemtest.Random(t, keysafe.KEKSize)
	safe, err := keysafe.Wrap(kek, dek, keysafe.Ref{Provider: "kp-1", KeyID: "k0"}, volume.Owner(diskUUID), 1)
	check(t, err)
	path = filepath.Join(t.TempDir(), "disk-0.luks")
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	check(t, err)
	defer dev.Close()
	check(t, volume.Format(dev, volume.FormatOptions{Size: diskSize, UUID: diskUUID, DEK: dek, Safe: safe}))
	return path, dek, kek, safe
}

// add opens a disk as a host does and passes it on.
func add(ctx context.Context, p *volumeproc.Process, d volumectl.Disk, path string, dek *keymem.Key) error {
	return addOpened(ctx, p, d, path, blockdev.FileOptions{ReadOnly: d.ReadOnly}, dek)
}

func addOpened(ctx context.Context, p *volumeproc.Process, d volumectl.Disk, path string, opts blockdev.FileOptions, dek *keymem.Key) error {
	dev, err := blockdev.OpenFile(path, opts)
	if err != nil {
		return err
	}
	defer dev.Close()
	file, err := dev.Dup()
	if err != nil {
		return err
	}
	defer file.Close()
	return p.AddDisk(ctx, d, file, dek, nil)
}

func uri(dir, export string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", export, volumeproc.NBDSocket(dir))
}

// run runs a peer program.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func qemuIO(t *testing.T, target string, commands ...string) string {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return run(t, "qemu-io", append(args, target)...)
}

// TestServe uses an encrypted and a plain disk through a real process with
// QEMU's and libnbd's tools.
func TestServe(t *testing.T) {
	t.Parallel()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	path, dek, _, _ := newVolume(t)
	raw := filepath.Join(t.TempDir(), "disk-1.raw")
	check(t, os.WriteFile(raw, make([]byte, 1<<20), 0o600))
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS, SizeMin: diskSize}, path, dek))
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-1", Format: volumectl.Raw}, raw, nil))
	checkProcess(t, p.PID(), dir)

	qemuIO(t, uri(dir, "disk-0"), "write -P 0x5a 0 1M", "write -P 0xa5 1000 3000", "flush", "read -P 0xa5 1000 3000", "read -P 0x5a 4096 4096", "read -P 0 2M 1M")
	qemuIO(t, uri(dir, "disk-1"), "write -P 0x11 0 4096")
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, "nbdcopy", uri(dir, "disk-0"), copied)
	plain, err := os.ReadFile(copied)
	check(t, err)
	if len(plain) != diskSize || bytes.Count(plain[:1<<20], []byte{0x5a}) != 1<<20-3000 || plain[1000] != 0xa5 {
		t.Errorf("nbdcopy read %d bytes that are not what qemu-io wrote", len(plain))
	}

	status, err := p.Status(t.Context())
	check(t, err)
	if len(status.Disks) != 2 || !status.Listening {
		t.Fatalf("status %+v", status)
	}
	if d := status.Disks[0]; d.Disk != "disk-0" || d.UUID != diskUUID || d.Size != diskSize || d.WrittenBytes < 1<<20 || d.ReadBytes < 1<<20 ||
		d.Flushes == 0 || d.Failures != 0 || d.Damage != nil || d.HeaderError != "" {
		t.Errorf("status of disk-0: %+v", d)
	}

	// Disks go one by one, and all at the end; what was written stays.
	check(t, p.RemoveDisk(t.Context(), "disk-1"))
	wantKind(t, p.Flush(t.Context(), "disk-1"), errs.NotFound)
	if b, err := os.ReadFile(raw); err != nil || bytes.Count(b, []byte{0x11}) != 4096 {
		t.Errorf("the plain disk does not hold what was written: %v", err)
	}
	check(t, p.Stop(t.Context()))
	if exit := p.Exit(); !strings.HasPrefix(exit, "exit status 0") {
		t.Errorf("it ended with %s", exit)
	}
	onDisk, err := os.ReadFile(path)
	check(t, err)
	if bytes.Contains(onDisk, bytes.Repeat([]byte{0x5a}, 16)) {
		t.Error("plaintext is on the disk")
	}
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true})
	check(t, err)
	v, err := volume.Open(dev, dek, volume.Options{ReadOnly: true})
	check(t, err)
	defer v.Close()
	again := make([]byte, diskSize)
	_, err = v.ReadAt(again, 0)
	check(t, err)
	if !bytes.Equal(again, plain) {
		t.Error("after the end the volume holds something else")
	}
}

// checkProcess checks that the process runs as it must.
func checkProcess(t *testing.T, pid int, dir string) {
	t.Helper()
	read := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		check(t, err)
		return string(b)
	}
	status := read("status")
	if !strings.Contains(status, "NoNewPrivs:\t1\n") {
		t.Error("it may gain privileges")
	}
	if !strings.Contains(status, "Umask:\t0077\n") {
		t.Error("its files would be open to others")
	}
	for line := range strings.SplitSeq(status, "\n") {
		if strings.HasPrefix(line, "VmRSS:") {
			t.Logf("resident: %s", strings.Join(strings.Fields(line)[1:], " "))
		}
	}
	limits := strings.Join(strings.Fields(read("limits")), " ")
	for _, want := range []string{"Max core file size 0 0", "Max open files 4096 4096", "Max data size 4294967296 4294967296"} {
		if !strings.Contains(limits, want) {
			t.Errorf("its limits are %s; want %s", limits, want)
		}
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	check(t, err)
	for _, thread := range threads {
		b, err := os.ReadFile(thread + "/status")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		check(t, err)
		if !strings.Contains(string(b), "Seccomp:\t2\n") {
			t.Errorf("thread %s is not filtered", filepath.Base(thread))
		}
	}
	if environment := read("environ"); environment != "" {
		t.Errorf("it has the environment %q", environment)
	}
	if args := strings.ReplaceAll(read("cmdline"), "\x00", " "); args != "strongroom volumed --vm web-1 --run-dir "+dir+" " {
		t.Errorf("it has the arguments %q", args)
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("its session is %d (%v), want its own", sid, err)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	check(t, err)
	for _, e := range entries {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		if err != nil {
			continue
		}
		known := false
		for _, prefix := range []string{"/dev/null", dir, "socket:", "anon_inode:", "/secretmem", "/memfd:", "pipe:", "/sys/fs/cgroup/"} { // the last are the Go runtime's
			known = known || strings.HasPrefix(target, prefix)
		}
		if !known && !strings.Contains(target, "/disk-") {
			t.Errorf("descriptor %s is %s", e.Name(), target)
		}
	}
}

// TestDirect: a descriptor that is open for direct I/O is read and written with the
// alignment that this takes, which the sandbox lets the process ask for.
func TestDirect(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	path, dek, _, _ := newVolume(t)
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	check(t, err)
	check(t, p.AddDisk(ctx, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS, SizeMin: diskSize}, file, dek, nil))
	check(t, file.Close())
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "-c", "write -P 2 512 512", "-c", "write -P 3 70000 100", "-c", "flush",
		"-c", "read -P 1 0 512", "-c", "read -P 2 512 512", "-c", "read -P 1 1k 67k", "-c", "read -P 3 70000 100", uri(dir, "disk-0"))
	check(t, p.Flush(ctx, "disk-0"))
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	path, dek, _, safe := newVolume(t)
	disk := volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}

	wantKind(t, add(ctx, p, disk, path, keymemtest.Random(t, volumectl.KeySize)), errs.Corrupt) // not its key
	large := disk
	large.SizeMin = diskSize + 512
	wantKind(t, add(ctx, p, large, path, dek), errs.Corrupt)
	foreign := filepath.Join(t.TempDir(), "foreign")
	check(t, os.WriteFile(foreign, make([]byte, 1<<20), 0o600))
	wantKind(t, add(ctx, p, disk, foreign, dek), errs.Corrupt)
	wantKind(t, p.AddDisk(ctx, disk, readOnlyFile(t, path), dek, nil), errs.InvalidState)

	check(t, add(ctx, p, disk, path, dek)) // none of that has left a lock
	if err := add(ctx, p, volumectl.Disk{Name: "other", Format: volumectl.LUKS}, path, dek); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("a host opened a disk that is in use: %v", err)
	}
	check(t, add(ctx, p, volumectl.Disk{Name: "disk-1", Format: volumectl.Raw, ReadOnly: true}, foreign, nil))
	wantKind(t, p.AddDisk(ctx, disk, readOnlyFile(t, foreign), dek, nil), errs.Exists)
	wantKind(t, p.ReplaceSafe(ctx, "disk-1", safe), errs.Invalid)
	wantKind(t, p.ReplaceSafe(ctx, "none", safe), errs.NotFound)
	wantKind(t, p.Resize(ctx, "disk-1", 2<<20), errs.InvalidState)
	wantKind(t, p.Resize(ctx, "disk-0", 512), errs.Invalid)
	elsewhere, err := keysafe.Wrap(keymemtest.Random(t, keysafe.KEKSize), dek, keysafe.Ref{Provider: "kp-1", KeyID: "k"}, "disk:another", 2)
	check(t, err)
	wantKind(t, p.ReplaceSafe(ctx, "disk-0", elsewhere), errs.Invalid)
	check(t, p.Resize(ctx, "disk-0", 2*diskSize))
	if out := run(t, "nbdinfo", "--size", uri(dir, "disk-0")); strings.TrimSpace(out) != fmt.Sprint(2*diskSize) {
		t.Errorf("after growing, NBD says %s bytes", out)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri(dir, "disk-1")).CombinedOutput(); err == nil {
		t.Errorf("a read-only disk was written: %s", out)
	}
	if _, err := volumeproc.Start(ctx, volumeproc.Config{VM: "web-1", RunDir: dir}); !errors.Is(err, volumeproc.ErrRunning) {
		t.Errorf("second start: %v, want ErrRunning", err)
	}
}

func readOnlyFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// checkSafe checks that the disk, which is in use, has that safe in both headers.
func checkSafe(t *testing.T, path string, want *keysafe.Safe) {
	t.Helper()
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	check(t, err)
	defer dev.Close()
	info, err := volume.Inspect(dev)
	check(t, err)
	if len(info.Safes) != 1 || !bytes.Equal(info.Safes[0].Encode(), want.Encode()) || info.Damage != nil {
		t.Fatalf("header has %v (damage %v), want %v", info.Safes, info.Damage, want)
	}
}

// TestQEMU: a real QEMU boots from the disk, over NBD and over vhost-user.
func TestQEMU(t *testing.T) {
	t.Parallel()
	for _, over := range []qemu.Interface{qemu.NBD, qemu.VhostUser} {
		t.Run(string(over), func(t *testing.T) {
			t.Parallel()
			dir := runDir(t)
			path, dek, _, _ := newVolume(t)
			p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
			check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}, path, dek))
			check(t, p.ServeVhostUser(t.Context(), "disk-0"))
			d := qemu.Disk{ID: "disk-0", Interface: over, Socket: volumeproc.NBDSocket(dir), Export: "disk-0", Bootable: true}
			if over == qemu.VhostUser {
				d.Socket, d.Queues = volumeproc.VhostSocket(dir, "disk-0"), 2
			}
			m, err := qemu.Start(t.Context(), qemu.Config{Name: "web-1", UUID: uuid.New(), CPUs: 2, MemoryMiB: 64, RunDir: dir, Disks: []qemu.Disk{d}})
			check(t, err)
			defer m.Close()
			defer m.Kill(context.Background())
			waitReads(t, p) // the firmware
			check(t, m.Kill(t.Context()))
			check(t, p.Stop(t.Context()))
		})
	}
}
