package vhostuser_test

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/vhostuser"
	"strongroom/internal/block/vhostuser/vhostusertest"
)

// slowDevice takes its time for some requests, so that the server serves many
// at a time and gives them back out of order.
type slowDevice struct {
	blockdev.Device
	mu  sync.Mutex
	rng *rand.Rand
}

func (d *slowDevice) delay() {
	d.mu.Lock()
	n := d.rng.IntN(400)
	d.mu.Unlock()
	timer := time.NewTimer(time.Duration(n) * time.Microsecond)
	<-timer.C
}

func (d *slowDevice) ReadAt(p []byte, off int64) (int, error) {
	d.delay()
	return d.Device.ReadAt(p, off)
}

func (d *slowDevice) WriteAt(p []byte, off int64) (int, error) {
	d.delay()
	return d.Device.WriteAt(p, off)
}

// TestParallel keeps many requests under way on several queues; each slot writes
// and reads blocks of its own.
func TestParallel(t *testing.T) {
	t.Parallel()
	seed := blockdevtest.Seed(t)
	for _, slow := range []bool{false, true} {
		var dev blockdev.Device = blockdev.NewMemory(16<<20, 4096)
		if slow {
			dev = &slowDevice{Device: dev, rng: rand.New(rand.NewPCG(seed, 1))}
		}
		_, path := start(t, vhostuser.Config{Device: dev, Queues: 4})
		f := dial(t, path, vhostusertest.Options{Queues: 4, Slots: 16, DataSize: 16 << 10})
		var group sync.WaitGroup
		for _, q := range f.Queues {
			group.Go(func() { stress(t, q, seed+uint64(q.Index), 400, nil) })
		}
		group.Wait()
	}
}

// stress does count requests on blocks that only this queue uses, with all slots
// under way, and checks what each reads. between, if not nil, is called now and
// then.
func stress(t testing.TB, q *vhostusertest.Queue, seed uint64, count int, between func(done int)) {
	const block = 16 << 10
	type state struct {
		version, writing byte
		reading          bool
	}
	slots := q.Idle()
	states := make([]state, slots)
	rng := rand.New(rand.NewPCG(seed, 2))
	sector := func(slot int) uint64 { return uint64(q.Index*slots+slot) * block / 512 }
	buf := make([]byte, block)
	contents := func(slot int, version byte) []byte {
		for i := range buf {
			buf[i] = byte(i/512) ^ byte(slot) ^ version
		}
		if version == 0 {
			clear(buf)
		}
		return buf
	}
	got := make([]byte, block)
	for sent, done := 0, 0; done < count; {
		for sent < count && q.Idle() > 0 {
			slot := q.Slot()
			s := &states[slot]
			if s.reading = rng.IntN(2) == 0; s.reading {
				q.Submit(slot, vhostusertest.Read, sector(slot), block)
			} else {
				s.writing = byte(1 + rng.IntN(255))
				q.Fill(slot, contents(slot, s.writing))
				q.Submit(slot, vhostusertest.Write, sector(slot), block)
			}
			sent++
		}
		if err := q.Kick(); err != nil {
			t.Error(err)
			return
		}
		if between != nil {
			between(done)
		}
		slot, status, err := q.Next()
		if err != nil || status != vhostusertest.OK {
			t.Errorf("queue %d, request %d: status %d, %v", q.Index, done, status, err)
			return
		}
		s := &states[slot]
		if s.reading {
			q.Fetch(slot, got)
			if !bytes.Equal(got, contents(slot, s.version)) {
				t.Errorf("queue %d, slot %d reads not what was written last", q.Index, slot)
				return
			}
		} else {
			s.version = s.writing
		}
		done++
	}
}

// counting counts flushes.
type counting struct {
	blockdev.Device
	mu      sync.Mutex
	flushes int
}

func (d *counting) Flush() error {
	d.mu.Lock()
	d.flushes++
	d.mu.Unlock()
	return d.Device.Flush()
}

func (d *counting) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushes
}

// TestCacheMode: writes are flushed where the driver cannot ask for a flush, or
// has chosen so, also after the back end was started anew.
func TestCacheMode(t *testing.T) {
	t.Parallel()
	dev := &counting{Device: blockdev.NewMemory(1<<20, 512)}
	path := filepath.Join(t.TempDir(), "vhost.sock")
	s := serveAt(t, vhostuser.Config{Device: dev}, path)
	f := dial(t, path, vhostusertest.Options{})
	q := f.Queues[0]
	wrote := func(want int) {
		t.Helper()
		before := dev.count()
		do(t, q, vhostusertest.Write, 0, make([]byte, 512), vhostusertest.OK)
		if got := dev.count() - before; got != want {
			t.Errorf("a write made %d flushes, want %d", got, want)
		}
	}
	wrote(0)
	check(t, f.SetWriteback(false))
	wrote(1)
	b, err := f.Config(60)
	check(t, err)
	if b[32] != 0 {
		t.Errorf("the configuration says writeback %d", b[32])
	}
	check(t, s.Close())
	serveAt(t, vhostuser.Config{Device: dev}, path)
	check(t, f.Connect(path))
	check(t, f.Start())
	wrote(1)
	check(t, f.SetWriteback(true))
	wrote(0)

	_, path = start(t, vhostuser.Config{Device: dev})
	q = dial(t, path, vhostusertest.Options{Without: vhostusertest.FeatureFlush | vhostusertest.FeatureConfigWCE}).Queues[0]
	wrote(1)
}

// TestDeviceFails: an error of the device is the request's status and one line
// in the log.
func TestDeviceFails(t *testing.T) {
	t.Parallel()
	dev := blockdev.NewMemory(1<<20, 512)
	var log bytes.Buffer
	s, path := start(t, vhostuser.Config{Device: dev, Name: "disk-7", Log: slog.New(slog.NewTextHandler(&log, nil))})
	q := dial(t, path, vhostusertest.Options{}).Queues[0]
	check(t, dev.Close())
	for range 3 {
		do(t, q, vhostusertest.Write, 0, make([]byte, 512), vhostusertest.Failed)
	}
	check(t, s.Close())
	if n := bytes.Count(log.Bytes(), []byte("disk=disk-7 op=write")); n != 1 {
		t.Errorf("the failure is logged %d times:\n%s", n, &log)
	}
}
