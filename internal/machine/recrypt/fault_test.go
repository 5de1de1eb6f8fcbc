package recrypt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/machine/recrypt"
)

const (
	configName = "vm.json"
	plainName  = "disk-0.raw"
	luksName   = "disk-0.luks"
	// revertedName is that of the disk's file after a revert to a snapshot.
	revertedName = "disk-0.1.luks"
	diskSize     = 64 << 10
)

// config is what the tests keep of vm.json.
type config struct{ disk, retired, encrypting string }

func readConfig(f recrypt.Folder) (config, error) {
	file, err := f.Open(configName)
	if err != nil {
		return config{}, err
	}
	defer file.Close()
	text := make([]byte, 512)
	if _, err := file.ReadAt(text, 0); err != nil {
		return config{}, err
	}
	lines := strings.Split(string(bytes.TrimRight(text, "\x00")), "\n")
	if len(lines) != 3 {
		return config{}, fmt.Errorf("vm.json is %q", text)
	}
	return config{lines[0], lines[1], lines[2]}, nil
}

// writeConfig replaces vm.json as bundle.Write does.
func writeConfig(f recrypt.Folder, c config) error {
	const temporary = configName + recrypt.Unfinished
	if err := f.Remove(temporary); err != nil {
		return err
	}
	file, err := f.Create(temporary)
	if err != nil {
		return err
	}
	text := make([]byte, 512)
	copy(text, strings.Join([]string{c.disk, c.retired, c.encrypting}, "\n"))
	err = file.Resize(512)
	if err == nil {
		_, err = file.WriteAt(text, 0)
	}
	if err == nil {
		err = file.Flush()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	return f.Rename(temporary, configName)
}

// operation is what is done to the disk, by the steps of the host's role.
type operation struct {
	name   string
	before string // the disk's file at the start
	after  string // and at the end
	kek    string // under which the disk is at the end; empty: plain
	newDEK bool
	// run rewrites the disk; nil: it is encrypted in place.
	run func(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error
	// snapshot says that the folder has a copy of the disk beside it.
	snapshot bool
}

var operations = []operation{
	{"encrypt in place", plainName, luksName, "new", true, nil, false},
	{"encrypt", plainName, luksName, "new", true, func(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error {
		return recrypt.Encrypt(ctx, f, disk, luksName, reference("new"), keks, nil)
	}, false},
	{"decrypt", luksName, plainName, "", false, func(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error {
		return recrypt.Decrypt(ctx, f, disk, plainName, keks, nil)
	}, false},
	{"shallow rekey", luksName, luksName, "new", false, func(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error {
		return recrypt.ShallowRekey(ctx, f, disk, reference("new"), keks)
	}, false},
	{"deep rekey", luksName, luksName, "new", true, func(ctx context.Context, f recrypt.Folder, disk string, keks recrypt.KEKs) error {
		return recrypt.DeepRekey(ctx, f, disk, reference("new"), keks, nil, nil)
	}, false},
}

// reverting gives the disk the contents of its copy.
var reverting = operation{"revert", luksName, revertedName, "old", false, func(ctx context.Context, f recrypt.Folder, _ string, keks recrypt.KEKs) error {
	return recrypt.Copy(ctx, f, revertedName, copyOf(luksName), keks, nil)
}, true}

// do runs the operation as package role/host does: sweep, rewrite, switch
// vm.json, sweep, remove what is unfinished.
func (o operation) do(ctx context.Context, f *faultFolder, keks recrypt.KEKs) error {
	defer func() {
		for _, name := range f.list() {
			if strings.HasSuffix(name, recrypt.Unfinished) {
				_ = f.Remove(name)
			}
		}
	}()
	c, err := readConfig(f)
	if err != nil {
		return err
	}
	if c, err = sweep(f, c); err != nil {
		return err
	}
	if o.run == nil {
		return encryptInPlace(ctx, f, c, keks)
	}
	if c.disk == o.after && o.before != o.after {
		return nil
	}
	if err := o.run(ctx, f, c.disk, keks); err != nil {
		return err
	}
	if o.before == o.after {
		return nil
	}
	next := config{disk: o.after, retired: c.disk}
	if err := writeConfig(f, next); err != nil {
		if now, readErr := readConfig(f); readErr == nil && now.disk != o.after {
			err = errors.Join(err, f.Remove(o.after))
		}
		return err
	}
	_, err = sweep(f, next)
	return err
}

// encryptInPlace makes vm.json say what is done before and after it.
func encryptInPlace(ctx context.Context, f *faultFolder, c config, keks recrypt.KEKs) error {
	if c.disk == plainName {
		c.disk, c.encrypting = luksName, plainName
		if err := writeConfig(f, c); err != nil {
			return err
		}
	}
	if c.encrypting == "" {
		return nil
	}
	undone, err := recrypt.EncryptInPlace(ctx, f, c.encrypting, c.disk, diskSize, reference("new"), keks, 0, nil)
	switch {
	case undone:
		c.disk = plainName
	case err != nil:
		return err
	}
	c.encrypting = ""
	return errors.Join(err, writeConfig(f, c))
}

func sweep(f *faultFolder, c config) (config, error) {
	if c.retired == "" {
		return c, nil
	}
	if err := f.Sync(); err != nil {
		return c, err
	}
	if err := f.Remove(c.retired); err != nil {
		return c, err
	}
	c.retired = ""
	return c, writeConfig(f, c)
}

// bench is a folder with one disk, and the keys.
type bench struct {
	keys   keyring
	oldDEK *keymem.Key // nil for a plain disk
	want   []byte      // what the disk holds
	folder *faultFolder
}

func newBench(t *testing.T, disk string) *bench {
	t.Helper()
	b := &bench{keys: newKeyring(t, "old", "new"), want: content(), folder: newFaultFolder()}
	plain, err := b.folder.Create(plainName)
	check(t, err)
	check(t, plain.Resize(diskSize))
	for off := 0; off < diskSize; off += 4096 { // zeros stay holes
		if block := b.want[off : off+4096]; !bytes.Equal(block, make([]byte, 4096)) {
			_, err = plain.WriteAt(block, int64(off))
			check(t, err)
		}
	}
	check(t, plain.Flush())
	check(t, plain.Close())
	if disk == luksName {
		check(t, recrypt.Encrypt(t.Context(), b.folder, plainName, luksName, reference("old"), b.keys.get, nil))
		check(t, b.folder.Remove(plainName))
		b.oldDEK = b.dek(t, b.folder)
	}
	check(t, writeConfig(b.folder, config{disk: disk}))
	return b
}

// content is what a guest has on its disk: data, zeros, and zeros that were
// never written.
func content() []byte {
	p := make([]byte, diskSize)
	for i := 8 << 10; i < 40<<10; i++ {
		p[i] = byte(i ^ i>>8)
	}
	copy(p[60<<10:], "the end")
	return p
}

func (b *bench) dek(t *testing.T, f *faultFolder) *keymem.Key {
	t.Helper()
	return b.dekOf(t, f, luksName)
}

func (b *bench) dekOf(t *testing.T, f *faultFolder, name string) *keymem.Key {
	t.Helper()
	file, err := f.Open(name)
	check(t, err)
	defer file.Close()
	dek, _, _, err := recrypt.UnwrapDEKs(t.Context(), file, b.keys.get)
	check(t, err)
	t.Cleanup(func() { dek.Close() })
	return dek
}

// usable checks that vm.json names a disk that opens with one of the keys, and
// holds what it should.
func (b *bench) usable(t *testing.T, f *faultFolder, keys keyring) {
	t.Helper()
	c, err := readConfig(f)
	if err != nil {
		t.Fatalf("vm.json is lost: %v; there is %v", err, f.list())
	}
	if c.encrypting == "" {
		b.holds(t, f, c.disk, keys)
		return
	}
	// A disk that is being encrypted in place can be brought to its end, with its key;
	// and as long as nothing of it is encrypted it can be undone, also without.
	after := f.clone(nil)
	if err := encryptInPlace(t.Context(), after, c, keys.get); err != nil {
		t.Fatalf("an encryption in place does not go on: %v; there is %v", err, f.list())
	}
	b.holds(t, after, luksName, keys)
	after = f.clone(nil)
	if undone, err := recrypt.EncryptInPlace(t.Context(), after, c.encrypting, c.disk, diskSize, reference("new"), keyring{}.get, 0, nil); undone {
		b.holds(t, after, plainName, nil)
	} else if err == nil {
		t.Fatal("an encryption in place went on without its key")
	}
}

func (b *bench) holds(t *testing.T, f *faultFolder, name string, keys keyring) {
	t.Helper()
	var disk blockdev.Device
	var err error
	if strings.HasSuffix(name, ".raw") {
		disk, err = f.Open(name)
	} else {
		disk, _, err = recrypt.OpenRekeying(t.Context(), f, name, keys.get)
	}
	if err != nil {
		t.Fatalf("disk %s is lost: %v; there is %v", name, err, f.list())
	}
	defer disk.Close()
	got := make([]byte, disk.Size())
	if _, err := disk.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, b.want) {
		t.Fatalf("disk %s has changed", name)
	}
}

// ended checks that the operation has ended: only the new KEK is needed, and
// the old disk is gone.
func (b *bench) ended(t *testing.T, o operation, f *faultFolder) {
	t.Helper()
	if c, err := readConfig(f); err != nil || c.disk != o.after {
		t.Fatalf("vm.json is %+v, error %v", c, err)
	}
	if o.before != o.after && f.names[o.before] != nil {
		t.Fatalf("%s is still there", o.before)
	}
	b.holds(t, f, o.after, keyring{o.kek: b.keys[o.kek]})
	if o.kek == "" {
		return
	}
	if b.oldDEK != nil && b.dekOf(t, f, o.after).Equal(b.oldDEK) == o.newDEK {
		t.Errorf("new DEK: %v, want %v", !o.newDEK, o.newDEK)
	}
	for _, offset := range []int64{0, 16 << 10} { // without one header copy the other must do
		one := f.clone(nil)
		file, err := one.Open(o.after)
		check(t, err)
		_, err = file.WriteAt([]byte("damage"), offset+5000)
		check(t, err)
		check(t, file.Close())
		if _, safes, err := recrypt.Inspect(one, o.after); err != nil || safes.Current.KEK != reference(o.kek) {
			t.Errorf("the header copy beside %d: %+v, %v", offset, safes, err)
		}
	}
}

// TestFaults fails every operation on files and folder in turn, in every way.
// Either the process goes on, tries again, is killed while it does, and the next
// one tries; or it is killed there and the power goes. The VM always has its
// disk, with its contents and under the old or the new KEK, and the operation
// called again ends as if nothing had happened.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, o := range append(slices.Clone(operations), reverting) {
		for _, mode := range faultdev.Modes() {
			for _, dead := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/dead=%v", o.name, mode, dead), func(t *testing.T) {
					t.Parallel()
					rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
					b := newBench(t, o.before)
					if o.snapshot {
						check(t, copyDisk(t.Context(), b.folder, o.before, b.keys.get))
					}
					n := 0
					for b.fails(t, rng, o, faultdev.Fault{Op: n, Mode: mode, Dead: dead}) {
						n += blockdevtest.FaultStep
					}
					if n < 10 {
						t.Errorf("only %d operations were there to fail", n)
					}
				})
			}
		}
	}
}

// fails runs the operation with a fault and reports whether it was reached.
func (b *bench) fails(t *testing.T, rng *rand.Rand, o operation, fault faultdev.Fault) bool {
	t.Helper()
	f := b.folder.clone(&fault)
	err := o.do(t.Context(), f, b.keys.get)
	hit := f.hit
	defer func() {
		if t.Failed() {
			t.Logf("failed was operation %d, %s; error %v", fault.Op, hit, err)
		}
	}()
	switch {
	case err != nil && !errors.Is(err, faultdev.ErrInjected):
		t.Errorf("error %v hides its cause", err)
	case hit == "" && err != nil:
		t.Errorf("error %v without a fault", err)
	}
	if names := f.opened(); len(names) > 0 {
		t.Errorf("left open: %v", names)
	}
	lost := f.powerLoss(rng)
	if err == nil { // told to be done: the old KEK may be gone the next moment
		b.usable(t, lost, keyring{o.kek: b.keys[o.kek]})
	}
	if fault.Dead {
		b.repeat(t, rng, o, lost)
		return hit != "" && !t.Failed()
	}
	b.usable(t, lost, b.keys)
	f.inject(&faultdev.Fault{Op: rng.IntN(fault.Op + 1), Mode: faultdev.Modes()[rng.IntN(3)], Dead: true})
	_ = o.do(t.Context(), f, b.keys.get)
	b.usable(t, f.powerLoss(rng), b.keys)
	f.inject(nil)
	b.repeat(t, rng, o, f)
	return hit != "" && !t.Failed()
}

// repeat runs the operation again, now without a fault.
func (b *bench) repeat(t *testing.T, rng *rand.Rand, o operation, f *faultFolder) {
	t.Helper()
	b.usable(t, f, b.keys)
	if err := o.do(t.Context(), f, b.keys.get); err != nil {
		t.Fatalf("the next attempt failed: %v; there is %v", err, f.list())
	}
	want := []string{o.after, configName}
	if o.snapshot {
		want = slices.Insert(want, 1, copyOf(o.before))
	}
	if got := f.list(); !slices.Equal(got, want) {
		t.Fatalf("the folder holds %v, want %v", got, want)
	}
	b.ended(t, o, f.powerLoss(rng))
}

// TestStaleResult: an encryption is cut short after its result got its name, the
// VM runs on with the plain disk, and the encryption is repeated.
func TestStaleResult(t *testing.T) {
	t.Parallel()
	b := newBench(t, plainName)
	check(t, recrypt.Encrypt(t.Context(), b.folder, plainName, luksName, reference("new"), b.keys.get, nil))
	first := b.dek(t, b.folder)

	// Unchanged, the result is taken as it is.
	check(t, recrypt.Encrypt(t.Context(), b.folder, plainName, luksName, reference("new"), b.keys.get, nil))
	if !b.dek(t, b.folder).Equal(first) {
		t.Error("a good result was made again")
	}
	plain, err := b.folder.Open(plainName)
	check(t, err)
	copy(b.want[3000:], "written by the guest meanwhile")
	_, err = plain.WriteAt(b.want, 0)
	check(t, err)
	check(t, plain.Close())
	check(t, recrypt.Encrypt(t.Context(), b.folder, plainName, luksName, reference("new"), b.keys.get, nil))
	b.holds(t, b.folder, luksName, b.keys)
}

// TestDeadKEK: a disk whose KEK cannot be had is left alone by everything.
func TestDeadKEK(t *testing.T) {
	t.Parallel()
	for _, o := range operations {
		b := newBench(t, o.before)
		only := keyring{}
		if o.before == luksName {
			only["new"] = b.keys["new"]
		}
		before := b.folder.list()
		if err := o.do(t.Context(), b.folder, only.get); !errors.Is(err, errNoKEK) {
			t.Errorf("%s: error %v", o.name, err)
		}
		if got := b.folder.list(); !slices.Equal(got, before) {
			t.Errorf("%s: the folder holds %v", o.name, got)
		}
		b.usable(t, b.folder, b.keys)
	}
}

// TestForeignSafe: a key safe that was moved here from another disk, or a KEK
// that is not the one it names, opens nothing and changes nothing.
func TestForeignSafe(t *testing.T) {
	t.Parallel()
	b := newBench(t, luksName)
	swapped := keyring{"old": b.keys["new"], "new": b.keys["old"]}
	rewrites := slices.DeleteFunc(slices.Clone(operations), func(o operation) bool { return o.before != luksName })
	for _, o := range rewrites {
		if err := o.do(t.Context(), b.folder, swapped.get); !errors.Is(err, keysafe.ErrDoesNotOpen) {
			t.Errorf("%s with a wrong KEK: error %v", o.name, err)
		}
		b.usable(t, b.folder, b.keys)
	}
	dek, err := keymem.Random(keysafe.DEKSize)
	check(t, err)
	defer dek.Close()
	_, safes, err := recrypt.Inspect(b.folder, luksName)
	check(t, err)
	safe := safes.Current
	foreign, err := keysafe.Wrap(b.keys["old"], dek, reference("old"), safe.Owner, safe.Generation+1)
	check(t, err)
	file, err := b.folder.Open(luksName)
	check(t, err)
	check(t, volume.ReplaceSafe(file, foreign))
	check(t, file.Close())
	for _, o := range rewrites {
		if err := o.do(t.Context(), b.folder, b.keys.get); !errors.Is(err, volume.ErrWrongKey) {
			t.Errorf("%s with another disk's DEK: error %v", o.name, err)
		}
	}
	if _, now, err := recrypt.Inspect(b.folder, luksName); err != nil || now.Current.KEK != reference("old") {
		t.Errorf("the key safe was replaced by one that opens nothing: %+v, %v", now, err)
	}
}
