package recrypt_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/machine/recrypt"
)

// copyOf is the name of the file that a disk is copied to.
func copyOf(disk string) string { return "snapshot." + disk }

func copyDisk(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error {
	if disk == plainName {
		return recrypt.CopyPlain(ctx, f, copyOf(disk), disk, nil)
	}
	return recrypt.Copy(ctx, f, copyOf(disk), disk, keks, nil)
}

// TestCopyFaults fails every operation of a copy in turn. The original is as it
// was; of the copy there is nothing or all, after a power loss too; and the next
// attempt succeeds.
func TestCopyFaults(t *testing.T) {
	t.Parallel()
	for _, disk := range []string{plainName, luksName} {
		for _, reflink := range []bool{false, true} {
			for _, mode := range faultdev.Modes() {
				t.Run(fmt.Sprintf("%s/reflink=%v/%s", disk, reflink, mode), func(t *testing.T) {
					t.Parallel()
					rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
					b := newBench(t, disk)
					n := 0
					for b.copyFails(t, rng, disk, reflink, faultdev.Fault{Op: n, Mode: mode}) {
						n += blockdevtest.FaultStep
					}
					if n < 2 {
						t.Errorf("only %d operations were there to fail", n)
					}
				})
			}
		}
	}
}

func (b *bench) copyFails(t *testing.T, rng *rand.Rand, disk string, reflink bool, fault faultdev.Fault) bool {
	t.Helper()
	folder := b.folder.clone(&fault)
	folder.reflink = reflink
	want := append(folder.list(), copyOf(disk))
	slices.Sort(want)
	err := copyDisk(t.Context(), folder, disk, b.keys.get)
	hit := folder.hit
	defer func() {
		if t.Failed() {
			t.Logf("failed was operation %d, %s; error %v", fault.Op, hit, err)
		}
	}()
	if err != nil && !errors.Is(err, faultdev.ErrInjected) {
		t.Errorf("error %v hides its cause", err)
	}
	if left := folder.opened(); len(left) > 0 {
		t.Errorf("left open: %v", left)
	}
	for _, left := range []*faultFolder{folder.powerLoss(rng), folder} {
		left.inject(nil)
		if err == nil || left.names[copyOf(disk)] != nil {
			b.holds(t, left, copyOf(disk), b.keys)
		}
		b.holds(t, left, disk, b.keys)
		left.reflink = reflink
		check(t, copyDisk(t.Context(), left, disk, b.keys.get))
		after := left.powerLoss(rng)
		b.holds(t, after, copyOf(disk), b.keys)
		b.holds(t, after, disk, b.keys)
		if got := after.list(); !slices.Equal(got, want) {
			t.Errorf("the folder holds %v, want %v", got, want)
		}
	}
	return hit != "" && !t.Failed()
}

// TestCopyIsTheDisk: the copy of an encrypted disk has its identity, and a rekey
// of either leaves the other's key safe alone.
func TestCopyIsTheDisk(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	check(t, copyDisk(t.Context(), b.folder, luksName, b.keys.get))
	info, safes, err := recrypt.Inspect(b.folder, luksName)
	check(t, err)
	copied, copiedSafes, err := recrypt.Inspect(b.folder, copyOf(luksName))
	check(t, err)
	if copied.UUID != info.UUID || copiedSafes.Current.KEK != safes.Current.KEK || copiedSafes.Current.Owner != safes.Current.Owner {
		t.Errorf("the copy is %+v with key safe %+v, not %+v with %+v", copied, copiedSafes.Current, info, safes.Current)
	}
	old, all := keyring{"old": b.keys["old"]}, b.with(t, "next")
	check(t, recrypt.ShallowRekey(t.Context(), b.folder, copyOf(luksName), reference("next"), all.get))
	b.holds(t, b.folder, luksName, old)
	b.holds(t, b.folder, copyOf(luksName), keyring{"next": all["next"]})
}

// TestCopyRefuses: a disk that does not open, or is under two DEKs, is not copied,
// and what had the copy's name stays.
func TestCopyRefuses(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	check(t, copyDisk(t.Context(), b.folder, luksName, b.keys.get))
	before := b.folder.list()
	if err := copyDisk(t.Context(), b.folder, luksName, keyring{}.get); err == nil {
		t.Error("a disk whose key is not here was copied")
	}
	for op := 0; ; op++ { // killed at each operation in turn, until that leaves one under way
		f := b.folder.clone(&faultdev.Fault{Op: op, Mode: faultdev.Done, Dead: true})
		if err := recrypt.DeepRekey(t.Context(), f, luksName, reference("next"), b.with(t, "next").get, nil, nil); err == nil {
			t.Fatal("no rekey was interrupted")
		}
		f.inject(nil)
		if _, safes, err := recrypt.Inspect(f, luksName); err != nil || safes.Next == nil {
			continue
		}
		if err := copyDisk(t.Context(), f, luksName, b.keys.get); !errors.Is(err, volume.ErrRekeying) || !slices.Equal(f.list(), before) {
			t.Errorf("error %v; there is %v", err, f.list())
		}
		break
	}
	b.holds(t, b.folder, copyOf(luksName), b.keys)
}

var together = []recrypt.Original{{To: copyOf(plainName), From: plainName}, {To: copyOf(luksName), From: luksName, Encrypted: true}}

// newTogether returns a folder with a plain and an encrypted disk.
func newTogether(t *testing.T) *bench {
	t.Helper()
	b := newBench(t, plainName)
	check(t, recrypt.Encrypt(t.Context(), b.folder, plainName, luksName, reference("old"), b.keys.get, nil))
	return b
}

// TestCopyTogetherFaults fails every operation of a copy of disks that are in use in
// turn: what is true of one copy is true of all of them.
func TestCopyTogetherFaults(t *testing.T) {
	t.Parallel()
	for _, mode := range faultdev.Modes() {
		for _, dead := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/dead=%v", mode, dead), func(t *testing.T) {
				t.Parallel()
				rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
				b := newTogether(t)
				n := 0
				for b.copyTogetherFails(t, rng, faultdev.Fault{Op: n, Mode: mode, Dead: dead}) {
					n += blockdevtest.FaultStep
				}
				if n < 2 {
					t.Errorf("only %d operations were there to fail", n)
				}
			})
		}
	}
}

func (b *bench) copyTogetherFails(t *testing.T, rng *rand.Rand, fault faultdev.Fault) bool {
	t.Helper()
	folder := b.folder.clone(nil)
	folder.reflink = true
	for _, d := range together { // a volume process has them
		file, err := folder.Open(d.From)
		check(t, err)
		defer file.Close()
	}
	folder.inject(&fault)
	err := recrypt.CopyTogether(t.Context(), folder, folder, together, b.keys.get, func(f func() error) error { return f() })
	hit := folder.hit
	defer func() {
		if t.Failed() {
			t.Logf("failed was operation %d, %s; error %v", fault.Op, hit, err)
		}
	}()
	if err != nil && !errors.Is(err, faultdev.ErrInjected) {
		t.Errorf("error %v hides its cause", err)
	}
	if got := folder.opened(); !slices.Equal(got, []string{luksName, plainName}) {
		t.Errorf("open are %v", got)
	}
	left := folder.powerLoss(rng)
	for _, d := range together {
		if err == nil || left.names[d.To] != nil {
			b.holds(t, left, d.To, b.keys)
		}
		b.holds(t, left, d.From, b.keys)
	}
	left.reflink = true
	check(t, recrypt.CopyTogether(t.Context(), left, left, together, b.keys.get, func(f func() error) error { return f() }))
	after := left.powerLoss(rng)
	for _, d := range together {
		b.holds(t, after, d.To, b.keys)
		b.holds(t, after, d.From, b.keys)
	}
	if got, want := after.list(), append(b.folder.list(), copyOf(luksName), copyOf(plainName)); len(got) != len(want) {
		t.Errorf("the folder holds %v, want %v", got, want)
	}
	return hit != "" && !t.Failed()
}

// TestCopyTogetherRefuses: without shared blocks, suspension or key there are no
// copies.
func TestCopyTogetherRefuses(t *testing.T) {
	t.Parallel()
	b := newTogether(t)
	before := b.folder.list()
	late := errors.New("the disks went on too early")
	for name, c := range map[string]struct {
		reflink   bool
		keys      keyring
		suspended func(func() error) error
		want      error
	}{
		"no reflinks":   {false, b.keys, func(f func() error) error { return f() }, blockdev.ErrNoClone},
		"not suspended": {true, b.keys, func(func() error) error { return late }, late},
		"too late":      {true, b.keys, func(f func() error) error { return errors.Join(f(), late) }, late},
		"no key":        {true, keyring{}, func(f func() error) error { return f() }, nil},
	} {
		b.folder.reflink = c.reflink
		err := recrypt.CopyTogether(t.Context(), b.folder, b.folder, together[1:], c.keys.get, c.suspended)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", name, err, c.want)
		}
		if got := b.folder.list(); !slices.Equal(got, before) {
			t.Errorf("%s: there is %v", name, got)
		}
	}
	b.holds(t, b.folder, luksName, b.keys)
}
