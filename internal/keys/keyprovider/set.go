package keyprovider

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// Set is the providers that a controller or host holds, by name. It owns them:
// it closes those that leave it.
type Set struct {
	mu        sync.RWMutex // guards the fields below
	providers map[string]Provider
	closed    bool
}

// NewSet returns an empty set.
func NewSet() *Set { return &Set{providers: map[string]Provider{}} }

// Add puts p into the set, which then owns it. If a provider of that name is
// there with the same key material, p replaces it and the old one is closed, so
// Add may be repeated. On an error p stays the caller's.
//
// It returns an error wrapping [ErrNameCollision] if a provider of that name is
// there with other key material or of another kind, or [ErrClosed].
func (s *Set) Add(p Provider) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("cannot add key provider %s: %w", p.Name(), ErrClosed)
	}
	old, exists := s.providers[p.Name()]
	if old == p {
		return nil
	}
	if exists {
		if !sameKeys(old, p) {
			return fmt.Errorf("cannot add key provider %s: %w", p.Name(), ErrNameCollision)
		}
		defer old.Close()
	}
	s.providers[p.Name()] = p
	return nil
}

// sameKeys reports whether b may stand in for a. Of kinds other than native
// nothing can be compared here: they never do.
func sameKeys(a, b Provider) bool {
	nativeA, okA := a.(*Native)
	nativeB, okB := b.(*Native)
	return okA && okB && nativeA.SameKeys(nativeB)
}

// Remove takes the provider of that name out of the set and closes it. It
// returns an error wrapping [ErrUnknownProvider] if there is none.
func (s *Set) Remove(name string) error {
	s.mu.Lock()
	p, exists := s.providers[name]
	delete(s.providers, name)
	s.mu.Unlock()
	if !exists {
		return fmt.Errorf("cannot remove key provider %s: %w", name, ErrUnknownProvider)
	}
	return p.Close()
}

// Lookup returns the provider of that name, which stays the set's: the caller
// must not close it, and it may be closed at any time by [Set.Remove]. It
// returns an error wrapping [ErrUnknownProvider] if there is none, or
// [ErrClosed].
func (s *Set) Lookup(name string) (Provider, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	p, exists := s.providers[name]
	if !exists {
		return nil, fmt.Errorf("%w: %s", ErrUnknownProvider, name)
	}
	return p, nil
}

// Names returns the names of all providers, sorted.
func (s *Set) Names() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Sorted(maps.Keys(s.providers))
}

// natives returns all native providers, sorted by name.
func (s *Set) natives() ([]*Native, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	var natives []*Native
	for _, name := range slices.Sorted(maps.Keys(s.providers)) {
		if n, ok := s.providers[name].(*Native); ok {
			natives = append(natives, n)
		}
	}
	return natives, nil
}

// KEK returns the key at ref from the provider that ref names. The caller must
// close it. It returns an error wrapping [ErrUnknownProvider] if the set has
// no such provider; other errors are those of [Provider].
func (s *Set) KEK(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error) {
	for {
		p, err := s.Lookup(ref.Provider)
		if err != nil {
			return nil, fmt.Errorf("cannot get KEK %s: %w", ref, err)
		}
		kek, err := p.KEK(ctx, ref)
		if !errors.Is(err, ErrClosed) {
			return kek, err
		}
		// Add may have put another in p's place in the meantime.
		if again, _ := s.Lookup(ref.Provider); again == p {
			return nil, err
		}
	}
}

// Close empties the set and closes its providers. It is idempotent and never
// fails.
func (s *Set) Close() error {
	s.mu.Lock()
	providers := s.providers
	s.providers, s.closed = nil, true
	s.mu.Unlock()
	for _, p := range providers {
		p.Close()
	}
	return nil
}
