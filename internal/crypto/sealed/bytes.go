package sealed

import (
	"bytes"
	"io"

	"strongroom/internal/crypto/keymem"
)

// Seal returns plaintext in the format of this package, for what is small and
// kept elsewhere than in a file of its own. key and context are those of
// [NewWriter].
func Seal(key *keymem.Key, context string, plaintext []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := NewWriter(&out, key, context)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(plaintext); err != nil {
		w.Abort()
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// Open returns what [Seal] was given. Its errors are those of [NewReader] and
// [Reader.Read]; nothing of a text that was changed is returned.
func Open(key *keymem.Key, context string, text []byte) ([]byte, error) {
	r, err := NewReader(bytes.NewReader(text), int64(len(text)), key, context)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	plaintext := make([]byte, r.Size()) // no more than text; one that grew would leave copies
	if _, err := io.ReadFull(r, plaintext); err != nil {
		clear(plaintext)
		return nil, err
	}
	return plaintext, nil
}
