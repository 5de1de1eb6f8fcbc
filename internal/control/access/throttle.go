package access

import (
	"sync"
	"time"

	"strongroom/internal/errs"
)

const (
	// A name has this many attempts before it has to wait.
	freeAttempts = 5
	// The wait doubles from the first to the second.
	throttleMin = time.Second
	throttleMax = 5 * time.Minute
	// throttled names are remembered up to this many; beyond it the oldest goes.
	maxThrottled = 10_000
)

// throttle slows down who guesses passwords, by name. It is in memory: a restart
// gives some attempts more, and a hash costs a guesser a tenth of a second
// anyway.
type throttle struct {
	now func() time.Time

	mu    sync.Mutex // guards names
	names map[string]*attempts
}

type attempts struct {
	failed int // attempts that did not succeed, or are under way
	next   time.Time
	last   time.Time
}

func newThrottle(now func() time.Time) *throttle {
	return &throttle{now: now, names: map[string]*attempts{}}
}

// begin counts an attempt as failed before it is made, so that many at once
// count as many, and returns an error if name has to wait.
func (t *throttle) begin(name string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	a := t.names[name]
	if a == nil {
		t.makeRoom()
		a = &attempts{}
		t.names[name] = a
	}
	if now.Before(a.next) {
		return errs.New(errs.Unavailable, "too many failed attempts, try again in %v", a.next.Sub(now).Round(time.Second)).
			WithReason("Throttled")
	}
	if now.Sub(a.last) > 2*throttleMax {
		a.failed = 0
	}
	a.failed++
	a.last = now
	if over := a.failed - freeAttempts; over >= 0 {
		a.next = now.Add(min(throttleMax, throttleMin<<min(over, 10)))
	}
	return nil
}

func (t *throttle) succeeded(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.names, name)
}

// makeRoom forgets the name that was not heard of for the longest time.
func (t *throttle) makeRoom() {
	if len(t.names) < maxThrottled {
		return
	}
	oldest := ""
	for name, a := range t.names {
		if oldest == "" || a.last.Before(t.names[oldest].last) {
			oldest = name
		}
	}
	delete(t.names, oldest)
}
