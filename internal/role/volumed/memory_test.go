//go:build !race

// Memory means nothing under the race detector.

package volumed_test

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/block/vhostuser/vhostusertest"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/machine/volumeproc"
)

// residentMax is how much memory of its own a volume process with four disks may
// have, under load, in KiB. What it maps of a guest's memory is the guest's.
const residentMax = 32 << 10

// TestMemory has four encrypted disks under load, over vhost-user and NBD, and
// looks at what the process needs.
func TestMemory(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	const disks, queues = 4, 4
	for i := range disks {
		name := fmt.Sprintf("disk-%d", i)
		path, dek, _, _ := newVolume(t)
		check(t, add(ctx, p, volumectl.Disk{Name: name, Format: volumectl.LUKS}, path, dek))
		check(t, p.ServeVhostUser(ctx, name))
	}
	t.Logf("idle: %s", resident(t, p.PID()))

	var loads sync.WaitGroup
	for i := range disks {
		f := dialVhost(t, dir, fmt.Sprintf("disk-%d", i), vhostusertest.Options{Queues: queues, Slots: 16, DataSize: 256 << 10, Scatter: true})
		for _, q := range f.Queues {
			loads.Go(func() { pump(t, q, 400) })
		}
	}
	loads.Wait()
	t.Logf("vhost-user: %s", resident(t, p.PID()))

	for i := range disks {
		loads.Go(func() {
			fio := exec.CommandContext(ctx, "fio", "--name=guest", "--ioengine=nbd", "--uri="+uri(dir, fmt.Sprintf("disk-%d", i)),
				"--rw=randrw", "--bsrange=4k-256k", "--iodepth=32", "--size=8M", "--io_size=64M")
			fio.Dir = t.TempDir()
			if out, err := fio.CombinedOutput(); err != nil {
				t.Errorf("fio: %v\n%s", err, out)
			}
		})
	}
	loads.Wait()
	last := resident(t, p.PID())
	t.Logf("NBD after that: %s", last)
	if last.own > residentMax {
		t.Errorf("it has %s; %d KiB of its own are allowed", last, residentMax)
	}
}

// pump keeps all slots of a queue under way with scattered requests of 256 KiB,
// reads and writes in turn.
func pump(t *testing.T, q *vhostusertest.Queue, count int) {
	const block = 256 << 10
	for sent, done := 0, 0; done < count; done++ {
		for sent < count && q.Idle() > 0 {
			op := uint32(vhostusertest.Read)
			if sent%2 == 0 {
				op = vhostusertest.Write
			}
			q.Submit(q.Slot(), op, uint64(sent*7%(diskSize/block))*block/512, block)
			sent++
		}
		if err := q.Kick(); err != nil {
			t.Error(err)
			return
		}
		if _, status, err := q.Next(); err != nil || status != vhostusertest.OK {
			t.Errorf("status %d, %v", status, err)
			return
		}
	}
}

// usage is what a process has in memory, in KiB: its highest sum, now of its own
// (anonymous and its program), and now shared with a guest.
type usage struct{ peak, own, guest int }

func (u usage) String() string {
	return fmt.Sprintf("%d KiB of its own, %d KiB of guests, peak of both %d KiB", u.own, u.guest, u.peak)
}

func resident(t *testing.T, pid int) usage {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	value := func(name string) int {
		_, rest, ok := strings.Cut(string(b), "\n"+name+":")
		if !ok {
			t.Fatalf("no %s of process %d", name, pid)
		}
		n, err := strconv.Atoi(strings.Fields(rest)[0])
		check(t, err)
		return n
	}
	return usage{value("VmHWM"), value("RssAnon") + value("RssFile"), value("RssShmem")}
}
