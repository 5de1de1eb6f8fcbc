package luks_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/block/luks"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// golden returns the start of an image that cryptsetup made; see
// testdata/generate.sh.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func goldenKey(t *testing.T, name string) *keymem.Key {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	return newKey(t, string(b))
}

// padded is storage of size bytes that starts with start; the rest is zeros.
func padded(start []byte, size int) *bytes.Reader {
	b := make([]byte, size)
	copy(b, start)
	return bytes.NewReader(b)
}

// reseal gives header copy b, and nothing else, a right checksum.
func reseal(b []byte) {
	clear(b[0x1c0:0x200])
	sum := sha256.Sum256(b)
	copy(b[0x1c0:], sum[:])
}

// rewriteJSON changes the metadata of both copies, which are of 16 KiB.
func rewriteJSON(t *testing.T, b []byte, change func(doc map[string]any)) {
	t.Helper()
	for _, c := range [][]byte{b[:headerSize], b[headerSize : 2*headerSize]} {
		text, _, _ := bytes.Cut(c[4096:], []byte{0})
		doc := map[string]any{}
		if err := json.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		change(doc)
		text, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		clear(c[4096:])
		copy(c[4096:], text)
		reseal(c)
	}
}

func TestGolden(t *testing.T) {
	t.Parallel()
	const size = 20 << 20
	passphrase := newKey(t, "correct horse battery staple")

	h, err := luks.Read(padded(golden(t, "argon2id"), size), size)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := h.Segment(); err != nil || s != (luks.Segment{Offset: 290816, SectorSize: 512}) {
		t.Errorf("argon2id: Segment() = %+v, %v", s, err)
	}
	if h.Label() != "golden" || len(h.UUID()) != 36 || len(h.Damaged()) != 0 {
		t.Errorf("argon2id: label %q, UUID %q, damaged %v", h.Label(), h.UUID(), h.Damaged())
	}
	dek, err := h.UnlockPassphrase(padded(golden(t, "argon2id"), size), passphrase)
	if err != nil {
		t.Fatal(err)
	}
	defer dek.Close()
	if !dek.Equal(goldenKey(t, "argon2id")) {
		t.Error("argon2id: unlocks another key")
	}

	h, err = luks.Read(padded(golden(t, "token"), size), size)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := h.Segment(); err != nil || s != (luks.Segment{Offset: 16 << 20, SectorSize: 4096}) {
		t.Errorf("token: Segment() = %+v, %v", s, err)
	}
	if err := h.VerifyKey(goldenKey(t, "token")); err != nil {
		t.Error(err)
	}
	if safes, err := h.Safes(); err != nil || len(safes) != 0 {
		t.Errorf("token: Safes() = %v, %v", safes, err)
	}
	if err := h.AddPassphrase(memory(t, make([]byte, 1<<20)), goldenKey(t, "token"), passphrase, quick); err != nil {
		t.Error(err)
	}

	for name, want := range map[string]string{
		"reencrypt": "re-encryption is in progress",
		"cbc":       "aes-cbc-essiv:sha256",
	} {
		h, err := luks.Read(padded(golden(t, name), size), size)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := h.Segment(); !errors.Is(err, luks.ErrUnsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: Segment() reports %v", name, err)
		}
	}
	if h, err = luks.Read(padded(golden(t, "reencrypt"), size), size); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(image{}); !errors.Is(err, luks.ErrUnsupported) {
		t.Errorf("Commit during a re-encryption: %v", err)
	}
	if _, err := luks.Read(padded(golden(t, "luks1"), size), size); !errors.Is(err, luks.ErrVersion) {
		t.Errorf("LUKS1: %v", err)
	}
}

// TestForeignMetadataSurvives rewrites a header that holds what we know
// nothing about, and compares the metadata value by value.
func TestForeignMetadataSurvives(t *testing.T) {
	t.Parallel()
	const size = 20 << 20
	decode := func(b []byte) map[string]any {
		text, _, _ := bytes.Cut(b[4096:headerSize], []byte{0})
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		doc := map[string]any{}
		if err := d.Decode(&doc); err != nil {
			t.Fatal(err)
		}
		return doc
	}
	start := golden(t, "token")
	want := decode(start)
	h, err := luks.Read(padded(start, size), size)
	if err != nil {
		t.Fatal(err)
	}
	mem := memory(t, append(start, make([]byte, 4096)...))
	if err := h.SetSafe(newSafe(t, goldenKey(t, "token"), 1)); err != nil {
		t.Fatal(err)
	}
	if err := h.SetSafe(nil); err != nil {
		t.Fatal(err)
	}
	commit(t, h, mem)
	if diff := cmp.Diff(want, decode(contents(t, mem))); diff != "" {
		t.Errorf("metadata changed (-before +after):\n%s", diff)
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	good := firstGeneration(t, dek)
	lastByte := len(good) - 1

	for _, test := range []struct {
		name   string
		change func(b []byte) []byte
		want   error
		text   string
	}{
		{"empty", func([]byte) []byte { return nil }, luks.ErrNotLUKS, ""},
		{"zeros", func(b []byte) []byte { clear(b); return b }, luks.ErrNotLUKS, ""},
		{"other data", func(b []byte) []byte { return bytes.Repeat([]byte("data"), len(b)/4) }, luks.ErrNotLUKS, ""},
		{"magic only", func(b []byte) []byte { return b[:6] }, luks.ErrVersion, ""},
		{"cut in the binary header", func(b []byte) []byte { return b[:1000] }, luks.ErrTruncated, ""},
		{"cut in the primary", func(b []byte) []byte { return b[:headerSize-1] }, luks.ErrTruncated, ""},
		{"cut in the secondary", func(b []byte) []byte { return b[:headerSize+5000] }, luks.ErrTruncated, ""},
		{"cut before the data", func(b []byte) []byte { return b[:luks.DataOffsetMin-1] }, luks.ErrTruncated, ""},
		{"both damaged", func(b []byte) []byte { b[4096] ^= 1; b[headerSize+4096] ^= 1; return b }, luks.ErrCorrupt, "checksum"},
		{"checksum of both damaged", func(b []byte) []byte { b[0x1c0] ^= 1; b[headerSize+0x1ff] ^= 1; return b }, luks.ErrCorrupt, "checksum"},
		{"future version", func(b []byte) []byte { b[7] = 3; clear(b[headerSize : 2*headerSize]); return b }, luks.ErrVersion, "3"},
		{"header size not defined", func(b []byte) []byte {
			binary.BigEndian.PutUint64(b[8:], 8192)
			clear(b[headerSize : 2*headerSize])
			return b
		}, luks.ErrCorrupt, "8192"},
		{"huge header size", func(b []byte) []byte {
			binary.BigEndian.PutUint64(b[8:], 1<<63)
			clear(b[headerSize : 2*headerSize])
			return b
		}, luks.ErrCorrupt, "size"},
		{"reformatted with something else", func(b []byte) []byte {
			copy(b, "XFSB")
			clear(b[4:4096])
			return b
		}, luks.ErrNotLUKS, testUUID},
		{"reserved bytes in use", func(b []byte) []byte { b[0x108] = 1; reseal(b[:headerSize]); return b }, luks.ErrUnsupported, "reserved"},
		{"unpadded label", func(b []byte) []byte {
			for _, c := range [][]byte{b[:headerSize], b[headerSize : 2*headerSize]} {
				c[0x18+10] = 'x'
				reseal(c)
			}
			return b
		}, luks.ErrCorrupt, "label"},
		{"copies swapped", func(b []byte) []byte {
			for i, magic := range []string{"LUKS\xba\xbe", "SKUL\xba\xbe"} {
				c := b[i*headerSize : (i+1)*headerSize]
				copy(c, magic)
				binary.BigEndian.PutUint64(c[0x100:], uint64((1-i)*headerSize))
				reseal(c)
			}
			return b
		}, luks.ErrCorrupt, "offset"},
		{"metadata without NUL at the end", func(b []byte) []byte {
			for _, c := range [][]byte{b[:headerSize], b[headerSize : 2*headerSize]} {
				text, _, _ := bytes.Cut(c[4096:], []byte{0})
				copy(c[4096+len(text)-1:], bytes.Repeat([]byte{' '}, headerSize))
				c[headerSize-1] = '}'
				reseal(c)
			}
			return b
		}, luks.ErrCorrupt, "padded"},
		{"bytes behind the metadata", func(b []byte) []byte {
			for _, c := range [][]byte{b[:headerSize], b[headerSize : 2*headerSize]} {
				c[headerSize-1] = 1
				reseal(c)
			}
			return b
		}, luks.ErrCorrupt, "padded"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := test.change(slices.Clone(good))
			h, err := luks.Read(bytes.NewReader(b), int64(len(b)))
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("Read reports %v, want %v with %q", err, test.want, test.text)
			}
			if h != nil {
				t.Error("Read returns a header with an error")
			}
		})
	}

	// One copy is enough, whatever happened to the other.
	for name, change := range map[string]func(b []byte){
		"primary's version":     func(b []byte) { b[7] = 9 },
		"primary's magic":       func(b []byte) { b[0] = 0 },
		"primary's size":        func(b []byte) { b[8] = 9 },
		"primary's end":         func(b []byte) { b[headerSize-1] = 9 },
		"secondary's magic":     func(b []byte) { b[headerSize] = 9 },
		"secondary's end":       func(b []byte) { b[2*headerSize-1] = 9 },
		"data, not a header":    func(b []byte) { b[lastByte] = 9 },
		"primary, wholly":       func(b []byte) { clear(b[:headerSize]) },
		"secondary, wholly":     func(b []byte) { clear(b[headerSize : 2*headerSize]) },
		"secondary, overrun":    func(b []byte) { copy(b[headerSize:], bytes.Repeat([]byte{0xff}, headerSize)) },
		"primary's first bytes": func(b []byte) { clear(b[:168]) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := slices.Clone(good)
			change(b)
			h, err := luks.Read(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				t.Fatal(err)
			}
			if err := h.VerifyKey(dek); err != nil {
				t.Error(err)
			}
		})
	}
}

// failingReader cannot read some bytes.
type failingReader struct {
	*bytes.Reader
	from, to int64
}

func (r failingReader) ReadAt(p []byte, off int64) (int, error) {
	if off < r.to && off+int64(len(p)) > r.from {
		return 0, os.ErrDeadlineExceeded
	}
	return r.Reader.ReadAt(p, off)
}

func TestUnreadableSectors(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	good := bytes.NewReader(firstGeneration(t, dek))
	for _, bad := range [][2]int64{{0, 512}, {4096, 8192}, {headerSize, headerSize + 512}} {
		h, err := luks.Read(failingReader{good, bad[0], bad[1]}, smallDisk)
		if err != nil {
			t.Fatalf("bytes %v unreadable: %v", bad, err)
		}
		if err := h.VerifyKey(dek); err != nil || len(h.Damaged()) != 1 {
			t.Errorf("bytes %v unreadable: %v, damaged %v", bad, err, h.Damaged())
		}
	}
	if _, err := luks.Read(failingReader{good, 0, smallDisk}, smallDisk); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing readable: %v", err)
	}
}

func TestSecondaryAtEachOffset(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	for _, kib := range []int{16, 32, 64, 128, 256, 512, 1024, 2048, 4096} {
		f := newImage(t, 24<<20)
		keys := []string{"--batch-mode", "--key-file", keyFile(t, newKey(t, "x")), "--volume-key-file", keyFile(t, dek), "--key-size", "512", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
		mustCryptsetup(t, append([]string{"luksFormat", "--type", "luks2", f.Name(), "--luks2-metadata-size", strconv.Itoa(kib) + "k"}, keys...)...)
		if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		h, err := f.read()
		if err != nil {
			t.Errorf("header of %d KiB: %v", kib, err)
			continue
		}
		if h.Size() != int64(kib)<<10 {
			t.Errorf("Size() = %d, want %d KiB", h.Size(), kib)
		}
		commit(t, h, f)
		mustCryptsetup(t, "luksDump", f.Name())
	}
}

func TestMetadataRefused(t *testing.T) {
	t.Parallel()
	type doc = map[string]any
	good := firstGeneration(t, keymemtest.Random(t, luks.KeySize))
	segment := func(d doc) doc { return d["segments"].(doc)["0"].(doc) }
	digest := func(d doc) doc { return d["digests"].(doc)["0"].(doc) }
	slot := func(offset, size string) doc {
		return doc{"type": "luks2", "key_size": 64, "area": doc{"type": "raw", "offset": offset, "size": size}}
	}
	for name, test := range map[string]struct {
		change func(d doc)
		text   string
	}{
		"no config":                {func(d doc) { delete(d, "config") }, "config"},
		"config is a string":       {func(d doc) { d["config"] = "x" }, "config"},
		"json_size":                {func(d doc) { d["config"].(doc)["json_size"] = "12289" }, "json_size"},
		"keyslots_size unaligned":  {func(d doc) { d["config"].(doc)["keyslots_size"] = "100" }, "keyslots_size"},
		"keyslots_size over data":  {func(d doc) { d["config"].(doc)["keyslots_size"] = "4096" }, "inside the header"},
		"flags":                    {func(d doc) { d["config"].(doc)["flags"] = []any{1} }, "flags"},
		"no segment":               {func(d doc) { d["segments"] = doc{} }, "segments"},
		"segment numbers":          {func(d doc) { d["segments"].(doc)["2"] = maps.Clone(segment(d)) }, "gap"},
		"segment name":             {func(d doc) { d["segments"].(doc)["00"] = maps.Clone(segment(d)) }, "00"},
		"offset is a number":       {func(d doc) { segment(d)["offset"] = 32768 }, "offset"},
		"offset with a zero":       {func(d doc) { segment(d)["offset"] = "032768" }, "offset"},
		"negative offset":          {func(d doc) { segment(d)["offset"] = "-32768" }, "offset"},
		"offset of 65 bits":        {func(d doc) { segment(d)["offset"] = "18446744073709551616" }, "offset"},
		"unaligned offset":         {func(d doc) { segment(d)["offset"] = "32769" }, "aligned"},
		"end beyond 63 bits":       {func(d doc) { segment(d)["size"] = "9223372036854775296" }, "beyond"},
		"size zero":                {func(d doc) { segment(d)["size"] = "0" }, "size"},
		"sector size 513":          {func(d doc) { segment(d)["sector_size"] = 513 }, "sector_size"},
		"sector size 8192":         {func(d doc) { segment(d)["sector_size"] = 8192 }, "sector_size"},
		"sector size in a string":  {func(d doc) { segment(d)["sector_size"] = "512" }, "sector_size"},
		"sector size 512.0":        {func(d doc) { segment(d)["sector_size"] = json.RawMessage("512.0") }, "sector_size"},
		"segment without digest":   {func(d doc) { digest(d)["segments"] = []any{} }, "digest"},
		"digest of unknown":        {func(d doc) { digest(d)["segments"] = []any{"0", "1"} }, "segments"},
		"digest twice":             {func(d doc) { digest(d)["segments"] = []any{"0", "0"} }, "segments"},
		"digest of unknown slot":   {func(d doc) { digest(d)["keyslots"] = []any{"3"} }, "keyslots"},
		"salt":                     {func(d doc) { digest(d)["salt"] = "!" }, "salt"},
		"long salt":                {func(d doc) { digest(d)["salt"] = strings.Repeat("AAAA", 2000) }, "salt"},
		"short digest":             {func(d doc) { digest(d)["digest"] = "AAAAAAAAAAAAAAAAAAAAAA==" }, "digest"},
		"iterations":               {func(d doc) { digest(d)["iterations"] = 0 }, "iterations"},
		"token without keyslots":   {func(d doc) { delete(d["tokens"].(doc)["0"].(doc), "keyslots") }, "tokens.0.keyslots"},
		"token of unknown keyslot": {func(d doc) { d["tokens"].(doc)["0"].(doc)["keyslots"] = []any{"1"} }, "tokens.0.keyslots"},
		"33rd token":               {func(d doc) { d["tokens"].(doc)["32"] = doc{"type": "x", "keyslots": []any{}} }, "32"},
		"keyslot over the header":  {func(d doc) { d["keyslots"].(doc)["0"] = slot("16384", "4096") }, "keyslots.0.area"},
		"keyslot over the data":    {func(d doc) { d["keyslots"].(doc)["0"] = slot("32768", "4096") }, "keyslots.0.area"},
		"keyslot overflow":         {func(d doc) { d["keyslots"].(doc)["0"] = slot("9223372036854775807", "9223372036854775807") }, "keyslots.0.area"},
		"too deep":                 {func(d doc) { d["x"] = json.RawMessage(strings.Repeat("[", 20) + strings.Repeat("]", 20)) }, "deep"},
		"name twice":               {func(d doc) { d["x"] = json.RawMessage(`{"a":1,"a":2}`) }, "twice"},
		"not UTF-8":                {func(d doc) { d["config"].(doc)["x"] = json.RawMessage("\"\xff\"") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := slices.Clone(good)
			rewriteJSON(t, b, test.change)
			if _, err := luks.Read(bytes.NewReader(b), int64(len(b))); !errors.Is(err, luks.ErrCorrupt) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("Read reports %v, want %v with %q", err, luks.ErrCorrupt, test.text)
			}
		})
	}
}

func TestSegmentRefused(t *testing.T) {
	t.Parallel()
	type doc = map[string]any
	good := firstGeneration(t, keymemtest.Random(t, luks.KeySize))
	segment := func(d doc) doc { return d["segments"].(doc)["0"].(doc) }
	for name, test := range map[string]struct {
		change func(d doc)
		text   string
	}{
		"requirement": {func(d doc) { d["config"].(doc)["requirements"] = doc{"mandatory": []any{"time-travel"}} }, "time-travel"},
		"iv_tweak":    {func(d doc) { segment(d)["iv_tweak"] = "8" }, "iv_tweak is 8"},
		"cipher":      {func(d doc) { segment(d)["encryption"] = "aes-xts-plain" }, "aes-xts-plain,"},
		"flag":        {func(d doc) { segment(d)["flags"] = []any{"in-reencryption"} }, "in-reencryption"},
		"integrity":   {func(d doc) { segment(d)["integrity"] = doc{"type": "hmac(sha256)"} }, "dm-integrity"},
		"linear": {func(d doc) {
			d["segments"] = doc{"0": doc{"type": "linear", "offset": "32768", "size": "dynamic"}}
		}, "linear"},
		"two segments": {func(d doc) {
			second := maps.Clone(segment(d))
			segment(d)["size"], second["offset"] = "512", "33280"
			d["segments"].(doc)["1"] = second
			d["digests"].(doc)["0"].(doc)["segments"] = []any{"0", "1"}
		}, "2 segments"},
		"two digests": {func(d doc) {
			d["digests"].(doc)["1"] = d["digests"].(doc)["0"]
		}, "2 digests"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := slices.Clone(good)
			rewriteJSON(t, b, test.change)
			h, err := luks.Read(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				t.Fatal(err)
			}
			test.text = strings.Replace(test.text, "aes-xts-plain,", `"aes-xts-plain",`, 1)
			if s, err := h.Segment(); !errors.Is(err, luks.ErrUnsupported) || !strings.Contains(err.Error(), test.text) || s != (luks.Segment{}) {
				t.Errorf("Segment() = %+v, %v; want an error with %q", s, err, test.text)
			}
		})
	}
}

func TestSegmentLength(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		s    luks.Segment
		size int64
		want int64
		err  error
	}{
		{luks.Segment{Offset: 1000 * 512, SectorSize: 512}, 1003*512 + 511, 3 * 512, nil},
		{luks.Segment{Offset: 8192, SectorSize: 4096}, 16383, 4096, nil},
		{luks.Segment{Offset: 8192, SectorSize: 512}, 8192, 0, nil},
		{luks.Segment{Offset: 8192, SectorSize: 512}, 8191, 0, luks.ErrTruncated},
		{luks.Segment{Offset: 8192, Size: 1024, SectorSize: 512}, 1 << 20, 1024, nil},
		{luks.Segment{Offset: 8192, Size: 1024, SectorSize: 512}, 8192 + 1023, 0, luks.ErrTruncated},
	} {
		if got, err := test.s.Length(test.size); got != test.want || !errors.Is(err, test.err) {
			t.Errorf("%+v on %d bytes: %d, %v; want %d, %v", test.s, test.size, got, err, test.want, test.err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, luks.KeySize)
	for name, opts := range map[string]luks.Options{
		"short DEK":        {DEK: keymemtest.Random(t, 32)},
		"UUID":             {DEK: dek, UUID: "6F9C5A52-1D3C-4F52-9A3E-0D6A3C1B7E11"},
		"no UUID":          {DEK: dek, UUID: "disk-0"},
		"label":            {DEK: dek, Label: strings.Repeat("x", 48)},
		"NUL in label":     {DEK: dek, Label: "a\x00b"},
		"sector size":      {DEK: dek, SectorSize: 1024},
		"offset":           {DEK: dek, DataOffset: 16384},
		"offset unaligned": {DEK: dek, DataOffset: 65536 + 512},
	} {
		if h, err := luks.New(opts); err == nil || h != nil {
			t.Errorf("%s: New = %v, %v", name, h, err)
		}
	}
}
