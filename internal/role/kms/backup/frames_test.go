package backup

import (
	"bytes"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
)

// FuzzFrames has whatever stands inside a backup, authentic, read: by somebody who
// has its passphrase and makes one.
func FuzzFrames(f *testing.F) {
	key, err := keymem.Random(sealed.KeySize)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { key.Close() })
	about := "\x01\x00\x00\x00\x02{}"
	f.Add([]byte(about + "\x02\x00\x00\x00\x03\x01ak" + "\x03\x00\x00\x00\x04\x00\x01ab" + "\x04\x00\x00\x00\x02{}"))
	f.Add([]byte(about + "\x04\x00\x00\x00\x02{}"))
	f.Add([]byte(about + "\x03\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		text, err := sealed.Seal(key, "fuzz", b)
		if err != nil {
			t.Fatal(err)
		}
		s, err := sealed.NewReader(bytes.NewReader(text), int64(len(text)), key, "fuzz")
		if err != nil {
			t.Fatal(err)
		}
		digest, err := newDigest(key, "")
		if err != nil {
			t.Fatal(err)
		}
		r := &Reader{stream: s, digest: digest, secret: true}
		defer r.Close()
		if r.about() != nil {
			return
		}
		for last := ""; ; {
			item, err := r.Next()
			if err != nil {
				return
			}
			if item.Key != nil {
				item.Key.Close()
				continue
			}
			if item.Record.Name <= last {
				t.Fatalf("%q behind %q", item.Record.Name, last)
			}
			last = item.Record.Name
		}
	})
}
