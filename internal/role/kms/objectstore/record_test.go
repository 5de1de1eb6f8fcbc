package objectstore

import (
	"bytes"
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyring"
)

const (
	vectorAccount = "a"
	vectorID      = "00000000-0000-7000-8000-000000000001"
)

func specBytes(t testing.TB, file, after string) []byte {
	t.Helper()
	text, err := os.ReadFile("../../../../docs/spec/" + file)
	if err != nil {
		t.Fatal(err)
	}
	_, digits, ok := strings.Cut(string(text), after)
	b, err := hex.DecodeString(strings.Join(strings.Fields(digits), ""))
	if !ok || err != nil {
		t.Fatalf("%s has no vector behind %q: %v", file, after, err)
	}
	return b
}

// vectorRing is the ring of docs/spec/kms-keyring.md.
func vectorRing(t testing.TB) *keyring.Ring {
	t.Helper()
	encoded, err := keymem.Take(specBytes(t, "kms-keyring.md", "20 21 .. 3f:\n"))
	if err != nil {
		t.Fatal(err)
	}
	defer encoded.Close()
	ring, err := keyring.Load(encoded, 0, func(*keymem.Key) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ring.Close() })
	return ring
}

func TestVector(t *testing.T) {
	t.Parallel()
	record := specBytes(t, "kms-object.md", "that is pre-active.\n")
	o, epoch, err := unseal(vectorRing(t), vectorAccount, vectorID, record)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Material.Close()
	if epoch != 5 || o.Type != kmip.ObjectTypeSymmetricKey || o.Layout.Algorithm != kmip.CryptographicAlgorithmAES || o.Layout.Length != 128 ||
		!bytes.Equal(o.Material.Bytes(), bytes.Repeat([]byte{0xff}, 16)) || len(o.Attributes) != 1 || o.Attributes[0].AttributeValue != kmip.StatePreActive {
		t.Errorf("epoch %d, %+v", epoch, o)
	}
	clear, err := clearPart(o, epoch)
	if err != nil || !bytes.Equal(clear, record[:len(clear)]) {
		t.Error("the encoding is not that of the specification")
	}
}

// FuzzRecord gives the parser what authentication would have to vouch for.
func FuzzRecord(f *testing.F) {
	good := specBytes(f, "kms-object.md", "that is pre-active.\n")
	f.Add(good)
	for _, at := range []int{0, 15, 23, 51, 59, 70, 80} {
		bad := bytes.Clone(good)
		bad[at] ^= 0x41
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, record []byte) {
		clear, _, epoch, err := split(record)
		if err != nil {
			return
		}
		o, err := parseClear(clear)
		if err != nil {
			return
		}
		again, err := clearPart(o, epoch)
		if err != nil {
			t.Fatal(err)
		}
		second, err := parseClear(again)
		if err != nil {
			t.Fatalf("what was encoded does not parse: %v", err)
		}
		third, err := clearPart(second, epoch)
		if err != nil || !bytes.Equal(third, again) {
			t.Errorf("the encoding is not stable")
		}
	})
}
