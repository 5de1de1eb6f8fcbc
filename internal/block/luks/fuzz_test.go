package luks_test

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"hash"
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
	seeds := ours.written
	for _, name := range []string{"argon2id", "token", "reencrypt", "cbc"} {
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

// FuzzHeader parses a binary header with its JSON area, which is given a right
// checksum first, or no input would get further than that.
func FuzzHeader(f *testing.F) {
	for _, b := range headerSeeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 0x200 {
			reseal(b)
		}
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
		f.Add(append(bytes.Clone(seeds[i]), seeds[i+1]...), uint16(4096))
	}
	f.Add(golden(f, "luks1"), uint16(0))
	f.Fuzz(func(t *testing.T, start []byte, more uint16) {
		for _, at := range []int{0, headerSize} {
			if len(start) >= at+headerSize {
				reseal(start[at : at+headerSize])
			}
		}
		size := int64(len(start)) + int64(more)
		h, err := luks.Read(padded(start, int(size)), size)
		if err != nil {
			known := []error{luks.ErrNotLUKS, luks.ErrVersion, luks.ErrCorrupt, luks.ErrTruncated, luks.ErrUnsupported}
			for _, k := range known {
				if errors.Is(err, k) {
					return
				}
			}
			t.Fatalf("error of no kind: %v", err)
		}
		if s, err := h.Segment(); err == nil {
			if n, err := s.Length(size); err != nil || n < 0 || n > size {
				t.Errorf("Length(%d) of %+v = %d, %v", size, s, n, err)
			}
		}
		h.Safes()
		h.Damaged()
	})
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
	digest := `"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1,"salt":"AAAA","digest":"AAAA"}}`
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
			t.Errorf("a guess unlocks a digest of 3 bytes: %v, %v", key, err)
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
