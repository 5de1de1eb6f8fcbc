package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"strongroom/internal/block/blockdev"
)

// Sentinels of [Server.AddExport] and [Server.RemoveExport].
var (
	// ErrExists: the server has an export of that name.
	ErrExists = errors.New("export exists")
	// ErrNotFound: the server has no export of that name.
	ErrNotFound = errors.New("no such export")
)

// Export is a device under a name.
type Export struct {
	// Name is what clients ask for, at most MaxName bytes; "" is the default
	// export.
	Name string
	// Device is not closed by the server. It must stay open until the export
	// was removed or Serve has returned.
	Device blockdev.Device
	// ReadOnly refuses every command that changes the device.
	ReadOnly bool
	// Description is shown to people, at most MaxName bytes; may be empty.
	Description string
}

// export is an Export in use.
type export struct {
	Export
	extents blockdev.Extenter // nil: the device does not know its holes

	mu      sync.Mutex // guards the fields below
	removed bool
	users   map[*conn]struct{}
	left    chan struct{} // closed when removed and without users
}

// leave undoes [Server.join].
func (e *export) leave(c *conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.users, c)
	if e.removed && len(e.users) == 0 {
		close(e.left)
	}
}

// flags returns the transmission flags; df tells whether structured replies
// were negotiated, without which a read cannot be fragmented anyway.
func (e *export) flags(df bool) uint16 {
	// Every connection works on the one Device and caches nothing, so a flush
	// on any of them covers the completed writes of all: multi-conn holds.
	flags := uint16(exportHasFlags | exportFlush | exportMultiConn | exportCache)
	if e.ReadOnly {
		flags |= exportReadOnly
	} else {
		flags |= exportFUA | exportTrim | exportWriteZeroes
	}
	if df {
		flags |= exportDF
	}
	return flags
}

// blockSizes returns the size constraints: minimum, preferred, maximum payload.
// The server itself takes any alignment; the minimum keeps clients from
// read-modify-write cycles in the volume.
func (e *export) blockSizes() (minimum, preferred, maximum uint32) {
	minimum = 512
	if e.Device.Size()%512 != 0 {
		minimum = 1
	}
	return minimum, uint32(max(4096, e.Device.BlockSize())), MaxPayload
}

// AddExport offers e from now on. It returns [ErrExists] if its name is taken.
func (s *Server) AddExport(e Export) error {
	if e.Device == nil {
		return fmt.Errorf("cannot export %q: no device", e.Name)
	}
	if len(e.Name) > MaxName || len(e.Description) > MaxName {
		return fmt.Errorf("cannot export %.32q...: its name and description may have %d bytes", e.Name, MaxName)
	}
	x := &export{Export: e, users: map[*conn]struct{}{}, left: make(chan struct{})}
	x.extents, _ = e.Device.(blockdev.Extenter)

	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.exports[e.Name]; ok {
		return fmt.Errorf("cannot export %q: %w", e.Name, ErrExists)
	}
	s.exports[e.Name] = x
	return nil
}

// RemoveExport withdraws an export: new clients no longer find it, and
// RemoveExport waits until the present ones have left. When ctx ends, it breaks
// their connections; a ctx that has ended already breaks them at once. After it
// returned nil, the server no longer uses the device. It returns [ErrNotFound]
// for an unknown name.
func (s *Server) RemoveExport(ctx context.Context, name string) error {
	s.mu.Lock()
	e, ok := s.exports[name]
	delete(s.exports, name) // from here on nobody joins it
	s.mu.Unlock()
	if !ok {
		return fmt.Errorf("cannot remove export %q: %w", name, ErrNotFound)
	}

	e.mu.Lock()
	e.removed = true
	if len(e.users) == 0 {
		close(e.left)
	}
	e.mu.Unlock()
	select {
	case <-e.left:
		return nil
	case <-ctx.Done():
	}
	e.mu.Lock()
	for c := range e.users {
		c.abort()
	}
	e.mu.Unlock()
	<-e.left
	return nil
}

// join makes c a user of the export of that name and returns it, or nil if there
// is none. Whoever is told anything of an export has joined it before, so that a
// removal waits for them.
func (s *Server) join(name string, c *conn) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.exports[name]
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.users[c] = struct{}{}
	return e
}

// has tells whether there is an export of that name.
func (s *Server) has(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name] != nil
}

// list returns all exports by name.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*export, 0, len(s.exports))
	for _, e := range s.exports {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *export) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return all
}
