package luks_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// bytes returns the first n bytes.
func (f image) bytes(t *testing.T, n int64) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// withText returns a storage like f of which both header copies have other
// metadata.
func withText(t *testing.T, f image, text string) image {
	t.Helper()
	both := f.bytes(t, 2*headerSize)
	for off := 0; off < len(both); off += headerSize {
		c := both[off : off+headerSize]
		clear(c[4096:])
		copy(c[4096:], text)
		reseal(c)
	}
	stat, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	other := newImage(t, stat.Size())
	if _, err := other.WriteAt(both, 0); err != nil {
		t.Fatal(err)
	}
	return other
}

// beginEncryption returns a committed header of a disk of size bytes that is to
// be moved by 1 MiB, on storage that has room for it, and its key.
func beginEncryption(t *testing.T, size int64) (*luks.Header, image, *keymem.Key) {
	t.Helper()
	dek := keymemtest.Random(t, luks.KeySize)
	h, err := luks.NewEncryption(luks.Options{UUID: testUUID, DEK: dek, Safe: newSafe(t, dek, 1), DataOffset: 1 << 20, Thin: true}, size)
	if err != nil {
		t.Fatal(err)
	}
	f := newImage(t, size+2<<20)
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	return h, f, dek
}

// TestEncryption goes through the states of an encryption in place, reading each
// back.
func TestEncryption(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{1 << 20, 1<<20 + 512, 3<<20 + 512} {
		h, f, dek := beginEncryption(t, size)
		for _, boundary := range []int64{size, 2<<20 + 512, 1<<20 + 512, 1 << 20, 0} {
			if boundary > size {
				continue
			}
			if boundary < size {
				if err := h.MarkEncrypted(boundary); err != nil {
					t.Fatal(err)
				}
			}
			if err := h.Commit(f); err != nil {
				t.Fatal(err)
			}
			got, err := f.read()
			if err != nil {
				t.Fatal(err)
			}
			e, underWay, err := got.Encryption()
			if err != nil || !underWay || e.Size != size || e.Shift != 1<<20 || e.Boundary != boundary {
				t.Fatalf("boundary %d of %d reads as %+v, under way %v, error %v", boundary, size, e, underWay, err)
			}
			if e.StorageMin() != size+1<<20 || e.StorageMax() != size+2<<20 {
				t.Errorf("storage of %d to %d bytes", e.StorageMin(), e.StorageMax())
			}
			if err := got.VerifyEncryption(dek); err != nil {
				t.Fatal(err)
			}
			if err := got.VerifyEncryption(keymemtest.Random(t, luks.KeySize)); !errors.Is(err, luks.ErrWrongKey) {
				t.Errorf("another key: %v", err)
			}
			if !bytes.Equal(got.Image(), f.bytes(t, 2*got.Size())) {
				t.Error("the image is not what was written")
			}
			if boundary > 0 {
				if err := got.FinishEncryption(); err == nil {
					t.Error("finished with plain data")
				}
			}
			_, _, err = got.Reencryption()
			_, segErr := got.Segment()
			for name, err := range map[string]error{"Reencryption": err, "Segment": segErr, "SetThin": got.SetThin(false)} {
				if !errors.Is(err, luks.ErrEncrypting) || !errors.Is(err, luks.ErrUnsupported) {
					t.Errorf("%s reports %v", name, err)
				}
			}
		}
		if err := h.FinishEncryption(); err != nil {
			t.Fatal(err)
		}
		if err := h.Commit(f); err != nil {
			t.Fatal(err)
		}
		got, err := f.read()
		if err != nil {
			t.Fatal(err)
		}
		if s, err := got.Segment(); err != nil || s != (luks.Segment{Offset: 1 << 20, SectorSize: 512}) {
			t.Errorf("finished, the segment is %+v, error %v", s, err)
		}
		if err := got.VerifyKey(dek); err != nil || !got.Thin() || len(generations(t, got)) != 1 || len(got.FreeAreas()) != 1 {
			t.Errorf("finished: %v, thin %v, free %v", err, got.Thin(), got.FreeAreas())
		}
		if _, underWay, err := got.Encryption(); underWay || err != nil {
			t.Errorf("finished, and under way %v, error %v", underWay, err)
		}
	}
}

// TestEncryptionSafe: the key safe can be replaced on the way.
func TestEncryptionSafe(t *testing.T) {
	t.Parallel()
	h, f, dek := beginEncryption(t, 2<<20)
	if err := h.SetSafe(newSafe(t, dek, 9)); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	got, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	if g := generations(t, got); len(g) != 1 || g[0] != 9 {
		t.Errorf("generations %v", g)
	}
	if err := got.VerifyEncryption(dek); err != nil {
		t.Error(err)
	}
}

// TestEncryptionRefuses changes one thing after another in a sound header.
func TestEncryptionRefuses(t *testing.T) {
	t.Parallel()
	h, f, dek := beginEncryption(t, 3<<20)
	if err := h.MarkEncrypted(2 << 20); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(f); err != nil {
		t.Fatal(err)
	}
	primary := f.bytes(t, headerSize)
	_, metadata := disassemble(primary)
	text := string(metadata)
	for _, c := range [][2]string{
		{`"mode":"encrypt"`, `"mode":"decrypt"`},
		{`"direction":"backward"`, `"direction":"forward"`},
		{`"type":"datashift"`, `"type":"journal"`},
		{`"shift_size":"1048576"`, `"shift_size":"2097152"`},
		{`"shift_size":"1048576"`, `"shift_size":"0"`},
		{`"shift_size":"1048576"`, `"shift_size":"9223372036854775807"`},
		{`"shift_size":"1048576"`, `"shift_size":1`},
		{`"shift_size":"1048576"`, `"size_shift":"1048576"`},
		{`"mandatory":["online-reencrypt-v2"]`, `"mandatory":["online-reencrypt-v2","more"]`},
		{`"mandatory":["online-reencrypt-v2"]`, `"mandatory":["online-reencrypt-v3"]`},
		{`"backup-moved-segment"`, `"backup-other"`},
		{`"backup-previous"`, `"backup-final"`},
		{`"size":"3145728"`, `"size":"3145216"`},
		{`"size":"3145728"`, `"size":"dynamic"`},
		{`"iv_tweak":"4096"`, `"iv_tweak":"4095"`},
		{`"iv_tweak":"0"`, `"iv_tweak":"1"`},
		{`"sector_size":512`, `"sector_size":4096`},
		{`"segments":["2","4"]`, `"segments":["4"]`},
		{`"segments":["2","4"]`, `"segments":["1","2","4"]`},
	} {
		changed := strings.Replace(text, c[0], c[1], 1)
		if changed == text {
			t.Errorf("%s is not in %s", c[0], text)
			continue
		}
		if !json.Valid([]byte(changed)) {
			t.Fatalf("%s is no JSON", changed)
		}
		other := withText(t, f, changed)
		got, err := other.read()
		if err != nil {
			continue // refused even earlier
		}
		if _, _, err := got.Encryption(); !errors.Is(err, luks.ErrUnsupported) {
			t.Errorf("with %s for %s: %v", c[1], c[0], err)
		}
		if err := got.Commit(other); err == nil {
			t.Errorf("with %s for %s it was written", c[1], c[0])
		}
	}
	// What the seal covers, and the segments do not.
	other := withText(t, f, strings.Replace(text, `"offset":"32768"`, `"offset":"36864"`, 1))
	got, err := other.read()
	if err != nil {
		t.Fatal(err)
	}
	if err := got.VerifyEncryption(dek); !errors.Is(err, luks.ErrCorrupt) {
		t.Errorf("with another area: %v", err)
	}
	for _, size := range []int64{0, 1<<20 - 512, 1<<20 + 1} {
		if _, err := luks.NewEncryption(luks.Options{DEK: dek, DataOffset: 1 << 20}, size); err == nil {
			t.Errorf("a disk of %d bytes", size)
		}
	}
	for _, boundary := range []int64{-512, 512, 1<<20 - 512, 1<<20 + 1, 3<<20 + 512} {
		if err := h.MarkEncrypted(boundary); err == nil {
			t.Errorf("boundary at %d", boundary)
		}
	}
}
