package sealed

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"testing"

	"strongroom/internal/crypto/keymem/keymemtest"
)

// FuzzReader checks that what opens is the one way to seal its content.
func FuzzReader(f *testing.F) {
	v := loadVectors(f)
	key := keymemtest.Hex(f, v.Files[0].Key)
	for _, refused := range v.Refused {
		file, err := hex.DecodeString(refused.File)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(file)
	}
	f.Add(seal(f, key, nil))
	f.Add(seal(f, key, pattern(100)))
	f.Add(seal(f, key, pattern(SegmentSize+1)))
	f.Fuzz(func(t *testing.T, file []byte) {
		r, err := open(file, key)
		if err != nil {
			if r != nil {
				t.Error("a reader together with an error")
			}
			return
		}
		defer r.Close()
		plain, err := io.ReadAll(r)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
			return
		}
		var again bytes.Buffer
		w, err := newWriter(&again, key, testContext, [saltSize]byte(file[saltOffset:verifyOffset]))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.Bytes(), file) {
			t.Error("seals to other bytes")
		}
	})
}
