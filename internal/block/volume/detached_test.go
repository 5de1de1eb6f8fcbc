package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// smallHeader is the length of detached headers in most tests, in bytes.
const smallHeader = 80 << 10

// pair is a header and its data, each on a device of its own, of which the
// operations are counted together.
type pair struct {
	header, data *faultdev.Device
	fault        faultdev.Fault
	ops          int
	hit          *faultdev.Device
}

// half is one of a pair's devices.
type half struct {
	*faultdev.Device
	p *pair
}

// count lets the operation that is about to reach h fail if it is its turn; then,
// if the fault is dead, the other device fails from now on too.
func (h half) count() {
	p := h.p
	if p.ops == p.fault.Op {
		p.hit = h.Device
		h.Inject(&faultdev.Fault{Mode: p.fault.Mode, Dead: p.fault.Dead})
		if other := p.header; p.fault.Dead {
			if other == h.Device {
				other = p.data
			}
			other.Inject(&faultdev.Fault{Mode: faultdev.Undone, Dead: true})
		}
	}
	p.ops++
}

func (h half) ReadAt(b []byte, off int64) (int, error) {
	h.count()
	return h.Device.ReadAt(b, off)
}

func (h half) WriteAt(b []byte, off int64) (int, error) {
	h.count()
	return h.Device.WriteAt(b, off)
}

func (h half) WriteZeroes(off, n int64, mayPunch bool) error {
	h.count()
	return h.Device.WriteZeroes(off, n, mayPunch)
}

func (h half) Flush() error {
	h.count()
	return h.Device.Flush()
}

func (p *pair) dev() *volume.Detached {
	return volume.NewDetached(half{p.header, p}, half{p.data, p})
}

// Injected returns the kind of the operation that the fault has hit.
func (p *pair) Injected() faultdev.Kind {
	if p.hit == nil {
		return faultdev.None
	}
	return p.hit.Injected()
}

// storage is what is on the two devices.
type storage struct{ header, data *blockdev.Memory }

func (s storage) clone() storage          { return storage{s.header.Clone(), s.data.Clone()} }
func (s storage) dev() *volume.Detached   { return volume.NewDetached(s.header, s.data) }
func (p *pair) contents() storage         { return storage{p.header.Contents(), p.data.Contents()} }
func (p *pair) lose(r *rand.Rand) storage { return storage{p.header.PowerLoss(r), p.data.PowerLoss(r)} }

func (p *pair) survivors(rng *rand.Rand) []storage {
	return []storage{p.contents(), p.lose(rng), p.lose(rng)}
}

// atEveryFaultOfPair is [atEveryFault] for two devices.
func atEveryFaultOfPair(t *testing.T, s storage, test func(t *testing.T, p *pair) error) {
	t.Helper()
	forEveryFault(t, func(f faultdev.Fault) *pair {
		return &pair{header: faultdev.New(s.header.Clone(), nil), data: faultdev.New(s.data.Clone(), nil), fault: f}
	}, test)
}

// underDetached checks that s holds want under dek, as every other program sees it
// too, and nothing of want in plain, in header and journal neither.
func underDetached(t *testing.T, s storage, dek *keymem.Key, want []byte) {
	t.Helper()
	s = s.clone() // also of what was closed
	raw := contents(t, s.data)
	v, err := volume.Open(s.clone().dev(), dek, volume.Options{SizeMin: int64(len(want))})
	check(t, err)
	defer v.Close()
	if !bytes.Equal(contents(t, v), want) {
		t.Fatal("contents differ")
	}
	got, err := oracle(dek, raw, 512)
	check(t, err)
	for off := 0; off < len(want); off += 512 {
		if !bytes.Equal(got[off:off+512], want[off:off+512]) && !bytes.Equal(raw[off:off+512], make([]byte, 512)) {
			t.Fatalf("the oracle reads something else at %d", off)
		}
	}
	header := contents(t, s.header)
	for off := 0; off < len(want); off += 512 {
		if part := want[off : off+512]; bytes.Equal(raw[off:off+512], part) && !bytes.Equal(part, make([]byte, 512)) {
			t.Fatalf("there are plain data at %d", off)
		}
	}
	h, err := luks.Read(s.header, s.header.Size())
	check(t, err)
	for _, a := range h.FreeAreas() {
		if !bytes.Equal(header[a.Offset:a.Offset+a.Size], make([]byte, a.Size)) {
			t.Fatalf("the %d bytes at %d of the header are not empty", a.Size, a.Offset)
		}
	}
	device, err := h.DataDevice()
	check(t, err)
	info, err := v.Inspect()
	check(t, err)
	if info.Encryption != nil || info.Rekey != nil || len(info.Damage) > 0 || !info.Detached || info.DataOffset != 0 || device.Start != nil {
		t.Errorf("the header is %+v, its device %+v", info, device)
	}
}

// detachedVolume returns an encrypted volume with a detached header, and what it holds.
func detachedVolume(t *testing.T, dek *keymem.Key, size int64) (storage, []byte) {
	t.Helper()
	data, want := plainDisk(t, rand.New(rand.NewPCG(blockdevtest.Seed(t), 1)), size)
	s := storage{blockdev.NewMemory(smallHeader, 512), data}
	opts := volume.EncryptOptions{DEK: dek, Safe: newSafe(t, dek, "old", 1), UUID: testUUID, AllowDiscards: true}
	check(t, volume.BeginEncryption(s.dev(), opts))
	check(t, volume.EncryptDetached(t.Context(), s.dev(), opts))
	return s, want
}

// TestDetachedFlush: what was written to either device is durable when Flush
// returns, and that of the header is flushed only if there is something.
func TestDetachedFlush(t *testing.T) {
	t.Parallel()
	header, data := faultdev.New(blockdev.NewMemory(4096, 512), nil), faultdev.New(blockdev.NewMemory(4096, 512), nil)
	d := volume.NewDetached(header, data)
	base := d.Size() - data.Size()
	for _, off := range []int64{512, base + 512} {
		_, err := d.WriteAt(bytes.Repeat([]byte{1}, 512), off)
		check(t, err)
	}
	check(t, d.Flush())
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	for range 20 {
		for _, dev := range []*faultdev.Device{header, data} {
			if lost := contents(t, dev.PowerLoss(rng)); lost[512] != 1 {
				t.Fatal("what was flushed is lost")
			}
		}
	}
	before := header.Ops()
	check(t, d.Flush())
	if header.Ops() != before {
		t.Error("the header was flushed for nothing")
	}
	// A flush that failed is repeated.
	check(t, d.WriteZeroes(512, 512, false))
	header.Inject(&faultdev.Fault{Mode: faultdev.Undone})
	wantError(t, d.Flush(), faultdev.ErrInjected)
	before = header.Ops()
	check(t, d.Flush())
	if header.Ops() == before {
		t.Error("a flush that failed was not repeated")
	}

	for _, off := range []int64{4096 - 512, base - 512, d.Size() - 512} {
		if _, err := d.ReadAt(make([]byte, 1024), off); !errors.Is(err, blockdev.ErrOutOfRange) {
			t.Errorf("reading over the end at %d: error %v", off, err)
		}
	}
}

// TestDetachedConformance runs the suite for devices on volumes with a detached
// header.
func TestDetachedConformance(t *testing.T) {
	for _, block := range []int{512, 4096} {
		t.Run(fmt.Sprint(block), func(t *testing.T) {
			dek := keymemtest.Random(t, 64)
			at := map[blockdev.Device]storage{}
			start := func(t testing.TB, s storage, opts volume.Options) blockdev.Device {
				v, err := volume.Open(s.dev(), dek, opts)
				check(t, err)
				t.Cleanup(func() { v.Close() })
				at[v] = s
				return fixed{v}
			}
			reopen := func(opts volume.Options) func(testing.TB, blockdev.Device) blockdev.Device {
				return func(t testing.TB, dev blockdev.Device) blockdev.Device {
					s := at[dev.(fixed).Device].clone()
					dev.Close()
					return start(t, s, opts)
				}
			}
			blockdevtest.Run(t, blockdevtest.Suite{
				New: func(t testing.TB, size int64) blockdev.Device {
					s := storage{blockdev.NewMemory(smallHeader, 512), blockdev.NewMemory(size, block)}
					opts := volume.EncryptOptions{DEK: dek, AllowDiscards: true}
					check(t, volume.BeginEncryption(s.dev(), opts))
					check(t, volume.EncryptDetached(t.Context(), s.dev(), opts))
					return start(t, s, volume.Options{})
				},
				Reopen:   reopen(volume.Options{}),
				ReadOnly: reopen(volume.Options{ReadOnly: true}),
			})
		})
	}
}

// fixed hides Resize, which a detached header refuses.
type fixed struct{ blockdev.Device }

// TestDetachedRefuses: a header and a device that do not belong together, and a
// header in the place of a volume.
func TestDetachedRefuses(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	s, want := detachedVolume(t, dek, 96<<10)
	open := func(header, data *blockdev.Memory) error {
		v, err := volume.Open(volume.NewDetached(header.Clone(), data.Clone()), dek, volume.Options{})
		if err == nil {
			v.Close()
		}
		return err
	}
	for _, size := range []int64{64 << 10, 128 << 10} {
		wantError(t, open(s.header, blockdev.NewMemory(size, 512)), volume.ErrOtherDevice)
	}
	_, err := volume.Open(s.header.Clone(), dek, volume.Options{})
	wantError(t, err, volume.ErrDetached)
	wantError(t, err, volume.ErrUnsupported)
	_, err = volume.Inspect(s.header.Clone())
	wantError(t, err, volume.ErrDetached)
	wantError(t, volume.ReplaceSafe(s.header.Clone(), newSafe(t, dek, "k", 1)), volume.ErrDetached)
	wantError(t, volume.EncryptInPlace(t.Context(), s.header.Clone(), volume.EncryptOptions{DEK: dek}), volume.ErrDetached)
	wantError(t, open(s.data, s.header), volume.ErrNotVolume)

	whole := blockdev.NewMemory(0, 512)
	format(t, whole, volume.FormatOptions{Size: 96 << 10, DEK: dek})
	wantError(t, open(whole, s.data), volume.ErrUnsupported)

	v := openVolume(t, s.dev(), dek)
	wantError(t, v.Resize(128<<10), blockdev.ErrBadSize)
	check(t, v.ReplaceSafe(newSafe(t, dek, "new", 2)))
	info, err := v.Inspect()
	check(t, err)
	if info.Safes[0].KEK.KeyID != "new" || info.Size != int64(len(want)) {
		t.Errorf("info %+v", info)
	}
	underDetached(t, s, dek, want)
}

// TestFaultsDetachedRekey fails every operation of a deep rekey under a detached
// header. Whatever is left opens with both keys, holds all data, and goes on.
func TestFaultsDetachedRekey(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	s, want := detachedVolume(t, oldDEK, 40<<10)
	opts := volume.RekeyOptions{NewDEK: newDEK, NewSafe: newSafe(t, newDEK, "new", 2), Zone: 32 << 10}
	atEveryFaultOfPair(t, s, func(t *testing.T, p *pair) error {
		v, err := volume.Open(p.dev(), oldDEK, volume.Options{})
		if err != nil {
			return err
		}
		if p.Injected() != faultdev.None {
			v.Close()
			return errHealed
		}
		err = v.Rekey(t.Context(), opts)
		if err == nil && p.Injected() == faultdev.Read {
			err = errHealed
		}
		for i, left := range p.survivors(rng)[:2] {
			again, openErr := volume.Open(left.dev(), newDEK, volume.Options{NextDEK: oldDEK})
			if openErr != nil {
				t.Fatalf("survivor %d of error %v does not open: %v", i, err, openErr)
			}
			if !bytes.Equal(contents(t, again), want) {
				t.Fatalf("survivor %d of error %v: contents differ", i, err)
			}
			info, inspectErr := again.Inspect()
			check(t, inspectErr)
			next := opts
			if len(info.Safes) == 1 && info.Safes[0].KEK.KeyID == "new" {
				next = volume.RekeyOptions{}
			}
			check(t, again.Rekey(t.Context(), next))
			check(t, again.Close())
			underDetached(t, left, newDEK, want)
		}
		return err
	})
}
