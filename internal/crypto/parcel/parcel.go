// Package parcel carries a key from one role to another, so that no RPC
// message, log or buffer of an RPC library ever holds it: docs/spec/key-parcel.md,
// docs/adr/0006-key-parcels.md.
//
// A parcel is sealed to the public key of the receiving role (HPKE, RFC 9180,
// with the hybrid KEM MLKEM768-X25519, so that recorded traffic stays closed
// to a later quantum computer) and bound to a context: who sends what to whom.
// It hides the key and shows alteration; it does not prove who sent it. That
// is the work of the mutually authenticated connection that it travels on.
//
// Invariants: the private key's seed and every key carried are in [keymem]. The
// standard library expands the seed into key schedules in ordinary memory;
// they live for one call of [Recipient.Open].
//
// Everything here is safe for concurrent use.
package parcel

import (
	"crypto/hpke"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"strongroom/internal/crypto/keymem"
)

// Sizes and limits of docs/spec/key-parcel.md, in bytes.
const (
	Version       = 1
	SecretSize    = 32        // a recipient's private key
	PublicKeySize = 1184 + 32 // ML-KEM-768, X25519
	KeyMax        = 256 << 10 // the longest key carried
	ContextMax    = 1024      // the longest context
	Overhead      = headerSize + encapSize + tagSize

	magic      = "SRparcel"
	headerSize = len(magic) + 4
	encapSize  = 1088 + 32 // ML-KEM-768, X25519
	tagSize    = 16
)

// domain separates parcels from all other uses of a recipient's key.
const domain = "strongroom/key-parcel/v1"

var (
	// ErrDoesNotOpen is reported for a parcel that was sealed to another
	// recipient or for another context, or was altered. Which cannot be told.
	ErrDoesNotOpen = errors.New("key parcel does not open: another recipient, another context, or altered")
	// ErrInvalid is reported for bytes, keys and contexts that no version of
	// the format allows.
	ErrInvalid = errors.New("invalid key parcel")
	// ErrVersion is reported for a parcel of a version that this program does
	// not know.
	ErrVersion = errors.New("key parcel of an unknown version")
	// ErrClosed is reported when a closed [Recipient] is used.
	ErrClosed = errors.New("parcel recipient is closed")
)

// Context says who sends what to whom. Its string form is the context of a
// parcel with a provider's key.
type Context struct {
	Sender    string // the sending role, such as "controller"
	Recipient string // the id of the receiving host or other role
	Provider  string // the name of the key provider
	KeyID     string // the key within it
}

// String returns a form from which all fields can be told apart.
func (c Context) String() string {
	return fmt.Sprintf("sender=%q recipient=%q provider=%q key_id=%q", c.Sender, c.Recipient, c.Provider, c.KeyID)
}

// DiskContext is that of a parcel with the DEK of a disk, from a host to a user.
type DiskContext struct {
	VM   string // the VM's id
	UUID string // of the volume
}

// String returns a form from which all fields can be told apart, and which no
// [Context] has.
func (c DiskContext) String() string {
	return fmt.Sprintf("sender=\"host\" recipient=\"user\" vm=%q disk=%q", c.VM, c.UUID)
}

// ImageContext is that of a parcel with the passphrase of an image, from which
// a host makes a disk of a VM.
type ImageContext struct {
	Recipient string // the id of the host
	VM        string // the id of the VM that is made
	Disk      int    // which of its disks
}

// String returns a form from which all fields can be told apart, and which no
// other context has.
func (c ImageContext) String() string {
	return fmt.Sprintf("sender=\"controller\" recipient=%q vm=%q image=%d", c.Recipient, c.VM, c.Disk)
}

// ApplicationContext is that of a parcel with a key of a KMS, to an application
// with REST.
type ApplicationContext struct {
	Application string // its name, with its account
	KeyID       string // the key's identifier
}

// String returns a form from which all fields can be told apart, and which no
// other context has.
func (c ApplicationContext) String() string {
	return fmt.Sprintf("sender=\"kms\" application=%q key_id=%q", c.Application, c.KeyID)
}

// ImportContext is that of a parcel with a key from elsewhere, from an application with
// REST to its KMS.
type ImportContext struct {
	Application string // its name, with its account
	Name        string // that the key is to have
	Type        string // that the key is to be of, as it is asked for
}

// String returns a form from which all fields can be told apart, and which no
// other context has.
func (c ImportContext) String() string {
	return fmt.Sprintf("recipient=\"kms\" application=%q name=%q type=%q", c.Application, c.Name, c.Type)
}

// Recipient is a role's key pair. It must be closed.
type Recipient struct {
	public []byte

	mu     sync.RWMutex // guards closed; read-locked while secret is in use
	closed bool
	secret *keymem.Key
}

// NewRecipient makes a new key pair.
func NewRecipient() (*Recipient, error) {
	secret, err := keymem.Random(SecretSize)
	if err != nil {
		return nil, fmt.Errorf("cannot make a parcel recipient: %w", err)
	}
	return newRecipient(secret)
}

// RestoreRecipient returns the Recipient whose [Recipient.Secret] is secret,
// [SecretSize] bytes, which stays the caller's.
func RestoreRecipient(secret *keymem.Key) (*Recipient, error) {
	if n := secret.Len(); n != SecretSize {
		return nil, fmt.Errorf("cannot restore a parcel recipient: %w: secret has %d bytes, not %d", ErrInvalid, n, SecretSize)
	}
	own, err := secret.Clone()
	if err != nil {
		return nil, fmt.Errorf("cannot restore a parcel recipient: %w", err)
	}
	return newRecipient(own)
}

// newRecipient takes secret over, also when it fails.
func newRecipient(secret *keymem.Key) (*Recipient, error) {
	private, err := expand(secret)
	if err != nil {
		secret.Close()
		return nil, fmt.Errorf("cannot make a parcel recipient: %w", err)
	}
	defer forget(private)
	return &Recipient{public: private.PublicKey().Bytes(), secret: secret}, nil
}

// PublicKey returns the [PublicKeySize] bytes that a sender needs, a new copy.
func (r *Recipient) PublicKey() []byte { return append([]byte(nil), r.public...) }

// Secret returns a copy of the private key, [SecretSize] bytes, to be stored in
// a sealed file. The caller must close it.
func (r *Recipient) Secret() (*keymem.Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed {
		return nil, ErrClosed
	}
	return r.secret.Clone()
}

// Close wipes the private key. It is idempotent and never fails.
func (r *Recipient) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	return r.secret.Close()
}

// Seal returns a parcel with key, 1 to [KeyMax] bytes, that only the owner of
// recipientPublic opens, and only for the same context, 1 to [ContextMax]
// bytes. Two parcels of the same key differ. It returns an error wrapping
// [ErrInvalid] if an argument is outside its limits. The parcel is [Overhead]
// bytes longer than key. key stays the caller's.
func Seal(recipientPublic []byte, context string, key *keymem.Key) ([]byte, error) {
	if err := validate(context, key.Len()); err != nil {
		return nil, fmt.Errorf("cannot seal key parcel: %w", err)
	}
	public, err := hpke.MLKEM768X25519().NewPublicKey(recipientPublic)
	if err != nil {
		return nil, fmt.Errorf("cannot seal key parcel: %w: public key: %w", ErrInvalid, err)
	}
	encap, sender, err := hpke.NewSender(public, hpke.HKDFSHA256(), hpke.AES256GCM(), info(context))
	if err != nil {
		return nil, fmt.Errorf("cannot seal key parcel: %w", err)
	}
	sealed, err := sender.Seal(nil, key.Bytes())
	if err != nil {
		return nil, fmt.Errorf("cannot seal key parcel: %w", err)
	}
	parcel := make([]byte, 0, Overhead+key.Len())
	parcel = append(parcel, magic...)
	parcel = binary.BigEndian.AppendUint32(parcel, Version)
	parcel = append(parcel, encap...)
	return append(parcel, sealed...), nil
}

// CheckPublicKey returns an error wrapping [ErrInvalid] for what [Seal] would refuse
// as a recipient's public key.
func CheckPublicKey(public []byte) error {
	if _, err := hpke.MLKEM768X25519().NewPublicKey(public); err != nil {
		return fmt.Errorf("%w: public key: %w", ErrInvalid, err)
	}
	return nil
}

// Open returns the key in parcel, which the caller must close. It does not
// retain parcel. It returns an error wrapping [ErrDoesNotOpen], [ErrInvalid] or
// [ErrVersion], or [ErrClosed].
func (r *Recipient) Open(parcel []byte, context string) (*keymem.Key, error) {
	encap, sealed, err := split(parcel)
	if err == nil {
		err = validate(context, len(sealed)-tagSize)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open key parcel: %w", err)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed {
		return nil, fmt.Errorf("cannot open key parcel: %w", ErrClosed)
	}
	private, err := expand(r.secret)
	if err != nil {
		return nil, fmt.Errorf("cannot open key parcel: %w", err)
	}
	defer forget(private)
	// The only failures from here on are an encapsulated key that is not one
	// and a failed authentication.
	opener, err := hpke.NewRecipient(encap, private, hpke.HKDFSHA256(), hpke.AES256GCM(), info(context))
	if err != nil {
		return nil, fmt.Errorf("cannot open key parcel: %w", ErrDoesNotOpen)
	}
	key, err := opener.Open(nil, sealed)
	if err != nil {
		return nil, fmt.Errorf("cannot open key parcel: %w", ErrDoesNotOpen)
	}
	return keymem.Take(key)
}

// split takes a parcel apart without copying.
func split(parcel []byte) (encap, sealed []byte, err error) {
	if len(parcel) < headerSize || string(parcel[:len(magic)]) != magic {
		return nil, nil, fmt.Errorf("%w: no magic", ErrInvalid)
	}
	if v := binary.BigEndian.Uint32(parcel[len(magic):]); v != Version {
		return nil, nil, fmt.Errorf("%w: %d", ErrVersion, v)
	}
	if len(parcel) < Overhead {
		return nil, nil, fmt.Errorf("%w: %d bytes are too short", ErrInvalid, len(parcel))
	}
	return parcel[headerSize : headerSize+encapSize], parcel[headerSize+encapSize:], nil
}

func validate(context string, keyLen int) error {
	if len(context) < 1 || len(context) > ContextMax {
		return fmt.Errorf("%w: context has %d bytes, not 1 to %d", ErrInvalid, len(context), ContextMax)
	}
	if keyLen < 1 || keyLen > KeyMax {
		return fmt.Errorf("%w: key has %d bytes, not 1 to %d", ErrInvalid, keyLen, KeyMax)
	}
	return nil
}

func info(context string) []byte { return []byte(domain + "\x00" + context) }

// expand makes the key pair of a seed.
func expand(secret *keymem.Key) (hpke.PrivateKey, error) {
	return hpke.MLKEM768X25519().NewPrivateKey(secret.Bytes())
}

// forget wipes what can be reached of the library's copy: the seed.
func forget(private hpke.PrivateKey) {
	if seed, err := private.Bytes(); err == nil {
		keymem.Wipe(seed)
	}
}
