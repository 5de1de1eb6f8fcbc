package image

import (
	"encoding/binary"
	"testing"
)

// newHeader returns the header of an image of version 3 with a disk of 1 MiB.
func newHeader() []byte {
	h := make([]byte, headerSizeV3)
	copy(h, magic)
	binary.BigEndian.PutUint32(h[offVersion:], 3)
	binary.BigEndian.PutUint32(h[offClusterBits:], 16)
	binary.BigEndian.PutUint64(h[offSize:], 1<<20)
	return h
}

func TestParseRounds(t *testing.T) {
	t.Parallel()
	for given, want := range map[uint64]int64{1: 512, 511: 512, 512: 512, 513: 1024, 1 << 62: 1 << 62} {
		h := newHeader()
		binary.BigEndian.PutUint64(h[offSize:], given)
		if got, err := parse(h); err != nil || got != want {
			t.Errorf("a disk of %d bytes: %d, %v; want %d", given, got, err, want)
		}
	}
}

// FuzzParse: what is accepted refers to nothing, and its size can be used.
func FuzzParse(f *testing.F) {
	f.Add(newHeader())
	f.Add(newHeader()[:headerSizeV2])
	f.Add([]byte(magic))
	backed := newHeader()
	backed[offBacking+7] = 200
	f.Add(backed)
	f.Fuzz(func(t *testing.T, header []byte) {
		size, err := parse(header)
		switch {
		case err != nil && size != 0:
			t.Error("a size beside an error")
		case err == nil && (size <= 0 || size%SectorSize != 0):
			t.Errorf("size %d", size)
		case err == nil && binary.BigEndian.Uint64(header[offBacking:]) != 0:
			t.Error("an image with a backing file was accepted")
		case err == nil && binary.BigEndian.Uint32(header[offVersion:]) == 3 && header[offFeatures+7]&featureDataFile != 0:
			t.Error("an image with a data file was accepted")
		}
	})
}
