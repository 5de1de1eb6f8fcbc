package keyprovider

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
)

// KDKSize is the length of a key derivation key in bytes.
const KDKSize = 32

// nativeDomain separates KEKs from all else that might be derived from a KDK.
const nativeDomain = "strongroom/native-kek/v1"

// ErrInvalidNative is reported for parts that no native provider can have.
var ErrInvalidNative = errors.New("invalid native key provider")

// NativeInfo is what may be known of a native provider: all but its KDK.
type NativeInfo struct {
	Name        string    // unique and never used again for another KDK; limits of keysafe.Ref
	KeyID       uuid.UUID // names the KDK; never the nil UUID
	TPMRequired bool      // only hosts with a TPM may have the KDK
	Created     time.Time // in UTC, whole seconds, year 1970 to 9999
}

// normalise returns info with its time as it is stored, or an error wrapping
// [ErrInvalidNative].
func (info NativeInfo) normalise() (NativeInfo, error) {
	if err := keysafe.ValidateProvider(info.Name); err != nil {
		return NativeInfo{}, fmt.Errorf("%w: %w", ErrInvalidNative, err)
	}
	if info.KeyID == uuid.Nil {
		return NativeInfo{}, fmt.Errorf("%w: key id is the nil UUID", ErrInvalidNative)
	}
	info.Created = info.Created.UTC().Truncate(time.Second)
	if !validTime(info.Created) {
		return NativeInfo{}, fmt.Errorf("%w: created in the year %d", ErrInvalidNative, info.Created.Year())
	}
	return info, nil
}

// unixMax is the last second of the year 9999, after which RFC 3339 ends.
const unixMax = 253402300799

// validTime reports whether t can be stored.
func validTime(t time.Time) bool { return t.Unix() >= 0 && t.Unix() <= unixMax }

// Native is a provider whose KEKs are derived from one key, the KDK. Whoever
// holds the KDK needs nobody else, so a host works while the controller is
// away. The KDK cannot be changed: the way is a new provider and a shallow
// rekey.
type Native struct {
	info NativeInfo

	mu     sync.RWMutex // guards closed; read-locked while kdk is in use
	closed bool
	kdk    *keymem.Key
}

var _ Provider = (*Native)(nil)

// CreateNative makes a provider with a new KDK and key id. It returns an error
// wrapping [ErrInvalidNative] if name cannot be a provider's.
func CreateNative(name string, tpmRequired bool, now time.Time) (*Native, error) {
	kdk, err := keymem.Random(KDKSize)
	if err != nil {
		return nil, fmt.Errorf("cannot create native key provider %q: %w", name, err)
	}
	n, err := newNative(NativeInfo{Name: name, KeyID: uuid.New(), TPMRequired: tpmRequired, Created: now}, kdk)
	if err != nil {
		return nil, fmt.Errorf("cannot create native key provider: %w", err)
	}
	return n, nil
}

// RestoreNative returns the provider that has this KDK, [KDKSize] bytes, which
// stays the caller's. It returns an error wrapping [ErrInvalidNative].
func RestoreNative(info NativeInfo, kdk *keymem.Key) (*Native, error) {
	own, err := kdk.Clone()
	if err != nil {
		return nil, fmt.Errorf("cannot restore native key provider %q: %w", info.Name, err)
	}
	n, err := newNative(info, own)
	if err != nil {
		return nil, fmt.Errorf("cannot restore native key provider: %w", err)
	}
	return n, nil
}

// newNative takes kdk over, also when it fails.
func newNative(info NativeInfo, kdk *keymem.Key) (*Native, error) {
	info, err := info.normalise()
	if err == nil && kdk.Len() != KDKSize {
		err = fmt.Errorf("%w: KDK has %d bytes, not %d", ErrInvalidNative, kdk.Len(), KDKSize)
	}
	if err != nil {
		kdk.Close()
		return nil, err
	}
	return &Native{info: info, kdk: kdk}, nil
}

// Name implements [Provider].
func (n *Native) Name() string { return n.info.Name }

// Kind implements [Provider]: [KindNative].
func (n *Native) Kind() Kind { return KindNative }

// Info returns all but the KDK.
func (n *Native) Info() NativeInfo { return n.info }

// NewKEK implements [Provider]. The reference's key id is
// "<KDK id>/<object id>". The nil UUID is refused with [ErrInvalidNative].
func (n *Native) NewKEK(ctx context.Context, objectID uuid.UUID) (keysafe.Ref, *keymem.Key, error) {
	if objectID == uuid.Nil {
		return keysafe.Ref{}, nil, fmt.Errorf("cannot make KEK: %w: object id is the nil UUID", ErrInvalidNative)
	}
	kek, err := n.derive(ctx, objectID)
	if err != nil {
		return keysafe.Ref{}, nil, fmt.Errorf("cannot make KEK at key provider %s: %w", n.info.Name, err)
	}
	return keysafe.Ref{Provider: n.info.Name, KeyID: n.info.KeyID.String() + "/" + objectID.String()}, kek, nil
}

// KEK implements [Provider].
func (n *Native) KEK(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	if ref.Provider != n.info.Name {
		return nil, fmt.Errorf("cannot get KEK %s from key provider %s: %w", ref, n.info.Name, ErrWrongProvider)
	}
	kdkID, objectID, err := parseNativeKeyID(ref.KeyID)
	if err != nil || kdkID != n.info.KeyID {
		return nil, fmt.Errorf("cannot get KEK %s: %w: its KDK is %s", ref, ErrNotFound, n.info.KeyID)
	}
	kek, err := n.derive(ctx, objectID)
	if err != nil {
		return nil, fmt.Errorf("cannot get KEK %s: %w", ref, err)
	}
	return kek, nil
}

// derive computes the KEK of an object: docs/spec/native-provider.md.
func (n *Native) derive(ctx context.Context, objectID uuid.UUID) (*keymem.Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.closed {
		return nil, ErrClosed
	}
	info := nativeDomain + "\x00" + string(n.info.KeyID[:]) + string(objectID[:])
	kek, err := hkdf.Key(sha256.New, n.kdk.Bytes(), nil, info, KEKSize)
	if err != nil {
		return nil, err
	}
	return keymem.Take(kek)
}

// KDK returns a copy of the key derivation key, to be put into a sealed store.
// The caller must close it. It returns [ErrClosed] after Close.
func (n *Native) KDK() (*keymem.Key, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.closed {
		return nil, ErrClosed
	}
	return n.kdk.Clone()
}

// Seal returns a key parcel with the KDK for the role that has the public key
// recipientPublic, as its id recipient, sent by the role sender. The receiver
// calls [OpenNative].
func (n *Native) Seal(sender, recipient string, recipientPublic []byte) ([]byte, error) {
	kdk, err := n.KDK()
	if err != nil {
		return nil, fmt.Errorf("cannot seal key provider %s: %w", n.info.Name, err)
	}
	defer kdk.Close()
	sealed, err := parcel.Seal(recipientPublic, n.info.parcelContext(sender, recipient), kdk)
	if err != nil {
		return nil, fmt.Errorf("cannot seal key provider %s for %s: %w", n.info.Name, recipient, err)
	}
	return sealed, nil
}

// OpenNative returns the provider whose KDK is in sealed, a parcel made by
// [Native.Seal] for the same sender, recipient, name and key id. Errors are
// those of parcel.Recipient.Open, and [ErrInvalidNative].
func OpenNative(info NativeInfo, r *parcel.Recipient, sender, recipient string, sealed []byte) (*Native, error) {
	kdk, err := r.Open(sealed, info.parcelContext(sender, recipient))
	if err != nil {
		return nil, fmt.Errorf("cannot receive key provider %s from %s: %w", info.Name, sender, err)
	}
	n, err := newNative(info, kdk)
	if err != nil {
		return nil, fmt.Errorf("cannot receive key provider from %s: %w", sender, err)
	}
	return n, nil
}

func (info NativeInfo) parcelContext(sender, recipient string) string {
	return parcel.Context{Sender: sender, Recipient: recipient, Provider: info.Name, KeyID: info.KeyID.String()}.String()
}

// SameKeys reports whether both derive the same KEKs: equal name, key id and
// KDK, the latter compared in constant time. It is false if one is closed.
func (n *Native) SameKeys(other *Native) bool {
	if n.info.Name != other.info.Name || n.info.KeyID != other.info.KeyID {
		return false
	}
	if n == other {
		return true
	}
	kdk, err := other.KDK()
	if err != nil {
		return false
	}
	defer kdk.Close()
	n.mu.RLock()
	defer n.mu.RUnlock()
	return !n.closed && n.kdk.Equal(kdk)
}

// Close implements [Provider].
func (n *Native) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return n.kdk.Close()
}

// parseNativeKeyID takes "<KDK id>/<object id>" apart, both in canonical form.
func parseNativeKeyID(keyID string) (kdkID, objectID uuid.UUID, err error) {
	first, second, _ := strings.Cut(keyID, "/")
	if kdkID, err = parseUUID(first); err != nil {
		return uuid.Nil, uuid.Nil, err
	}
	if objectID, err = parseUUID(second); err != nil {
		return uuid.Nil, uuid.Nil, err
	}
	return kdkID, objectID, nil
}

// parseUUID accepts the canonical text form only; the library takes others too.
func parseUUID(s string) (uuid.UUID, error) {
	id, err := uuid.Parse(s)
	if err != nil || id == uuid.Nil || id.String() != s {
		return uuid.Nil, fmt.Errorf("%.40q is not a UUID", s)
	}
	return id, nil
}
