package blockdev

import (
	"math"
	"sync"
)

// Guard is what an implementation of [Device] needs to keep the contract's
// promises about concurrency: it admits requests, keeps conflicting ones apart,
// and lets Close wait for those that run. The zero Guard is ready for use and
// must not be copied.
//
// Requests are admitted first come, first served: a request waits only for
// earlier ones whose range overlaps its own, unless both are shared. So none
// starves, and a request that holds one Guard may enter another one below it,
// never one above.
//
// Once its free list has grown to the largest number of requests that ever ran
// together, a Guard allocates nothing.
type Guard struct {
	mu     sync.Mutex // protects all below, never held while waiting
	queue  Pass       // sentinel of a ring in order of arrival; next == nil before first use
	free   *Pass      // single-linked by next
	change sync.Cond  // broadcast when a Pass leaves while others wait
	waits  int        // goroutines inside change.Wait
	closed bool

	entered uint64 // requests admitted so far
}

// Pass is a request that was admitted by [Guard.Enter]. It must be given back
// once, by [Guard.Leave].
type Pass struct {
	off, end   int64
	shared     bool
	prev, next *Pass
}

// Access tells how a request uses its range.
type Access bool

// The kinds of access. Shared requests run together; an exclusive one runs
// alone on its range.
const (
	Exclusive Access = false
	Shared    Access = true
)

// Enter admits a request on n bytes at off, waiting for earlier ones that it
// conflicts with. An empty range conflicts with nothing, but Close waits for
// it. It returns [ErrOutOfRange] for a range that no device could have, and
// [ErrClosed] after Close. The caller compares the range with its size after
// Enter, because a Resize may have run while it waited.
func (g *Guard) Enter(off, n int64, access Access) (*Pass, error) {
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return nil, ErrOutOfRange
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, ErrClosed
	}
	g.prepare()
	p := g.free
	if p == nil {
		p = new(Pass)
	} else {
		g.free = p.next
	}
	if n == 0 {
		off = 0 // [0, 0) overlaps nothing
	}
	*p = Pass{off: off, end: off + n, shared: access == Shared, prev: g.queue.prev, next: &g.queue}
	p.prev.next, g.queue.prev = p, p
	for g.mustWait(p) {
		g.wait()
	}
	g.entered++
	return p, nil
}

// Entered returns how many requests were admitted so far. Who knows his own
// tells by it whether others are at work.
func (g *Guard) Entered() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.entered
}

// EnterAll admits a request that excludes every other one with a range.
func (g *Guard) EnterAll() (*Pass, error) {
	return g.Enter(0, math.MaxInt64, Exclusive)
}

// Leave ends a request.
func (g *Guard) Leave(p *Pass) {
	g.mu.Lock()
	p.prev.next, p.next.prev = p.next, p.prev
	p.prev, p.next = nil, g.free
	g.free = p
	if g.waits > 0 {
		g.change.Broadcast()
	}
	g.mu.Unlock()
}

// Close refuses new requests, waits until all admitted ones have left, and
// reports whether this call was the one that closed the Guard.
func (g *Guard) Close() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.prepare()
	first := !g.closed
	g.closed = true
	for g.queue.next != &g.queue {
		g.wait()
	}
	return first
}

// prepare makes the zero Guard usable. mu is held.
func (g *Guard) prepare() {
	if g.queue.next == nil {
		g.queue.next, g.queue.prev = &g.queue, &g.queue
		g.change.L = &g.mu
	}
}

// wait sleeps until some Pass has left. mu is held, and free meanwhile.
func (g *Guard) wait() {
	g.waits++
	g.change.Wait()
	g.waits--
}

// mustWait reports whether a request that came before p conflicts with it. mu
// is held.
func (g *Guard) mustWait(p *Pass) bool {
	for q := p.prev; q != &g.queue; q = q.prev {
		if p.off < q.end && q.off < p.end && !(p.shared && q.shared) {
			return true
		}
	}
	return false
}
