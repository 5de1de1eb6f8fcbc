package sealed

import (
	"bytes"
	"testing"

	"strongroom/internal/crypto/keymem/keymemtest"
)

func TestSealBytes(t *testing.T) {
	t.Parallel()
	key, other := keymemtest.Random(t, KeySize), keymemtest.Random(t, KeySize)
	for _, plaintext := range [][]byte{nil, []byte("text"), bytes.Repeat([]byte("x"), 200_000)} {
		text, err := Seal(key, "test", plaintext)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Open(key, "test", text)
		if err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes: %d come back, %v", len(plaintext), len(got), err)
		}
		if cap(got) != len(got) {
			t.Errorf("%d bytes come back in room for %d: copies that nobody wipes were made on the way", len(got), cap(got))
		}
		if _, err := Open(other, "test", text); err == nil {
			t.Error("another key opens it")
		}
		if _, err := Open(key, "another", text); err == nil {
			t.Error("it opens in another context")
		}
		text[len(text)-1] ^= 1
		if got, err := Open(key, "test", text); err == nil || got != nil {
			t.Errorf("of a changed text %d bytes are returned, %v", len(got), err)
		}
	}
}
