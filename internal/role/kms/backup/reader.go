package backup

import (
	"context"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
	"strongroom/internal/keys/rootkey"
)

// Key is what opens a backup: one of the two. It stays the caller's.
type Key struct {
	Passphrase *keymem.Key
	Recipient  *parcel.Recipient
}

// Reader reads a backup in one pass: [Reader.Next] until the end.
type Reader struct {
	Header Header
	About  About

	src    io.ReaderAt
	size   int64
	stream *sealed.Reader
	digest hash.Hash
	begin  int64 // of the sealed part
	last   string
	secret bool // secrets may still come
	seen   End
	ended  bool
}

// Item is a secret or a record.
type Item struct {
	Secret string      // its name; "": a record
	Key    *keymem.Key // the secret, which the caller closes
	Record Record
}

// Open opens the backup in a file. Nothing but a regular file is read.
func Open(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO is refused, not waited for
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = errs.New(errs.NotFound, "%w", err)
		}
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errs.New(errs.Invalid, "%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// ReadHeader returns what everybody can read of a backup. Nothing vouches for it.
func ReadHeader(src io.ReaderAt) (Header, error) {
	h, _, err := readHeader(src)
	return h, err
}

// NewReader opens the backup of size bytes at src, which is used until Close and
// not closed. It returns an error of kind Denied for a wrong passphrase or private
// key, [ErrNotBackup] for another file, or one that wraps [ErrCorrupt].
func NewReader(ctx context.Context, src io.ReaderAt, size int64, key Key) (*Reader, error) {
	h, text, err := readHeader(src)
	if err != nil {
		return nil, err
	}
	secret, err := h.open(ctx, key)
	if err != nil {
		return nil, err
	}
	defer secret.Close()
	r := &Reader{Header: h, src: src, size: size, begin: int64(len(text)), secret: true}
	section := io.NewSectionReader(src, r.begin, size-r.begin)
	if r.stream, err = sealed.NewReader(section, section.Size(), secret, streamContext(text)); err != nil {
		return nil, damaged(err)
	}
	r.digest, err = newDigest(secret, h.ID)
	if err == nil {
		err = r.about()
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (h Header) open(ctx context.Context, key Key) (*keymem.Key, error) {
	switch {
	case h.Passphrase != nil && key.Passphrase == nil:
		return nil, errs.New(errs.Denied, "it opens with a passphrase")
	case h.Passphrase != nil:
		secret, err := rootkey.Source{Passphrase: h.Passphrase}.Open(ctx, rootkey.Given{Passphrase: key.Passphrase})
		if err != nil && errs.KindOf(err) != errs.Denied {
			err = damaged(err)
		}
		return secret, err
	case key.Recipient == nil:
		return nil, errs.New(errs.Denied, "it opens with the private key of recipient %s", h.Recipient.KeyID)
	}
	if id := KeyID(key.Recipient.PublicKey()); id != h.Recipient.KeyID {
		return nil, errs.New(errs.Denied, "it is for recipient %s, and this is the private key of %s", h.Recipient.KeyID, id)
	}
	secret, err := key.Recipient.Open(h.Recipient.Parcel, h.parcelContext())
	if err != nil {
		return nil, damaged(err)
	}
	if secret.Len() != sealed.KeySize {
		secret.Close()
		return nil, corrupt("a key of another length")
	}
	return secret, nil
}

// damaged marks errors of the layers below that say that bytes were altered.
func damaged(err error) error {
	for _, what := range []error{sealed.ErrNotSealed, sealed.ErrVersion, sealed.ErrWrongKey, sealed.ErrCorrupt, sealed.ErrTooLarge, parcel.ErrDoesNotOpen, parcel.ErrInvalid, parcel.ErrVersion} {
		if errors.Is(err, what) {
			return fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
	}
	if errs.KindOf(err) == errs.Corrupt {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}

// Digest is what the objects are to be added to, in the order of their records.
func (r *Reader) Digest() hash.Hash { return r.digest }

// about reads the first frame.
func (r *Reader) about() error {
	kind, size, err := r.head()
	if err != nil {
		return err
	}
	if kind != frameAbout || size > jsonMax {
		return corrupt("it does not begin with where it comes from")
	}
	body := make([]byte, size)
	if err := r.fill(body); err != nil {
		return err
	}
	if err := decodeJSON(body, &r.About); err != nil {
		return corrupt("where it comes from: %w", err)
	}
	return nil
}

func (r *Reader) fill(p []byte) error {
	_, err := io.ReadFull(r.stream, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corrupt("it ends before its end")
	}
	return damaged(err)
}

func (r *Reader) head() (kind byte, size int, err error) {
	var head [frameHeader]byte
	if err := r.fill(head[:]); err != nil {
		return 0, 0, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > valueMax+nameMax+2 {
		return 0, 0, corrupt("a frame of %d bytes", n)
	}
	return head[0], int(n), nil
}

// Next returns the next secret or record, or [io.EOF] at the end of a backup that
// is whole. Secrets come first.
func (r *Reader) Next() (Item, error) {
	if r.ended {
		return Item{}, io.EOF
	}
	kind, size, err := r.head()
	if err != nil {
		return Item{}, err
	}
	switch {
	case kind == frameSecret && r.secret && size >= 3:
		return r.nextSecret(size)
	case kind == frameRecord && size >= 3:
		r.secret = false
		return r.nextRecord(size)
	case kind == frameEnd && size <= jsonMax:
		return Item{}, r.finish(size)
	}
	return Item{}, corrupt("a frame of kind %d with %d bytes where none may be", kind, size)
}

func (r *Reader) nextSecret(size int) (Item, error) {
	var n [1]byte
	if err := r.fill(n[:]); err != nil {
		return Item{}, err
	}
	length := int(n[0])
	if length < 1 || length > 64 || 1+length >= size || size-1-length > valueMax {
		return Item{}, corrupt("a secret's name of %d bytes", length)
	}
	name := make([]byte, length)
	if err := r.fill(name); err != nil {
		return Item{}, err
	}
	key, err := keymem.Read(r.stream, size-1-length)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = corrupt("it ends before its end")
	}
	if err != nil {
		return Item{}, damaged(err)
	}
	return Item{Secret: string(name), Key: key}, nil
}

func (r *Reader) nextRecord(size int) (Item, error) {
	body := make([]byte, size)
	if err := r.fill(body); err != nil {
		return Item{}, err
	}
	n := int(binary.BigEndian.Uint16(body))
	if n < 1 || n > nameMax || 2+n > size || size-2-n > valueMax {
		return Item{}, corrupt("a record's name of %d bytes", n)
	}
	rec := Record{Name: string(body[2:][:n]), Value: body[2+n:]}
	if rec.Name <= r.last {
		return Item{}, corrupt("record %.128q behind %.128q", rec.Name, r.last)
	}
	r.last = rec.Name
	r.seen.Records++
	return Item{Record: rec}, nil
}

// Count counts an object, which the caller has added to [Reader.Digest].
func (r *Reader) Count(key bool) {
	r.seen.Objects++
	if key {
		r.seen.Keys++
	}
}

// finish compares what was read with what was written. It returns io.EOF.
func (r *Reader) finish(size int) error {
	body := make([]byte, size)
	if err := r.fill(body); err != nil {
		return err
	}
	var end End
	if err := decodeJSON(body, &end); err != nil {
		return corrupt("its end: %w", err)
	}
	if n, err := r.stream.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		if n == 0 && err != nil {
			return damaged(err)
		}
		return corrupt("something follows its end")
	}
	digest := r.digest.Sum(nil)
	if end.Records != r.seen.Records || end.Objects != r.seen.Objects || end.Keys != r.seen.Keys || !hmac.Equal(digest, end.Digest) {
		return corrupt("it holds %d records, %d objects and %d keys that are not the %d, %d and %d that were backed up",
			r.seen.Records, r.seen.Objects, r.seen.Keys, end.Records, end.Objects, end.Keys)
	}
	r.seen.Digest, r.ended = digest, true
	return io.EOF
}

// End returns what the backup holds; Next must have returned io.EOF.
func (r *Reader) End() End { return r.seen }

// Close wipes what is in memory.
func (r *Reader) Close() error { return r.stream.Close() }
