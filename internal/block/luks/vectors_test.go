package luks_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"

	"strongroom/internal/block/luks"
)

// vectors is testdata/vectors.json, made by vectors.py.
type vectors struct {
	Headers []struct {
		Name       string
		UUID       string
		Label      string
		Seqid      uint64
		Offset     int64
		SectorSize int `json:"sector_size"`
		DEK        string
		Safe       string
		Binary     [2]string // the first 512 bytes of each copy
		Metadata   string
		SHA256     [2]string // of each whole copy
	}
	Splitters []struct {
		Hash string
		Key  string
	}
}

func readVectors(t *testing.T) vectors {
	t.Helper()
	text, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func fromHex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestHeaderVectors(t *testing.T) {
	t.Parallel()
	for _, v := range readVectors(t).Headers {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			size := v.Offset + 4096
			start := make([]byte, 2*headerSize)
			for c := range v.Binary {
				one := start[c*headerSize : (c+1)*headerSize]
				copy(one, fromHex(t, v.Binary[c]))
				copy(one[4096:], v.Metadata)
				if sum := sha256.Sum256(one); hex.EncodeToString(sum[:]) != v.SHA256[c] {
					t.Fatalf("copy %d of the vector is put together wrongly", c)
				}
				encoded, err := luks.DecodeAndEncode(one, luks.Copy(c))
				if err != nil || !bytes.Equal(encoded, one) {
					t.Errorf("copy %d is not written as it was read: %v", c, err)
				}
			}
			h, err := luks.Read(padded(start, int(size)), size)
			if err != nil {
				t.Fatal(err)
			}
			if h.UUID() != v.UUID || h.Label() != v.Label || h.Seqid() != v.Seqid || len(h.Damaged()) != 0 {
				t.Errorf("reads as UUID %q, label %q, seqid %d, damaged %v", h.UUID(), h.Label(), h.Seqid(), h.Damaged())
			}
			if s, err := h.Segment(); err != nil || s != (luks.Segment{Offset: v.Offset, SectorSize: v.SectorSize}) {
				t.Errorf("Segment() = %+v, %v", s, err)
			}
			if err := h.VerifyKey(newKey(t, string(fromHex(t, v.DEK)))); err != nil {
				t.Error(err)
			}
			safes, err := h.Safes()
			if err != nil {
				t.Fatal(err)
			}
			if v.Safe == "" && len(safes) != 0 || v.Safe != "" && (len(safes) != 1 || string(safes[0].Encode()) != v.Safe) {
				t.Errorf("Safes() = %v, want %s", safes, v.Safe)
			}
		})
	}
}

func TestSplitterVectors(t *testing.T) {
	t.Parallel()
	for _, v := range readVectors(t).Splitters {
		want := fromHex(t, v.Key)
		stripes, key := make([]byte, luks.AFStripes*len(want)), make([]byte, len(want))
		for i := range stripes {
			stripes[i] = byte((i*i*7 + i) % 251)
		}
		if err := luks.AFMerge(key, stripes, v.Hash); err != nil || !bytes.Equal(key, want) {
			t.Errorf("%s, %d bytes: %x, %v; want %x", v.Hash, len(want), key, err, want)
		}
	}
}
