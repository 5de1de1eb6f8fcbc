package luks_test

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"hash"
	"io"
	"slices"
	"testing"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
)

// headerSeeds are whole header copies: ours and cryptsetup's.
func headerSeeds(f *testing.F) [][]byte {
	f.Helper()
	dek, err := keymem.Random(luks.KeySize)
	if err != nil {
		f.Fatal(err)
	}
	defer dek.Close()
	h, err := luks.New(luks.Options{UUID: testUUID, Label: "seed", DEK: dek})
	if err != nil {
		f.Fatal(err)
	}
	var ours copies
	if err := h.Commit(&ours); err != nil {
		f.Fatal(err)
	}
	encrypting, err := luks.NewEncryption(luks.Options{UUID: testUUID, DEK: dek, DataOffset: 1 << 20}, 3<<20)
	if err != nil {
		f.Fatal(err)
	}
	if err := errors.Join(encrypting.MarkEncrypted(2<<20), encrypting.Commit(&ours)); err != nil {
		f.Fatal(err)
	}
	seeds := ours.written
	for _, name := range []string{"argon2id", "token", "reencrypt", "cbc", "encrypting", "detached"} {
		b := golden(f, name)
		seeds = append(seeds, b[:headerSize], b[headerSize:2*headerSize])
	}
	return seeds
}

// copies collects what is written.
type copies struct{ written [][]byte }

func (c *copies) WriteAt(p []byte, _ int64) (int, error) {
	c.written = append(c.written, bytes.Clone(p))
	return len(p), nil
}

func (*copies) Flush() error { return nil }

// assemble makes a header copy of the first 512 bytes of its binary header and
// its metadata, with a right checksum, or no input would get further than that.
func assemble(bin, text []byte) []byte {
	b := make([]byte, headerSize)
	copy(b[:512], bin)
	copy(b[4096:], text)
	reseal(b)
	return b
}

// disassemble is the reverse, for seeds.
func disassemble(b []byte) (bin, text []byte) {
	text, _, _ = bytes.Cut(b[4096:], []byte{0})
	return b[:512], text
}

// FuzzHeader parses one copy of a header.
func FuzzHeader(f *testing.F) {
	for _, b := range headerSeeds(f) {
		bin, text := disassemble(b)
		f.Add(bin, text)
	}
	f.Fuzz(func(t *testing.T, bin, text []byte) {
		b := assemble(bin, text)
		for _, c := range []luks.Copy{luks.Primary, luks.Secondary} {
			encoded, err := luks.DecodeAndEncode(b, c)
			if err != nil {
				continue
			}
			// All but the text of the metadata is canonical.
			if !bytes.Equal(encoded[:0x1c0], b[:0x1c0]) || !bytes.Equal(encoded[0x200:4096], b[0x200:4096]) || len(encoded) != len(b) {
				t.Error("the binary header changes when it is written again")
			}
			again, err := luks.DecodeAndEncode(encoded, c)
			if err != nil || !bytes.Equal(again, encoded) {
				t.Errorf("what was written does not read as the same: %v", err)
			}
		}
	})
}

// FuzzRead reads a volume from a storage of any contents.
func FuzzRead(f *testing.F) {
	seeds := headerSeeds(f)
	for i := 0; i+1 < len(seeds); i += 2 {
		bin1, text1 := disassemble(seeds[i])
		bin2, text2 := disassemble(seeds[i+1])
		f.Add(bin1, text1, bin2, text2, uint32(20<<20))
		f.Add(bin1, text1, bin2, text2, uint32(20000))
		f.Add([]byte{}, text1, bin2, text2, uint32(20<<20))
	}
	f.Add(golden(f, "luks1")[:512], []byte{}, []byte{}, []byte{}, uint32(1<<20))
	known := []error{luks.ErrNotLUKS, luks.ErrVersion, luks.ErrCorrupt, luks.ErrTruncated, luks.ErrUnsupported, luks.ErrOtherDevice}
	f.Fuzz(func(t *testing.T, bin1, text1, bin2, text2 []byte, length uint32) {
		start := append(assemble(bin1, text1), assemble(bin2, text2)...)
		size := int64(length)
		storage := sparse{start[:min(size, int64(len(start)))], size}
		h, err := luks.Read(storage, size)
		if err == nil && h.Detached() {
			h, err = luks.ReadDetached(storage, size, size)
		}
		if err != nil {
			if h != nil {
				t.Error("results are not zero after an error")
			}
			if !slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }) {
				t.Errorf("error of no kind: %v", err)
			}
			return
		}
		if s, err := h.Segment(); err == nil {
			if n, err := s.Length(size); err != nil || n < 0 || n > size {
				t.Errorf("Length(%d) of %+v = %d, %v", size, s, n, err)
			}
		}
		if e, underWay, err := h.Encryption(); err == nil && underWay {
			if e.Boundary < 0 || e.Boundary > e.Size || e.Shift <= 0 || e.Size < e.Shift || e.StorageMax() <= e.Size {
				t.Errorf("encryption %+v", e)
			}
			if r, other, err := h.Reencryption(); other || r.Plain || !errors.Is(err, luks.ErrEncrypting) {
				t.Errorf("it is a re-encryption too: %v", err)
			}
		}
		if r, underWay, err := h.Reencryption(); err == nil && underWay && r.Plain && (!h.Detached() || r.Boundary < 0 || r.Hot < 0 || r.Hot > r.Journal.Size) {
			t.Errorf("encryption %+v, detached %v", r, h.Detached())
		}
		if d, err := h.DataDevice(); err == nil && (d.Size < 0 || d.Size == 0 && d.Start != nil || d.Start != nil && len(d.Start) != 32) {
			t.Errorf("device %+v", d)
		}
		if safes, err := h.Safes(); err != nil && safes != nil {
			t.Error("results are not zero after an error")
		}
		h.Damaged()
	})
}

// sparse is storage of size bytes that starts with start; the rest is zeros.
type sparse struct {
	start []byte
	size  int64
}

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > s.size {
		return 0, io.EOF
	}
	clear(p)
	if off < int64(len(s.start)) {
		copy(p, s.start[off:])
	}
	return len(p), nil
}

func FuzzMetadata(f *testing.F) {
	for _, b := range headerSeeds(f) {
		text, _, _ := bytes.Cut(b[4096:], []byte{0})
		f.Add(text)
	}
	f.Add([]byte(`{"a":[1e400,-0,"\ud800\u2028",null,true,{}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		encoded, err := luks.CanonicalJSON(text)
		if err != nil {
			return
		}
		again, err := luks.CanonicalJSON(encoded)
		if err != nil || !bytes.Equal(again, encoded) {
			t.Errorf("%q is written as %q and that as %q, %v", text, encoded, again, err)
		}
		if before, after := luks.DecodeMetadata(text), luks.DecodeMetadata(encoded); (before == nil) != (after == nil) {
			t.Errorf("%q: %v, written again: %v", text, before, after)
		}
	})
}

// FuzzKeyslot opens a volume whose keyslot says anything.
func FuzzKeyslot(f *testing.F) {
	b := golden(f, "argon2id")
	f.Add([]byte(`{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},"area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},"kdf":{"type":"pbkdf2","hash":"sha1","iterations":3,"salt":"0XKOU4/R81ub6ygc7PvvGS2GljGvY3uVJE1N4TFMpgA="}}`))
	f.Add([]byte(`{"type":"luks2","key_size":16,"af":{"type":"luks1","stripes":4000,"hash":"sha512"},"area":{"type":"raw","offset":"32768","size":"64512","encryption":"aes-xts-plain64","key_size":32},"kdf":{"type":"argon2i","time":1,"memory":64,"cpus":1,"salt":"0XKOU4/R81ub6ygc7PvvGS2GljGvY3uVJE1N4TFMpgA="}}`))
	passphrase, err := keymem.Take([]byte("guess"))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { passphrase.Close() })
	digest := `"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1,"salt":"AAAAAAAAAAAAAAAAAAAAAA==","digest":"AAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`
	rest := `"tokens":{},"segments":{"0":{"type":"crypt","offset":"290816","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512}},"config":{"json_size":"12288","keyslots_size":"258048"}`
	f.Fuzz(func(t *testing.T, slot []byte) {
		text := `{"keyslots":{"0":` + string(slot) + `},` + digest + `,` + rest + `}`
		if len(text) >= headerSize-4096 || luks.ExpensiveKDF([]byte(text)) {
			return
		}
		clear(b[4096:headerSize])
		copy(b[4096:], text)
		reseal(b[:headerSize])
		clear(b[headerSize : 2*headerSize])
		h, err := luks.Read(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		if key, err := h.UnlockPassphrase(bytes.NewReader(b), passphrase); err == nil || key != nil {
			t.Errorf("a guess unlocks a digest of zeros: %v, %v", key, err)
		}
	})
}

// FuzzPBKDF2 compares with the standard library's.
func FuzzPBKDF2(f *testing.F) {
	f.Add([]byte("password"), []byte("salt"), uint8(2), uint8(20))
	f.Add(bytes.Repeat([]byte("x"), 129), []byte(""), uint8(1), uint8(200))
	f.Fuzz(func(t *testing.T, password, salt []byte, iterations, size uint8) {
		if len(password) == 0 || len(password) > keymem.SizeMax || iterations == 0 || size == 0 {
			return
		}
		key, err := keymem.Take(bytes.Clone(password))
		if err != nil {
			t.Fatal(err)
		}
		defer key.Close()
		for name, newHash := range map[string]func() hash.Hash{"sha1": sha1.New, "sha256": sha256.New, "sha512": sha512.New} {
			want, err := pbkdf2.Key(newHash, string(password), salt, int(iterations), int(size))
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if err := luks.PBKDF2(name, got, key, salt, int(iterations)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %x, %v; want %x", name, got, err, want)
			}
		}
	})
}

// FuzzAntiForensic splits and merges.
func FuzzAntiForensic(f *testing.F) {
	f.Add([]byte("0123456789abcdef0123456789abcdef"))
	f.Fuzz(func(t *testing.T, key []byte) {
		if len(key) == 0 || len(key) > 100 {
			return
		}
		for _, hash := range []string{"sha1", "sha256", "sha512"} {
			stripes, merged := make([]byte, luks.AFStripes*len(key)), make([]byte, len(key))
			if err := luks.AFSplit(stripes, key, hash); err != nil {
				t.Fatal(err)
			}
			if err := luks.AFMerge(merged, stripes, hash); err != nil || !bytes.Equal(merged, key) {
				t.Fatalf("%s: %v, merged %x, want %x", hash, err, merged, key)
			}
		}
	})
}
