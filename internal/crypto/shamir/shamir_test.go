package shamir

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

func key(t testing.TB, b []byte) *keymem.Key {
	t.Helper()
	k, err := keymem.Take(bytes.Clone(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// slowMul is multiplication by the definition: polynomials, then the remainder.
func slowMul(f Field, a, b uint8) uint8 {
	var p uint16
	for i := range 8 {
		if b>>i&1 == 1 {
			p ^= uint16(a) << i
		}
	}
	for i := 15; i >= 8; i-- {
		if p>>i&1 == 1 {
			p ^= (0x100 | uint16(f)) << (i - 8)
		}
	}
	return uint8(p)
}

func TestField(t *testing.T) {
	t.Parallel()
	for _, f := range []Field{AES, KMIP} {
		for a := range 256 {
			for b := range 256 {
				if got, want := f.mul(uint8(a), uint8(b)), slowMul(f, uint8(a), uint8(b)); got != want {
					t.Fatalf("%02x: %02x * %02x = %02x, want %02x", f, a, b, got, want)
				}
			}
			if a > 0 && f.mul(uint8(a), f.inverse(uint8(a))) != 1 {
				t.Fatalf("%02x: 1/%02x is wrong", f, a)
			}
		}
	}
	if AES.mul(0x57, 0x83) != 0xc1 { // FIPS 197, 4.2
		t.Error("57 * 83 is not c1")
	}
}

// The vectors of docs/spec/shamir.md.
const (
	vectorSecret       = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	vectorCoefficients = "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f" +
		"404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"
)

var vectorShares = []struct{ value, text string }{
	{
		"606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f",
		"srshare-1-A6BY6UAD-AFQGCYTD-MRSWMZ3I-NFVGW3DN-NZXXA4LS-ON2HK5TX-PB4XU634-PV7H7VNN-JANA",
	},
	{
		"5b5c55524740494e63646d6a7f7871762b2c25223730393e13141d1a0f080106",
		"srshare-1-A6BY6UAD-AJNVYVKS-I5AESTTD-MRWWU73Y-OF3CWLBF-EI3TAOJ6-CMKB2GQP-BAAQMOLE-A46Q",
	},
	{
		"3b3c35322720292e03040d0a1f1811164b4c45425750595e73747d7a6f686166",
		"srshare-1-A6BY6UAD-AM5TYNJS-E4QCSLQD-AQGQUHYY-CELEWTCF-IJLVAWK6-ON2H26TP-NBQWMF5M-6FAQ",
	},
}

func TestVectors(t *testing.T) {
	t.Parallel()
	secret := key(t, unhex(t, vectorSecret))
	shares, err := AES.split(secret, key(t, unhex(t, vectorCoefficients)), [4]byte{0x07, 0x83, 0x8f, 0x50}, 3, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(shares)
	for i, s := range shares {
		want := vectorShares[i]
		// By the definition, not by Horner and mul.
		for j := range secret.Len() {
			x := uint8(i + 1)
			y := unhex(t, vectorSecret)[j] ^ slowMul(AES, unhex(t, vectorCoefficients)[j], x) ^ slowMul(AES, unhex(t, vectorCoefficients)[32+j], slowMul(AES, x, x))
			if s.Value.Bytes()[j] != y {
				t.Fatalf("share %d, byte %d: %02x, want %02x", i+1, j, s.Value.Bytes()[j], y)
			}
		}
		if got := hex.EncodeToString(s.Value.Bytes()); got != want.value {
			t.Errorf("share %d is %s", i+1, got)
		}
		text, err := s.Text()
		if err != nil {
			t.Fatal(err)
		}
		defer text.Close()
		if string(text.Bytes()) != want.text {
			t.Errorf("text of share %d is %s", i+1, text.Bytes())
		}
	}
}

// TestSplitCombine splits random secrets and combines any threshold of shares,
// by way of their texts.
func TestSplitCombine(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		secret, err := keymem.Take(rapid.SliceOfN(rapid.Byte(), 1, 64).Draw(r, "secret"))
		if err != nil {
			r.Fatal(err)
		}
		defer secret.Close()
		threshold := rapid.IntRange(2, 8).Draw(r, "threshold")
		count := rapid.IntRange(threshold, 12).Draw(r, "shares")
		field := rapid.SampledFrom([]Field{AES, KMIP}).Draw(r, "field")
		shares, err := field.Split(secret, threshold, count)
		if err != nil {
			r.Fatal(err)
		}
		defer Close(shares)
		order := rapid.Permutation(shares).Draw(r, "order")
		var read []Share
		for _, s := range order[:rapid.IntRange(threshold, count).Draw(r, "given")] {
			text, err := s.Text()
			if err != nil {
				r.Fatal(err)
			}
			again, err := Parse(bytes.ToLower(text.Bytes()))
			text.Close()
			if err != nil {
				r.Fatal(err)
			}
			defer again.Value.Close()
			read = append(read, again)
		}
		got, err := field.Combine(read)
		if err != nil {
			r.Fatal(err)
		}
		defer got.Close()
		if !got.Equal(secret) {
			r.Fatal("the shares gave another secret")
		}
	})
}

// TestTooFewTellNothing: for one share fewer than the threshold every secret is
// possible, each by exactly one polynomial.
func TestTooFewTellNothing(t *testing.T) {
	t.Parallel()
	shares, err := AES.Split(key(t, []byte{0x5a}), 2, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(shares)
	x, y := shares[0].Point, shares[0].Value.Bytes()[0]
	for secret := range 256 {
		c := AES.mul(y^uint8(secret), AES.inverse(x))
		if uint8(secret)^AES.mul(c, x) != y {
			t.Fatalf("secret %02x is not possible", secret)
		}
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	secret := key(t, []byte("a secret"))
	for _, c := range [][2]int{{0, 1}, {1, 3}, {3, 2}, {2, 256}, {-1, 5}} {
		if _, err := AES.Split(secret, c[0], c[1]); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%d of %d: %v", c[0], c[1], err)
		}
	}
	if _, err := AES.Split(key(t, make([]byte, SecretMax+1)), 2, 3); errs.KindOf(err) != errs.Invalid {
		t.Errorf("too long: %v", err)
	}
	a, err := AES.Split(secret, 2, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(a)
	b, err := AES.Split(secret, 2, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(b)
	for name, shares := range map[string][]Share{
		"none": nil, "too few": a[:1], "twice the same": {a[0], a[0]}, "of two sets": {a[0], b[1]},
	} {
		if got, err := AES.Combine(shares); !errors.Is(err, ErrMismatch) || got != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMistakes: every letter that is changed, and every one left out, is noticed.
func TestMistakes(t *testing.T) {
	t.Parallel()
	shares, err := AES.Split(key(t, unhex(t, vectorSecret)), 2, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(shares)
	text, err := shares[0].Text()
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	for i, c := range text.Bytes() {
		if i < len(prefix) || c == '-' {
			continue
		}
		changed := bytes.Clone(text.Bytes())
		changed[i] = 'A'
		if c == 'A' {
			changed[i] = 'B'
		}
		left := append(bytes.Clone(text.Bytes()[:i]), text.Bytes()[i+1:]...)
		for _, wrong := range [][]byte{changed, left} {
			if s, err := Parse(wrong); errs.KindOf(err) != errs.Invalid || s.Value != nil {
				t.Fatalf("letter %d wrong: %v", i, err)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, v := range vectorShares {
		f.Add([]byte(v.text))
	}
	f.Add([]byte("srshare-1-"))
	f.Add([]byte("srshare-1-AAAA AAAA-aaaa"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Parse(text)
		if err != nil {
			if s.Value != nil {
				t.Error("a share beside an error")
			}
			return
		}
		defer s.Value.Close()
		again, err := s.Text()
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		clean := func(b []byte) string {
			b = bytes.ReplaceAll(bytes.ReplaceAll(bytes.ToUpper(bytes.TrimSpace(b)), []byte("-"), nil), []byte(" "), nil)
			return string(b)
		}
		if got, want := clean(again.Bytes()), clean(text); got != want {
			t.Errorf("read and written again it is %s, was %s", got, want)
		}
	})
}

// TestKMIP has the parts of OASIS TC-SJ-2-12.
func TestKMIP(t *testing.T) {
	t.Parallel()
	secret := unhex(t, "0102030405060708090a0b0c0d0e0f10")
	var shares []Share
	for i, part := range []string{
		"66c46a7754f94de420c7b1a7fff5ec56", "cf93d1e2a7e593cd5b8d6247f4e5d49c",
		"a855b891f61ad9217240d8ec061e37da", "803dbad55cdd329fad19d99ae2c5a415",
	} {
		shares = append(shares, Share{Threshold: 2, Point: uint8(i + 1), Value: key(t, unhex(t, part))})
	}
	for i := range shares {
		for j := range i {
			got, err := KMIP.Combine([]Share{shares[i], shares[j]})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), secret) {
				t.Errorf("parts %d and %d give %x", i+1, j+1, got.Bytes())
			}
			got.Close()
		}
	}
}
