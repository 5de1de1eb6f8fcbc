package volume_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/internal/block/blockdev/faultdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// errPause ends a rekey between two zones.
var errPause = errors.New("pause")

// rekeyZones rekeys at most n zones and calls between, which may be nil, after
// each.
func rekeyZones(v *volume.Volume, n int, opts volume.RekeyOptions, between func()) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	opts.Progress = func(int64, int64) {
		if between != nil {
			between()
		}
		if n--; n <= 0 {
			cancel(errPause)
		}
	}
	err := v.Rekey(ctx, opts)
	if errors.Is(err, errPause) {
		return nil
	}
	return err
}

// openBoth opens a volume of which a rekey may be under way, with the keys in
// any order.
func openBoth(dev blockdev.Device, a, b *keymem.Key) (*volume.Volume, error) {
	return volume.Open(dev, a, volume.Options{NextDEK: b})
}

// onlyUnder checks that the volume on disk holds want under dek alone, is plain
// LUKS2, and that no trace of the other key is left in front of the data.
func onlyUnder(t *testing.T, disk *blockdev.Memory, dek, gone *keymem.Key, want []byte) {
	t.Helper()
	_, err := volume.Open(disk.Clone(), gone, volume.Options{})
	wantError(t, err, volume.ErrWrongKey)
	h, err := luks.Read(disk, disk.Size())
	check(t, err)
	wantError(t, h.VerifyKey(gone), luks.ErrWrongKey)
	if _, underWay, err := h.Reencryption(); underWay || err != nil {
		t.Errorf("a re-encryption is under way: %v", err)
	}
	segment, err := h.Segment()
	check(t, err)
	if free := h.FreeAreas(); len(free) == 0 {
		t.Error("no free area in the header")
	} else {
		for _, area := range free {
			b := make([]byte, area.Size)
			_, err := disk.ReadAt(b, area.Offset)
			check(t, err)
			if !bytes.Equal(b, make([]byte, len(b))) {
				t.Errorf("the free %d bytes at %d of the header are not wiped", area.Size, area.Offset)
			}
		}
	}
	v := openVolume(t, disk.Clone(), dek)
	if !bytes.Equal(contents(t, v), want) {
		t.Error("contents differ")
	}
	raw := make([]byte, len(want))
	_, err = disk.ReadAt(raw, segment.Offset)
	check(t, err)
	under, err := oracle(gone, raw, segment.SectorSize)
	check(t, err)
	for off := 0; off < len(want); off += segment.SectorSize {
		if sector := want[off : off+segment.SectorSize]; bytes.Equal(under[off:off+segment.SectorSize], sector) && !bytes.Equal(sector, make([]byte, len(sector))) {
			t.Fatalf("the old key opens the sector at %d", off)
		}
	}
}

// TestRekey rekeys a volume with data, holes and empty sectors, in zones of many
// sizes, and looks at the keys, the safes, the holes and the header area.
func TestRekey(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		sector, device int
		zone           int64
		offset         int64
	}{{512, 512, 0, testOffset}, {512, 512, 4096, testOffset}, {4096, 512, 8192, testOffset}, {512, 4096, 12 << 10, 1 << 20}, {4096, 65536, 0, 1 << 20}} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			t.Parallel()
			oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
			oldSafe, newSafe := newSafe(t, oldDEK, "old", 1), newSafe(t, newDEK, "new", 1)
			mem := blockdev.NewMemory(0, c.device)
			const size = 1 << 20
			check(t, volume.Format(mem, volume.FormatOptions{
				Size: size, SectorSize: c.sector, DEK: oldDEK, Safe: oldSafe, UUID: testUUID, DataOffset: c.offset, AllowDiscards: true,
			}))
			v := openVolume(t, mem, oldDEK)
			want := make([]byte, size)
			for _, span := range [][2]int{{0, 20 << 10}, {100 << 10, 130 << 10}, {200<<10 + 512, 200<<10 + 1024}, {size - 8192, size}} {
				copy(want[span[0]:span[1]], pattern(span[1]-span[0], byte(span[0]>>9)))
				_, err := v.WriteAt(want[span[0]:span[1]], int64(span[0]))
				check(t, err)
			}
			emptyBefore := emptySectors(t, mem, c.offset, c.sector)

			done := int64(-1)
			mid := false
			check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK, NewSafe: newSafe, Zone: c.zone, Progress: func(d, total int64) {
				if d <= done || total != size {
					t.Errorf("progress %d of %d after %d", d, total, done)
				}
				done = d
				if mid || d == size {
					return
				}
				mid = true
				info, err := v.Inspect()
				check(t, err)
				if info.Rekey == nil || *info.Rekey != (volume.RekeyInfo{Done: d, Total: size}) || len(info.Safes) != 2 || info.Safes[0].KEK.KeyID != "old" || info.Safes[1].KEK.KeyID != "new" {
					t.Errorf("info %+v, rekey %+v", info, info.Rekey)
				}
				if !bytes.Equal(contents(t, v), want) {
					t.Error("contents differ during the rekey")
				}
				wantError(t, v.ReplaceSafe(newSafe), volume.ErrRekeying)
				wantError(t, v.Resize(size/2), volume.ErrRekeying)
				wantError(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK}), volume.ErrRekeying)
				_, err = volume.Open(mem.Clone(), oldDEK, volume.Options{})
				wantError(t, err, volume.ErrRekeying)
				_, err = openBoth(mem.Clone(), oldDEK, keymemtest.Random(t, 64))
				wantError(t, err, volume.ErrWrongKey)
				ro, err := volume.Open(mem.Clone(), newDEK, volume.Options{ReadOnly: true, NextDEK: oldDEK})
				check(t, err)
				if !bytes.Equal(contents(t, ro), want) {
					t.Error("contents differ, opened read-only during the rekey")
				}
				check(t, ro.Close())
			}}))
			if done != size || !mid {
				t.Errorf("progress ended at %d", done)
			}
			if !bytes.Equal(contents(t, v), want) {
				t.Error("contents differ")
			}
			info, err := v.Inspect()
			check(t, err)
			if info.Rekey != nil || len(info.Safes) != 1 || info.Safes[0].KEK.KeyID != "new" {
				t.Errorf("info %+v", info)
			}
			if !bytes.Equal(emptySectors(t, mem, c.offset, c.sector), emptyBefore) {
				t.Error("other sectors are empty now")
			}
			onlyUnder(t, mem, newDEK, oldDEK, want)
			head := make([]byte, c.offset)
			_, err = mem.ReadAt(head, 0)
			check(t, err)
			for _, trace := range []string{"old", "online-reencrypt", "backup-", "journal", base64.StdEncoding.EncodeToString(want[:30])} {
				if bytes.Contains(head, []byte(trace)) {
					t.Errorf("the header still holds %q", trace)
				}
			}
			// It goes on as any other volume: shallow rekey, and the next deep one.
			check(t, v.ReplaceSafe(newSafe))
			third := keymemtest.Random(t, 64)
			check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: third}))
			onlyUnder(t, mem, third, newDEK, want)
		})
	}
}

// emptySectors tells of each sector whether it is empty.
func emptySectors(t *testing.T, mem *blockdev.Memory, offset int64, sector int) []byte {
	t.Helper()
	raw := contents(t, mem)[offset:]
	empty := make([]byte, 0, len(raw)/sector)
	for ; len(raw) > 0; raw = raw[sector:] {
		empty = append(empty, "-X"[min(1, len(bytes.Trim(raw[:sector], "\x00")))])
	}
	return empty
}

// TestRekeyRefuses what it cannot do, and changes nothing then.
func TestRekeyRefuses(t *testing.T) {
	t.Parallel()
	dek, next := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 64 << 10, DEK: dek})
	before := contents(t, mem.Clone())
	v := openVolume(t, mem, dek)
	check(t, v.Close())
	wantError(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next}), blockdev.ErrClosed)
	ro, err := volume.Open(mem.Clone(), dek, volume.Options{ReadOnly: true})
	check(t, err)
	defer ro.Close()
	wantError(t, ro.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next}), blockdev.ErrReadOnly)

	mem = mem.Clone()
	v = openVolume(t, mem, dek)
	for name, opts := range map[string]volume.RekeyOptions{
		"the same key": {NewDEK: dek}, "short key": {NewDEK: keymemtest.Random(t, 32)},
	} {
		if err := v.Rekey(t.Context(), opts); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	safe := newSafe(t, next, "k", 1)
	other := *safe
	other.Owner = "disk:somebody else"
	wantError(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next, NewSafe: &other}), volume.ErrWrongSafe)
	if !bytes.Equal(contents(t, mem), before) {
		t.Error("something was written")
	}

	small := blockdev.NewMemory(0, 512)
	check(t, volume.Format(small, volume.FormatOptions{Size: 64 << 10, DEK: dek, UUID: testUUID, DataOffset: luks.DataOffsetMin}))
	sv := openVolume(t, small, dek)
	wantError(t, sv.Rekey(t.Context(), volume.RekeyOptions{NewDEK: next}), luks.ErrNoSpace)

	// With the wrong next key a rekey does not go on.
	_, err = v.WriteAt(pattern(64<<10, 1), 0)
	check(t, err)
	check(t, rekeyZones(v, 1, volume.RekeyOptions{NewDEK: next, Zone: 4096}, nil))
	wantError(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: keymemtest.Random(t, 64)}), volume.ErrWrongKey)
	wantError(t, volume.ReplaceSafe(mem.Clone(), safe), volume.ErrRekeying)
}

// TestRekeyRate holds a rekey back, and lets it be stopped while it waits.
func TestRekeyRate(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	format(t, mem, volume.FormatOptions{Size: 64 << 10, DEK: dek})
	v := openVolume(t, mem, dek)
	_, err := v.WriteAt(pattern(64<<10, 1), 0)
	check(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	calls := 0
	err = v.Rekey(ctx, volume.RekeyOptions{NewDEK: keymemtest.Random(t, 64), Zone: 4096, Rate: volume.NewRate(1), Progress: func(int64, int64) {
		calls++ // the next zone is due in an hour
		go cancel(errPause)
	}})
	wantError(t, err, errPause)
	if calls != 1 {
		t.Errorf("%d zones were rewritten", calls)
	}
	check(t, v.Rekey(t.Context(), volume.RekeyOptions{Rate: volume.NewRate(1 << 30)}))
}

// TestRekeyWhileInUse rekeys under random requests of many goroutines, each with
// a part of the disk that it alone writes and always verifies, while the disk
// grows, is closed in between, and goes on.
func TestRekeyWhileInUse(t *testing.T) {
	t.Parallel()
	seed := blockdevtest.Seed(t)
	const parts, partSize = 6, 512 << 10
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	mem := blockdev.NewMemory(0, 512)
	check(t, volume.Format(mem, volume.FormatOptions{Size: parts * partSize, DEK: oldDEK, UUID: testUUID, DataOffset: 1 << 20, AllowDiscards: true}))
	want := make([][]byte, parts)
	for i := range want {
		want[i] = make([]byte, partSize)
	}
	v := openVolume(t, mem, oldDEK)
	size := int64(parts * partSize)
	for round := 0; ; round++ {
		ctx, cancel := context.WithCancelCause(t.Context())
		var ended atomic.Bool
		zones := 0
		var group sync.WaitGroup
		for i := range want {
			rng := rand.New(rand.NewPCG(seed, uint64(round*100+i)))
			group.Go(func() {
				for n := 0; n < 100 || !ended.Load(); n++ {
					if err := useDisk(v, want[i], int64(i), parts, rng); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		err := v.Rekey(ctx, volume.RekeyOptions{NewDEK: newDEK, Zone: 64 << 10, Progress: func(int64, int64) {
			switch zones++; zones {
			case 3:
				size += 256 << 10
				check(t, v.Resize(size))
			case 20:
				if round == 0 {
					cancel(errPause)
				}
			}
		}})
		ended.Store(true)
		group.Wait()
		cancel(nil)
		for i := range want {
			if err := verifyDisk(v, want[i], int64(i), parts); err != nil {
				t.Error(err)
			}
		}
		if !errors.Is(err, errPause) {
			check(t, err)
			break
		}
		check(t, v.Close())
		mem = mem.Clone()
		if v, err = openBoth(mem, newDEK, oldDEK); err != nil {
			t.Fatal(err)
		}
		defer v.Close()
	}
	all := contents(t, v)
	if int64(len(all)) != size {
		t.Errorf("size %d, want %d", len(all), size)
	}
	onlyUnder(t, mem, newDEK, oldDEK, all)
}

// Parts of the disk lie in each other, in turns of one stripe, so that every
// zone has some of each.
const stripe = 1536

func stripes(off, n, part, parts int64, f func(at, start, end int64) error) error {
	for n > 0 {
		row, in := off/stripe, off%stripe
		k := min(stripe-in, n)
		if err := f((row*parts+part)*stripe+in, off, off+k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// useDisk does one random thing to a part of the disk.
func useDisk(v *volume.Volume, want []byte, part, parts int64, rng *rand.Rand) error {
	off := rng.Int64N(int64(len(want)) / stripe * stripe)
	n := min(1+rng.Int64N(8192), int64(len(want))/stripe*stripe-off)
	kind := rng.IntN(10)
	return stripes(off, n, part, parts, func(at, start, end int64) error {
		span := want[start:end]
		switch {
		case kind < 4:
			for i := range span {
				span[i] = byte(rng.Uint32())
			}
			_, err := v.WriteAt(span, at)
			return err
		case kind < 5:
			clear(span)
			return v.WriteZeroes(at, int64(len(span)), true)
		case kind < 6:
			first, last := (at+511)&^511, (at+int64(len(span)))&^511
			if first < last {
				clear(want[start+first-at : start+last-at])
			}
			return v.Discard(at, int64(len(span)))
		case kind < 7:
			return v.Flush()
		}
		got := make([]byte, len(span))
		if _, err := v.ReadAt(got, at); err != nil {
			return err
		}
		if !bytes.Equal(got, span) {
			return fmt.Errorf("%d bytes at %d differ", len(span), at)
		}
		return nil
	})
}

func verifyDisk(v *volume.Volume, want []byte, part, parts int64) error {
	return stripes(0, int64(len(want))/stripe*stripe, part, parts, func(at, start, end int64) error {
		got := make([]byte, end-start)
		if _, err := v.ReadAt(got, at); err != nil {
			return err
		}
		if !bytes.Equal(got, want[start:end]) {
			return fmt.Errorf("%d bytes at %d differ", len(got), at)
		}
		return nil
	})
}

// rekeyDisk returns a volume of four zones of rekeyZone bytes, of which one is
// empty, and what it holds.
func rekeyDisk(t *testing.T, dek *keymem.Key) (*blockdev.Memory, []byte) {
	t.Helper()
	disk := blockdev.NewMemory(0, 512)
	format(t, disk, volume.FormatOptions{Size: 4 * rekeyZone, DEK: dek, Safe: newSafe(t, dek, "old", 1)})
	v, err := volume.Open(disk.Clone(), dek, volume.Options{})
	check(t, err)
	check(t, v.Close())
	want := make([]byte, 4*rekeyZone)
	copy(want, pattern(rekeyZone, 1))
	copy(want[rekeyZone:], pattern(1024, 2)) // the rest of it is empty
	copy(want[3*rekeyZone:], pattern(rekeyZone, 3))
	v = openVolume(t, disk, dek)
	_, err = v.WriteAt(want[:rekeyZone+1024], 0)
	check(t, err)
	_, err = v.WriteAt(want[3*rekeyZone:], 3*rekeyZone)
	check(t, err)
	return disk.Clone(), want
}

const rekeyZone = 8192

// TestFaultsRekey fails every operation of a whole rekey. Whatever a kill or a
// power loss then leaves opens with both keys, holds all data, also what the
// guest wrote on the way, and can be rekeyed to the end; and so can the volume
// in which the fault was, unless it says that a zone has to be recovered.
func TestFaultsRekey(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	newSafe := newSafe(t, newDEK, "new", 1)
	disk, start := rekeyDisk(t, oldDEK)

	atEveryFault(t, disk, func(t *testing.T, dev *faultdev.Device) error {
		v, err := openFaulty(dev, oldDEK)
		if err != nil {
			return err
		}
		want := bytes.Clone(start)
		var guest error // of the guest's own requests
		writes := byte(0)
		err = v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK, NewSafe: newSafe, Zone: rekeyZone, Progress: func(done, total int64) {
			if done == total || guest != nil {
				return
			}
			// On both sides of the boundary and across it, durably.
			writes++
			for _, off := range []int64{done - 700, done - 300, done + 1024} {
				p := pattern(600, writes)
				if _, guest = v.WriteAt(p, off); guest != nil {
					break
				}
				copy(want[off:], p)
			}
			if guest == nil {
				guest = v.Flush()
			}
		}})
		if guest != nil {
			// What a failed request of the guest's left is in TestFaultsWrite.
			return errors.Join(err, guest)
		}
		if err == nil && dev.Injected() == faultdev.Read {
			return errHealed
		}
		for i, disk := range survivors(dev, rng)[:2] {
			if err == nil {
				onlyUnder(t, disk.Clone(), newDEK, oldDEK, want)
			}
			again, openErr := openBoth(disk, newDEK, oldDEK)
			if openErr != nil {
				t.Fatalf("survivor %d of error %v does not open: %v", i, err, openErr)
			}
			if !bytes.Equal(contents(t, again), want) {
				t.Fatalf("survivor %d of error %v: contents differ", i, err)
			}
			info, inspectErr := again.Inspect()
			check(t, inspectErr)
			if len(info.Damage) > 0 && info.Rekey == nil && info.Safes[0].KEK.KeyID == "new" {
				t.Errorf("a stale header copy was left: %v", info.Damage)
			}
			if info.Rekey != nil || info.Safes[0].KEK.KeyID == "old" {
				check(t, again.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK, NewSafe: newSafe, Zone: rekeyZone}))
			}
			onlyUnder(t, disk.Clone(), newDEK, oldDEK, want)
			check(t, again.Close())
		}
		if dev.Heal(); err == nil {
			return nil
		}
		got := make([]byte, len(want))
		if _, readErr := v.ReadAt(got, 0); readErr != nil {
			if !errors.Is(readErr, faultdev.ErrInjected) {
				t.Errorf("after error %v the volume reads with %v", err, readErr)
			}
			wantError(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK}), faultdev.ErrInjected)
			return err
		}
		if !bytes.Equal(got, want) {
			t.Error("contents differ in the running volume")
		}
		check(t, v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK, NewSafe: newSafe, Zone: rekeyZone}))
		onlyUnder(t, dev.Contents(), newDEK, oldDEK, want)
		return err
	})
}

// TestFaultsRekeyRecovery fails every operation of an opening that recovers an
// interrupted zone.
func TestFaultsRekeyRecovery(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(blockdevtest.Seed(t), 0))
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	disk, want := rekeyDisk(t, oldDEK)
	found := 0
	for op := 0; ; op++ {
		dev := faultdev.New(disk.Clone(), &faultdev.Fault{Op: op, Mode: faultdev.Torn, Dead: true})
		if v, err := openFaulty(dev, oldDEK); err == nil {
			err = v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK, Zone: rekeyZone})
			if err == nil && dev.Injected() == faultdev.None {
				break
			}
		}
		crashed := dev.PowerLoss(rng)
		if info, err := volume.Inspect(crashed); err != nil || info.Rekey == nil || !info.Rekey.InZone {
			check(t, err)
			continue
		}
		if found++; found > 2 {
			continue
		}
		_, err := volume.Open(crashed.Clone(), oldDEK, volume.Options{NextDEK: newDEK, ReadOnly: true})
		wantError(t, err, volume.ErrRekeying)
		atEveryFault(t, crashed, func(t *testing.T, dev *faultdev.Device) error {
			v, err := openBoth(dev, oldDEK, newDEK)
			for _, disk := range survivors(dev, rng)[:2] {
				again, err := openBoth(disk, oldDEK, newDEK)
				check(t, err)
				if !bytes.Equal(contents(t, again), want) {
					t.Error("contents differ")
				}
				check(t, again.Rekey(t.Context(), volume.RekeyOptions{}))
				onlyUnder(t, disk, newDEK, oldDEK, want)
			}
			if err == nil {
				v.Close()
				if dev.Injected() == faultdev.Read {
					return errHealed
				}
			}
			return err
		})
	}
	if found == 0 {
		t.Error("no crash was inside a zone")
	}
}

// TestRekeyClose closes a volume in the middle of a rekey.
func TestRekeyClose(t *testing.T) {
	t.Parallel()
	oldDEK, newDEK := keymemtest.Random(t, 64), keymemtest.Random(t, 64)
	disk, want := rekeyDisk(t, oldDEK)
	v := openVolume(t, disk, oldDEK)
	err := v.Rekey(t.Context(), volume.RekeyOptions{NewDEK: newDEK, Zone: rekeyZone, Progress: func(int64, int64) { v.Close() }})
	wantError(t, err, blockdev.ErrClosed)
	again, err := openBoth(disk.Clone(), oldDEK, newDEK)
	check(t, err)
	defer again.Close()
	if !bytes.Equal(contents(t, again), want) {
		t.Error("contents differ")
	}
}
