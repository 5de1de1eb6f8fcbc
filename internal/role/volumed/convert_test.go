package volumed_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/errs"
	"strongroom/internal/machine/volumeproc"
)

// guest writes to a disk over NBD, and knows what it must read as.
type guest struct {
	dev  *nbd.Client
	want []byte
	stop chan struct{}
	done chan error
}

// newGuest begins to write. The disk holds want.
func newGuest(t *testing.T, dir string, want []byte) *guest {
	t.Helper()
	dev, err := nbd.Dial(t.Context(), "unix", volumeproc.NBDSocket(dir), "disk-0")
	check(t, err)
	g := &guest{dev: dev, want: want, stop: make(chan struct{}), done: make(chan error, 1)}
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	go func() {
		for {
			select {
			case <-g.stop:
				g.done <- dev.Flush()
				return
			default:
			}
			if err := g.work(rng); err != nil {
				g.done <- err
				return
			}
		}
	}()
	t.Cleanup(func() { dev.Close() })
	return g
}

func (g *guest) work(rng *rand.Rand) error {
	off := rng.Int64N(diskSize/512-128) * 512
	span := g.want[off : off+(1+rng.Int64N(127))*512]
	switch rng.IntN(8) {
	case 0:
		clear(span)
		return g.dev.WriteZeroes(off, int64(len(span)), true)
	case 1:
		return g.dev.Flush()
	}
	for i := range span {
		span[i] = byte(rng.Uint32())
	}
	_, err := g.dev.WriteAt(span, off)
	return err
}

// end stops the guest, which has flushed then, and checks what it reads.
func (g *guest) end(t *testing.T) {
	t.Helper()
	close(g.stop)
	check(t, <-g.done)
	got := make([]byte, diskSize)
	_, err := g.dev.ReadAt(got, 0)
	check(t, err)
	if !bytes.Equal(got, g.want) {
		t.Error("the guest does not read what it wrote")
	}
}

// holds checks the content of a disk that nobody uses; dek is nil if it is plain.
func holds(t *testing.T, what, path string, dek *keymem.Key, want []byte) {
	t.Helper()
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{})
	check(t, err)
	var dev blockdev.Device = file
	if dek != nil {
		dev, err = volume.Open(file, dek, volume.Options{})
		check(t, err)
	}
	defer dev.Close()
	got := make([]byte, diskSize)
	_, err = dev.ReadAt(got, 0)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s does not hold what the guest wrote", what)
	}
}

func convert(ctx context.Context, p *volumeproc.Process, format volumectl.Format, path string, dek *keymem.Key) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	return p.Convert(ctx, "disk-0", format, file, dek, 0)
}

// awaitPhase waits until the conversion of disk-0 is in a phase.
func awaitPhase(t *testing.T, p *volumeproc.Process, want volumectl.Phase) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		status, err := p.Status(t.Context())
		check(t, err)
		c := status.Disks[0].Conversion
		switch {
		case c == nil:
			t.Fatal("there is no conversion")
		case c.Phase == want:
			return
		case c.Phase == volumectl.Failed:
			t.Fatalf("the conversion failed: %v", c.Failure.Err())
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatalf("still %+v", c)
		}
	}
}

// newRaw makes a plain disk.
func newRaw(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk-0.raw")
	check(t, os.WriteFile(path, content, 0o600))
	return path
}

// TestConvert encrypts a disk and decrypts it again while a guest writes to it.
func TestConvert(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := runDir(t)
	p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
	want := make([]byte, diskSize)
	copy(want[1<<20:], bytes.Repeat([]byte("a plain disk "), 1<<16))
	raw := newRaw(t, want)
	luks, dek, _, safe := newVolume(t)
	check(t, add(ctx, p, volumectl.Disk{Name: "disk-0", Format: volumectl.Raw}, raw, nil))
	g := newGuest(t, dir, want)

	wantKind(t, p.HoldConversion(ctx, "disk-0"), errs.InvalidState)
	wantKind(t, p.SwitchDisk(ctx, "disk-0"), errs.InvalidState)
	check(t, p.StopConversion(ctx, "disk-0"))
	wantKind(t, convert(ctx, p, volumectl.LUKS, luks, keymemtest.Random(t, volumectl.KeySize)), errs.Corrupt) // not its key
	wantKind(t, convert(ctx, p, volumectl.Raw, newRaw(t, nil), nil), errs.Invalid)                            // another size
	wantKind(t, convert(ctx, p, volumectl.Raw, raw, nil), errs.InvalidState)                                  // itself
	check(t, convert(ctx, p, volumectl.LUKS, luks, dek))
	wantKind(t, convert(ctx, p, volumectl.Raw, newRaw(t, make([]byte, diskSize)), nil), errs.Exists)
	wantKind(t, p.Resize(ctx, "disk-0", 2*diskSize), errs.InvalidState)
	awaitPhase(t, p, volumectl.Synced)
	wantKind(t, p.SwitchDisk(ctx, "disk-0"), errs.InvalidState)
	check(t, p.HoldConversion(ctx, "disk-0"))
	awaitPhase(t, p, volumectl.Held)
	check(t, p.SwitchDisk(ctx, "disk-0"))
	status, err := p.Status(ctx)
	check(t, err)
	if d := status.Disks[0]; d.Format != volumectl.LUKS || d.UUID != diskUUID || d.Conversion != nil || d.Failures != 0 {
		t.Errorf("after the switch: %+v", d)
	}
	check(t, p.ReplaceSafe(ctx, "disk-0", safe)) // it is a volume in every respect

	plain := newRaw(t, make([]byte, diskSize))
	check(t, convert(ctx, p, volumectl.Raw, plain, nil))
	awaitPhase(t, p, volumectl.Synced)
	check(t, p.HoldConversion(ctx, "disk-0"))
	check(t, p.SwitchDisk(ctx, "disk-0"))
	g.end(t)
	check(t, p.Stop(ctx))
	holds(t, "the decrypted disk", plain, nil, want)
}

// TestConversionEnds in all the other ways: the guest goes on with the old file,
// which has everything.
func TestConversionEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(t *testing.T, p *volumeproc.Process){
		"stopped while copying": func(t *testing.T, p *volumeproc.Process) { check(t, p.StopConversion(t.Context(), "disk-0")) },
		"stopped when held": func(t *testing.T, p *volumeproc.Process) {
			awaitPhase(t, p, volumectl.Synced)
			check(t, p.HoldConversion(t.Context(), "disk-0"))
			check(t, p.StopConversion(t.Context(), "disk-0"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := runDir(t)
			p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
			want := make([]byte, diskSize)
			raw := newRaw(t, want)
			luks, dek, _, _ := newVolume(t)
			check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.Raw}, raw, nil))
			g := newGuest(t, dir, want)
			for range 2 { // it can be begun anew
				check(t, convert(t.Context(), p, volumectl.LUKS, luks, dek))
				end(t, p)
			}
			g.end(t)
			check(t, p.Stop(t.Context()))
			holds(t, "the old file", raw, nil, want)
		})
	}
}

// TestConversionCrashes: when the process is killed while both files are held
// together, or shut down, each of them has all that the guest wrote.
func TestConversionCrashes(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(p *volumeproc.Process) error{
		"killed":    func(p *volumeproc.Process) error { return p.Kill(context.Background()) },
		"shut down": func(p *volumeproc.Process) error { return p.Stop(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := runDir(t)
			p := start(t, volumeproc.Config{VM: "web-1", RunDir: dir})
			want := make([]byte, diskSize)
			raw := newRaw(t, want)
			luks, dek, _, _ := newVolume(t)
			check(t, add(t.Context(), p, volumectl.Disk{Name: "disk-0", Format: volumectl.Raw}, raw, nil))
			g := newGuest(t, dir, want)
			check(t, convert(t.Context(), p, volumectl.LUKS, luks, dek))
			awaitPhase(t, p, volumectl.Synced)
			check(t, p.HoldConversion(t.Context(), "disk-0"))
			g.end(t)
			check(t, end(p))
			holds(t, "the old file", raw, nil, want)
			holds(t, "the new file", luks, dek, want)
		})
	}
}
