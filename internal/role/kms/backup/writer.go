package backup

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"hash"
	"io"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
)

// Writer writes a backup in one pass. [Writer.Finish] must be called: without its
// end a backup does not open; [Writer.Abort] always.
type Writer struct {
	Header Header

	out    counter
	stream *sealed.Writer
	digest hash.Hash
	end    End
	last   string
	err    error
}

// counter counts and hashes what passes.
type counter struct {
	w    io.Writer
	n    int64
	hash hash.Hash
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	c.hash.Write(p[:n])
	return n, err
}

// NewWriter begins a backup of the KMS named cluster. header, if not nil, is called
// with what everybody can read of it, before anything is written.
func NewWriter(w io.Writer, cluster string, about About, protect Protection, header func(Header) error) (*Writer, error) {
	key, err := keymem.Random(sealed.KeySize)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	b := &Writer{
		Header: Header{ID: uuid.NewString(), Cluster: cluster, Created: time.Now().UTC().Truncate(time.Second)},
		out:    counter{w: w, hash: sha256.New()},
	}
	if err := protect(&b.Header, key); err != nil {
		return nil, err
	}
	text, err := b.Header.encode()
	if err != nil {
		return nil, err
	}
	if err := b.Header.check(); err != nil {
		return nil, errs.New(errs.Invalid, "the backup would not open: %w", err)
	}
	if b.digest, err = newDigest(key, b.Header.ID); err != nil {
		return nil, err
	}
	if header != nil {
		if err := header(b.Header); err != nil {
			return nil, err
		}
	}
	if _, err := b.out.Write(text); err != nil {
		return nil, err
	}
	if b.stream, err = sealed.NewWriter(&b.out, key, streamContext(text)); err != nil {
		return nil, err
	}
	body, err := json.Marshal(about)
	if err == nil {
		err = b.frame(frameAbout, body)
	}
	if err != nil {
		b.Abort()
		return nil, err
	}
	return b, nil
}

// frame writes one frame, of parts one behind the other.
func (b *Writer) frame(kind byte, parts ...[]byte) error {
	if b.err != nil {
		return b.err
	}
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	head := binary.BigEndian.AppendUint32([]byte{kind}, uint32(n))
	for _, p := range append([][]byte{head}, parts...) {
		if _, b.err = b.stream.Write(p); b.err != nil {
			return b.err
		}
	}
	return nil
}

// Secret adds a secret, which stays the caller's. Secrets come before records.
func (b *Writer) Secret(name string, secret *keymem.Key) error {
	if len(name) < 1 || len(name) > 64 || secret.Len() > valueMax {
		return errs.New(errs.Invalid, "secret %.64q of %d bytes", name, secret.Len())
	}
	return b.frame(frameSecret, []byte{byte(len(name))}, []byte(name), secret.Bytes())
}

// Digest is what the objects are to be added to, in the order of their records.
func (b *Writer) Digest() hash.Hash { return b.digest }

// Record adds a record; they come in ascending byte order of their names. object
// tells that it is one of a managed object, key that the object has material.
func (b *Writer) Record(r Record, object, key bool) error {
	if r.Name <= b.last || len(r.Name) > nameMax || len(r.Value) > valueMax {
		return errs.New(errs.Invalid, "record %.128q of %d bytes behind %.128q", r.Name, len(r.Value), b.last)
	}
	b.last = r.Name
	b.end.Records++
	if object {
		b.end.Objects++
	}
	if key {
		b.end.Keys++
	}
	return b.frame(frameRecord, binary.BigEndian.AppendUint16(nil, uint16(len(r.Name))), []byte(r.Name), r.Value)
}

// Written is a backup that is complete.
type Written struct {
	End    End
	Bytes  int64
	SHA256 string // of the whole file, hex
}

// Finish writes the end.
func (b *Writer) Finish() (Written, error) {
	b.end.Digest = b.digest.Sum(nil)
	body, err := json.Marshal(b.end)
	if err == nil {
		err = b.frame(frameEnd, body)
	}
	if err == nil {
		err = b.stream.Close()
	}
	if err != nil {
		return Written{}, err
	}
	return Written{End: b.end, Bytes: b.out.n, SHA256: hex.EncodeToString(b.out.hash.Sum(nil))}, nil
}

// Abort wipes what is in memory. After Finish it does nothing.
func (b *Writer) Abort() { b.stream.Abort() }
