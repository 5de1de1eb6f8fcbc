package luks_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// TestGoldenEncryptions reads encryptions in place that cryptsetup has begun, and
// checks their keys and seals.
func TestGoldenEncryptions(t *testing.T) {
	t.Parallel()
	moved, err := luks.Read(padded(golden(t, "encrypting"), 8<<20), 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	e, underWay, err := moved.Encryption()
	if err != nil || !underWay || e.Size != 6<<20 || e.Shift != 1<<20 || e.Boundary != 6<<20 {
		t.Errorf("it reads as %+v, under way %v, error %v", e, underWay, err)
	}
	const header, data = 16 << 20, 8 << 20
	detached, err := luks.ReadDetached(padded(golden(t, "detached"), header), header, data)
	if err != nil {
		t.Fatal(err)
	}
	r, underWay, err := detached.Reencryption()
	if err != nil || !underWay || !r.Plain || r.Boundary != 0 || r.Hot != 0 || r.Segment != (luks.Segment{SectorSize: 512}) || r.Journal.Size == 0 {
		t.Errorf("it reads as %+v, under way %v, error %v", r, underWay, err)
	}
	for name, h := range map[string]*luks.Header{"encrypting": moved, "detached": detached} {
		if err := h.VerifyEncryption(goldenKey(t, name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := h.VerifyEncryption(keymemtest.Random(t, luks.KeySize)); !errors.Is(err, luks.ErrWrongKey) {
			t.Errorf("%s: another key: %v", name, err)
		}
		if h.Detached() != (name == "detached") {
			t.Errorf("%s: detached %v", name, h.Detached())
		}
	}
}

// TestDetachedEncryption goes through the states of an encryption under a detached
// header, reading each back.
func TestDetachedEncryption(t *testing.T) {
	t.Parallel()
	const room, size, zone = 256 << 10, 3<<20 + 512, 64 << 10
	dek := keymemtest.Random(t, luks.KeySize)
	device := luks.DataDevice{Size: size, Start: bytes.Repeat([]byte{7}, 32)}
	h, err := luks.NewDetachedEncryption(luks.Options{
		UUID: testUUID, DEK: dek, Safe: newSafe(t, dek, 1), DataOffset: room, Thin: true, Detached: true, Device: device,
	}, 4096, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	f := newImage(t, room)
	reread := func(want luks.Reencryption) *luks.Header {
		t.Helper()
		if err := h.Commit(f); err != nil {
			t.Fatal(err)
		}
		got, err := luks.ReadDetached(f, room, size)
		if err != nil {
			t.Fatal(err)
		}
		r, underWay, err := got.Reencryption()
		want.Plain, want.Segment, want.Journal = true, luks.Segment{SectorSize: 512}, luks.Area{Offset: 2 * headerSize, Size: room - 2*headerSize}
		if err != nil || !underWay || r != want {
			t.Fatalf("%+v reads as %+v, under way %v, error %v", want, r, underWay, err)
		}
		return got
	}
	got := reread(luks.Reencryption{})
	if d, err := got.DataDevice(); err != nil || d.Size != size || !bytes.Equal(d.Start, device.Start) {
		t.Errorf("the device reads as %+v, error %v", d, err)
	}
	_, segErr := got.Segment()
	for name, err := range map[string]error{"Segment": segErr, "SetThin": got.SetThin(false), "CancelReencryption": got.CancelReencryption(), "VerifyReencryption": got.VerifyReencryption(dek, dek)} {
		if !errors.Is(err, luks.ErrEncrypting) || !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("%s reports %v", name, err)
		}
	}
	if err := got.SetSafe(newSafe(t, dek, 2)); err != nil {
		t.Error(err)
	}
	for b := int64(0); b < size; b += zone {
		n := min(zone, size-b)
		if err := h.MarkHot(n, b+n == size); err != nil {
			t.Fatal(err)
		}
		reread(luks.Reencryption{Boundary: b, Hot: n, HotIsLast: b+n == size})
		if b+n == size {
			break
		}
		if err := h.MarkClean(b + n); err != nil {
			t.Fatal(err)
		}
		if err := reread(luks.Reencryption{Boundary: b + n}).VerifyEncryption(dek); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.FinishReencryption(); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	if got, err = luks.ReadDetached(f, room, size); err != nil {
		t.Fatal(err)
	}
	s, err := got.Segment()
	if err != nil || s != (luks.Segment{SectorSize: 512}) || got.VerifyKey(dek) != nil || !got.Thin() {
		t.Errorf("in the end the segment is %+v, error %v", s, err)
	}
	if safes, err := got.Safes(); err != nil || len(safes) != 1 {
		t.Errorf("in the end the safes are %v, error %v", safes, err)
	}
	if d, err := got.DataDevice(); err != nil || d.Size != size || d.Start != nil {
		t.Errorf("in the end the device is %+v, error %v", d, err)
	}
	for other, want := range map[int64]error{size - 512: luks.ErrOtherDevice, size + 512: luks.ErrOtherDevice} {
		if _, err := luks.ReadDetached(f, room, other); !errors.Is(err, want) {
			t.Errorf("for a device of %d bytes: error %v", other, err)
		}
	}
	if _, err := luks.ReadDetached(f, room-512, size); !errors.Is(err, luks.ErrTruncated) {
		t.Errorf("cut short: error %v", err)
	}
	if err := got.BeginReencryption(luks.ReencryptionOptions{OldDEK: dek, NewDEK: keymemtest.Random(t, luks.KeySize), JournalMin: 4096, JournalMax: 1 << 20}); err != nil {
		t.Errorf("it cannot be rekeyed: %v", err)
	}
}

// TestDetachedInvalid: tokens and segments that are not as the specification says.
func TestDetachedInvalid(t *testing.T) {
	t.Parallel()
	const room, size = 64 << 10, 1 << 20
	dek := keymemtest.Random(t, luks.KeySize)
	h, err := luks.NewDetachedEncryption(luks.Options{UUID: testUUID, DEK: dek, DataOffset: room, Detached: true, Device: luks.DataDevice{Size: size, Start: make([]byte, 32)}}, 4096, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	f := newImage(t, room)
	if err := errors.Join(h.MarkHot(8192, false), h.Commit(f)); err != nil {
		t.Fatal(err)
	}
	text := string(bytes.TrimRight(f.bytes(t, headerSize)[4096:], "\x00"))
	for i, c := range []struct {
		old, new string
		want     error
	}{
		{`"size":"1048576"`, `"size":"0"`, luks.ErrCorrupt},
		{`"size":"1048576"`, `"size":1048576`, luks.ErrCorrupt},
		{`"start":"AAAA`, `"start":"`, luks.ErrCorrupt},
		{`"mode":"encrypt"`, `"mode":"decrypt"`, luks.ErrUnsupported},
		{`"mode":"encrypt"`, `"mode":"reencrypt"`, luks.ErrUnsupported},
		{`"direction":"forward"`, `"direction":"backward"`, luks.ErrUnsupported},
		{`"type":"journal"`, `"type":"checksum"`, luks.ErrUnsupported},
		{`"offset":"8192"`, `"offset":"8704"`, luks.ErrUnsupported},
		{`"iv_tweak":"0","offset":"0","sector_size":512,"size":"8192"`, `"iv_tweak":"1","offset":"0","sector_size":512,"size":"8192"`, luks.ErrUnsupported},
		{`"sector_size":512`, `"sector_size":4096`, luks.ErrUnsupported},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			if !strings.Contains(text, c.old) {
				t.Fatalf("no %s in %s", c.old, text)
			}
			got, err := luks.ReadDetached(withText(t, f, strings.ReplaceAll(text, c.old, c.new)), room, size)
			if err == nil {
				_, _, err = got.Reencryption()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}
