package volumed

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestGate: while it is closed nobody is inside, whoever closes it; nobody waits for
// ever; and all get in again.
func TestGate(t *testing.T) {
	t.Parallel()
	g := newGate()
	var inside, passed atomic.Int64
	stop := make(chan struct{})
	var users, closers sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				g.enter()
				inside.Add(1)
				passed.Add(1)
				inside.Add(-1)
				g.leave()
			}
		})
	}
	for range 2 {
		closers.Go(func() {
			for range 300 {
				if err := g.close(context.Background()); err != nil {
					t.Error(err)
					return
				}
				before := passed.Load()
				if n := inside.Load(); n != 0 {
					t.Errorf("%d are inside the closed gate", n)
				}
				time.Sleep(10 * time.Microsecond)
				if passed.Load() != before || inside.Load() != 0 {
					t.Error("somebody went through the closed gate")
				}
				g.open()
			}
		})
	}
	closers.Wait()
	close(stop)
	users.Wait()
	if passed.Load() == 0 {
		t.Error("nobody went through")
	}
}

// TestGateGivesUp: who does not leave keeps it from closing, and others in no longer
// than the closer waits.
func TestGateGivesUp(t *testing.T) {
	t.Parallel()
	g := newGate()
	g.enter()
	reason := errors.New("too late")
	ctx, cancel := context.WithCancelCause(t.Context())
	closed := make(chan error)
	go func() { closed <- g.close(ctx) }()
	for g.state.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
	entered := make(chan struct{})
	go func() {
		g.enter()
		close(entered)
	}()
	select {
	case <-entered:
		t.Error("somebody got in while it was being closed")
	case <-time.After(10 * time.Millisecond):
	}
	cancel(reason)
	if err := <-closed; !errors.Is(err, reason) {
		t.Errorf("it was closed with somebody inside: %v", err)
	}
	<-entered
	g.leave()
	g.leave()
	if err := g.close(t.Context()); err != nil {
		t.Error(err)
	}
	g.open()
}
