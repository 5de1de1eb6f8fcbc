package keyscan_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"strongroom/test/keyscan"
)

// TestFinds hides a key in every form, at awkward places, and wants it found.
func TestFinds(t *testing.T) {
	t.Parallel()
	key := make([]byte, 64)
	rand.Read(key)
	var s keyscan.Scanner
	s.AddKey("DEK", key)
	s.AddMarker("marker", []byte("PLAIN-MARKER"))

	noise := make([]byte, 3<<20)
	rand.Read(noise)
	hide := func(off int, secret []byte) []byte {
		b := bytes.Clone(noise)
		copy(b[off:], secret)
		return b
	}
	forms := map[string][]byte{
		"raw at 0":           hide(0, key),
		"raw across window":  hide(1<<20-20, key),
		"raw at end":         append(bytes.Clone(noise), key...),
		"first half":         hide(12345, key[:32]),
		"second half":        hide(12345, key[32:]),
		"hex":                hide(2<<20-7, []byte(hex.EncodeToString(key))),
		"base64":             hide(777, []byte(base64.StdEncoding.EncodeToString(key))),
		"base64 in a record": hide(777, []byte(base64.StdEncoding.EncodeToString(append([]byte{1, 2}, key...)))),
		"marker":             hide(1<<20-3, []byte("PLAIN-MARKER")),
	}
	for name, content := range forms {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "f"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		found, n, err := s.Tree(dir, 10)
		if err != nil || n != int64(len(content)) {
			t.Errorf("%s: read %d of %d bytes, error %v", name, n, len(content), err)
		}
		if len(found) == 0 {
			t.Errorf("%s: not found", name)
		}
	}
}

func TestCleanTree(t *testing.T) {
	t.Parallel()
	key := make([]byte, 32)
	rand.Read(key)
	var s keyscan.Scanner
	s.AddKey("KEK", key)
	dir := t.TempDir()
	noise := make([]byte, 1<<20+1)
	rand.Read(noise)
	if err := os.WriteFile(filepath.Join(dir, "f"), noise, 0o600); err != nil {
		t.Fatal(err)
	}
	if found, n, err := s.Tree(dir, 10); len(found) > 0 || n != int64(len(noise)) || err != nil {
		t.Errorf("Tree = %v, %d bytes, %v; want nothing in %d bytes", found, n, err, len(noise))
	}
}
