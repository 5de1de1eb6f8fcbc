// Package backup is the file in which a KMS is backed up: docs/spec/kms-backup.md.
//
// A backup is sealed under a key of its own, which a passphrase opens, or the
// private key of who the backup is for: it needs nothing of the KMS. The managed
// keys in it are wrapped once more, under a key ring that was made for it: it opens
// what it holds, and nothing that the KMS has besides.
//
// Invariants: what is secret is in keymem, and leaves the process sealed only; no
// byte is released that was not authenticated; a backup that was cut short,
// reordered or altered anywhere is an error, and so is one whose objects are not
// those that the KMS had. A [Writer] and a [Reader] are used by one goroutine.
package backup

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/errs"
	"strongroom/internal/keys/rootkey"
)

// Limits of docs/spec/kms-backup.md, in bytes.
const (
	magic     = "SRkmsbak"
	version   = 1
	prefix    = len(magic) + 8 // before the header's text
	headerMax = 16 << 10
	domain    = "strongroom/kms-backup/v1"

	frameHeader = 5
	nameMax     = 1024
	jsonMax     = 64 << 10
	valueMax    = 1 << 20
)

// Kinds of frames.
const (
	frameAbout  = 1
	frameSecret = 2
	frameRecord = 3
	frameEnd    = 4
)

// Names of secrets.
const (
	SecretRing   = "keyring" // docs/spec/kms-keyring.md
	SecretCA     = "ca-key"  // PKCS #8
	SecretServer = "server"  // PEM: certificate and key of the KMIP server
)

// Header is what everybody can read of a backup.
type Header struct {
	ID      string    `json:"id"`      // UUID
	Cluster string    `json:"cluster"` // of the KMS: docs/spec/kms-cluster.md
	Created time.Time `json:"created"` // UTC, whole seconds
	// One of the two opens the backup.
	Passphrase *rootkey.Passphrase `json:"passphrase,omitempty"`
	Recipient  *Recipient          `json:"recipient,omitempty"`
}

// OpensWith says in words what opens the backup.
func (h Header) OpensWith() string {
	if h.Recipient != nil {
		return "recipient " + h.Recipient.KeyID
	}
	return "passphrase"
}

// Recipient is a backup's key sealed to a public key.
type Recipient struct {
	// KeyID is the first 16 hex digits of the public key's SHA-256.
	KeyID  string `json:"keyId"`
	Parcel []byte `json:"parcel"`
}

// About is where a backup comes from.
type About struct {
	Program  string `json:"program"`  // version of the KMS that made it
	Address  string `json:"address"`  // of its KMIP server
	Revision int64  `json:"revision"` // of the database
	CA       []byte `json:"ca"`       // certificate, DER
	// AuditKey signs the audit log of the node that made the backup, PEM; AuditHead
	// is where that log was then, "SEQ:HASH".
	AuditKey  string `json:"auditKey"`
	AuditHead string `json:"auditHead"`
}

// End is what a backup holds.
type End struct {
	Records int64 `json:"records"` // of the database
	Objects int64 `json:"objects"` // managed objects among them
	Keys    int64 `json:"keys"`    // objects with material: not destroyed
	// Digest is over all objects: see [Digest].
	Digest []byte `json:"digest"`
}

// Record is a record of the database, named "TABLE/KEY".
type Record struct {
	Name  string
	Value []byte
}

// KeyID names a recipient's public key.
func KeyID(public []byte) string {
	sum := sha256.Sum256(public)
	return hex.EncodeToString(sum[:8])
}

var (
	// ErrNotBackup is reported for a file that does not begin like a backup.
	ErrNotBackup = errs.New(errs.Invalid, "it is no backup of a KMS")
	// ErrCorrupt is reported for a backup that was altered, cut or extended.
	ErrCorrupt = errs.New(errs.Corrupt, "the backup is damaged")
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrCorrupt}, args...)...)
}

// ForPassphrase says that a backup opens with a passphrase, which stays the
// caller's.
func ForPassphrase(passphrase *keymem.Key, cost rootkey.Cost) Protection {
	return func(h *Header, key *keymem.Key) error {
		source, err := rootkey.NewPassphrase(passphrase, key, cost)
		h.Passphrase = source.Passphrase
		return err
	}
}

// ForRecipient says that a backup opens with the private key that belongs to
// public (package parcel).
func ForRecipient(public []byte) Protection {
	return func(h *Header, key *keymem.Key) error {
		text, err := parcel.Seal(public, h.parcelContext(), key)
		if err != nil {
			return errs.New(errs.Invalid, "the backup cannot be sealed to that public key: %w", err)
		}
		h.Recipient = &Recipient{KeyID: KeyID(public), Parcel: text}
		return nil
	}
}

// Protection seals a backup's key into its header.
type Protection func(h *Header, key *keymem.Key) error

func (h Header) parcelContext() string { return domain + " backup=" + h.ID }

// encode returns what stands before the sealed part.
func (h Header) encode() ([]byte, error) {
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(text) > headerMax {
		return nil, errs.New(errs.Invalid, "a header of %d bytes", len(text))
	}
	b := append(make([]byte, 0, prefix+len(text)), magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
	return append(b, text...), nil
}

// readHeader returns the header at the beginning of r and its bytes.
func readHeader(r io.ReaderAt) (Header, []byte, error) {
	begin := make([]byte, prefix)
	n, err := r.ReadAt(begin, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Header{}, nil, err
	}
	if n < len(magic) || string(begin[:len(magic)]) != magic {
		return Header{}, nil, ErrNotBackup
	}
	if n < prefix {
		return Header{}, nil, corrupt("it ends in its header")
	}
	if v := binary.BigEndian.Uint32(begin[len(magic):]); v != version {
		return Header{}, nil, errs.New(errs.InvalidState, "backup of unknown version %d", v).WithHint("use the release that made it, or a later one")
	}
	size := binary.BigEndian.Uint32(begin[len(magic)+4:])
	if size > headerMax {
		return Header{}, nil, corrupt("a header of %d bytes", size)
	}
	all := append(begin, make([]byte, size)...)
	if n, err := r.ReadAt(all[prefix:], int64(prefix)); n < int(size) {
		if err != nil && !errors.Is(err, io.EOF) {
			return Header{}, nil, err
		}
		return Header{}, nil, corrupt("it ends in its header")
	}
	var h Header
	if err := decodeJSON(all[prefix:], &h); err != nil {
		return Header{}, nil, corrupt("its header: %w", err)
	}
	if err := h.check(); err != nil {
		return Header{}, nil, corrupt("its header: %w", err)
	}
	return h, all, nil
}

func (h Header) check() error {
	switch {
	case uuid.Validate(h.ID) != nil || len(h.ID) != 36:
		return errors.New("no id")
	case len(h.Cluster) > 64:
		return errors.New("a long cluster")
	case (h.Passphrase == nil) == (h.Recipient == nil):
		return errors.New("not one thing that opens it")
	case h.Passphrase != nil:
		return rootkey.Source{Passphrase: h.Passphrase}.Check()
	case len(h.Recipient.KeyID) != 16 || len(h.Recipient.Parcel) != sealed.KeySize+parcel.Overhead:
		return errors.New("no parcel")
	}
	return nil
}

// decodeJSON accepts one value without unknown fields.
func decodeJSON(text []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something behind its end")
	}
	return nil
}

// streamContext binds the sealed part to the header, bytes of which are given.
func streamContext(header []byte) string {
	sum := sha256.Sum256(header)
	return domain + "/" + hex.EncodeToString(sum[:])
}

// newDigest returns the hash under which the objects of a backup are compared with
// those of the KMS: HMAC-SHA-256 under a key that is derived of the backup's.
func newDigest(key *keymem.Key, id string) (hash.Hash, error) {
	derived, err := hkdf.Key(sha256.New, key.Bytes(), nil, domain+"/objects\x00"+id, sha256.Size)
	if err != nil {
		return nil, err
	}
	defer keymem.Wipe(derived)
	return hmac.New(sha256.New, derived), nil
}
