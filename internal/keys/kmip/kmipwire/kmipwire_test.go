package kmipwire

import (
	"bytes"
	"errors"
	"testing"

	"github.com/ovh/kmip-go"
	_ "github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

var limits = Limits{Message: 1 << 16, Depth: 8, Values: 200}

// FuzzRead checks that what passes decodes to values that encode to the same
// bytes, and that an error comes without a message.
func FuzzRead(f *testing.F) {
	m := kmip.NewRequestMessage(kmip.V1_4, kmip.NewUnknownPayload(kmip.OperationQuery, ttlv.Value{Tag: kmip.TagQueryFunction, Value: ttlv.Enum(1)}))
	f.Add(ttlv.MarshalTTLV(&m))
	f.Add([]byte{0x42, 0, 0x78, 1, 0, 0, 0, 8, 0x42, 0, 0x6a, 2, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		message, err := Read(bytes.NewReader(in), kmip.TagRequestMessage, limits)
		if err != nil {
			if message != nil {
				t.Error("an error came with a message")
			}
			return
		}
		d, err := ttlv.NewTTLVDecoder(message)
		if err != nil {
			t.Fatal(err)
		}
		var v ttlv.Value
		if err := v.DecodeTTLV(&d); err != nil {
			t.Fatal(err)
		}
		if hasBigInteger(v) {
			return // may have leading sign bytes that the codec leaves out
		}
		if again := ttlv.MarshalTTLV(&v); !bytes.Equal(again, message) {
			t.Errorf("got %x, want %x", again, message)
		}
	})
}

func hasBigInteger(v ttlv.Value) bool {
	switch value := v.Value.(type) {
	case ttlv.Struct:
		for _, f := range value {
			if hasBigInteger(f) {
				return true
			}
		}
	case string, []byte, int32, int64, bool, ttlv.Enum:
	default:
		return true // dates and intervals beyond the range of Go's, too
	}
	return false
}

func TestReadAllocatesNotWhatIsPromised(t *testing.T) {
	header := []byte{0x42, 0, 0x78, 1, 0, 0x10, 0, 0}
	allocated := testing.Benchmark(func(b *testing.B) {
		for range b.N {
			if _, err := Read(bytes.NewReader(header), kmip.TagRequestMessage, Limits{Message: 64 << 20, Depth: 8, Values: 9}); err == nil {
				b.Fatal("a header alone was taken for a message")
			}
		}
	}).AllocedBytesPerOp()
	if allocated > 16<<10 {
		t.Errorf("a header that promises a megabyte made us allocate %d bytes", allocated)
	}
	if _, err := Read(bytes.NewReader(header), kmip.TagResponseMessage, limits); !errors.Is(err, ErrMalformed) {
		t.Errorf("a wrong tag: %v", err)
	}
}
