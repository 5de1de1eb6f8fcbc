package sealed

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/leaktest"
)

const testContext = "test"

// pattern is the plaintext of testdata/gen.py.
func pattern(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i*7 + i/251)
	}
	return b
}

func seal(t testing.TB, key *keymem.Key, plain []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, key, testContext)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := w.Write(plain); n != len(plain) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func open(file []byte, key *keymem.Key) (*Reader, error) {
	return NewReader(bytes.NewReader(file), int64(len(file)), key, testContext)
}

// openAll returns the whole plaintext.
func openAll(file []byte, key *keymem.Key) ([]byte, error) {
	r, err := open(file, key)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	for _, size := range []int{0, 1, SegmentSize - 1, SegmentSize, SegmentSize + 1, 2 * SegmentSize, 200_000} {
		plain := pattern(size)
		file := seal(t, key, plain)
		if size >= 16 && bytes.Contains(file, plain[:16]) {
			t.Errorf("%d bytes: the file shows the plaintext", size)
		}
		r, err := open(file, key)
		if err != nil {
			t.Fatal(err)
		}
		if r.Size() != int64(size) {
			t.Errorf("Size = %d, want %d", r.Size(), size)
		}
		if err := iotest.TestReader(struct {
			io.Reader
			io.ReaderAt
		}{r, r}, plain); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
		r.Close()
	}
}

func TestSaltsDiffer(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	a, b := seal(t, key, pattern(100)), seal(t, key, pattern(100))
	if bytes.Equal(a[saltOffset:verifyOffset], b[saltOffset:verifyOffset]) || bytes.Equal(a[HeaderSize:], b[HeaderSize:]) {
		t.Error("two files share their salt or ciphertext")
	}
}

type vectors struct {
	Files []struct {
		Key, Salt, Context string
		Size               int
		SHA256             string
	}
	Refused []struct{ Name, File, Expect string }
}

func loadVectors(t testing.TB) vectors {
	t.Helper()
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVectors(t *testing.T) {
	t.Parallel()
	v := loadVectors(t)
	if len(v.Files) == 0 || len(v.Refused) == 0 {
		t.Fatal("no vectors")
	}
	for _, f := range v.Files {
		key := keymemtest.Hex(t, f.Key)
		salt, err := hex.DecodeString(f.Salt)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		w, err := newWriter(&out, key, f.Context, [saltSize]byte(salt))
		if err != nil {
			t.Fatal(err)
		}
		// Pieces of a size that does not divide a segment.
		for plain := pattern(f.Size); len(plain) > 0; {
			n, err := w.Write(plain[:min(len(plain), 10_007)])
			if err != nil {
				t.Fatal(err)
			}
			plain = plain[n:]
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(out.Bytes())
		if got := hex.EncodeToString(sum[:]); got != f.SHA256 {
			t.Errorf("%d bytes: file has SHA-256 %s, want %s", f.Size, got, f.SHA256)
		}
		r, err := NewReader(bytes.NewReader(out.Bytes()), int64(out.Len()), key, f.Context)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, pattern(f.Size)) {
			t.Errorf("%d bytes: other content (%v)", f.Size, err)
		}
	}

	want := map[string]error{"not sealed": ErrNotSealed, "version": ErrVersion, "wrong key": ErrWrongKey, "damaged": ErrCorrupt}
	key := keymemtest.Hex(t, v.Files[0].Key)
	for _, f := range v.Refused {
		file, err := hex.DecodeString(f.File)
		if err != nil {
			t.Fatal(err)
		}
		r, err := open(file, key)
		if r != nil || want[f.Expect] == nil || !errors.Is(err, want[f.Expect]) {
			t.Errorf("%s: %v, %v; want %q", f.Name, r, err, f.Expect)
		}
	}
}

func TestAlteredBits(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	file := seal(t, key, pattern(100))
	for bit := range len(file) * 8 {
		altered := bytes.Clone(file)
		altered[bit/8] ^= 1 << (bit % 8)
		if r, err := open(altered, key); r != nil || err == nil {
			t.Fatalf("bit %d: opened", bit)
		}
	}
}

// Segments that are there, authentic, and not where they belong.
func TestMovedSegments(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	plain := pattern(3*SegmentSize + 100)
	file := seal(t, key, plain)
	other := seal(t, key, plain)
	header := file[:HeaderSize]
	segment := func(i int) []byte { return file[HeaderSize+i*sealedSize : min(HeaderSize+(i+1)*sealedSize, len(file))] }
	join := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{header}, parts...), nil) }

	for name, altered := range map[string][]byte{
		"swapped":                    join(segment(1), segment(0), segment(2), segment(3)),
		"repeated":                   join(segment(0), segment(0), segment(2), segment(3)),
		"left out":                   join(segment(0), segment(2), segment(3)),
		"doubled":                    join(segment(0), segment(1), segment(1), segment(2), segment(3)),
		"last left out":              join(segment(0), segment(1), segment(2)),
		"last first":                 join(segment(3)),
		"last doubled":               join(segment(0), segment(1), segment(2), segment(3), segment(3)),
		"last cut":                   file[:len(file)-1],
		"last cut to a tag":          file[:HeaderSize+3*sealedSize+tagSize],
		"only a header":              header,
		"segment of another file":    join(segment(0), other[HeaderSize+sealedSize:HeaderSize+2*sealedSize], segment(2), segment(3)),
		"header of another file":     append(bytes.Clone(other[:HeaderSize]), file[HeaderSize:]...),
		"zeros after the end":        append(bytes.Clone(file), make([]byte, sealedSize)...),
		"zeros instead of a segment": join(segment(0), make([]byte, sealedSize), segment(2), segment(3)),
	} {
		got, err := openAll(altered, key)
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v; want ErrCorrupt", name, err)
		}
		// All that came out before the error is authentic.
		if !bytes.HasPrefix(plain, got) {
			t.Errorf("%s: %d bytes were released that are not the plaintext's", name, len(got))
		}
	}
}

// A file of full segments, cut at each length, never opens.
func TestCut(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	file := seal(t, key, pattern(2*SegmentSize))
	lengths := []int{}
	for _, border := range []int{0, HeaderSize, HeaderSize + sealedSize, HeaderSize + 2*sealedSize} {
		for n := border - 40; n <= border+40; n++ {
			if n >= 0 && n < len(file) {
				lengths = append(lengths, n)
			}
		}
	}
	for _, n := range lengths {
		want := ErrCorrupt
		if n < len(magic) {
			want = ErrNotSealed
		}
		if r, err := open(file[:n], key); r != nil || !errors.Is(err, want) {
			t.Errorf("cut to %d bytes: %v, %v; want %v", n, r, err, want)
		}
	}
}

// An empty segment at the end would be a second encoding of the same content.
func TestEmptyLastSegment(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	file := seal(t, key, pattern(SegmentSize))
	aead, _, err := derive(key, testContext, file[:HeaderSize])
	if err != nil {
		t.Fatal(err)
	}
	forged := bytes.Clone(file[:HeaderSize])
	forged = aead.Seal(forged, nonce(0, false), pattern(SegmentSize), nil)
	forged = aead.Seal(forged, nonce(1, true), nil, nil)
	if r, err := open(forged, key); r != nil || !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v, %v; want ErrCorrupt", r, err)
	}
}

func TestDamageInTheMiddle(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	plain := pattern(3 * SegmentSize)
	file := seal(t, key, plain)
	file[HeaderSize+sealedSize+5] ^= 1 // in segment 1
	r, err := open(file, key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := make([]byte, SegmentSize+10)
	n, err := r.ReadAt(p, 100)
	if n != SegmentSize-100 || !errors.Is(err, ErrCorrupt) || !bytes.Equal(p[:n], plain[100:SegmentSize]) {
		t.Errorf("ReadAt = %d, %v; want the bytes of segment 0 and ErrCorrupt", n, err)
	}
	if !bytes.Equal(p[n:], make([]byte, len(p)-n)) {
		t.Error("bytes of a damaged segment were released")
	}
	// The others can still be read.
	if n, err := r.ReadAt(p[:10], 2*SegmentSize); n != 10 || err != nil || !bytes.Equal(p[:10], plain[2*SegmentSize:][:10]) {
		t.Errorf("ReadAt behind the damage = %d, %v", n, err)
	}
}

func TestArguments(t *testing.T) {
	t.Parallel()
	key, short := keymemtest.Random(t, KeySize), keymemtest.Random(t, KeySize-1)
	file := seal(t, key, pattern(10))
	for name, err := range map[string]error{
		"write, short key":    second(NewWriter(io.Discard, short, testContext)),
		"write, no context":   second(NewWriter(io.Discard, key, "")),
		"write, long context": second(NewWriter(io.Discard, key, strings.Repeat("c", ContextMax+1))),
		"read, short key":     second(open(file, short)),
		"read, no context":    second(NewReader(bytes.NewReader(file), int64(len(file)), key, "")),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v; want ErrInvalid", name, err)
		}
	}
	r, err := open(file, key)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := r.ReadAt(make([]byte, 1), -1); n != 0 || !errors.Is(err, ErrInvalid) {
		t.Errorf("negative offset: %d, %v; want ErrInvalid", n, err)
	}
	r.Close()
	r.Close()
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, ErrClosed) {
		t.Errorf("Read after Close: %d, %v; want ErrClosed", n, err)
	}
	if _, err := open(nil, key); !errors.Is(err, ErrNotSealed) {
		t.Errorf("empty: %v; want ErrNotSealed", err)
	}
	huge := HeaderSize + (SizeMax/SegmentSize+1)*sealedSize
	if r, err := NewReader(bytes.NewReader(file), int64(huge), key, testContext); r != nil || !errors.Is(err, ErrTooLarge) {
		t.Errorf("file of %d bytes: %v; want ErrTooLarge", huge, err)
	}
	// A source that is shorter than it was said to be.
	if r, err := NewReader(bytes.NewReader(file[:90]), int64(len(file)), key, testContext); r != nil || !errors.Is(err, ErrCorrupt) {
		t.Errorf("short source: %v; want ErrCorrupt", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestWriterEnds(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	var out bytes.Buffer
	w, err := NewWriter(&out, key, testContext)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(pattern(SegmentSize + 1)); err != nil {
		t.Fatal(err)
	}
	w.Abort()
	w.Abort()
	if err := w.Close(); err != nil {
		t.Errorf("Close after Abort: %v", err)
	}
	if n, err := w.Write([]byte{1}); n != 0 || !errors.Is(err, ErrClosed) {
		t.Errorf("Write after Abort: %d, %v; want ErrClosed", n, err)
	}
	if r, err := open(out.Bytes(), key); r != nil || !errors.Is(err, ErrCorrupt) {
		t.Errorf("an aborted file: %v, %v; want ErrCorrupt", r, err)
	}

	w, err = NewWriter(io.Discard, key, testContext)
	if err != nil {
		t.Fatal(err)
	}
	w.segment = SizeMax/SegmentSize - 1
	if _, err := w.Write(pattern(2 * SegmentSize)); err != nil {
		t.Errorf("at the limit: %v", err)
	}
	if err := w.Close(); !errors.Is(err, ErrTooLarge) {
		t.Errorf("beyond the limit: %v; want ErrTooLarge", err)
	}
}

// failingWriter fails at the call with number n.
type failingWriter struct{ n int }

var errDisk = errors.New("disk failed")

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.n--; w.n < 0 {
		return len(p) / 2, errDisk
	}
	return len(p), nil
}

func TestWriterReportsErrors(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	const writes = 1 + 3 // the header and three segments
	for n := range writes + 1 {
		err := func() error {
			w, err := NewWriter(&failingWriter{n}, key, testContext)
			if err != nil {
				return err
			}
			_, writeErr := w.Write(pattern(2*SegmentSize + 1))
			err = w.Close()
			if writeErr != nil && err == nil {
				t.Errorf("write %d failed, Close returned nil", n)
			}
			return err
		}()
		if (n < writes) != errors.Is(err, errDisk) {
			t.Errorf("write %d failed: got %v", n, err)
		}
	}
}

func TestConcurrentReadAt(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	plain := pattern(4 * SegmentSize)
	r, err := open(seal(t, key, plain), key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			p := make([]byte, 1000)
			for i := range 20 {
				off := (i*31 + worker*7) * 1117 % (len(plain) - len(p))
				if n, err := r.ReadAt(p, int64(off)); n != len(p) || err != nil || !bytes.Equal(p, plain[off:off+n]) {
					t.Errorf("ReadAt(%d) = %d, %v", off, n, err)
				}
			}
		})
	}
	wg.Wait()
}

// Whatever the pieces that are written and read, the content is the same.
func TestPieces(t *testing.T) {
	t.Parallel()
	key := keymemtest.Random(t, KeySize)
	border := rapid.SampledFrom([]int{0, 1, 100, SegmentSize - 1, SegmentSize, SegmentSize + 1, 2*SegmentSize - 1, 2 * SegmentSize})
	rapid.Check(t, func(t *rapid.T) {
		var out bytes.Buffer
		w, err := NewWriter(&out, key, testContext)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		plain := pattern(border.Draw(t, "size") + rapid.IntRange(0, 40).Draw(t, "more"))
		for rest := plain; len(rest) > 0; {
			n, err := w.Write(rest[:min(len(rest), max(1, border.Draw(t, "piece")))])
			if err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := open(out.Bytes(), key)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		for range 3 {
			off, n := border.Draw(t, "offset"), border.Draw(t, "length")
			p := make([]byte, n)
			got, err := r.ReadAt(p, int64(off))
			want := plain[min(off, len(plain)):min(off+n, len(plain))]
			if !bytes.Equal(p[:got], want) || (err == io.EOF) != (got < n) {
				t.Fatalf("ReadAt(%d bytes, %d) = %d, %v; want %d bytes", n, off, got, err, len(want))
			}
		}
	})
}

func TestNoKeyIsPrinted(t *testing.T) {
	t.Parallel()
	key, data := keymemtest.Random(t, KeySize), keymemtest.Random(t, 100)
	file := seal(t, key, data.Bytes())
	r, err := open(file, key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w, err := NewWriter(io.Discard, key, testContext)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if _, err := w.Write(data.Bytes()); err != nil {
		t.Fatal(err)
	}
	_, wrongKey := open(file, data)
	_, foreign := open(data.Bytes(), key)
	if wrongKey == nil || foreign == nil {
		t.Fatal("an error is missing")
	}
	leaktest.Refute(t, leaktest.Print(file, r, w, wrongKey, foreign), key, data)
}

func TestPlainSize(t *testing.T) {
	t.Parallel()
	// Each length of a plaintext has one length of a file, and no other
	// length is taken.
	fileSizes := map[int64]int64{}
	const limit = 3*SegmentSize + 10
	for size := range int64(limit) {
		fileSizes[HeaderSize+size+segments(size)*tagSize] = size
	}
	for fileSize := range int64(limit) {
		want, valid := fileSizes[fileSize]
		if got, ok := plainSize(fileSize); got != want || ok != valid {
			t.Fatalf("plainSize(%d) = %d, %t; want %d, %t", fileSize, got, ok, want, valid)
		}
	}
}

func Example() {
	key, err := keymem.Random(KeySize)
	if err != nil {
		panic(err)
	}
	defer key.Close()
	var file bytes.Buffer
	w, err := NewWriter(&file, key, "greeting")
	if err != nil {
		panic(err)
	}
	defer w.Abort() // does nothing after Close
	fmt.Fprint(w, "hello")
	if err := w.Close(); err != nil {
		panic(err)
	}
	r, err := NewReader(bytes.NewReader(file.Bytes()), int64(file.Len()), key, "greeting")
	if err != nil {
		panic(err)
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	fmt.Println(string(text), err)
	// Output: hello <nil>
}

func BenchmarkWriter(b *testing.B) {
	key := keymemtest.Random(b, KeySize)
	w, err := NewWriter(io.Discard, key, testContext)
	if err != nil {
		b.Fatal(err)
	}
	defer w.Abort()
	plain := pattern(1 << 20)
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		if _, err := w.Write(plain); err != nil {
			b.Fatal(err)
		}
	}
}
