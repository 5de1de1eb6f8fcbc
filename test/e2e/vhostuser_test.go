package e2e

import (
	"bufio"
	"context"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"strongroom/test/guest"
)

// serveVhost runs `strongroom volume serve` and returns when QEMU can connect.
func serveVhost(t *testing.T, dir string, more ...string) *exec.Cmd {
	t.Helper()
	socket := filepath.Join(dir, "disk.vhost")
	serve := exec.Command(binary, append([]string{
		"volume", "serve", filepath.Join(dir, "disk.luks"), "--key-file", filepath.Join(dir, "key"), "--vhost-user", socket,
	}, more...)...)
	serve.Stderr = os.Stderr
	out, err := serve.StdoutPipe()
	must(t, err)
	must(t, serve.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); line != socket+"\n" {
		t.Fatalf("volume serve says %q, %v", line, err)
	}
	return serve
}

// TestServeVhostUser boots a guest of somebody else's QEMU, started as our
// documents say, on a volume without a controller. Its server is killed again and
// again while it writes.
func TestServeVhostUser(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	image, err := guest.Build(ctx, guest.Options{
		Programs: []string{"mke2fs"},
		Steps: []guest.Step{
			{Name: "format", Command: "agent await /dev/vda && mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt"},
			{Name: "write", Command: "agent write-files /mnt/files 20 200000 " + marker},
			{Name: "churn", Command: "agent churn /mnt/churn 4000000 2000"}, // the server is killed during it
			{Name: "verify", Command: "agent verify-files /mnt && umount /mnt && cat /sys/block/vda/serial"},
		},
	})
	must(t, err)
	dir, err := os.MkdirTemp("", "vh")
	must(t, err)
	defer os.RemoveAll(dir)
	key := make([]byte, 64)
	_, err = rand.Read(key)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "key"), key, 0o600))
	if out, err := exec.CommandContext(ctx, binary, "volume", "format", filepath.Join(dir, "disk.luks"), "--size", "64M", "--key-file", filepath.Join(dir, "key")).CombinedOutput(); err != nil {
		t.Fatalf("volume format: %v\n%s", err, out)
	}

	serve := serveVhost(t, dir)
	defer func() {
		_ = serve.Process.Kill()
		_ = serve.Wait()
	}()
	kills := 0
	kill := func() {
		_ = serve.Process.Kill()
		_ = serve.Wait()
		serve = serveVhost(t, dir)
		kills++
	}
	console, err := guest.Run(ctx, guest.Machine{
		Image: image,
		Args: []string{
			"-machine", "q35,memory-backend=mem", "-object", "memory-backend-memfd,id=mem,size=192M,share=on",
			"-chardev", "socket,id=disk,path=" + filepath.Join(dir, "disk.vhost") + ",reconnect=1",
			"-device", "vhost-user-blk-pci,chardev=disk",
		},
		OnEvent: func(e guest.Event) {
			if e.Step == "churn" && (e.Kind == guest.Start || e.Kind == guest.Note && kills < 4) {
				kill()
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if kills < 2 {
		t.Errorf("the server was killed only %d times", kills)
	}
	t.Logf("%d kills", kills)
	for _, bad := range []string{"I/O error", "EXT4-fs error"} {
		if strings.Contains(console, bad) {
			t.Errorf("the guest saw %s:\n%s", bad, console)
		}
	}
	must(t, serve.Process.Signal(os.Interrupt))
	must(t, serve.Wait())
	if _, err := os.Lstat(filepath.Join(dir, "disk.vhost")); err == nil {
		t.Error("the socket is left")
	}
	raw, err := os.ReadFile(filepath.Join(dir, "disk.luks"))
	must(t, err)
	if strings.Contains(string(raw), marker) {
		t.Error("plain text is on the disk")
	}
	if out, err := exec.CommandContext(ctx, binary, "volume", "decrypt", filepath.Join(dir, "disk.luks"), "--key-file", filepath.Join(dir, "key"), "--out", filepath.Join(dir, "plain")).CombinedOutput(); err != nil {
		t.Fatalf("volume decrypt: %v\n%s", err, out)
	}
	if out, err := exec.CommandContext(ctx, "e2fsck", "-f", "-n", filepath.Join(dir, "plain")).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}
