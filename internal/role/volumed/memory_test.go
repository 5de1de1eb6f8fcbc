//go:build !race

// Memory means nothing under the race detector.

package volumed_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/vhostuser/vhostusertest"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/machine/volumeproc"
)

// anonMax is how much memory a volume process with four disks may have under load, in
// KiB, besides the program: 32 MiB together with 12 of that. How many pages of the
// program there are is for the page cache to say, and what the process maps of a
// guest's memory is the guest's.
const anonMax = 20 << 10

const busyDisks = 4

// TestMemory has encrypted disks under load and looks at what the process needs.
func TestMemory(t *testing.T) {
	t.Parallel()
	// The program as users have it: the test binary has other packages to start.
	program := filepath.Join(t.TempDir(), "strongroom")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", program, "strongroom/cmd/strongroom")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct=%v", direct), func(t *testing.T) { testMemory(t, program, direct) })
	}
}

func testMemory(t *testing.T, program string, direct bool) {
	t.Run("NBD", func(t *testing.T) {
		p, dir := startBusy(t, program, direct)
		for _, sizes := range []string{"4k-4k", "4k-256k", "1M-1M"} {
			loadNBD(t, dir, sizes)
		}
		last := resident(t, p.PID())
		t.Log(last)
		checkAnon(t, last)
		// With direct I/O each request waits for the disk in a thread of its own, and how
		// many do at once is for the disk to say.
		if !direct && last.peak-last.program() > anonMax {
			t.Errorf("it had %s; %d KiB besides the program are allowed", last, anonMax)
		}
	})
	t.Run("vhost-user", func(t *testing.T) {
		const queues = 4
		p, dir := startBusy(t, program, direct)
		var loads sync.WaitGroup
		for i := range busyDisks {
			name := fmt.Sprintf("disk-%d", i)
			check(t, p.ServeVhostUser(t.Context(), name))
			f := dialVhost(t, dir, name, vhostusertest.Options{Queues: queues, Slots: 16, DataSize: 256 << 10, Scatter: true})
			for _, q := range f.Queues {
				loads.Go(func() { pump(t, q, 400) })
			}
		}
		loads.Wait()
		t.Log(resident(t, p.PID()))
		loadNBD(t, dir, "4k-256k")
		last := resident(t, p.PID())
		t.Logf("NBD after that: %s", last)
		checkAnon(t, last)
	})
}

func checkAnon(t *testing.T, u usage) {
	t.Helper()
	if u.anon > anonMax {
		t.Errorf("it has %s; %d KiB besides the program are allowed", u, anonMax)
	}
}

// startBusy starts a volume process with busyDisks encrypted disks.
func startBusy(t *testing.T, program string, direct bool) (p *volumeproc.Process, dir string) {
	t.Helper()
	dir = runDir(t)
	p = start(t, volumeproc.Config{VM: "web-1", RunDir: dir, Command: []string{program, "volumed"}})
	for i := range busyDisks {
		path, dek, _, _ := newVolume(t)
		err := addOpened(t.Context(), p, volumectl.Disk{Name: fmt.Sprintf("disk-%d", i), Format: volumectl.LUKS}, path, blockdev.FileOptions{Direct: direct}, dek)
		if errors.Is(err, blockdev.ErrNoDirect) {
			t.Skip(err)
		}
		check(t, err)
	}
	t.Logf("idle: %s", resident(t, p.PID()))
	// The peak so far is that of starting the packages of all roles, most of it pages
	// of the program that were let go since. From here on it is that of serving. Only
	// root may say so; for others the start counts too.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.PID()), []byte("5"), 0)
	return p, dir
}

// loadNBD keeps all disks busy, at depth 32, with blocks of those sizes.
func loadNBD(t *testing.T, dir, sizes string) {
	t.Helper()
	var loads sync.WaitGroup
	for i := range busyDisks {
		loads.Go(func() {
			fio := exec.CommandContext(t.Context(), "fio", "--name=guest", "--ioengine=nbd", "--uri="+uri(dir, fmt.Sprintf("disk-%d", i)),
				"--rw=randrw", "--bsrange="+sizes, "--iodepth=32", "--size=8M", "--io_size=64M")
			fio.Dir = t.TempDir()
			if out, err := fio.CombinedOutput(); err != nil {
				t.Errorf("fio: %v\n%s", err, out)
			}
		})
	}
	loads.Wait()
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

// usage is what a process has in memory, in KiB: its highest sum while serving,
// now of its own (anonymous and its program), of that anonymous, and now shared with
// a guest.
type usage struct{ peak, own, anon, guest int }

// program is how much of the process's own memory is pages of its program.
func (u usage) program() int { return u.own - u.anon }

func (u usage) String() string {
	return fmt.Sprintf("%d KiB of its own (%d KiB besides the program), %d KiB of guests, peak of both %d KiB", u.own, u.anon, u.guest, u.peak)
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
	return usage{value("VmHWM"), value("RssAnon") + value("RssFile"), value("RssAnon"), value("RssShmem")}
}
