// Package groupcommit has callers that want something made durable at about the
// same time share the disk's work (DeWitt et al., "Implementation Techniques for
// Main Memory Database Systems", 1984, section 5.2).
//
// One caller at a time leads: it commits for all who wait. Whoever comes
// meanwhile waits for the next commit. Callers that were served together come
// back together; so before it begins, a leader waits until as many are there as
// were the last time, but no longer than a fraction of the time that a commit
// takes. A caller that is alone never waits.
//
// Invariants: an item is in one commit at most; while somebody waits, somebody
// leads. A [Queue] is safe for concurrent use.
package groupcommit

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// gatherPart is the part of a commit's time that a leader waits for others at
	// most, and gatherMax the bound of that.
	gatherPart = 4
	gatherMax  = time.Millisecond
)

// Queue is where callers wait. It is safe for concurrent use.
type Queue[T any] struct {
	fits   func(group []T, item T) bool
	commit func(group []T)

	mu      sync.Mutex // guards all below
	waiting []*waiter[T]
	led     bool
	last    int           // how many the last commit was for
	took    time.Duration // a commit, lately
	came    chan struct{} // buffered by one: somebody has come
}

type waiter[T any] struct {
	item T
	wake chan bool // buffered by one; true: lead; false: committed
}

// New returns a queue. fits tells whether item may be committed together with
// group; who does not fit waits for the next commit. commit is called by one
// caller at a time, with one item at least, and leaves results in the items.
func New[T any](fits func(group []T, item T) bool, commit func(group []T)) *Queue[T] {
	return &Queue[T]{fits: fits, commit: commit, came: make(chan struct{}, 1)}
}

// Do returns when item has been committed, or the cause of ctx's end: the item
// may be committed all the same then, unless it had to wait.
func (q *Queue[T]) Do(ctx context.Context, item T) error {
	w := &waiter[T]{item: item, wake: make(chan bool, 1)}
	q.mu.Lock()
	q.waiting = append(q.waiting, w)
	lead := !q.led
	q.led = true
	q.mu.Unlock()
	if !lead {
		select {
		case q.came <- struct{}{}:
		default:
		}
		select {
		case lead = <-w.wake:
		case <-ctx.Done():
			q.leave(w)
			return context.Cause(ctx)
		}
	}
	if lead {
		q.lead()
	}
	return nil
}

// leave takes w off the queue. What it was woken for, others do.
func (q *Queue[T]) leave(w *waiter[T]) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = slices.DeleteFunc(q.waiting, func(other *waiter[T]) bool { return other == w })
	select {
	case lead := <-w.wake:
		if lead {
			q.handOver()
		}
	default:
	}
}

// handOver has the first who waits lead.
func (q *Queue[T]) handOver() {
	if q.led = len(q.waiting) > 0; q.led {
		q.waiting[0].wake <- true
	}
}

// lead commits for whoever waits, the caller first.
func (q *Queue[T]) lead() {
	q.gather()
	q.mu.Lock()
	taken, items, left := []*waiter[T]{q.waiting[0]}, []T{q.waiting[0].item}, []*waiter[T]{}
	for _, w := range q.waiting[1:] {
		if q.fits(items, w.item) {
			taken, items = append(taken, w), append(items, w.item)
		} else {
			left = append(left, w)
		}
	}
	q.waiting = left
	q.mu.Unlock()

	begun := time.Now()
	q.commit(items)
	took := time.Since(begun)

	q.mu.Lock()
	defer q.mu.Unlock()
	q.last, q.took = len(taken), (3*q.took+took)/4
	for _, w := range taken[1:] {
		w.wake <- false
	}
	q.handOver()
}

// gather waits for those who are likely to come.
func (q *Queue[T]) gather() {
	var timer <-chan time.Time
	for {
		q.mu.Lock()
		enough, patience := len(q.waiting) >= q.last, min(q.took/gatherPart, gatherMax)
		q.mu.Unlock()
		if enough {
			return
		}
		if timer == nil {
			timer = time.After(patience)
		}
		select {
		case <-q.came:
		case <-timer:
			return
		}
	}
}
