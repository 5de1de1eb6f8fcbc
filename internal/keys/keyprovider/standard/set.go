package standard

import (
	"fmt"
	"sync"

	"strongroom/internal/keys/keyprovider"
)

// Set is the standard providers that a controller or host is connected to, by
// name. The zero value is an empty set. It is safe for concurrent use.
type Set struct {
	mu     sync.Mutex
	open   map[string]*Provider
	closed bool
}

// Lookup returns the provider of that name, which stays the set's and may be
// closed at any time, or an error wrapping [keyprovider.ErrUnknownProvider].
func (s *Set) Lookup(name string) (*Provider, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.open[name]
	if !ok {
		return nil, fmt.Errorf("%w: %s", keyprovider.ErrUnknownProvider, name)
	}
	return p, nil
}

// Empty reports whether there is no provider.
func (s *Set) Empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open) == 0
}

// Put makes p, which is the set's from then on, the provider of that name, and
// closes the one before. A nil p leaves none.
func (s *Set) Put(name string, p *Provider) {
	s.mu.Lock()
	old := s.open[name]
	delete(s.open, name)
	if p != nil && !s.closed {
		if s.open == nil {
			s.open = map[string]*Provider{}
		}
		s.open[name], p = p, nil
	}
	s.mu.Unlock()
	for _, p := range []*Provider{old, p} {
		if p != nil {
			p.Close()
		}
	}
}

// Close closes all providers, and what is put later. It is idempotent and never
// fails.
func (s *Set) Close() error {
	s.mu.Lock()
	s.closed = true
	open := s.open
	s.open = nil
	s.mu.Unlock()
	for _, p := range open {
		p.Close()
	}
	return nil
}
