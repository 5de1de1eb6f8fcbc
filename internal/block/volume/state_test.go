package volume_test

import (
	"bytes"
	"crypto/aes"
	"fmt"
	"sync"
	"testing"

	"golang.org/x/crypto/xts"
	"pgregory.net/rapid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
)

// oracle decrypts the data of a volume with golang.org/x/crypto/xts and the
// zero rule, independently of this package and of ours for XTS.
func oracle(dek *keymem.Key, data []byte, sector int) ([]byte, error) {
	cipher, err := xts.NewCipher(aes.NewCipher, dek.Bytes())
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(data))
	for off := 0; off < len(data); off += sector {
		if in := data[off : off+sector]; !bytes.Equal(in, make([]byte, sector)) {
			cipher.Decrypt(plain[off:off+sector], in, uint64(off/512))
		}
	}
	return plain, nil
}

// TestStateMachine drives a volume with random requests and compares it with a
// byte slice, and what lies below it with the oracle. A failure prints how to
// replay it.
func TestStateMachine(t *testing.T) {
	t.Parallel()
	dek := keymemtest.Random(t, 64)
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(rt *rapid.T) { stateMachine(t, rt, dek, sector) })
		})
	}
}

func stateMachine(t *testing.T, rt *rapid.T, dek *keymem.Key, sector int) {
	const sizeMax = 320 << 10
	ok := func(err error) {
		if err != nil {
			rt.Fatal(err)
		}
	}
	discards := rapid.Bool().Draw(rt, "allow discards")
	mem := blockdev.NewMemory(0, 512)
	want := make([]byte, int64(rapid.IntRange(1, sizeMax/sector/2).Draw(rt, "sectors"))*int64(sector))
	ok(volume.Format(mem, volume.FormatOptions{
		Size: int64(len(want)), SectorSize: sector, DEK: dek, UUID: testUUID, DataOffset: testOffset, AllowDiscards: discards,
	}))
	v, err := volume.Open(mem, dek, volume.Options{})
	ok(err)
	defer func() { v.Close() }()
	written := map[int]bool{} // sectors whose ciphertext must not be empty
	touch := func(off, n int) {
		for s := off / sector; n > 0 && s <= (off+n-1)/sector; s++ {
			written[s] = true
		}
	}
	span := func(rt *rapid.T) (off, n int) {
		off = rapid.IntRange(0, len(want)).Draw(rt, "offset")
		n = rapid.OneOf(rapid.IntRange(0, 3*sector), rapid.IntRange(0, sizeMax)).Draw(rt, "length")
		if rapid.Bool().Draw(rt, "aligned") {
			off, n = off/sector*sector, n/sector*sector
		}
		return off, min(n, len(want)-off)
	}

	rt.Repeat(map[string]func(*rapid.T){
		"write": func(rt *rapid.T) {
			off, n := span(rt)
			p := pattern(n, rapid.Byte().Draw(rt, "seed"))
			_, err := v.WriteAt(p, int64(off))
			ok(err)
			copy(want[off:], p)
			touch(off, n)
		},
		"read": func(rt *rapid.T) {
			off, n := span(rt)
			got := bytes.Repeat([]byte{0xA5}, n)
			_, err := v.ReadAt(got, int64(off))
			ok(err)
			if !bytes.Equal(got, want[off:off+n]) {
				rt.Fatalf("%d bytes at %d differ", n, off)
			}
		},
		"zero": func(rt *rapid.T) {
			off, n := span(rt)
			ok(v.WriteZeroes(int64(off), int64(n), rapid.Bool().Draw(rt, "may punch")))
			clear(want[off : off+n])
			touch(off, n)
		},
		"discard": func(rt *rapid.T) {
			off, n := span(rt)
			ok(v.Discard(int64(off), int64(n)))
			for s := (off + sector - 1) / sector; discards && (s+1)*sector <= off+n; s++ {
				clear(want[s*sector : (s+1)*sector])
				delete(written, s)
			}
		},
		"together": func(rt *rapid.T) { // pieces that share sectors, each with its own goroutine
			off, n := span(rt)
			piece := rapid.IntRange(1, 2*sector).Draw(rt, "piece")
			p := pattern(n, rapid.Byte().Draw(rt, "seed"))
			var group sync.WaitGroup
			for i := 0; i < n && i < 16*piece; i += piece {
				part := p[i:min(i+piece, n)]
				copy(want[off+i:], part)
				touch(off+i, len(part))
				group.Go(func() {
					if _, err := v.WriteAt(part, int64(off+i)); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
		},
		"resize": func(rt *rapid.T) {
			n := rapid.IntRange(1, sizeMax/sector).Draw(rt, "sectors") * sector
			ok(v.Resize(int64(n)))
			if n > len(want) {
				want = append(want, make([]byte, n-len(want))...)
			}
			for s := range written {
				if s*sector >= n {
					delete(written, s)
				}
			}
			want = want[:n:n]
		},
		"reopen": func(rt *rapid.T) {
			ok(v.Flush())
			ok(v.Close())
			mem = mem.Clone()
			v, err = volume.Open(mem, dek, volume.Options{SizeMin: int64(len(want))})
			ok(err)
		},
		"fill": func(rt *rapid.T) {
			ok(v.Fill(t.Context(), nil))
			touch(0, len(want))
		},
		"oracle": func(rt *rapid.T) {
			raw := make([]byte, len(want))
			_, err := mem.ReadAt(raw, testOffset)
			ok(err)
			got, err := oracle(dek, raw, sector)
			ok(err)
			if !bytes.Equal(got, want) {
				rt.Fatal("the oracle decrypts something else")
			}
		},
		"": func(rt *rapid.T) {
			if v.Size() != int64(len(want)) {
				rt.Fatalf("size %d, want %d", v.Size(), len(want))
			}
			raw := make([]byte, len(want))
			_, err := mem.ReadAt(raw, testOffset)
			ok(err)
			for s := range len(want) / sector {
				if empty := bytes.Equal(raw[s*sector:(s+1)*sector], make([]byte, sector)); empty == written[s] {
					rt.Fatalf("sector %d: written %v, empty below %v", s, written[s], empty)
				}
			}
		},
	})
}
