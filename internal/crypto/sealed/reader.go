package sealed

import (
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"sync"

	"strongroom/internal/crypto/keymem"
)

// Reader opens a sealed file. It implements [io.Reader] and [io.ReaderAt].
type Reader struct {
	src  io.ReaderAt
	aead cipher.AEAD
	size int64

	mu     sync.Mutex // guards the fields below
	offset int64      // of Read
	// plain is the plaintext of segment cached, which is -1 if there is none;
	// plain is nil after Close.
	plain  *keymem.Key
	cached int64
	filled int
	sealed []byte // one segment's ciphertext, reused
}

// NewReader opens the sealed file of size bytes at src. key and context are
// those of [NewWriter]; key stays the caller's and may be closed at once. src
// is used until Close, and not closed.
//
// The header and the last segment are verified at once, so that a file that was
// cut or extended is refused before anything is read from it. Errors wrap
// [ErrNotSealed], [ErrVersion], [ErrWrongKey], [ErrCorrupt], [ErrTooLarge] or
// [ErrInvalid], or are those of src.
func NewReader(src io.ReaderAt, size int64, key *keymem.Key, context string) (*Reader, error) {
	r, err := newReader(src, size, key, context)
	if err != nil {
		return nil, fmt.Errorf("cannot open sealed file: %w", err)
	}
	return r, nil
}

func newReader(src io.ReaderAt, size int64, key *keymem.Key, context string) (*Reader, error) {
	if size < HeaderSize {
		// Tells an empty or foreign file from a sealed one that was cut.
		begin := make([]byte, min(max(size, 0), int64(len(magic))))
		if err := readAt(src, begin, 0); err != nil {
			return nil, err
		}
		if string(begin) != magic {
			return nil, ErrNotSealed
		}
		return nil, fmt.Errorf("%w: %d bytes", ErrCorrupt, size)
	}
	header := make([]byte, HeaderSize)
	if err := readAt(src, header, 0); err != nil {
		return nil, err
	}
	if err := checkHeader(header); err != nil {
		return nil, err
	}
	aead, verifier, err := derive(key, context, header)
	if err != nil {
		return nil, err
	}
	if !verifies(header, verifier) {
		return nil, ErrWrongKey
	}
	plain, ok := plainSize(size)
	if !ok {
		return nil, fmt.Errorf("%w: a file of %d bytes was cut or extended", ErrCorrupt, size)
	}
	if plain > SizeMax {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, plain)
	}
	segment := int(min(plain, SegmentSize))
	buffer, err := keymem.New(max(1, segment))
	if err != nil {
		return nil, err
	}
	r := &Reader{src: src, aead: aead, size: plain, plain: buffer, cached: -1, sealed: make([]byte, segment+tagSize)}
	if err := r.load(segments(plain) - 1); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Size returns the length of the plaintext in bytes.
func (r *Reader) Size() int64 { return r.size }

// Read implements [io.Reader]. Concurrent calls each get a part of the whole.
func (r *Reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	n, err := r.readAt(p, r.offset)
	r.offset += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// ReadAt implements [io.ReaderAt]. It returns the bytes before the first
// segment that cannot be read or authenticated, and an error.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("cannot read sealed file: %w: offset %d", ErrInvalid, off)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.readAt(p, off)
}

func (r *Reader) readAt(p []byte, off int64) (int, error) {
	if r.plain == nil {
		return 0, ErrClosed
	}
	n := 0
	for n < len(p) {
		if off >= r.size {
			return n, io.EOF
		}
		if err := r.load(off / SegmentSize); err != nil {
			return n, fmt.Errorf("cannot read sealed file: %w", err)
		}
		copied := copy(p[n:], r.plain.Bytes()[off%SegmentSize:r.filled])
		n += copied
		off += int64(copied)
	}
	return n, nil
}

// load decrypts segment i into r.plain.
func (r *Reader) load(i int64) error {
	if i == r.cached {
		return nil
	}
	r.cached = -1
	filled := int(min(SegmentSize, r.size-i*SegmentSize))
	sealed := r.sealed[:filled+tagSize]
	if err := readAt(r.src, sealed, HeaderSize+i*sealedSize); err != nil {
		return err
	}
	last := i == segments(r.size)-1
	if _, err := r.aead.Open(r.plain.Bytes()[:0], nonce(i, last), sealed, nil); err != nil {
		return fmt.Errorf("%w: segment %d", ErrCorrupt, i)
	}
	r.cached, r.filled = i, filled
	return nil
}

// Close wipes the buffer. It is idempotent and never fails.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.plain.Close()
	r.plain = nil
	return nil
}

// readAt fills p or returns an error. A source that ends early was cut while it
// was open.
func readAt(src io.ReaderAt, p []byte, off int64) error {
	n, err := src.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if n < len(p) {
		return fmt.Errorf("%w: it ends at byte %d", ErrCorrupt, off+int64(n))
	}
	return nil
}
