package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// TestSwitchInterrupted ends the switch of a disk after each of its steps: what
// starts the VM next finds a whole disk, and leaves nothing else.
func TestSwitchInterrupted(t *testing.T) {
	t.Parallel()
	for done := range 4 {
		for _, format := range []string{bundle.FormatLUKS, bundle.FormatRaw} {
			b := newBench(t)
			var ref keysafe.Ref
			old := bundle.FormatLUKS
			if format == bundle.FormatLUKS {
				ref, old = b.newRef(t), bundle.FormatRaw
			}
			req := request("web-1", b.newRef(t))
			req.Disks[0].Plain = old == bundle.FormatRaw
			check(t, b.createVM(t.Context(), req, quiet))
			dir := filepath.Join(b.root, "web-1")
			vm, err := bundle.Read(dir)
			check(t, err)
			c := conversion{format: format, ref: ref}
			name := bundle.DiskFile("disk-0", format)
			check(t, recrypt.NewTarget(t.Context(), recrypt.Dir{Path: dir}, name, vm.Disks[0].SizeBytes, ref, b.kek))
			_, steps, err := switchSteps(dir, vm, "disk-0", c)
			check(t, err)
			for _, step := range steps[:done] {
				check(t, step())
			}
			check(t, os.WriteFile(filepath.Join(dir, "vm.json.new"), []byte("{"), 0o600)) // half written

			now, err := bundle.Read(dir)
			check(t, err)
			check(t, tidy(dir, now))
			now, err = bundle.Read(dir)
			check(t, err)
			want := old
			if done == len(steps) {
				want = format
			}
			d := now.Disks[0]
			if d.Format != want || len(now.Retired) > 0 || now.Key == nil {
				t.Errorf("after step %d of the switch to %s: %+v", done, format, now)
			}
			if files := b.files(t, "web-1"); !slices.Equal(files, []string{d.File, "disk-1.luks"}) {
				t.Errorf("after step %d of the switch to %s the folder holds %v", done, format, files)
			}
			if got := b.content(t, req.GetId(), "disk-0", 4096); !bytes.Equal(got, make([]byte, 4096)) {
				t.Errorf("after step %d of the switch to %s the disk reads otherwise", done, format)
			}
		}
	}
}

// TestSettle has an agent die while a volume process holds two files of a disk,
// after each step of the switch: the next agent has it go on with the one that
// vm.json names.
func TestSettle(t *testing.T) {
	t.Parallel()
	for done := range 4 {
		b := newBench(t)
		ctx := t.Context()
		id := b.create(t, "web-1", keysafe.Ref{})
		m, err := b.machine(id)
		check(t, err)
		reg, _ := m.state()
		dir := filepath.Join(b.root, "web-1")
		vm, process, err := b.startVolumes(ctx, reg, dir)
		check(t, err)
		t.Cleanup(func() {
			check(t, process.Kill(context.Background()))
			check(t, process.Close())
		})
		run := &running{volumes: process}
		m.setRunning(run)
		c := conversion{format: bundle.FormatLUKS, ref: b.newRef(t)}
		_, err = b.beginConversion(ctx, m, run, dir, vm.Disks[0], c)
		check(t, err)
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			s, err := conversionOf(ctx, process, "disk-0")
			check(t, err)
			if s.Phase == volumectl.Synced {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the conversion is still %+v", s)
			}
		}
		check(t, process.HoldConversion(ctx, "disk-0"))
		_, steps, err := switchSteps(dir, vm, "disk-0", c)
		check(t, err)
		for _, step := range steps[:done] {
			check(t, step())
		}

		check(t, b.settle(ctx, reg, process))
		want := bundle.FormatRaw
		if done == len(steps) {
			want = bundle.FormatLUKS
		}
		now, err := bundle.Read(dir)
		check(t, err)
		status, err := process.Status(ctx)
		check(t, err)
		if d := status.Disks[0]; now.Disks[0].Format != want || string(d.Format) != want || d.Conversion != nil || len(now.Retired) > 0 {
			t.Errorf("after step %d: vm.json has %+v, the volume process %+v", done, now, d)
		}
		if files := b.files(t, "web-1"); !slices.Equal(files, []string{now.Disks[0].File}) {
			t.Errorf("after step %d the folder holds %v", done, files)
		}
		m.setRunning(nil)
	}
}

// recorder notes what is done to it, and fails at one step.
type recorder struct {
	steps []string
	fails string
}

func (r *recorder) do(step string) error {
	r.steps = append(r.steps, step)
	if step == r.fails {
		return errors.New("it fails")
	}
	return nil
}

func (r *recorder) Sync() error                                  { return r.do("sync") }
func (r *recorder) SwitchDisk(_ context.Context, _ string) error { return r.do("switch") }

// TestSwitchOfDurable: the old file is written to until the vm.json that names the new
// one is durable.
func TestSwitchOfDurable(t *testing.T) {
	t.Parallel()
	for fails, want := range map[string][]string{"": {"sync", "switch"}, "sync": {"sync"}, "switch": {"sync", "switch"}} {
		r := &recorder{fails: fails}
		if err := switchDisk(t.Context(), r, r, "disk-0"); (err != nil) != (fails != "") {
			t.Errorf("%s fails: %v", fails, err)
		}
		if !slices.Equal(r.steps, want) {
			t.Errorf("%s fails: %v were done", fails, r.steps)
		}
	}
}
