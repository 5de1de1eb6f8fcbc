package volumed_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/machine/volumeproc"
)

// counter is a guest with two disks that counts: each number is written to disk-0
// and, when that is done, to disk-1.
type counter struct {
	disks   [2]*nbd.Client
	written atomic.Uint64 // the last number that both have
	stop    chan struct{}
	done    chan error
}

func newCounter(t *testing.T, dir string) *counter {
	t.Helper()
	c := &counter{stop: make(chan struct{}), done: make(chan error, 1)}
	for i, name := range []string{"disk-0", "disk-1"} {
		dev, err := nbd.Dial(t.Context(), "unix", volumeproc.NBDSocket(dir), name)
		check(t, err)
		t.Cleanup(func() { dev.Close() })
		c.disks[i] = dev
	}
	go func() {
		for n := uint64(1); ; n++ {
			select {
			case <-c.stop:
				c.done <- nil
				return
			default:
			}
			var sector [512]byte
			binary.BigEndian.PutUint64(sector[:], n)
			for _, d := range c.disks {
				if _, err := d.WriteAt(sector[:], 4096); err != nil {
					c.done <- err
					return
				}
			}
			c.written.Store(n)
		}
	}()
	return c
}

// comesTo waits until both disks have a number larger than n.
func (c *counter) comesTo(t *testing.T, n uint64) {
	t.Helper()
	deadline := time.After(time.Minute)
	for c.written.Load() <= n {
		select {
		case <-time.After(time.Millisecond):
		case <-deadline:
			t.Fatalf("the guest has come to %d only", c.written.Load())
		}
	}
}

// end stops the guest, for which nothing failed.
func (c *counter) end(t *testing.T) {
	t.Helper()
	close(c.stop)
	check(t, <-c.done)
}

// counted returns the number in a copy of a disk; dek is nil if it is plain.
func counted(t *testing.T, path string, dek *keymem.Key) uint64 {
	t.Helper()
	content, err := os.ReadFile(path)
	check(t, err)
	path = filepath.Join(t.TempDir(), "copy")
	check(t, os.WriteFile(path, content, 0o600))
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{})
	check(t, err)
	var dev blockdev.Device = file
	if dek != nil {
		dev, err = volume.Open(file, dek, volume.Options{})
		check(t, err)
	}
	defer dev.Close()
	var sector [512]byte
	_, err = dev.ReadAt(sector[:], 4096)
	check(t, err)
	return binary.BigEndian.Uint64(sector[:])
}

// countingDisks gives p an encrypted and a plain disk, and returns their files.
func countingDisks(t *testing.T, p *volumeproc.Process) (luks string, dek *keymem.Key, raw string) {
	t.Helper()
	luks, dek, _, _ = newVolume(t)
	raw = newRaw(t, make([]byte, diskSize))
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.LUKS}, luks, dek))
	check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-1", Format: volumectl.Raw}, raw, nil))
	return luks, dek, raw
}

// TestSuspend: while disks are suspended their files stay as they are, at one point
// in time, and the guest only waits.
func TestSuspend(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	luks, dek, raw := countingDisks(t, p)
	g := newCounter(t, dir)
	for range 5 {
		g.comesTo(t, g.written.Load()+20)
		before := g.written.Load()
		check(t, p.Suspend(ctx, volumectl.SuspendMax))
		first, second := counted(t, luks, dek), counted(t, raw, nil)
		if _, err := p.Status(ctx); err != nil { // is told meanwhile
			t.Error(err)
		}
		if again := counted(t, luks, dek); again != first {
			t.Errorf("suspended, disk-0 went on from %d to %d", first, again)
		}
		if again := counted(t, raw, nil); again != second {
			t.Errorf("suspended, disk-1 went on from %d to %d", second, again)
		}
		check(t, p.Resume(ctx))
		if second < before || first != second && first != second+1 {
			t.Errorf("the disks hold %d and %d, and both had %d before: that was at no one time", first, second, before)
		}
	}
	wantKind(t, p.Resume(ctx), errs.InvalidState)
	g.comesTo(t, g.written.Load())
	g.end(t)

	// The end of the process does not wait for a suspension.
	check(t, p.Suspend(ctx, volumectl.SuspendMax))
	check(t, p.Stop(ctx))
	if got := counted(t, raw, nil); got != g.written.Load() {
		t.Errorf("at the end disk-1 holds %d of %d", got, g.written.Load())
	}
}

// TestSuspensionEnds by itself: the guest goes on, and who asks for the end is told
// that it was too late.
func TestSuspensionEnds(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	countingDisks(t, p)
	g := newCounter(t, dir)

	check(t, p.Suspend(ctx, 2*time.Second)) // time enough to come to rest on a busy machine
	g.comesTo(t, g.written.Load()+1)        // one may have been under way
	wantKind(t, p.Resume(ctx), errs.Unavailable)

	// The host is killed.
	other, err := volumectl.Dial(ctx, filepath.Join(dir, "volume.sock"))
	check(t, err)
	check(t, other.Suspend(ctx, volumectl.SuspendMax))
	wantKind(t, p.Resume(ctx), errs.InvalidState) // not of this host
	before := g.written.Load()
	check(t, other.Close())
	g.comesTo(t, before+1)

	// Whatever else is asked for is done, and the disks go on.
	check(t, p.Suspend(ctx, volumectl.SuspendMax))
	before = g.written.Load()
	check(t, p.Flush(ctx, "disk-0"))
	g.comesTo(t, before+1)
	wantKind(t, p.Resume(ctx), errs.InvalidState)

	// Not while the files are rewritten by others than the guest.
	plain := newRaw(t, make([]byte, diskSize))
	check(t, convert(ctx, p, volumectl.Raw, plain, nil))
	wantKind(t, p.Suspend(ctx, volumectl.SuspendMax), errs.InvalidState)
	check(t, p.StopConversion(ctx, "disk-0"))
	next, safe := nextSafe(t, 2)
	check(t, p.Rekey(ctx, "disk-0", next, safe, 1<<16)) // it takes minutes
	wantKind(t, p.Suspend(ctx, volumectl.SuspendMax), errs.InvalidState)
	check(t, p.StopRekey(ctx, "disk-0"))
	g.comesTo(t, g.written.Load())
	g.end(t)
}
