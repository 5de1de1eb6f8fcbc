package keyprovider

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
)

// Cache is the KEKs of standard providers that a host was given. They are in
// memory only: nothing here can be marshalled, and a cache begins empty after
// every start. It is safe for concurrent use.
type Cache struct {
	mu        sync.Mutex // guards the fields below
	providers []string   // sorted
	keks      map[keysafe.Ref]*keymem.Key
	closed    bool
}

// NewCache returns an empty cache that knows these standard providers by name.
func NewCache(providers []string) *Cache {
	return &Cache{providers: slices.Sorted(slices.Values(providers)), keks: map[keysafe.Ref]*keymem.Key{}}
}

// Providers returns the names of the standard providers, sorted.
func (c *Cache) Providers() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.providers)
}

// Keep makes providers the known ones, wipes every KEK that is not among keys,
// and returns those of keys that are not here, in their order, and how many
// were wiped.
func (c *Cache) Keep(providers []string, keys []keysafe.Ref) (missing []keysafe.Ref, wiped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.providers = slices.Sorted(slices.Values(providers))
	wanted := make(map[keysafe.Ref]bool, len(keys))
	for _, ref := range keys {
		wanted[ref] = true
		if c.keks[ref] == nil {
			missing = append(missing, ref)
		}
	}
	for ref, kek := range c.keks {
		if !wanted[ref] {
			kek.Close()
			delete(c.keks, ref)
			wiped++
		}
	}
	return missing, wiped
}

// Put adds a KEK of [KEKSize] bytes, which the cache owns from now on, also
// after an error. One that is there is replaced.
func (c *Cache) Put(ref keysafe.Ref, kek *keymem.Key) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := ref.Validate()
	if err == nil && kek.Len() != KEKSize {
		err = fmt.Errorf("KEK %s has %d bytes, not %d", ref, kek.Len(), KEKSize)
	}
	if c.closed {
		err = ErrClosed
	}
	if err != nil {
		kek.Close()
		return fmt.Errorf("cannot keep KEK: %w", err)
	}
	c.keks[ref].Close()
	c.keks[ref] = kek
	return nil
}

// KEK returns a copy of the key at ref, which the caller closes. It returns an
// error wrapping [ErrUnknownProvider] if the provider is none of the known,
// [ErrUnavailable] if the key is not here: the controller has to send it; or
// [ErrClosed].
func (c *Cache) KEK(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	kek := c.keks[ref]
	_, known := slices.BinarySearchFunc(c.providers, ref.Provider, strings.Compare)
	switch {
	case c.closed:
		return nil, ErrClosed
	case kek != nil:
		return kek.Clone()
	case known:
		return nil, fmt.Errorf("cannot get KEK %s: %w: it is not in this host's memory", ref, ErrUnavailable)
	}
	return nil, fmt.Errorf("cannot get KEK %s: %w", ref, ErrUnknownProvider)
}

// Close wipes all keys. It is idempotent and never fails.
func (c *Cache) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, kek := range c.keks {
		kek.Close()
	}
	clear(c.keks)
	return nil
}

// KEKContext is the context of the key parcel (package parcel) in which the role
// sender gives the KEK at ref to the role with the id recipient.
func KEKContext(sender, recipient string, ref keysafe.Ref) string {
	return parcel.Context{Sender: sender, Recipient: recipient, Provider: ref.Provider, KeyID: "kek:" + ref.KeyID}.String()
}
