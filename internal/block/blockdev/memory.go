package blockdev

import (
	"fmt"
	"math"
	"sync/atomic"
)

// memoryPage is the unit in which a [Memory] allocates, in bytes.
const memoryPage = 4096

// Memory is a sparse device in ordinary memory, for tests and benchmarks.
// Flush does nothing: all is lost with the process.
type Memory struct {
	guard     Guard
	size      atomic.Int64
	blockSize int
	pages     []*[memoryPage]byte // nil: a hole; each entry is guarded by its range of guard
}

var (
	_ Resizer  = (*Memory)(nil)
	_ Extenter = (*Memory)(nil)
)

// NewMemory returns a device of size zero bytes whose blocks have blockSize
// bytes, a power of two from 512 to 65536.
func NewMemory(size int64, blockSize int) *Memory {
	if blockSize < 512 || blockSize > 65536 || blockSize&(blockSize-1) != 0 {
		panic(fmt.Sprintf("blockdev: block size %d is not a power of two from 512 to 65536", blockSize))
	}
	m := &Memory{blockSize: blockSize, pages: make([]*[memoryPage]byte, pagesFor(size))}
	m.size.Store(size)
	return m
}

func pagesFor(size int64) int64 { return (size + memoryPage - 1) / memoryPage }

// enter admits a request; its range is widened to whole pages and blocks, so
// that two requests never allocate the same page or tear each other's block.
func (m *Memory) enter(op string, off, n int64, access Access) (*Pass, error) {
	unit := int64(max(memoryPage, m.blockSize))
	wideOff, wideLen := Widen(off, n, unit)
	p, err := m.guard.Enter(wideOff, wideLen, access)
	if err == nil {
		if err = CheckRange(m.size.Load(), off, n); err == nil {
			return p, nil
		}
		m.guard.Leave(p)
	}
	return nil, fmt.Errorf("cannot %s %d bytes at %d of memory device: %w", op, n, off, err)
}

// ReadAt implements [Device].
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	pass, err := m.enter("read", off, int64(len(p)), Shared)
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	for done := 0; done < len(p); {
		page, in := m.pages[(off+int64(done))/memoryPage], int((off+int64(done))%memoryPage)
		chunk := p[done:min(len(p), done+memoryPage-in)]
		if page == nil {
			clear(chunk)
		} else {
			copy(chunk, page[in:])
		}
		done += len(chunk)
	}
	return len(p), nil
}

// WriteAt implements [Device].
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	pass, err := m.enter("write", off, int64(len(p)), Exclusive)
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	for done := 0; done < len(p); {
		i, in := (off+int64(done))/memoryPage, int((off+int64(done))%memoryPage)
		if m.pages[i] == nil {
			m.pages[i] = new([memoryPage]byte)
		}
		done += copy(m.pages[i][in:], p[done:])
	}
	return len(p), nil
}

// WriteZeroes implements [Device].
func (m *Memory) WriteZeroes(off, n int64, mayPunch bool) error {
	pass, err := m.enter("zero", off, n, Exclusive)
	if err != nil {
		return err
	}
	defer m.guard.Leave(pass)
	m.zero(off, n, mayPunch)
	return nil
}

// Discard implements [Device]; the range reads as zeros afterwards.
func (m *Memory) Discard(off, n int64) error {
	pass, err := m.enter("discard", off, n, Exclusive)
	if err != nil {
		return err
	}
	defer m.guard.Leave(pass)
	m.zero(off, n, true)
	return nil
}

// zero clears a range; with punch, whole pages become holes, else holes become
// allocated.
func (m *Memory) zero(off, n int64, punch bool) {
	for n > 0 {
		i, in := off/memoryPage, off%memoryPage
		k := min(n, memoryPage-in)
		switch {
		case punch && k == memoryPage:
			m.pages[i] = nil
		case m.pages[i] != nil:
			clear(m.pages[i][in : in+k])
		case !punch:
			m.pages[i] = new([memoryPage]byte)
		}
		off, n = off+k, n-k
	}
}

// Flush implements [Device].
func (m *Memory) Flush() error {
	pass, err := m.guard.Enter(0, 0, Shared)
	if err != nil {
		return fmt.Errorf("cannot flush memory device: %w", err)
	}
	m.guard.Leave(pass)
	return nil
}

// Size implements [Device].
func (m *Memory) Size() int64 { return m.size.Load() }

// BlockSize implements [Device].
func (m *Memory) BlockSize() int { return m.blockSize }

// Close implements [Device]. The contents stay until the Memory is garbage.
func (m *Memory) Close() error {
	m.guard.Close()
	return nil
}

// Resize implements [Resizer].
func (m *Memory) Resize(size int64) error {
	if size < 0 || size%int64(m.blockSize) != 0 {
		return fmt.Errorf("cannot resize memory device to %d bytes: %w", size, ErrBadSize)
	}
	pass, err := m.guard.EnterAll()
	if err != nil {
		return fmt.Errorf("cannot resize memory device: %w", err)
	}
	defer m.guard.Leave(pass)
	if old := m.size.Load(); size < old {
		m.zero(size, min(old-size, memoryPage-size%memoryPage), true)
	}
	pages := make([]*[memoryPage]byte, pagesFor(size))
	copy(pages, m.pages)
	m.pages = pages
	m.size.Store(size)
	return nil
}

// NextExtent implements [Extenter].
func (m *Memory) NextExtent(off int64) (Extent, error) {
	pass, err := m.guard.Enter(0, math.MaxInt64, Shared)
	if err != nil {
		return Extent{}, fmt.Errorf("cannot find extent at %d of memory device: %w", off, err)
	}
	defer m.guard.Leave(pass)
	size := m.size.Load()
	if off < 0 || off >= size {
		return Extent{}, fmt.Errorf("cannot find extent at %d of memory device: %w", off, ErrOutOfRange)
	}
	first := off / memoryPage
	hole, end := m.pages[first] == nil, first+1
	for end < int64(len(m.pages)) && (m.pages[end] == nil) == hole {
		end++
	}
	return Extent{Offset: off, Length: min(end*memoryPage, size) - off, Hole: hole}, nil
}

// Clone returns an independent copy of the contents, open also when m is
// closed.
func (m *Memory) Clone() *Memory {
	if pass, err := m.guard.EnterAll(); err == nil { // closed: nothing changes any more
		defer m.guard.Leave(pass)
	}
	c := NewMemory(m.size.Load(), m.blockSize)
	for i, page := range m.pages {
		if page != nil {
			p := *page
			c.pages[i] = &p
		}
	}
	return c
}
