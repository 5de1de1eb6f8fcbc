package groupcommit

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type item struct {
	n     int
	times atomic.Int64 // committed
}

// TestEachOnce has many callers commit, some of whom give up: whoever does not
// is committed once when Do returns, and nobody twice.
func TestEachOnce(t *testing.T) {
	t.Parallel()
	var busy atomic.Bool
	commits := 0
	q := New(
		func(group []*item, next *item) bool { return len(group) < 5 && (group[0].n-next.n)%2 == 0 },
		func(group []*item) {
			if busy.Swap(true) {
				t.Error("two commit at once")
			}
			commits++
			for _, i := range group {
				if (group[0].n-i.n)%2 != 0 {
					t.Error("what does not fit is in one group")
				}
				i.times.Add(1)
			}
			busy.Store(false)
		})
	const callers, times = 16, 200
	var all sync.WaitGroup
	for c := range callers {
		all.Go(func() {
			for range times {
				ctx, cancel := context.WithCancel(t.Context())
				if c%4 == 0 {
					cancel() // it may still be committed
				}
				i := &item{n: c}
				err := q.Do(ctx, i)
				cancel()
				switch n := i.times.Load(); {
				case err == nil && n != 1, n > 1:
					t.Errorf("committed %d times, %v", n, err)
				case err != nil && !errors.Is(err, context.Canceled):
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if q.led || len(q.waiting) != 0 {
		t.Errorf("led: %v, waiting: %d", q.led, len(q.waiting))
	}
	t.Logf("%d commits for %d callers", commits, callers*times)
}

// TestShared commits what has come during a commit together, in order.
func TestShared(t *testing.T) {
	t.Parallel()
	begun, proceed := make(chan int), make(chan bool)
	q := New(func([]int, int) bool { return true }, func(group []int) {
		begun <- len(group)
		<-proceed
	})
	var all sync.WaitGroup
	do := func() { all.Go(func() { q.Do(t.Context(), 0) }) }
	do()
	if n := <-begun; n != 1 {
		t.Errorf("the first commit is for %d", n)
	}
	const more = 7
	for range more {
		do()
	}
	for q.waits() < more {
		time.Sleep(time.Millisecond)
	}
	proceed <- true
	if n := <-begun; n != more {
		t.Errorf("the second commit is for %d, want %d", n, more)
	}
	proceed <- true
	all.Wait()
}

// TestLeaverHandsOver has the caller give up who was to lead next.
func TestLeaverHandsOver(t *testing.T) {
	t.Parallel()
	for range 200 {
		begun, proceed := make(chan bool, 3), make(chan bool, 3)
		q := New(func([]int, int) bool { return false }, func([]int) {
			begun <- true
			<-proceed
		})
		var all sync.WaitGroup
		all.Go(func() { q.Do(t.Context(), 0) })
		<-begun
		ctx, cancel := context.WithCancel(t.Context())
		all.Go(func() { q.Do(ctx, 1) })
		for q.waits() < 1 {
			time.Sleep(time.Microsecond)
		}
		all.Go(func() { q.Do(t.Context(), 2) })
		proceed <- true
		cancel()
		proceed <- true
		proceed <- true
		all.Wait() // not for ever
		if q.led || len(q.waiting) != 0 {
			t.Fatalf("led: %v, waiting: %d", q.led, len(q.waiting))
		}
	}
}

func (q *Queue[T]) waits() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting)
}
