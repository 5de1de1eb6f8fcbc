package volume

import (
	"context"
	"sync"
	"time"

	"strongroom/internal/block/blockdev"
)

// Rate bounds how fast a rekey rewrites, in bytes a second, and may change
// meanwhile. 0 bounds nothing; nor does a nil Rate. It is safe for concurrent
// use.
type Rate struct {
	mu        sync.Mutex
	perSecond int64
	changed   chan struct{} // closed by the next Set; nil while nobody waits
}

// NewRate returns a Rate of that many bytes a second.
func NewRate(perSecond int64) *Rate { return &Rate{perSecond: perSecond} }

// Set changes the rate, at once.
func (r *Rate) Set(perSecond int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.perSecond = perSecond
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// PerSecond returns the rate in bytes a second.
func (r *Rate) PerSecond() int64 {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.perSecond
}

// current returns the rate, and a channel that is closed when it changes.
func (r *Rate) current() (int64, <-chan struct{}) {
	if r == nil {
		return 0, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return r.perSecond, r.changed
}

const (
	// headerTurn is how long a rekey may have the header's lock most of the time
	// before it leaves it for headerGap, so that those who look at the header get
	// their turn.
	headerTurn = 250 * time.Millisecond
	headerGap  = blockdev.HeaderRetry + time.Millisecond
	// restMax bounds the rest after a zone during which the guest was at work.
	restMax = time.Second
	// burstMax bounds what a rekey that fell behind its rate may make up for.
	burstMax = time.Second
)

// pace holds a rekey back between its zones: to its rate, behind the guest, and
// for those who wait for the header.
type pace struct {
	v    *Volume
	rate *Rate

	perSecond int64     // of the period since start
	start     time.Time // of the period over which the rate is kept
	done      int64     // bytes rewritten since start

	began   time.Time     // of the zone in work
	entered uint64        // requests on the volume when it began
	rest    time.Duration // what the guest is due for the last zone; 0: it was idle
	rested  time.Time     // when the header was last left alone
}

func newPace(v *Volume, rate *Rate) *pace {
	now := time.Now()
	return &pace{v: v, rate: rate, perSecond: rate.PerSecond(), start: now, rested: now}
}

// zone notes that a zone was moved, of which n bytes were rewritten.
func (p *pace) zone(n int64) {
	p.done += n
	p.rest = 0
	// The zone itself entered once.
	if guest := p.v.guard.Entered() > p.entered+1; guest && n > 0 {
		p.rest = min(time.Since(p.began), restMax)
	}
}

// wait returns when the next zone may begin, or with the error of ctx.
func (p *pace) wait(ctx context.Context) error {
	if err := p.sleep(ctx, p.rest, nil); err != nil {
		return err
	}
	if err := p.keepRate(ctx); err != nil {
		return err
	}
	if time.Since(p.rested) > headerTurn {
		if err := p.sleep(ctx, headerGap, nil); err != nil {
			return err
		}
	}
	p.began, p.entered = time.Now(), p.v.guard.Entered()
	return nil
}

// keepRate returns when the rate allows the next zone.
func (p *pace) keepRate(ctx context.Context) error {
	for {
		perSecond, changed := p.rate.current()
		now := time.Now()
		if perSecond != p.perSecond {
			p.perSecond, p.start, p.done = perSecond, now, 0
		}
		if perSecond <= 0 {
			return nil
		}
		wait := time.Duration(float64(p.done)/float64(perSecond)*float64(time.Second)) - now.Sub(p.start)
		if wait < -burstMax {
			p.start, p.done = now, 0
		}
		if wait <= 0 {
			return nil
		}
		if err := p.sleep(ctx, wait, changed); err != nil {
			return err
		}
	}
}

// sleep leaves the header alone for d, or until changed is closed or ctx ends,
// whose error it returns.
func (p *pace) sleep(ctx context.Context, d time.Duration, changed <-chan struct{}) error {
	if err := context.Cause(ctx); err != nil || d <= 0 {
		return err
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-changed:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if d >= headerGap {
		p.rested = time.Now()
	}
	return nil
}
