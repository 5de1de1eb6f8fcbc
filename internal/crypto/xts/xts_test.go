package xts_test

import (
	"bytes"
	"crypto/aes"
	"fmt"
	"math/rand/v2"
	"testing"

	oracle "golang.org/x/crypto/xts"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts"
)

func newCipher(t testing.TB, name string, key []byte) *xts.Cipher {
	t.Helper()
	k, err := keymem.Take(bytes.Clone(key))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	c, err := xts.NewWith(name, k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestOracle(t *testing.T) {
	r := rand.NewChaCha8([32]byte{1})
	for _, n := range []int{32, 64} {
		key := make([]byte, n)
		r.Read(key)
		o, err := oracle.NewCipher(aes.NewCipher, key)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range xts.Implementations() {
			c := newCipher(t, name, key)
			src := make([]byte, 3*4096)
			r.Read(src)
			got := make([]byte, len(src))
			want := make([]byte, len(src))
			for _, ss := range []int{512, 4096} {
				for off := 0; off < len(src); off += ss {
					o.Encrypt(want[off:off+ss], src[off:off+ss], 77+uint64(off/512))
				}
				c.Encrypt(got, src, 77, ss)
				if !bytes.Equal(got, want) {
					t.Fatal(name, n, ss, "differs")
				}
				c.Decrypt(got, got, 77, ss)
				if !bytes.Equal(got, src) {
					t.Fatal(name, n, ss, "decrypt differs")
				}
			}
		}
	}
}

func BenchmarkCipher(b *testing.B) {
	key := make([]byte, 64)
	key[0] = 1
	for _, name := range xts.Implementations() {
		c := newCipher(b, name, key)
		for _, n := range []int{512, 4096, 65536} {
			buf := make([]byte, n)
			b.Run(fmt.Sprint(name, "/encrypt/", n), func(b *testing.B) {
				b.SetBytes(int64(n))
				for b.Loop() {
					c.Encrypt(buf, buf, 1, 512)
				}
			})
			b.Run(fmt.Sprint(name, "/decrypt/", n), func(b *testing.B) {
				b.SetBytes(int64(n))
				for b.Loop() {
					c.Decrypt(buf, buf, 1, 512)
				}
			})
		}
	}
}
