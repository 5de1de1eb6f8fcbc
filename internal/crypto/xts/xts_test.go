package xts_test

import (
	"bytes"
	"crypto/aes"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"

	oracle "golang.org/x/crypto/xts"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

func takeKey(t testing.TB, key []byte) *keymem.Key {
	t.Helper()
	k, err := keymem.Take(bytes.Clone(key))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newCipher(t testing.TB, name string, key []byte) *xts.Cipher {
	t.Helper()
	c, err := xts.NewWith(name, takeKey(t, key))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// crypter is what Cipher and the oracle have in common.
type crypter interface {
	Encrypt(dst, src []byte, iv uint64, sectorSize int)
	Decrypt(dst, src []byte, iv uint64, sectorSize int)
}

// oracleCipher does with golang.org/x/crypto/xts what Cipher does.
type oracleCipher struct{ *oracle.Cipher }

func newOracle(t testing.TB, key []byte) *oracle.Cipher {
	t.Helper()
	c, err := oracle.NewCipher(aes.NewCipher, key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (c oracleCipher) Encrypt(dst, src []byte, iv uint64, sectorSize int) {
	for o := 0; o < len(src); o += sectorSize {
		c.Cipher.Encrypt(dst[o:o+sectorSize], src[o:o+sectorSize], iv+uint64(o/512))
	}
}

func (c oracleCipher) Decrypt(dst, src []byte, iv uint64, sectorSize int) {
	for o := 0; o < len(src); o += sectorSize {
		c.Cipher.Decrypt(dst[o:o+sectorSize], src[o:o+sectorSize], iv+uint64(o/512))
	}
}

// pattern returns n bytes that do not repeat.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// everyImplementation runs f as a subtest for each.
func everyImplementation(t *testing.T, f func(t *testing.T, name string)) {
	for _, name := range xts.Implementations() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, name)
		})
	}
}

// TestShapes compares all sector sizes, both key sizes and sector counts around
// the batches in which the assembly works with the oracle.
func TestShapes(t *testing.T) {
	t.Parallel()
	everyImplementation(t, func(t *testing.T, name string) {
		for _, keySize := range []int{xts.KeySize128, xts.KeySize256} {
			key := pattern(keySize)
			c, o := newCipher(t, name, key), oracleCipher{newOracle(t, key)}
			for sectorSize := 512; sectorSize <= xts.SectorSizeMax; sectorSize *= 2 {
				for _, sectors := range []int{0, 1, 2, 7, 8, 9, 16, 17, 129} {
					n := sectors * sectorSize
					if n > 4*xts.SectorSizeMax || name == "portable" && sectors > 1 && n > 1<<14 {
						continue
					}
					// The last one wraps around 2^64 in the middle.
					for _, iv := range []uint64{0, 1<<32 - 3, math.MaxUint64 - 5} {
						src := pattern(n)
						got, want := make([]byte, n), make([]byte, n)
						c.Encrypt(got, src, iv, sectorSize)
						o.Encrypt(want, src, iv, sectorSize)
						if !bytes.Equal(got, want) {
							t.Fatalf("key of %d bytes, %d sectors of %d, iv %d: wrong ciphertext from byte %d on", keySize, sectors, sectorSize, iv, difference(got, want))
						}
						c.Decrypt(got, want, iv, sectorSize)
						if !bytes.Equal(got, src) {
							t.Fatalf("key of %d bytes, %d sectors of %d, iv %d: wrong plaintext from byte %d on", keySize, sectors, sectorSize, iv, difference(got, src))
						}
					}
				}
			}
		}
	})
}

func difference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// TestBuffers checks that output goes exactly where it belongs, from and to any
// address, and that the input is only read.
func TestBuffers(t *testing.T) {
	t.Parallel()
	everyImplementation(t, func(t *testing.T, name string) {
		key := pattern(xts.KeySize256)
		c, o := newCipher(t, name, key), oracleCipher{newOracle(t, key)}
		for _, n := range []int{512, 8 * 512, 9 * 512} {
			src := pattern(n)
			want := make([]byte, n)
			o.Encrypt(want, src, 7, 512)
			for _, at := range []int{0, 1, 8, 15, 31, 63} {
				from := make([]byte, n+128)
				copy(from[at:], src)
				before := bytes.Clone(from)
				to := bytes.Repeat([]byte{0xEE}, n+256)
				c.Encrypt(to[64-at:], from[at:at+n], 7, 512) // dst is longer than src
				if !bytes.Equal(to[64-at:64-at+n], want) {
					t.Errorf("%d bytes, from %d on: wrong output", n, at)
				}
				if !bytes.Equal(from, before) {
					t.Errorf("%d bytes, from %d on: the input was changed", n, at)
				}
				for i, b := range to {
					if (i < 64-at || i >= 64-at+n) && b != 0xEE {
						t.Fatalf("%d bytes, from %d on: byte %d outside the output was changed", n, at, i-64+at)
					}
				}
				c.Encrypt(from[at:at+n], from[at:at+n], 7, 512)
				if !bytes.Equal(from[at:at+n], want) {
					t.Errorf("%d bytes, from %d on: wrong output in place", n, at)
				}
			}
			// Neighbours in one buffer do not overlap.
			both := append(bytes.Clone(src), make([]byte, n)...)
			c.Encrypt(both[n:], both[:n], 7, 512)
			if !bytes.Equal(both[n:], want) || !bytes.Equal(both[:n], src) {
				t.Errorf("%d bytes beside each other: wrong output", n)
			}
		}
	})
}

func TestPanics(t *testing.T) {
	t.Parallel()
	everyImplementation(t, func(t *testing.T, name string) {
		c := newCipher(t, name, pattern(xts.KeySize256))
		closed := newCipher(t, name, pattern(xts.KeySize256))
		closed.Close()
		b := make([]byte, 4096)
		for _, test := range []struct {
			what       string
			c          *xts.Cipher
			dst, src   []byte
			sectorSize int
		}{
			{"no sector size", c, b, b, 0},
			{"a negative sector size", c, b, b, -512},
			{"a small sector size", c, b, b, 256},
			{"a sector size that is no power of two", c, make([]byte, 1536), make([]byte, 1536), 1536},
			{"a large sector size", c, make([]byte, 131072), make([]byte, 131072), 131072},
			{"half a sector", c, b, b[:256], 512},
			{"one byte more than a sector", c, b, b[:513], 512},
			{"sectors of another size", c, b, b[:512], 4096},
			{"a short output", c, make([]byte, 511), b[:512], 512},
			{"no output", c, nil, b[:512], 512},
			{"an overlap one byte on", c, b[1:], b[:512], 512},
			{"an overlap one byte before", c, b[:1024], b[1:1025], 512},
			{"an overlap of the last byte", c, b[511:], b[:512], 512},
			{"an overlap by one sector", c, b[512:2048], b[:1536], 512},
			{"a closed cipher", closed, b, b, 512},
			{"a closed cipher and nothing to do", closed, nil, nil, 512},
		} {
			for op, f := range map[string]func(dst, src []byte, iv uint64, sectorSize int){
				"Encrypt": test.c.Encrypt, "Decrypt": test.c.Decrypt,
			} {
				func() {
					defer func() {
						if recover() == nil {
							t.Errorf("%s does not panic with %s", op, test.what)
						}
					}()
					f(test.dst, test.src, 0, test.sectorSize)
				}()
			}
		}
		if !bytes.Equal(b, make([]byte, 4096)) {
			t.Error("a call that panicked has written")
		}
		c.Encrypt(nil, nil, 0, 512) // nothing to do is no mistake
		c.Decrypt(b, nil, 0, 65536)
	})
}

func TestKeys(t *testing.T) {
	t.Parallel()
	everyImplementation(t, func(t *testing.T, name string) {
		for _, n := range []int{1, 16, 31, 33, 48, 63, 65, 128} {
			if c, err := xts.NewWith(name, takeKey(t, pattern(n))); !errors.Is(err, xts.ErrKeySize) || c != nil {
				t.Errorf("a key of %d bytes: %v, %v; want ErrKeySize", n, c, err)
			}
		}
		for _, half := range []int{16, 32} {
			equal := slices.Repeat(pattern(half), 2)
			if c, err := xts.NewWith(name, takeKey(t, equal)); !errors.Is(err, xts.ErrEqualHalves) || c != nil {
				t.Errorf("a key with equal halves of %d bytes: %v, %v; want ErrEqualHalves", half, c, err)
			}
			equal[2*half-1] ^= 1
			if _, err := xts.NewWith(name, takeKey(t, equal)); err != nil {
				t.Errorf("a key with halves that differ in one bit: %v", err)
			}
		}

		// The key may go at once.
		k := takeKey(t, pattern(xts.KeySize256))
		c, err := xts.NewWith(name, k)
		if err != nil {
			t.Fatal(err)
		}
		k.Close()
		got, want := make([]byte, 512), make([]byte, 512)
		c.Encrypt(got, want, 0, 512)
		oracleCipher{newOracle(t, pattern(xts.KeySize256))}.Encrypt(want, want, 0, 512)
		if !bytes.Equal(got, want) {
			t.Error("the cipher needs its key after New")
		}
		for range 2 {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	if c, err := xts.NewWith("rot13", takeKey(t, pattern(xts.KeySize256))); !errors.Is(err, xts.ErrImplementation) || c != nil {
		t.Errorf("NewWith an unknown name: %v, %v; want ErrImplementation", c, err)
	}
}

func TestNewTakesTheFastest(t *testing.T) {
	t.Parallel()
	c, err := xts.New(takeKey(t, pattern(xts.KeySize256)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, want := c.Implementation(), xts.Implementations()[0]; got != want {
		t.Errorf("New takes %s, want %s", got, want)
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	everyImplementation(t, func(t *testing.T, name string) {
		key := pattern(xts.KeySize256)
		c := newCipher(t, name, key)
		src, want := pattern(4096), make([]byte, 4096)
		oracleCipher{newOracle(t, key)}.Encrypt(want, src, 3, 512)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				b := make([]byte, 4096)
				for range 20 {
					c.Encrypt(b, src, 3, 512)
					if !bytes.Equal(b, want) {
						t.Error("wrong ciphertext")
						return
					}
					c.Decrypt(b, b, 3, 512)
					if !bytes.Equal(b, src) {
						t.Error("wrong plaintext")
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// TestNoAllocation is not parallel: testing.AllocsPerRun counts the whole
// process.
func TestNoAllocation(t *testing.T) {
	for _, name := range xts.Implementations() {
		c := newCipher(t, name, pattern(xts.KeySize256))
		b := make([]byte, 4096)
		if n := testing.AllocsPerRun(10, func() {
			var onStack [512]byte
			c.Encrypt(b, b, 1, 512)
			c.Decrypt(b, b, 1, 4096)
			c.Encrypt(onStack[:], b[:512], 1, 512)
		}); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func FuzzImplementations(f *testing.F) {
	f.Add(pattern(64), uint64(0), uint8(0), uint8(8), []byte("seed"))
	f.Add(pattern(32), uint64(math.MaxUint64), uint8(3), uint8(3), []byte{})
	f.Add(pattern(64), uint64(1)<<63, uint8(0), uint8(17), pattern(100))
	f.Fuzz(func(t *testing.T, key []byte, iv uint64, shift, sectors uint8, data []byte) {
		k := make([]byte, 64)
		copy(k, key)
		if len(key)%2 == 1 {
			k = k[:32]
		}
		half := len(k) / 2
		if bytes.Equal(k[:half], k[half:]) {
			k[0] ^= 1
		}
		sectorSize := 512 << (shift % 8)
		n := min(int(sectors)*sectorSize, 1<<16)
		src := pattern(n)
		for i := range data {
			if i < n {
				src[(i*37)%n] ^= data[i]
			}
		}
		want, plain := make([]byte, n), make([]byte, n)
		o := oracleCipher{newOracle(t, k)}
		o.Encrypt(want, src, iv, sectorSize)
		o.Decrypt(plain, src, iv, sectorSize)
		for _, name := range xts.Implementations() {
			c := newCipher(t, name, k)
			got := bytes.Clone(src)
			c.Encrypt(got, got, iv, sectorSize)
			if !bytes.Equal(got, want) {
				t.Fatalf("%s: wrong ciphertext from byte %d on", name, difference(got, want))
			}
			c.Decrypt(got, got, iv, sectorSize)
			if !bytes.Equal(got, src) {
				t.Fatalf("%s: wrong plaintext from byte %d on", name, difference(got, src))
			}
			c.Decrypt(got, src, iv, sectorSize)
			if !bytes.Equal(got, plain) {
				t.Fatalf("%s: wrong inverse from byte %d on", name, difference(got, plain))
			}
		}
	})
}

func BenchmarkCipher(b *testing.B) {
	for _, name := range xts.Implementations() {
		c := newCipher(b, name, pattern(xts.KeySize256))
		for _, n := range []int{512, 4096, 65536} {
			buf := make([]byte, n)
			b.Run(fmt.Sprint(name, "/encrypt/", n), func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					c.Encrypt(buf, buf, 1, 512)
				}
			})
			b.Run(fmt.Sprint(name, "/decrypt/", n), func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					c.Decrypt(buf, buf, 1, 512)
				}
			})
		}
	}
}
