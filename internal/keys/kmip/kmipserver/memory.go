package kmipserver

import (
	"context"
	"iter"
	"slices"
	"sync"

	"github.com/ovh/kmip-go"
)

// Memory is a [Store] that forgets everything when it is closed: for tests and
// for trying things.
type Memory struct {
	mu       sync.RWMutex
	accounts map[string]*shelf
}

// shelf is what one account has.
type shelf struct {
	objects map[string]*Object
	order   []string            // identifiers, oldest first
	names   map[string][]string // identifiers by Name
}

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{accounts: map[string]*shelf{}} }

// Close releases all key material. The store must not be in use.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.accounts {
		for _, o := range s.objects {
			o.Material.Close()
		}
	}
	m.accounts = map[string]*shelf{}
	return nil
}

// View implements [Store].
func (m *Memory) View(ctx context.Context, account string, f func(Reader) error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return f(&memoryTx{shelf: m.accounts[account]})
}

// Update implements [Store].
func (m *Memory) Update(ctx context.Context, account string, f func(Tx) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.accounts[account]
	if s == nil {
		s = &shelf{objects: map[string]*Object{}, names: map[string][]string{}}
		m.accounts[account] = s
	}
	tx := &memoryTx{shelf: s, changed: map[string]*Object{}}
	if err := f(tx); err != nil {
		return err
	}
	for _, id := range tx.order {
		s.commit(tx.changed[id])
	}
	return nil
}

func (s *shelf) commit(o *Object) {
	old := s.objects[o.ID]
	if old == nil {
		s.order = append(s.order, o.ID)
	} else {
		if old.Material != o.Material {
			old.Material.Close()
		}
		for _, name := range namesOf(old) {
			s.names[name] = without(s.names[name], o.ID)
			if len(s.names[name]) == 0 {
				delete(s.names, name)
			}
		}
	}
	for _, name := range namesOf(o) {
		s.names[name] = append(s.names[name], o.ID)
	}
	s.objects[o.ID] = o
}

func without(ids []string, id string) []string {
	kept := ids[:0]
	for _, other := range ids {
		if other != id {
			kept = append(kept, other)
		}
	}
	return kept
}

func namesOf(o *Object) []string {
	var names []string
	for _, a := range o.Attributes {
		if name, ok := a.AttributeValue.(kmip.Name); ok && a.AttributeName == kmip.AttributeNameName {
			names = append(names, name.NameValue)
		}
	}
	return names
}

type memoryTx struct {
	shelf   *shelf // nil for an account that has nothing
	changed map[string]*Object
	order   []string
}

func (t *memoryTx) Get(id string) (*Object, error) {
	if o := t.changed[id]; o != nil {
		return o.clone(), nil
	}
	if t.shelf == nil || t.shelf.objects[id] == nil {
		return nil, ErrNoObject
	}
	return t.shelf.objects[id].clone(), nil
}

func (t *memoryTx) Find(q Query) iter.Seq2[*Object, error] {
	return func(yield func(*Object, error) bool) {
		if t.shelf == nil {
			return
		}
		ids := t.shelf.order
		if q.Name != "" {
			ids = t.shelf.names[q.Name]
		}
		ids = slices.Sorted(slices.Values(append(slices.Clone(ids), t.order...)))
		ids = slices.Compact(ids)
		if q.Newest {
			slices.Reverse(ids)
		}
		for _, id := range ids {
			o, err := t.Get(id)
			if err != nil || !q.Passes(id) || !q.IsDue(o) || q.Name != "" && !slices.Contains(namesOf(o), q.Name) {
				continue
			}
			o.Material = nil
			if !yield(o, nil) {
				return
			}
		}
	}
}

func (t *memoryTx) Put(o *Object) error {
	if t.changed[o.ID] == nil {
		t.order = append(t.order, o.ID)
	}
	t.changed[o.ID] = o.clone()
	return nil
}

var _ Store = (*Memory)(nil)
