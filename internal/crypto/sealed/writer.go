package sealed

import (
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"io"

	"strongroom/internal/crypto/keymem"
)

// Writer seals what is written to it. Close must be called: it writes the end,
// without which the file does not open.
type Writer struct {
	w       io.Writer
	aead    cipher.AEAD
	plain   *keymem.Key // one segment's plaintext
	filled  int         // bytes of plain in use
	sealed  []byte      // one segment's ciphertext, reused
	segment int64       // number of the next segment
	err     error       // the first one; all later calls return it
}

// NewWriter writes a header to w and returns a Writer that seals to it under
// key ([KeySize] bytes) for a context, 1 to [ContextMax] bytes that say what
// the file is, such as "host-config"; it opens with the same key and context
// only. key stays the caller's and may be closed at once. w is used until
// Close or Abort, and not closed.
func NewWriter(w io.Writer, key *keymem.Key, context string) (*Writer, error) {
	var salt [saltSize]byte
	rand.Read(salt[:]) // never fails: it ends the process instead
	sealer, err := newWriter(w, key, context, salt)
	if err != nil {
		return nil, fmt.Errorf("cannot write sealed file: %w", err)
	}
	return sealer, nil
}

func newWriter(w io.Writer, key *keymem.Key, context string, salt [saltSize]byte) (*Writer, error) {
	header := newHeader(salt)
	aead, verifier, err := derive(key, context, header)
	if err != nil {
		return nil, err
	}
	copy(header[verifyOffset:], verifier)
	plain, err := keymem.New(SegmentSize)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(header); err != nil {
		plain.Close()
		return nil, err
	}
	return &Writer{w: w, aead: aead, plain: plain, sealed: make([]byte, 0, sealedSize)}, nil
}

// Write implements [io.Writer]. It does not retain p. After an error the file
// is of no use. It returns an error wrapping [ErrTooLarge] beyond [SizeMax],
// or [ErrClosed].
func (w *Writer) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 && w.err == nil {
		// A full segment is written only when more follows it, because the
		// last one is sealed as such.
		if w.filled == SegmentSize {
			w.flush(false)
			continue
		}
		n := copy(w.plain.Bytes()[w.filled:], p)
		w.filled += n
		written += n
		p = p[n:]
	}
	return written, w.err
}

// flush seals and writes the buffered segment.
func (w *Writer) flush(last bool) {
	if w.segment == SizeMax/SegmentSize {
		w.err = fmt.Errorf("cannot write sealed file: %w", ErrTooLarge)
		return
	}
	plain := w.plain.Bytes()[:w.filled]
	w.sealed = w.aead.Seal(w.sealed[:0], nonce(w.segment, last), plain, nil)
	w.segment++
	w.filled = 0
	if _, err := w.w.Write(w.sealed); err != nil {
		w.err = fmt.Errorf("cannot write sealed file: %w", err)
	}
}

// Close writes the last segment and wipes the buffer. The file is whole only if
// Close returns nil. A second Close does nothing.
func (w *Writer) Close() error {
	if w.plain == nil {
		return nil
	}
	if w.err == nil {
		w.flush(true)
	}
	err := w.err
	w.Abort()
	return err
}

// Abort wipes the buffer without writing the end: what was written so far does
// not open. After Close it does nothing.
func (w *Writer) Abort() {
	if w.plain == nil {
		return
	}
	w.plain.Close()
	w.plain = nil
	w.err = ErrClosed
}
