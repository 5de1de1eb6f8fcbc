package access

import (
	"sync"
	"time"

	"strongroom/internal/admission"
	"strongroom/internal/errs"
)

const (
	// The wait doubles from the first to what a bound allows.
	throttleMin = time.Second
	throttleMax = 5 * time.Minute
	// counters are kept up to this many; beyond it an old one goes.
	maxThrottled = 10_000
	// maxKnown bounds the places from which users have logged in, alike.
	maxKnown = 10_000
)

// bound is how many attempts may fail before there is a wait, and how long that
// gets.
type bound struct {
	free int
	max  time.Duration
}

var (
	// perPlace bounds attempts at a name from one network address.
	perPlace = bound{5, throttleMax}
	// perAddress bounds attempts from one address, at whatever name.
	perAddress = bound{20, throttleMax}
	// perName bounds attempts at a name by strangers, from wherever: a guesser with
	// many addresses. The wait is short, or he could keep out whom the name is of.
	perName = bound{60, 2 * time.Second}
)

// throttle slows down who guesses passwords, and nobody else: attempts are counted
// by name and address together, by address, and by name. Only the last could have a
// stranger's attempts make somebody else wait, and it does not hold for an address
// from which that user has logged in before.
//
// It is in memory: a restart gives some attempts more, and a hash costs a guesser a
// tenth of a second anyway.
type throttle struct {
	now func() time.Time

	mu       sync.Mutex // guards all below
	counters map[counter]*attempts
	known    map[place]time.Time // from which a user has logged in, and when last
}

// place is where a name is tried: an address, or an IPv6 network.
type place struct{ name, address string }

// counter names what is counted. A field that is empty stands for any.
type counter struct {
	place
	of bound
}

type attempts struct {
	failed int // attempts that did not succeed, or are under way
	next   time.Time
	last   time.Time
}

func newThrottle(now func() time.Time) *throttle {
	return &throttle{now: now, counters: map[counter]*attempts{}, known: map[place]time.Time{}}
}

// countersOf returns what an attempt at p counts for.
func (t *throttle) countersOf(p place) []counter {
	all := []counter{{p, perPlace}, {place{address: p.address}, perAddress}}
	if _, ok := t.known[p]; !ok {
		all = append(all, counter{place{name: p.name}, perName})
	}
	return all
}

// begin counts an attempt at name from a peer as failed before it is made, so that
// many at once count as many, and returns an error if it has to wait. Then it does
// not count.
func (t *throttle) begin(name, peer string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	counters := t.countersOf(place{name, admission.NetworkOf(peer)})
	var next time.Time
	for _, c := range counters {
		if a := t.counters[c]; a != nil && a.next.After(next) {
			next = a.next
		}
	}
	if now.Before(next) {
		return errs.New(errs.Unavailable, "too many failed attempts, try again in %v", next.Sub(now).Round(time.Second)).
			WithReason("Throttled")
	}
	for _, c := range counters {
		a := t.counters[c]
		if a == nil {
			t.makeRoom()
			a = &attempts{}
			t.counters[c] = a
		}
		if now.Sub(a.last) > 2*throttleMax {
			a.failed = 0
		}
		a.failed++
		a.last = now
		if over := a.failed - c.of.free; over >= 0 {
			a.next = now.Add(min(c.of.max, throttleMin<<min(over, 10)))
		}
	}
	return nil
}

// succeeded takes back an attempt that succeeded, and what failed before at the same
// place. What the same address failed at other names stays.
func (t *throttle) succeeded(name, peer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := place{name, admission.NetworkOf(peer)}
	for _, c := range t.countersOf(p) {
		switch a := t.counters[c]; {
		case c.of == perPlace:
			delete(t.counters, c)
		case a != nil:
			a.failed, a.next = a.failed-1, time.Time{}
		}
	}
	if _, ok := t.known[p]; !ok && len(t.known) >= maxKnown {
		delete(t.known, old(t.known, func(at time.Time) time.Time { return at }))
	}
	t.known[p] = t.now()
}

// makeRoom forgets a counter that was not used for a long time.
func (t *throttle) makeRoom() {
	if len(t.counters) >= maxThrottled {
		delete(t.counters, old(t.counters, func(a *attempts) time.Time { return a.last }))
	}
}

// old returns the key of what has the earliest time of some that are looked at: a
// map's order is random, and to look at all would cost a guesser's victim more than
// it is worth.
func old[K comparable, V any](m map[K]V, of func(V) time.Time) (key K) {
	var first time.Time
	looked := 0
	for k, v := range m {
		if at := of(v); looked == 0 || at.Before(first) {
			key, first = k, at
		}
		if looked++; looked == 32 {
			break
		}
	}
	return key
}
