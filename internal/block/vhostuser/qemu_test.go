//go:build !race

// Allocations, times and guests mean nothing under the race detector.

package vhostuser_test

import (
	"context"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/vhostuser"
	"strongroom/test/guest"
)

// TestQEMU boots a Linux guest on a disk with two queues: it makes an ext4,
// checks checksums while the back end is started anew again and again, discards,
// and sees the disk grow.
func TestQEMU(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	image, err := guest.Build(ctx, guest.Options{
		Programs: []string{"mke2fs"},
		Steps: []guest.Step{
			{Name: "await", Command: "agent await /dev/vda && cat /sys/block/vda/serial && ls /sys/block/vda/mq | wc -l"},
			{Name: "attributes", Command: `test "$(cat /sys/block/vda/serial)" = web-1/disk-0 &&
				test "$(ls /sys/block/vda/mq | wc -l)" = 2 &&
				test "$(cat /sys/block/vda/queue/logical_block_size)" = 512 &&
				test "$(cat /sys/block/vda/queue/physical_block_size)" = 4096 &&
				test "$(cat /sys/block/vda/queue/write_cache)" = "write back" &&
				test "$(cat /sys/block/vda/queue/discard_max_bytes)" != 0 &&
				test "$(cat /sys/block/vda/queue/write_zeroes_max_bytes)" != 0`},
			{Name: "format", Command: "mke2fs -q -t ext4 -E discard /dev/vda && mount -t ext4 -o discard /dev/vda /mnt"},
			{Name: "write", Command: "agent write-files /mnt/files 20 300000 plain && agent verify-files /mnt"},
			// The back end is started anew during this step.
			{Name: "churn", Command: "agent churn /mnt/churn 4000000 200"},
			{Name: "verify", Command: "agent verify-files /mnt"},
			{Name: "trim", Command: "rm -r /mnt/files && fstrim /mnt && umount /mnt"},
			{Name: "pattern", Command: "agent write-pattern /dev/vda 4096 16777216 5 && agent verify-pattern /dev/vda 4096 16777216 5"},
			{Name: "direct", Command: "dd if=/dev/vda of=/dev/null bs=4M count=8 iflag=direct"},
			// The test lets the disk grow when this step starts.
			{Name: "grow", Command: "for i in $(seq 300); do test $(cat /sys/block/vda/size) = 196608 && exit 0; sleep 0.1; done; exit 1"},
		},
	})
	check(t, err)

	dir := t.TempDir()
	dev := blockdev.NewMemory(64<<20, 4096)
	path, qmp := filepath.Join(dir, "vhost.sock"), filepath.Join(dir, "qmp.sock")
	var mu sync.Mutex // guards server
	config := vhostuser.Config{Device: dev, Serial: "web-1/disk-0"}
	server := serveAt(t, config, path)
	var restarter sync.WaitGroup
	defer restarter.Wait()
	churned := make(chan struct{})
	var once sync.Once
	restarts := 0
	console, err := guest.Run(ctx, guest.Machine{
		Image: image,
		Args: []string{
			"-object", "memory-backend-memfd,id=mem,size=192M,share=on", "-machine", "memory-backend=mem", "-smp", "2",
			"-chardev", "socket,id=disk,path=" + path + ",reconnect=1",
			"-device", "vhost-user-blk-pci,chardev=disk,num-queues=2",
			"-qmp", "unix:" + qmp + ",server=on,wait=off",
		},
		OnEvent: func(e guest.Event) {
			switch {
			case e.Step == "churn" && e.Kind == guest.Start:
				restarter.Go(func() {
					events := make(chan struct{})
					go func() { <-churned; close(events) }()
					for range 3 {
						mu.Lock()
						check := server.Close()
						if check != nil {
							t.Error(check)
						}
						server = serveAt(t, config, path)
						restarts++
						mu.Unlock()
						select {
						case <-events:
							return
						case <-time.After(1500 * time.Millisecond): // QEMU comes back after one second
						}
					}
				})
			case e.Step == "churn" && (e.Kind == guest.OK || e.Kind == guest.Fail):
				once.Do(func() { close(churned) })
			case e.Step == "grow" && e.Kind == guest.Start:
				if err := dev.Resize(96 << 20); err != nil {
					t.Error(err)
				}
				mu.Lock()
				server.Resized()
				mu.Unlock()
			}
		},
	})
	once.Do(func() { close(churned) })
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(console, "I/O error") {
		t.Errorf("the guest saw an I/O error:\n%s", console)
	}
	mu.Lock()
	defer mu.Unlock()
	if restarts < 2 {
		t.Errorf("the back end was started anew only %d times under load", restarts)
	}
	t.Logf("%d restarts", restarts)
	if data := allocated(t, dev); data > 30<<20 {
		t.Errorf("%d bytes are allocated after discards", data)
	}
}

// allocated returns how many bytes of a device are no holes.
func allocated(t testing.TB, dev blockdev.Extenter) int64 {
	n := int64(0)
	for off := int64(0); off < dev.Size(); {
		e, err := dev.NextExtent(off)
		check(t, err)
		if !e.Hole {
			n += e.Length
		}
		off += e.Length
	}
	return n
}
