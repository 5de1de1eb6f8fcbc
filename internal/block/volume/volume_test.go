package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testOffset = 64 << 10 // of the data, in bytes: keeps test volumes small
	testUUID   = "5c6f1a3e-8f0d-4d2b-9a1e-0f4f6d1b2c3d"
)

// newSafe wraps dek for the test volume under a KEK of its own.
func newSafe(t testing.TB, dek *keymem.Key, name string, generation uint64) *keysafe.Safe {
	t.Helper()
	return newSafeOf(t, testUUID, dek, name, generation)
}

func newSafeOf(t testing.TB, uuid string, dek *keymem.Key, name string, generation uint64) *keysafe.Safe {
	t.Helper()
	s, err := keysafe.Wrap(keymemtest.Random(t, keysafe.KEKSize), dek, keysafe.Ref{Provider: "kp-1", KeyID: name}, volume.Owner(uuid), generation)
	check(t, err)
	return s
}

// format makes a volume with defaults for tests.
func format(t testing.TB, dev blockdev.Resizer, opts volume.FormatOptions) {
	t.Helper()
	opts.UUID, opts.DataOffset = testUUID, testOffset
	check(t, volume.Format(dev, opts))
}

func openVolume(t testing.TB, dev blockdev.Device, dek *keymem.Key) *volume.Volume {
	t.Helper()
	v, err := volume.Open(dev, dek, volume.Options{})
	check(t, err)
	t.Cleanup(func() { v.Close() })
	return v
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

// contents reads all of dev.
func contents(t testing.TB, dev blockdev.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	_, err := dev.ReadAt(p, 0)
	check(t, err)
	return p
}

// pattern returns n bytes that differ from sector to sector.
func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed + byte(i) ^ byte(i>>8)*3 ^ byte(i>>16)*5
	}
	return p
}

func TestConformance(t *testing.T) {
	for _, c := range []struct{ sector, device int }{{512, 512}, {4096, 512}, {512, 4096}, {4096, 65536}} {
		t.Run(fmt.Sprintf("%d on %d", c.sector, c.device), func(t *testing.T) {
			dek := keymemtest.Random(t, 64)
			mems := map[blockdev.Device]*blockdev.Memory{}
			start := func(t testing.TB, mem *blockdev.Memory, opts volume.Options) blockdev.Device {
				v, err := volume.Open(mem, dek, opts)
				check(t, err)
				t.Cleanup(func() { v.Close() })
				mems[v] = mem
				return v
			}
			reopen := func(opts volume.Options) func(testing.TB, blockdev.Device) blockdev.Device {
				return func(t testing.TB, dev blockdev.Device) blockdev.Device {
					mem := mems[dev].Clone()
					dev.Close()
					return start(t, mem, opts)
				}
			}
			blockdevtest.Run(t, blockdevtest.Suite{
				New: func(t testing.TB, size int64) blockdev.Device {
					mem := blockdev.NewMemory(0, c.device)
					format(t, mem, volume.FormatOptions{Size: size, SectorSize: c.sector, DEK: dek, AllowDiscards: true})
					return start(t, mem, volume.Options{})
				},
				Reopen:   reopen(volume.Options{}),
				ReadOnly: reopen(volume.Options{ReadOnly: true}),
			})
		})
	}
}

// TestOpenRefuses opens what cannot be opened: each has its own error, and not a
// byte is written.
func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	good := blockdev.NewMemory(0, 512)
	format(t, good, volume.FormatOptions{Size: 1 << 20, DEK: dek, Safe: newSafe(t, dek, "k", 1)})
	for _, c := range []struct {
		name   string
		dek    *keymem.Key
		break_ func(*blockdev.Memory) error
		opts   volume.Options
		want   error
	}{
		{"wrong key", keymemtest.Random(t, 64), nil, volume.Options{}, volume.ErrWrongKey},
		{"key of another length", keymemtest.Random(t, 32), nil, volume.Options{}, volume.ErrWrongKey},
		{"empty", dek, func(m *blockdev.Memory) error { return m.Resize(0) }, volume.Options{}, nil},
		{"cut in the header", dek, func(m *blockdev.Memory) error { return m.Resize(8192) }, volume.Options{}, volume.ErrTruncated},
		{"cut before the data", dek, func(m *blockdev.Memory) error { return m.Resize(40 << 10) }, volume.Options{}, volume.ErrTruncated},
		{"cut at the data", dek, func(m *blockdev.Memory) error { return m.Resize(testOffset) }, volume.Options{}, volume.ErrTruncated},
		{"cut in the data", dek, func(m *blockdev.Memory) error { return m.Resize(1 << 20) }, volume.Options{SizeMin: 1 << 20}, volume.ErrTruncated},
		{"no header", dek, func(m *blockdev.Memory) error { return m.Discard(0, 32<<10) }, volume.Options{}, volume.ErrNotVolume},
		{"both copies damaged", dek, func(m *blockdev.Memory) error {
			return errors.Join(damage(m, 5000), damage(m, 16<<10+5000))
		}, volume.Options{}, volume.ErrCorrupt},
	} {
		mem := good.Clone()
		if c.break_ != nil {
			check(t, c.break_(mem))
		}
		before := contents(t, mem)
		v, err := volume.Open(mem, c.dek, c.opts)
		if err == nil {
			t.Errorf("%s: opened", c.name)
			v.Close()
			continue
		}
		if c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.want)
		}
		if c.dek == dek && c.opts.SizeMin == 0 {
			if _, err := volume.Inspect(mem); c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%s: Inspect: error %v, want %v", c.name, err, c.want)
			}
		}
		if !bytes.Equal(contents(t, mem), before) {
			t.Errorf("%s: something was written", c.name)
		}
	}
}

// damage changes one byte.
func damage(dev blockdev.Device, off int64) error {
	var b [1]byte
	if _, err := dev.ReadAt(b[:], off); err != nil {
		return err
	}
	b[0] ^= 0x40
	_, err := dev.WriteAt(b[:], off)
	return err
}

// TestDamagedCopy opens a volume with one bad header copy, which is reported,
// left alone, and repaired by the next commit.
func TestDamagedCopy(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	for _, off := range []int64{0, 5000, 16 << 10, 16<<10 + 5000} {
		mem := blockdev.NewMemory(0, 512)
		format(t, mem, volume.FormatOptions{Size: 1 << 20, DEK: dek, Safe: newSafe(t, dek, "old", 1)})
		check(t, damage(mem, off))
		before := contents(t, mem)
		v := openVolume(t, mem, dek)
		info, err := v.Inspect()
		check(t, err)
		if len(info.Damage) != 1 || len(info.Safes) != 1 || info.Safes[0].KEK.KeyID != "old" {
			t.Errorf("damage at %d: info %+v", off, info)
		}
		if !bytes.Equal(contents(t, mem), before) {
			t.Errorf("damage at %d: Open wrote something", off)
		}
		check(t, v.ReplaceSafe(newSafe(t, dek, "new", 2)))
		info, err = v.Inspect()
		check(t, err)
		if len(info.Damage) != 0 || info.Safes[0].KEK.KeyID != "new" {
			t.Errorf("damage at %d: after a commit: info %+v", off, info)
		}
	}
}

func TestFormat(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	safe := newSafe(t, dek, "k", 1)
	mem := blockdev.NewMemory(0, 512)
	check(t, volume.Format(mem, volume.FormatOptions{Size: 3 << 20, DEK: dek, UUID: testUUID, Label: "web-1/disk-0", Safe: safe, AllowDiscards: true}))
	info, err := volume.Inspect(mem)
	check(t, err)
	if info.UUID != testUUID || info.Label != "web-1/disk-0" || info.Size != 3<<20 || info.SectorSize != 512 || info.DataOffset != 16<<20 ||
		!info.AllowDiscards || len(info.Safes) != 1 || info.Safes[0].KEK != safe.KEK || len(info.Damage) != 0 {
		t.Errorf("info %+v", info)
	}
	if mem.Size() != 19<<20 {
		t.Errorf("storage has %d bytes", mem.Size())
	}

	before := contents(t, mem)
	for _, c := range []struct {
		name string
		opts volume.FormatOptions
		want error // nil: any
	}{
		{"not empty", volume.FormatOptions{Size: 1 << 20, DEK: dek}, volume.ErrNotEmpty},
		{"size of no whole sectors", volume.FormatOptions{Size: 1<<20 + 512, SectorSize: 4096, DEK: dek, Overwrite: true}, nil},
		{"negative size", volume.FormatOptions{Size: -512, DEK: dek, Overwrite: true}, nil},
		{"sector size", volume.FormatOptions{Size: 1 << 20, SectorSize: 1024, DEK: dek, Overwrite: true}, nil},
		{"short key", volume.FormatOptions{Size: 1 << 20, DEK: keymemtest.Random(t, 32), Overwrite: true}, nil},
		{"another disk's safe", volume.FormatOptions{Size: 1 << 20, DEK: dek, Safe: safe, Overwrite: true}, volume.ErrWrongSafe},
		{"no room for data", volume.FormatOptions{DataOffset: 19 << 20, DEK: dek, Overwrite: true}, blockdev.ErrNoSpace},
	} {
		err := volume.Format(mem, c.opts)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.want)
		}
		if !bytes.Equal(contents(t, mem), before) {
			t.Fatalf("%s: something was written", c.name)
		}
	}

	// What was there before does not shine through.
	for _, size := range []int64{0, 2 << 20} {
		_, err = mem.WriteAt(pattern(int(mem.Size()), 9), 0)
		check(t, err)
		format(t, mem, volume.FormatOptions{Size: size, DEK: dek, Overwrite: true})
		if got := contents(t, openVolume(t, mem.Clone(), dek)); !bytes.Equal(got, make([]byte, len(got))) {
			t.Error("a new volume does not read as zeros")
		}
	}
}

func TestReplaceSafeRefuses(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 1 << 20, DEK: dek, Safe: newSafe(t, dek, "k", 1)})
	v := openVolume(t, mem, dek)
	before := contents(t, mem)
	foreign, err := keysafe.Wrap(keymemtest.Random(t, 32), dek, keysafe.Ref{Provider: "kp-1", KeyID: "x"}, "disk:other", 2)
	check(t, err)
	wantError(t, v.ReplaceSafe(foreign), volume.ErrWrongSafe)
	wantError(t, volume.ReplaceSafe(mem, foreign), volume.ErrWrongSafe)
	wantError(t, v.ReplaceSafe(nil), volume.ErrWrongSafe)
	if !bytes.Equal(contents(t, mem), before) {
		t.Error("something was written")
	}
	readOnly, err := volume.Open(mem.Clone(), dek, volume.Options{ReadOnly: true})
	check(t, err)
	defer readOnly.Close()
	wantError(t, readOnly.ReplaceSafe(newSafe(t, dek, "k2", 2)), blockdev.ErrReadOnly)

	// Another program makes another volume of the storage while ours is open.
	check(t, volume.Format(mem, volume.FormatOptions{Size: 1 << 20, DEK: dek, DataOffset: testOffset, Overwrite: true}))
	wantError(t, v.ReplaceSafe(newSafe(t, dek, "k2", 2)), volume.ErrChanged)
	check(t, v.Close())
	wantError(t, v.ReplaceSafe(newSafe(t, dek, "k2", 2)), blockdev.ErrClosed)
}

// TestReplaceSafeLive rekeys while a guest writes.
func TestReplaceSafeLive(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 1 << 20, DEK: dek, Safe: newSafe(t, dek, "0", 1)})
	v := openVolume(t, mem, dek)
	want := pattern(1<<20, 1)
	var guest sync.WaitGroup
	guest.Go(func() {
		for off := 0; off < len(want); off += 3000 {
			end := min(off+3000, len(want))
			if _, err := v.WriteAt(want[off:end], int64(off)); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range 20 {
		check(t, v.ReplaceSafe(newSafe(t, dek, fmt.Sprint(i+1), uint64(i+2))))
	}
	guest.Wait()
	check(t, v.Close())
	info, err := volume.Inspect(mem.Clone())
	check(t, err)
	if len(info.Safes) != 1 || info.Safes[0].KEK.KeyID != "20" {
		t.Errorf("safes %+v", info.Safes)
	}
	if !bytes.Equal(contents(t, openVolume(t, mem.Clone(), dek)), want) {
		t.Error("contents differ")
	}
}

// TestFile puts a volume on a real file: in use, cut off, inspected meanwhile.
func TestFile(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	path := filepath.Join(t.TempDir(), "disk-0.luks")
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Create: true})
	check(t, err)
	format(t, f, volume.FormatOptions{Size: 8 << 20, DEK: dek, Safe: newSafe(t, dek, "old", 1)})
	v := openVolume(t, f, dek)
	want := pattern(1<<20, 7)
	_, err = v.WriteAt(want, 4<<20)
	check(t, err)
	check(t, v.Flush())

	_, err = blockdev.OpenFile(path, blockdev.FileOptions{})
	wantError(t, err, blockdev.ErrInUse)
	look, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true})
	check(t, err)
	defer look.Close()
	if info, err := volume.Inspect(look); err != nil || info.Safes[0].KEK.KeyID != "old" {
		t.Errorf("Inspect beside an open volume: %+v, %v", info, err)
	}
	check(t, v.ReplaceSafe(newSafe(t, dek, "new", 2)))
	if info, err := volume.Inspect(look); err != nil || info.Safes[0].KEK.KeyID != "new" {
		t.Errorf("Inspect after a rekey: %+v, %v", info, err)
	}
	check(t, v.Resize(16<<20))
	check(t, v.Close())

	raw, err := os.ReadFile(path)
	check(t, err)
	if bytes.Contains(raw, want[:64]) || bytes.Contains(raw, dek.Bytes()[:32]) {
		t.Error("the file holds plaintext or the key")
	}
	f, err = blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true})
	check(t, err)
	v, err = volume.Open(f, dek, volume.Options{ReadOnly: true, SizeMin: 16 << 20})
	check(t, err)
	got := contents(t, v)
	if !bytes.Equal(got[4<<20:5<<20], want) || !bytes.Equal(got[5<<20:], make([]byte, 11<<20)) {
		t.Error("contents differ")
	}
	check(t, v.Close())
	check(t, os.Truncate(path, 9<<20))
	f, err = blockdev.OpenFile(path, blockdev.FileOptions{})
	check(t, err)
	defer f.Close()
	_, err = volume.Open(f, dek, volume.Options{SizeMin: 16 << 20})
	wantError(t, err, volume.ErrTruncated)
}
