package objectstore

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/keys/kmip/kmipserver"
)

const (
	vectorAccount = "a"
	vectorID      = "00000000-0000-7000-8000-000000000001"
)

// specBytes returns the bytes of the indented lines behind some text.
func specBytes(t testing.TB, file, after string) []byte {
	t.Helper()
	text, err := os.ReadFile("../../../../docs/spec/" + file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), after)
	digits, _, _ := strings.Cut(strings.TrimLeft(rest, "\n"), "\n\n")
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

const (
	vector1 = "that is pre-active.\n"
	vector2 = "in this order:\n"
)

func TestVector(t *testing.T) {
	t.Parallel()
	want := map[string][]kmip.Attribute{
		vector1: {{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StatePreActive}},
		vector2: {
			{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "web-1", NameType: kmip.NameTypeUninterpretedTextString}},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(128)},
			{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StatePreActive},
			{AttributeName: kmip.AttributeNameLeaseTime, AttributeValue: time.Hour},
			{AttributeName: kmip.AttributeNameFresh, AttributeValue: true},
			{AttributeName: kmip.AttributeNameInitialDate, AttributeValue: time.Unix(1800000000, 0)},
			{AttributeName: "x-p", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: int32(7)}},
		},
	}
	for after, attributes := range want {
		record := specBytes(t, "kms-object.md", after)
		o, epoch, err := unseal(vectorRing(t), vectorAccount, vectorID, record)
		if err != nil {
			t.Fatal(err)
		}
		defer o.Material.Close()
		if epoch != 5 || o.Type != kmip.ObjectTypeSymmetricKey || o.Layout.Algorithm != kmip.CryptographicAlgorithmAES || o.Layout.Length != 128 ||
			!bytes.Equal(o.Material.Bytes(), bytes.Repeat([]byte{0xff}, 16)) || !reflect.DeepEqual(o.Attributes, attributes) {
			t.Errorf("%s: epoch %d, %+v", after, epoch, o)
		}
		clear, err := clearPart(o, epoch)
		if err != nil || after == vector2 && !bytes.Equal(clear, record[:len(clear)]) {
			t.Error("the encoding is not that of the specification")
		}
	}
	bucket, hash := place(vectorAccount, "web-1")
	if stored := specBytes(t, "kms-object.md", "stands in bucket `"+bucket+"`:\n"); !bytes.Equal(stored[1:], entryOf(hash, vectorID)) || checkBucket(bucket, stored) != nil {
		t.Errorf("%x", stored)
	}
}

// TestAttributes has attributes of every kind come back as they were, with a code or
// without, as they do in TTLV.
func TestAttributes(t *testing.T) {
	t.Parallel()
	one, at := int32(1), time.Unix(1_800_000_000, 0)
	list := []kmip.Attribute{
		{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "ä/1", NameType: kmip.NameTypeUri}},
		{AttributeName: kmip.AttributeNameName, AttributeIndex: &one, AttributeValue: kmip.Name{NameValue: "2", NameType: kmip.NameTypeUri}},
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(-1)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageMask(-1)},
		{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateDestroyedCompromised},
		{AttributeName: kmip.AttributeNameLeaseTime, AttributeValue: time.Duration(math.MaxUint32) * time.Second},
		{AttributeName: kmip.AttributeNameFresh, AttributeValue: false},
		{AttributeName: kmip.AttributeNameDigest, AttributeValue: kmip.Digest{HashingAlgorithm: kmip.HashingAlgorithmSHA_256, DigestValue: []byte{1, 2}, KeyFormatType: kmip.KeyFormatTypeRaw}},
		{AttributeName: kmip.AttributeNameDigest, AttributeIndex: &one, AttributeValue: kmip.Digest{HashingAlgorithm: kmip.HashingAlgorithmMD5, DigestValue: []byte{}}},
		{AttributeName: kmip.AttributeNameObjectGroup, AttributeValue: "g"},
		{AttributeName: kmip.AttributeNameContactInformation, AttributeValue: "c"},
		{AttributeName: kmip.AttributeNameSensitive, AttributeValue: true},
		{AttributeName: kmip.AttributeNameLink, AttributeValue: kmip.Link{LinkType: kmip.LinkTypeReplacedObjectLink, LinkedObjectIdentifier: vectorID}},
		{AttributeName: "x-text", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: "label"}},
		{AttributeName: "x-date", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: at}},
		{AttributeName: "x-number", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: int32(5)}},
		{AttributeName: "x-flag", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: true}},
		{AttributeName: "x-time", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: time.Minute}},
	}
	for _, name := range dates {
		list = append(list, kmip.Attribute{AttributeName: name, AttributeValue: at}, kmip.Attribute{AttributeName: name, AttributeValue: time.Unix(-1, 0)})
	}
	got, err := parseAttributes(appendAttributes(nil, list))
	if err != nil {
		t.Fatal(err)
	}
	enc := ttlv.NewTTLVEncoder()
	for _, a := range list {
		enc.TagAny(kmip.TagAttribute, a)
	}
	old, err := decodeAttributes(enc.Bytes())
	if err != nil || !reflect.DeepEqual(got, old) || !reflect.DeepEqual(got, list) {
		t.Errorf("%v\nin place of %v\nin TTLV %v, %v", got, list, old, err)
	}
	for _, bad := range []string{"00", "0001", "02", "0280", "07", "0702", "15", "ff", "0101", "010105", "02ffffffff10", "0affffffffffffffffff7f", "080101ff"} {
		b, _ := hex.DecodeString(bad)
		if list, err := parseAttributes(b); !errors.Is(err, errCorrupt) {
			t.Errorf("%s: %v, %v", bad, list, err)
		}
	}
}

// TestLayout has come back what only some types of objects have.
func TestLayout(t *testing.T) {
	t.Parallel()
	for _, want := range []kmipserver.Object{
		{Type: kmip.ObjectTypePGPKey, Layout: kmipserver.Layout{Format: kmip.KeyFormatTypeRaw, Algorithm: kmip.CryptographicAlgorithmRSA, Length: 2048, PGPVersion: 4}},
		{Type: kmip.ObjectTypeSecretData, Layout: kmipserver.Layout{Format: kmip.KeyFormatTypeRaw, SecretType: kmip.SecretDataTypeSeed}},
		{Type: kmip.ObjectTypeSplitKey, Layout: kmipserver.Layout{
			Format: kmip.KeyFormatTypeRaw, Algorithm: kmip.CryptographicAlgorithmAES, Length: 256,
			Part: kmipserver.Part{Parts: 255, ID: 7, Threshold: 3, Method: kmip.SplitKeyMethodPolynomialSharingGF28},
		}},
	} {
		clear, err := clearPart(&want, 5)
		if err != nil {
			t.Fatal(err)
		}
		if o, err := parseClear(clear); err != nil || o.Type != want.Type || o.Layout != want.Layout {
			t.Errorf("%+v, %v, want %+v", o, err, want)
		}
	}
	// A type that is not known is never taken for another.
	clear, err := clearPart(&kmipserver.Object{Type: kmip.ObjectTypePGPKey + 1}, 5)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseClear(clear); !errors.Is(err, errVersion) {
		t.Errorf("an object of a newer release: %v", err)
	}
}

// FuzzRecord gives the parser what authentication would have to vouch for.
func FuzzRecord(f *testing.F) {
	for _, vector := range []string{vector1, vector2} {
		good := specBytes(f, "kms-object.md", vector)
		f.Add(good)
		for _, at := range []int{0, 15, 23, 51, 59, 60, 61, 70, 80} {
			bad := bytes.Clone(good)
			bad[at] ^= 0x41
			f.Add(bad)
		}
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
