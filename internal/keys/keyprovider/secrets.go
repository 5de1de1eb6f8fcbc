package keyprovider

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
)

// The secrets blob of docs/spec/native-provider.md; sizes in bytes.
const (
	// NativesMax is the largest number of native providers in a blob.
	NativesMax = 1024

	secretsMagic      = "SRnative"
	secretsVersion    = 1
	secretsHeaderSize = len(secretsMagic) + 4 + 4
	entryFixedSize    = 1 + 16 + 8 + 1 + KDKSize // without the name

	flagTPMRequired = 1
)

var (
	// ErrInvalidSecrets is reported for bytes that are no secrets blob.
	ErrInvalidSecrets = errors.New("invalid store of key providers")
	// ErrSecretsVersion is reported for a secrets blob of a version that this
	// program does not know.
	ErrSecretsVersion = errors.New("store of key providers of an unknown version")
)

// MarshalSecrets returns all native providers of s with their KDKs as one
// secret, to be put into a sealed file. The caller must close it. Equal sets
// give equal bytes. It returns an error if s has more than [NativesMax]
// native providers, or one wrapping [ErrClosed] if s or one of them was closed:
// never a blob that lacks some.
func MarshalSecrets(s *Set) (*keymem.Key, error) {
	natives, err := s.natives()
	if err != nil {
		return nil, fmt.Errorf("cannot store key providers: %w", err)
	}
	size := secretsHeaderSize
	for _, n := range natives {
		size += entryFixedSize + len(n.info.Name)
	}
	if len(natives) > NativesMax {
		return nil, fmt.Errorf("cannot store key providers: %d are more than %d", len(natives), NativesMax)
	}
	blob, err := keymem.New(size)
	if err != nil {
		return nil, fmt.Errorf("cannot store key providers: %w", err)
	}
	// Appending within the capacity keeps the secrets where they are.
	b := append(blob.Bytes()[:0], secretsMagic...)
	b = binary.BigEndian.AppendUint32(b, secretsVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(len(natives)))
	for _, n := range natives {
		if b, err = n.appendSecrets(b); err != nil {
			blob.Close()
			return nil, fmt.Errorf("cannot store key provider %s: %w", n.info.Name, err)
		}
	}
	return blob, nil
}

func (n *Native) appendSecrets(b []byte) ([]byte, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.closed {
		return nil, ErrClosed
	}
	var flags byte
	if n.info.TPMRequired {
		flags |= flagTPMRequired
	}
	b = append(b, flags)
	b = append(b, n.info.KeyID[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(n.info.Created.Unix()))
	b = append(b, byte(len(n.info.Name)))
	b = append(b, n.info.Name...)
	return append(b, n.kdk.Bytes()...), nil
}

// UnmarshalSecrets is the reverse of [MarshalSecrets]. blob stays the caller's;
// the caller must close the set. It returns an error wrapping
// [ErrInvalidSecrets] or [ErrSecretsVersion].
func UnmarshalSecrets(blob *keymem.Key) (*Set, error) {
	set := NewSet()
	if err := unmarshalSecrets(set, blob.Bytes()); err != nil {
		set.Close()
		return nil, fmt.Errorf("cannot load key providers: %w", err)
	}
	return set, nil
}

func unmarshalSecrets(set *Set, b []byte) error {
	if len(b) < secretsHeaderSize || string(b[:len(secretsMagic)]) != secretsMagic {
		return fmt.Errorf("%w: no magic", ErrInvalidSecrets)
	}
	if v := binary.BigEndian.Uint32(b[len(secretsMagic):]); v != secretsVersion {
		return fmt.Errorf("%w: %d", ErrSecretsVersion, v)
	}
	count := binary.BigEndian.Uint32(b[len(secretsMagic)+4:])
	if count > NativesMax {
		return fmt.Errorf("%w: %d entries are more than %d", ErrInvalidSecrets, count, NativesMax)
	}
	b = b[secretsHeaderSize:]
	previous := ""
	for i := range count {
		n, rest, err := parseEntry(b)
		if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if n.info.Name <= previous {
			n.Close()
			return fmt.Errorf("entry %d: %w: names are not in order", i, ErrInvalidSecrets)
		}
		if err := set.Add(n); err != nil {
			n.Close()
			return err
		}
		previous, b = n.info.Name, rest
	}
	if len(b) > 0 {
		return fmt.Errorf("%w: %d bytes follow the last entry", ErrInvalidSecrets, len(b))
	}
	return nil
}

// parseEntry reads one provider and returns the bytes after it.
func parseEntry(b []byte) (*Native, []byte, error) {
	if len(b) < entryFixedSize {
		return nil, nil, fmt.Errorf("%w: cut", ErrInvalidSecrets)
	}
	flags, keyID, b := b[0], uuid.UUID(b[1:17]), b[17:]
	created, nameLen, b := int64(binary.BigEndian.Uint64(b)), int(b[8]), b[9:]
	if len(b) < nameLen+KDKSize {
		return nil, nil, fmt.Errorf("%w: cut", ErrInvalidSecrets)
	}
	name, kdkBytes, rest := string(b[:nameLen]), b[nameLen:nameLen+KDKSize], b[nameLen+KDKSize:]
	if flags&^flagTPMRequired != 0 {
		return nil, nil, fmt.Errorf("%w: unknown flags %#x", ErrInvalidSecrets, flags)
	}
	kdk, err := keymem.New(KDKSize)
	if err != nil {
		return nil, nil, err
	}
	copy(kdk.Bytes(), kdkBytes)
	n, err := newNative(NativeInfo{
		Name: name, KeyID: keyID, TPMRequired: flags&flagTPMRequired != 0, Created: time.Unix(created, 0),
	}, kdk)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInvalidSecrets, err)
	}
	return n, rest, nil
}
