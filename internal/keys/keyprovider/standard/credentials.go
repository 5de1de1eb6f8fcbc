package standard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
)

// The credentials blob of docs/spec/standard-provider.md.
const (
	CredentialsMax = 64       // providers in a blob
	SecretMax      = 16 << 10 // bytes of one secret
	PasswordMax    = 1024     // bytes of a password

	credentialsMagic   = "SRkmscrd"
	credentialsVersion = 1
	secretsEach        = 3
)

// ErrInvalidCredentials is reported for bytes that are no credentials blob of a
// version that this program knows.
var ErrInvalidCredentials = errors.New("invalid store of key server credentials")

// Credentials are the secrets for one KMS. A nil field means that there is none.
type Credentials struct {
	Password  *keymem.Key // of the user name and password credential
	ClientKey *keymem.Key // PKCS #8
	Requested *keymem.Key // PKCS #8: of a certificate request that waits for its certificate
}

func (c Credentials) all() []*keymem.Key {
	return []*keymem.Key{c.Password, c.ClientKey, c.Requested}
}

// Close wipes the secrets. It is idempotent and never fails.
func (c Credentials) Close() error {
	for _, s := range c.all() {
		s.Close()
	}
	return nil
}

// AccessContext is the context of the key parcel (package parcel) in which the
// role sender gives the credentials of a provider to the host with the id
// recipient.
func AccessContext(sender, recipient, provider string) string {
	return parcel.Context{Sender: sender, Recipient: recipient, Provider: provider, KeyID: "key-servers"}.String()
}

// MarshalCredentials returns the credentials of all providers, by name, as one
// secret to be put into a vault. The caller closes it. Equal maps give equal
// bytes.
func MarshalCredentials(all map[string]Credentials) (*keymem.Key, error) {
	if len(all) > CredentialsMax {
		return nil, fmt.Errorf("cannot store credentials of %d key providers: over %d", len(all), CredentialsMax)
	}
	size := len(credentialsMagic) + 4 + 1
	for name, c := range all {
		if err := keysafe.ValidateProvider(name); err != nil {
			return nil, err
		}
		size += 1 + len(name)
		for _, s := range c.all() {
			size += 2
			if s != nil {
				if size += s.Len(); s.Len() > SecretMax {
					return nil, fmt.Errorf("cannot store a secret of key provider %s: %d bytes are over %d", name, s.Len(), SecretMax)
				}
			}
		}
	}
	blob, err := keymem.New(size)
	if err != nil {
		return nil, err
	}
	b := append(blob.Bytes()[:0], credentialsMagic...) // within the capacity, so in place
	b = binary.BigEndian.AppendUint32(b, credentialsVersion)
	b = append(b, byte(len(all)))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		b = append(b, byte(len(name)))
		b = append(b, name...)
		for _, s := range all[name].all() {
			if s == nil {
				b = binary.BigEndian.AppendUint16(b, 0)
				continue
			}
			b = binary.BigEndian.AppendUint16(b, uint16(s.Len()))
			b = append(b, s.Bytes()...)
		}
	}
	return blob, nil
}

// UnmarshalCredentials is the reverse of [MarshalCredentials]; blob stays the
// caller's, who also closes the credentials. It accepts exactly what
// MarshalCredentials makes, or returns an error wrapping
// [ErrInvalidCredentials].
func UnmarshalCredentials(blob *keymem.Key) (_ map[string]Credentials, err error) {
	all := map[string]Credentials{}
	defer func() {
		if err != nil {
			for _, c := range all {
				c.Close()
			}
		}
	}()
	b := blob.Bytes()
	invalid := func(why string) error { return fmt.Errorf("%w: %s", ErrInvalidCredentials, why) }
	head := len(credentialsMagic) + 4 + 1
	if len(b) < head || string(b[:len(credentialsMagic)]) != credentialsMagic || binary.BigEndian.Uint32(b[len(credentialsMagic):]) != credentialsVersion {
		return nil, invalid("another magic or version")
	}
	count, rest, last := int(b[head-1]), b[head:], ""
	if count > CredentialsMax {
		return nil, invalid("too many entries")
	}
	for range count {
		raw, ok := cut(&rest, 1)
		name := string(raw)
		if !ok || name <= last || keysafe.ValidateProvider(name) != nil {
			return nil, invalid("a name")
		}
		last = name
		var secrets [secretsEach]*keymem.Key
		for i := range secrets {
			raw, ok := cut(&rest, 2)
			ok = ok && len(raw) <= SecretMax
			if ok && len(raw) > 0 {
				if secrets[i], err = keymem.New(len(raw)); err == nil {
					copy(secrets[i].Bytes(), raw)
				}
			}
			all[name] = Credentials{secrets[0], secrets[1], secrets[2]}
			if err != nil {
				return nil, err
			}
			if !ok {
				return nil, invalid("a secret")
			}
		}
	}
	if len(rest) > 0 {
		return nil, invalid("bytes follow the last entry")
	}
	return all, nil
}

// cut takes a length of prefix bytes (1 or 2) and so many bytes off rest.
func cut(rest *[]byte, prefix int) ([]byte, bool) {
	b := *rest
	if len(b) < prefix {
		return nil, false
	}
	n := int(b[0])
	if prefix == 2 {
		n = int(binary.BigEndian.Uint16(b))
	}
	b = b[prefix:]
	if n > len(b) {
		return nil, false
	}
	*rest = b[n:]
	return b[:n:n], true
}
