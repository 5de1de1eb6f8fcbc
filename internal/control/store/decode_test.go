package store

import (
	"errors"
	"testing"
)

// FuzzDecode feeds stored bytes that a damaged or foreign database could hold.
func FuzzDecode(f *testing.F) {
	type rec struct {
		Name string   `json:"name"`
		List []string `json:"list"`
	}
	t := NewTable[rec](nil, "t", 2)
	good, err := t.encode("k", rec{Name: "n", List: []string{"a", "b"}})
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{good, "", "{}", `{"schema":1,"data":{}}`, `{"schema":3,"data":{}}`, `{"schema":1}`, `{"schema":1,"data":[]}`, `[1`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(tt *testing.T, b []byte) {
		v, err := t.decode(t.prefix+"k", b)
		if err != nil {
			if v.Name != "" || v.List != nil {
				tt.Errorf("value with an error: %+v", v)
			}
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewerSchema) {
				tt.Errorf("error is neither: %v", err)
			}
			return
		}
		enc, err := t.encode("k", v)
		if errors.Is(err, ErrTooLarge) {
			return // escapes may make it longer
		}
		if err != nil {
			tt.Fatal(err)
		}
		again, err := t.decode(t.prefix+"k", []byte(enc))
		if err != nil {
			tt.Fatal(err)
		}
		enc2, err := t.encode("k", again)
		if err != nil || enc2 != enc {
			tt.Errorf("encoding is not stable: %q, %q, %v", enc, enc2, err)
		}
	})
}
