package qemu_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/vhostuser"
)

// guestKernel returns where scripts/setup.sh puts the kernel of test guests.
func guestKernel() string {
	cache := os.Getenv("STRONGROOM_CACHE")
	if cache == "" {
		cache = "../../../.cache"
	}
	return filepath.Join(cache, "guest-kernel")
}

// guestInit says that it is up, and powers off when the button is pressed.
const guestInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\necho guest-button >/dev/console\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod 755 /etc/acpi/PWRF/00000080
for m in /modules/*.ko; do insmod $m; done
until [ -e /dev/input/event0 ]; do sleep 0.05; done
acpid -d >/dev/null 2>&1 &
sleep 0.2
echo guest-up
while :; do sleep 60; done
`

// guest returns the paths of a kernel and an initramfs that boot to "guest-up".
func guest(t *testing.T) (kernel, initrd string) {
	t.Helper()
	kernel, err := filepath.Abs(filepath.Join(guestKernel(), "vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	add := func(name string, mode uint32, content []byte) {
		fmt.Fprintf(&archive, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		archive.Write(make([]byte, -archive.Len()&3))
		archive.Write(content)
		archive.Write(make([]byte, -archive.Len()&3))
	}
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatalf("run scripts/setup.sh: %v", err)
		}
		return b
	}
	const dir, executable = 0o040755, 0o100755
	for _, name := range []string{"bin", "proc", "sys", "dev", "modules"} {
		add(name, dir, nil)
	}
	add("bin/busybox", executable, read("/bin/busybox"))
	add("init", executable, []byte(guestInit))
	for _, module := range []string{"drivers/acpi/button.ko", "drivers/input/evdev.ko"} {
		add("modules/"+filepath.Base(module), executable, read(filepath.Join(guestKernel(), "modules/kernel", module)))
	}
	add("TRAILER!!!", 0, nil)
	initrd = filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(initrd, archive.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return kernel, initrd
}

// serveNBD runs nbdkit with a disk in memory and returns its socket.
func serveNBD(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(shortDir(t), "nbd.sock")
	cmd := exec.Command("nbdkit", "-f", "--exit-with-parent", "-U", socket, "memory", "64M")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatalf("run scripts/setup.sh: %v", err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	eventually(t, "nbdkit to listen", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket
}

// serveVhost serves a disk in memory over vhost-user and returns its socket.
func serveVhost(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(shortDir(t), "vhost.sock")
	server, err := vhostuser.NewServer(vhostuser.Config{Device: blockdev.NewMemory(64<<20, 512), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
	return socket
}

// shortDir returns a temporary directory whose path leaves room for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qemu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// eventually waits until ok, for at most two minutes: everything here is
// emulated, and other tests run beside it.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func waitSerial(t *testing.T, path, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q on the serial port", text), func() bool {
		b, _ := os.ReadFile(path)
		return strings.Contains(string(b), text)
	})
}
