package recrypt_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/machine/recrypt"
	"strongroom/test/reflink"
)

// cloning is a way to make a clone's disk.
type cloning struct {
	name   string
	disk   string
	newDEK bool
	run    func(ctx context.Context, to, from recrypt.Folder, keks recrypt.KEKs) error
}

var clonings = []cloning{
	{"plain", plainName, false, func(ctx context.Context, to, from recrypt.Folder, _ recrypt.KEKs) error {
		return recrypt.ClonePlain(ctx, to, from, plainName, nil)
	}},
	{"same DEK", luksName, false, func(ctx context.Context, to, from recrypt.Folder, keks recrypt.KEKs) error {
		return recrypt.Clone(ctx, to, from, luksName, reference("new"), keks, nil)
	}},
	{"own DEK", luksName, true, func(ctx context.Context, to, from recrypt.Folder, keks recrypt.KEKs) error {
		return recrypt.CloneRecrypt(ctx, to, from, luksName, reference("new"), keks, nil)
	}},
}

// cloned checks a clone that is done: it needs the new KEK only, and is no other
// name for the original.
func (b *bench) cloned(t *testing.T, c cloning, f *faultFolder) {
	t.Helper()
	if got := f.list(); !slices.Equal(got, []string{c.disk}) {
		t.Fatalf("the clone's folder holds %v", got)
	}
	b.holds(t, f, c.disk, keyring{"new": b.keys["new"]})
	if c.disk == plainName {
		return
	}
	if b.dek(t, f).Equal(b.oldDEK) == c.newDEK {
		t.Errorf("new DEK: %v, want %v", !c.newDEK, c.newDEK)
	}
	info, safes, err := recrypt.Inspect(f, luksName)
	check(t, err)
	original, _, err := recrypt.Inspect(b.folder, luksName)
	check(t, err)
	if info.UUID == original.UUID || safes.Current.KEK != reference("new") || safes.Current.Generation != 1 || safes.Current.Owner != volume.Owner(info.UUID) {
		t.Errorf("the clone is %+v with key safe %+v", info, safes.Current)
	}
	if info.Size != original.Size || info.SectorSize != original.SectorSize || info.AllowDiscards != original.AllowDiscards || info.Thin != original.Thin || info.Label != original.Label {
		t.Errorf("the clone is %+v, the original %+v", info, original)
	}
}

// TestCloneFaults fails every operation in the clone's folder, and in the
// original's, in turn. The original is as it was; of the clone there is nothing
// or all; and the next attempt, in a new folder, succeeds.
func TestCloneFaults(t *testing.T) {
	t.Parallel()
	run := func(c cloning, reflink, inOriginal bool, mode faultdev.Mode) {
		t.Run(fmt.Sprintf("%s/reflink=%v/original=%v/%s", c.name, reflink, inOriginal, mode), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
			b := newBench(t, c.disk)
			n := 0
			for b.cloneFails(t, rng, c, reflink, inOriginal, faultdev.Fault{Op: n, Mode: mode}) {
				n += blockdevtest.FaultStep
			}
			if n < 2 {
				t.Errorf("only %d operations were there to fail", n)
			}
		})
	}
	for _, c := range clonings {
		run(c, false, true, faultdev.Undone)
		for _, mode := range faultdev.Modes() {
			run(c, false, false, mode)
			if !c.newDEK { // nothing else is a clone of blocks
				run(c, true, false, mode)
			}
		}
	}
}

func (b *bench) cloneFails(t *testing.T, rng *rand.Rand, c cloning, reflink, inOriginal bool, fault faultdev.Fault) bool {
	t.Helper()
	from, to := b.folder.clone(nil), newFaultFolder()
	to.reflink = reflink
	faulty := to
	if inOriginal {
		faulty = from
	}
	faulty.inject(&fault)
	err := c.run(t.Context(), to, from, b.keys.get)
	hit := faulty.hit
	defer func() {
		if t.Failed() {
			t.Logf("failed was operation %d, %s; error %v", fault.Op, hit, err)
		}
	}()
	if err != nil && !errors.Is(err, faultdev.ErrInjected) {
		t.Errorf("error %v hides its cause", err)
	}
	if left := append(to.opened(), from.opened()...); len(left) > 0 {
		t.Errorf("left open: %v", left)
	}
	lost := to.powerLoss(rng)
	if err == nil {
		b.cloned(t, c, lost)
	} else if lost.names[c.disk] != nil { // renamed, and not told to be
		b.holds(t, lost, c.disk, b.keys)
	}
	from.inject(nil)
	b.usable(t, from.powerLoss(rng), b.keys)
	if err != nil {
		again := newFaultFolder()
		again.reflink = reflink
		check(t, c.run(t.Context(), again, from, b.keys.get))
		b.cloned(t, c, again.powerLoss(rng))
	}
	return hit != "" && !t.Failed()
}

// TestCloneWhileRekeying: with a deep rekey under way the data are under two DEKs.
func TestCloneWhileRekeying(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	var from *faultFolder
	for op := 0; ; op++ { // killed at each operation in turn, until that leaves one under way
		from = b.folder.clone(&faultdev.Fault{Op: op, Mode: faultdev.Done, Dead: true})
		if err := recrypt.DeepRekey(t.Context(), from, luksName, reference("next"), b.with(t, "next").get, nil, nil); err == nil {
			t.Fatal("no rekey was interrupted")
		}
		from.inject(nil)
		if _, safes, err := recrypt.Inspect(from, luksName); err == nil && safes.Next != nil {
			break
		}
	}
	to := newFaultFolder()
	if err := recrypt.Clone(t.Context(), to, from, luksName, reference("new"), b.keys.get, nil); !errors.Is(err, volume.ErrRekeying) || len(to.list()) > 0 {
		t.Errorf("error %v; there is %v", err, to.list())
	}
	check(t, recrypt.CloneRecrypt(t.Context(), to, from, luksName, reference("new"), b.keys.get, nil))
	b.holds(t, to, luksName, keyring{"new": b.keys["new"]})
}

// with adds a KEK to the bench's and returns them.
func (b *bench) with(t *testing.T, name string) keyring {
	t.Helper()
	if b.keys[name] == nil {
		b.keys[name] = newKeyring(t, name)[name]
	}
	return b.keys
}

// TestCloneOnReflinks clones a disk on a file system that shares blocks.
func TestCloneOnReflinks(t *testing.T) {
	t.Parallel()
	root := reflink.Dir(t)
	from, to := recrypt.Dir{Path: root}, recrypt.Dir{Path: t.TempDir()}
	keys := newKeyring(t, "old", "new")
	vol, err := recrypt.NewVolume(t.Context(), from, luksName, 16<<20, false, reference("old"), keys.get)
	check(t, err)
	_, err = vol.WriteAt(make([]byte, 16<<20), 0)
	check(t, err)
	check(t, vol.Flush())
	check(t, vol.Close())
	check(t, recrypt.Finish(from, luksName))
	copied := 0
	count := func(done, _ int64) { copied++ }
	clones := recrypt.Dir{Path: filepath.Join(root, "clone")}
	check(t, os.Mkdir(clones.Path, 0o700))
	check(t, recrypt.Clone(t.Context(), clones, from, luksName, reference("new"), keys.get, count))
	if copied > 0 {
		t.Error("it was copied")
	}
	check(t, recrypt.Clone(t.Context(), to, from, luksName, reference("new"), keys.get, count))
	if copied == 0 {
		t.Error("it was not copied to another file system")
	}
	for _, folder := range []recrypt.Dir{clones, to} {
		vol, safe, err := recrypt.OpenVolume(t.Context(), folder, luksName, keyring{"new": keys["new"]}.get)
		check(t, err)
		if safe.KEK != reference("new") || vol.Size() != 16<<20 {
			t.Errorf("%s: %+v, %d bytes", folder.Path, safe, vol.Size())
		}
		check(t, vol.Close())
	}
}
