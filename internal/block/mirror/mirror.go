// Package mirror moves a disk from one device to another while it is in use: the
// live encryption and decryption of a disk (docs/spec/live-conversion.md).
//
// A [Mirror] is a [blockdev.Device]. It reads from the old device and writes to
// the old and, where that has been copied, to the new one. [Mirror.Copy] copies
// the rest behind a moving boundary and compares all of it; [Mirror.Hold] then
// forbids that the two part, so that the caller can decide for the new one by a
// durable note of his; [Mirror.Release] ends it either way.
//
// Invariants:
//
//   - Until Hold, nothing that happens to the new device reaches a user: if it
//     fails it is given up, and the old device has all that was written.
//   - When Copy has returned nil, both devices have all that was written, and after
//     a Flush both have it durably, until the new one is given up. After Hold it is
//     not given up: then a write or Flush that fails on either fails.
//   - A request waits for the copy of its own chunk at most.
//
// Requests allocate nothing: what goes to both devices does so through buffers of the
// Mirror, of which there is a fixed number. Everything here is safe for concurrent use.
package mirror

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
)

// Sentinels that callers branch on.
var (
	// ErrVerify: the new device does not read as the old one does.
	ErrVerify = errors.New("copy differs from its source")
	// ErrParted: the new device was given up, or the copy has not ended yet.
	ErrParted = errors.New("the new device does not have all that was written")
)

// Mirror is a disk that moves. Its size cannot change.
type Mirror struct {
	from, to blockdev.Device
	extents  blockdev.Extenter // from, if it knows its holes
	guard    blockdev.Guard    // writes hold their range, the copy its chunk
	boundary atomic.Int64      // to has what is below; changes over a range that is held exclusively
	requests atomic.Uint64     // of users; by it the copy sees that somebody is at work
	copying  atomic.Bool       // Copy was called
	buffers  chan []byte       // not in use; nil: not yet made

	mu     sync.Mutex // guards what follows
	parted error      // why to was given up; nil: it was not
	synced bool       // to has all that was written
	held   bool
}

var _ blockdev.Extenter = (*Mirror)(nil)

const (
	// bufferSize is how much of a write goes to both devices at once, in bytes.
	bufferSize = 64 << 10
	// bufferCount is how many writes do so at once; more wait.
	bufferCount = 16
)

// New returns a Mirror from one device to another of the same size, which reads
// as zeros. The devices are the Mirror's until [Mirror.Release].
func New(from, to blockdev.Device) (*Mirror, error) {
	if from.Size() != to.Size() {
		return nil, fmt.Errorf("cannot mirror %d bytes to %d bytes: %w", from.Size(), to.Size(), blockdev.ErrBadSize)
	}
	m := &Mirror{from: from, to: to, buffers: make(chan []byte, bufferCount)}
	m.extents, _ = from.(blockdev.Extenter)
	for range bufferCount {
		m.buffers <- nil
	}
	return m, nil
}

// Hold makes sure that the two devices do not part any more: until
// [Mirror.Release], what fails on the new device fails. It returns [ErrParted] if
// [Mirror.Copy] has not returned nil or the new device was given up since.
func (m *Mirror) Hold() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.parted != nil {
		return fmt.Errorf("%w: %w", ErrParted, m.parted)
	}
	if !m.synced {
		return ErrParted
	}
	m.held = true
	return nil
}

// Parted returns why the new device was given up, or nil.
func (m *Mirror) Parted() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.parted
}

// Release ends the Mirror and leaves its devices, which are the caller's then,
// open. It waits for requests; the copy must have ended.
func (m *Mirror) Release() { m.guard.Close() }

// part gives the new device up because of err. It returns err if that must not be.
func (m *Mirror) part(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held {
		return err
	}
	if m.parted == nil {
		m.parted = err
	}
	return nil
}

// whole reports whether the new device has all that was written.
func (m *Mirror) whole() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.synced && m.parted == nil
}

// Size implements [blockdev.Device].
func (m *Mirror) Size() int64 { return m.from.Size() }

// BlockSize implements [blockdev.Device].
func (m *Mirror) BlockSize() int { return max(m.from.BlockSize(), m.to.BlockSize()) }

// ReadAt implements [blockdev.Device].
func (m *Mirror) ReadAt(p []byte, off int64) (int, error) {
	pass, err := m.guard.Enter(0, 0, blockdev.Shared) // so that Close waits
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	m.requests.Add(1)
	return m.from.ReadAt(p, off)
}

// WriteAt implements [blockdev.Device].
func (m *Mirror) WriteAt(p []byte, off int64) (int, error) {
	pass, err := m.enter(off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer m.guard.Leave(pass)
	k := m.below(off, int64(len(p)))
	if k > 0 {
		if err := m.writeBoth(p[:k], off); err != nil {
			return 0, err
		}
	}
	if k == 0 || k < int64(len(p)) {
		if _, err := m.from.WriteAt(p[k:], off+k); err != nil {
			return int(k), m.failed(err)
		}
	}
	return len(p), nil
}

// writeBoth writes p, which is held, to both devices. Whoever gave p may change it
// meanwhile, such as a guest whose memory it is: the devices get the same copy.
func (m *Mirror) writeBoth(p []byte, off int64) error {
	buf := <-m.buffers
	defer func() { m.buffers <- buf }() // also if p is not there any more, which panics
	if buf == nil {
		buf = make([]byte, bufferSize)
	}
	for len(p) > 0 {
		part := buf[:copy(buf[:bufferSize-off%bufferSize], p)]
		if _, err := m.from.WriteAt(part, off); err != nil {
			return m.failed(err)
		}
		if m.Parted() == nil {
			if _, err := m.to.WriteAt(part, off); err != nil {
				if err := m.part(err); err != nil {
					return err
				}
			}
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// WriteZeroes implements [blockdev.Device].
func (m *Mirror) WriteZeroes(off, n int64, mayPunch bool) error {
	pass, err := m.enter(off, n)
	if err != nil {
		return err
	}
	defer m.guard.Leave(pass)
	if err := m.from.WriteZeroes(off, n, mayPunch); err != nil {
		return m.failed(err)
	}
	if k := m.below(off, n); k > 0 {
		if err := m.to.WriteZeroes(off, k, mayPunch); err != nil {
			return m.part(err)
		}
	}
	return nil
}

// Discard implements [blockdev.Device]. It does nothing: what is discarded may
// read as anything, and would read differently from the two.
func (m *Mirror) Discard(off, n int64) error {
	pass, err := m.enter(off, n)
	if err == nil {
		m.guard.Leave(pass)
	}
	return err
}

// Flush implements [blockdev.Device].
func (m *Mirror) Flush() error {
	pass, err := m.guard.Enter(0, 0, blockdev.Shared)
	if err != nil {
		return err
	}
	defer m.guard.Leave(pass)
	m.requests.Add(1)
	if err := m.from.Flush(); err != nil {
		return m.failed(err)
	}
	if m.whole() {
		if err := m.to.Flush(); err != nil {
			return m.part(err)
		}
	}
	return nil
}

// NextExtent implements [blockdev.Extenter]. If the old device does not know its
// holes, all is data.
func (m *Mirror) NextExtent(off int64) (blockdev.Extent, error) {
	if m.extents != nil {
		return m.extents.NextExtent(off)
	}
	if off < 0 || off >= m.Size() {
		return blockdev.Extent{}, blockdev.ErrOutOfRange
	}
	return blockdev.Extent{Offset: off, Length: m.Size() - off}, nil
}

// Close implements [blockdev.Device]. It closes both devices.
func (m *Mirror) Close() error {
	if !m.guard.Close() {
		return nil
	}
	return errors.Join(m.from.Close(), m.to.Close())
}

// enter admits a write of n bytes at off, alone on its range.
func (m *Mirror) enter(off, n int64) (*blockdev.Pass, error) {
	if err := blockdev.CheckRange(m.Size(), off, n); err != nil {
		return nil, err
	}
	pass, err := m.guard.Enter(off, n, blockdev.Exclusive)
	if err == nil {
		m.requests.Add(1)
	}
	return pass, err
}

// below returns how many of the n bytes at off, which are held, the new device
// must get too.
func (m *Mirror) below(off, n int64) int64 {
	k := min(m.boundary.Load()-off, n)
	if k <= 0 || m.Parted() != nil {
		return 0
	}
	return k
}

// failed notes that a request failed on the old device, which may then hold
// anything in its range: the new one is given up if it may be. It returns err.
func (m *Mirror) failed(err error) error {
	_ = m.part(fmt.Errorf("the old device failed: %w", err))
	return err
}
