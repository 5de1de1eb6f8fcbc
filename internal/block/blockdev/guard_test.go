package blockdev_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"

	"strongroom/internal/block/blockdev"
)

// TestGuard checks which requests wait for which: in the bubble, Wait returns
// when every goroutine is blocked for good.
func TestGuard(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g blockdev.Guard
		enter := func(off, n int64, access blockdev.Access) *pending {
			p := &pending{leave: make(chan struct{})}
			go func() {
				pass, err := g.Enter(off, n, access)
				check(t, err)
				p.in = true
				<-p.leave
				g.Leave(pass)
			}()
			synctest.Wait()
			return p
		}
		first := enter(0, 100, blockdev.Shared)
		second := enter(50, 100, blockdev.Shared)
		writer := enter(60, 10, blockdev.Exclusive)
		late := enter(65, 100, blockdev.Shared) // would starve the writer if it were let in
		apart := enter(200, 10, blockdev.Exclusive)
		empty := enter(65, 0, blockdev.Exclusive)
		all := enter(0, 1<<62, blockdev.Exclusive)
		expect := func(want ...bool) {
			t.Helper()
			synctest.Wait()
			for i, p := range []*pending{first, second, writer, late, apart, empty, all} {
				if p.in != want[i] {
					t.Errorf("request %d is in: %v, want %v", i, p.in, want[i])
				}
			}
		}
		expect(true, true, false, false, true, true, false)
		close(first.leave)
		expect(true, true, false, false, true, true, false)
		close(second.leave)
		expect(true, true, true, false, true, true, false)
		close(writer.leave)
		expect(true, true, true, true, true, true, false)
		close(apart.leave)
		close(late.leave)
		expect(true, true, true, true, true, true, true)

		var closed atomic.Int32
		for range 2 {
			go func() {
				if g.Close() {
					closed.Add(1)
				}
				closed.Add(10)
			}()
		}
		synctest.Wait()
		if closed.Load() != 0 {
			t.Error("Close did not wait for running requests")
		}
		_, err := g.Enter(0, 1, blockdev.Shared)
		wantError(t, err, blockdev.ErrClosed)
		close(all.leave)
		synctest.Wait()
		if closed.Load() != 0 {
			t.Error("Close did not wait for an empty request")
		}
		close(empty.leave)
		synctest.Wait()
		if n := closed.Load(); n != 21 {
			t.Errorf("%d, not 21: want both calls to return, and one to be the first", n)
		}
	})
}

// pending is a request in its own goroutine.
type pending struct {
	in    bool // read only after synctest.Wait
	leave chan struct{}
}
