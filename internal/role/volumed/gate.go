package volumed

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
)

// gate lets requests through, or holds them back while it is closed. A request
// costs two atomic additions and allocates nothing. It is made by newGate.
type gate struct {
	owner sync.Mutex    // held while it is closed
	state atomic.Int64  // requests inside, less gateClosed while it is closed
	idle  chan struct{} // somebody may have been the last to leave a closed gate

	mu     sync.Mutex
	opened chan struct{} // guarded by mu: closed when it opens; nil while it is open
}

const gateClosed = math.MaxInt64 / 2

func newGate() *gate { return &gate{idle: make(chan struct{}, 1)} }

// enter lets a request in; it must leave.
func (g *gate) enter() {
	for g.state.Add(1) <= 0 {
		g.leave()
		g.mu.Lock()
		opened := g.opened
		g.mu.Unlock()
		if opened != nil {
			<-opened
		}
	}
}

func (g *gate) leave() {
	if g.state.Add(-1) != -gateClosed {
		return
	}
	select {
	case g.idle <- struct{}{}:
	default:
	}
}

// close holds back new requests and waits until none is inside. If ctx ends first,
// the gate is open again. It waits for whoever has it closed already.
func (g *gate) close(ctx context.Context) error {
	g.owner.Lock()
	g.mu.Lock()
	g.opened = make(chan struct{})
	g.mu.Unlock()
	g.state.Add(-gateClosed)
	// A signal may be of an earlier time, or of a request that was turned away: what
	// counts is the state, and whoever is inside signals when he leaves.
	for g.state.Load() != -gateClosed {
		select {
		case <-g.idle:
		case <-ctx.Done():
			g.open()
			return context.Cause(ctx)
		}
	}
	return nil
}

// open lets those in who wait, and everybody else.
func (g *gate) open() {
	g.state.Add(gateClosed)
	g.mu.Lock()
	close(g.opened)
	g.opened = nil
	g.mu.Unlock()
	g.owner.Unlock()
}
