package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// queue is one virtqueue. It is configured by the session while it is stopped,
// and served by its workers while it runs.
//
// Workers take turns: the one whose turn it is takes a chain from the ring. Where
// the device is quick it serves it and takes the next; where it is slow, or the
// request long, it first passes the turn on, so that requests run in parallel.
type queue struct {
	session *session
	index   int

	// Configuration.
	size    uint16
	addr    vringAddr
	base    uint16   // index of the first chain to take
	kick    *os.File // nil: none
	err     int      // eventfd that tells of a broken ring, or -1
	placed  bool     // addr was given
	enabled bool

	// State of a run; set before it begins.
	running  bool
	ring     ring
	track    *tracker // nil: nothing is tracked
	durable  bool     // writes are flushed
	most     int      // workers that it may have
	stopping atomic.Bool
	broken   atomic.Bool // until the ring is configured anew
	workers  sync.WaitGroup
	pace     pace

	turn   sync.Mutex // held by the worker whose turn it is; guards the fields below and the taking side of ring
	resume []uint16   // chains that an earlier back end has left, not yet taken
	idle   []*worker  // not running
	count  int        // workers of this run

	give    sync.Mutex // guards the fields below and the giving side of ring; taken after turn
	call    int        // eventfd that tells of buffers given back, or -1
	busy    []bool     // by head
	untold  int        // requests given back since the driver was told
	waiting atomic.Int32
}

// worker serves requests of one queue, one at a time.
type worker struct {
	request request
	turn    bool // it is this worker's turn
}

// pace tells whether requests take long enough to pay for passing the turn on
// before they are served.
type pace struct {
	average atomic.Int64 // ns, of the last eight or so
}

const (
	// slow is about four times what it costs to wake another worker.
	slow = 20_000 // ns
	// long is the length in bytes from which on requests are served in parallel.
	long = 64 << 10
	// untoldMax is how many quick requests are given back before the driver is
	// told, if there are more to serve.
	untoldMax = 8
)

func (p *pace) isSlow() bool { return p.average.Load() > slow }

// note counts one request. One that took very long counts no more than five
// slow ones: it is the scheduler's doing as often as the device's. Two workers
// may overwrite each other's count, which does no harm to an average.
func (p *pace) note(d time.Duration) {
	a := p.average.Load()
	p.average.Store(a + (min(int64(d), 5*slow)-a)/8)
}

func newQueue(s *session, index int) *queue {
	return &queue{session: s, index: index, err: -1, call: -1}
}

// ready reports whether the queue has all that it needs to run.
func (q *queue) ready() bool {
	return q.enabled && q.placed && q.size > 0 && q.kick != nil && !q.broken.Load()
}

// start makes a ready queue run.
func (q *queue) start() {
	s := q.session
	r, err := newRing(&s.memory, q.size, q.addr, s.features)
	if err == nil && s.inflight != nil {
		q.track, err = s.inflight.queue(q.index, int(q.size))
	}
	if err == nil {
		err = q.kick.SetReadDeadline(time.Time{})
	}
	if err != nil {
		q.breakDown(err)
		return
	}
	q.ring, q.durable = r, durable(s.features, s.writeback)
	q.stopping.Store(false)
	q.running = true
	q.busy = make([]bool, q.size)
	q.resume, q.untold, q.count = nil, 0, 1
	q.most = s.share()
	w := q.worker()
	q.workers.Go(func() { q.run(w, true) })
}

// stop waits until what was taken is given back. Then nothing of the queue
// touches the guest's memory.
func (q *queue) stop() {
	if !q.running {
		return
	}
	q.stopping.Store(true)
	_ = q.kick.SetReadDeadline(time.Unix(1, 0)) // it worked at start
	q.workers.Wait()
	q.running = false
	q.base = q.ring.taken
	q.track = nil
}

// close stops the queue and gives back all that it has.
func (q *queue) close() {
	q.stop()
	for _, w := range q.idle {
		w.request.release()
	}
	q.idle = nil
	q.setKick(nil)
	q.setCall(-1)
	q.setErr(-1)
}

// setKick replaces the descriptor of kicks, of a stopped queue.
func (q *queue) setKick(f *os.File) {
	if q.kick != nil {
		q.kick.Close()
	}
	q.kick = f
}

func (q *queue) setErr(fd int) {
	if q.err >= 0 {
		unix.Close(q.err)
	}
	q.err = fd
}

// setCall replaces the descriptor of calls, at any time. The driver is told once
// without need: what it was to be told may have gone to the former descriptor.
func (q *queue) setCall(fd int) {
	q.give.Lock()
	defer q.give.Unlock()
	if q.call >= 0 {
		unix.Close(q.call)
	}
	if q.call = fd; fd >= 0 {
		signal(fd)
	}
}

// signal adds one to an eventfd. One that is full tells enough.
func signal(fd int) {
	one := [8]byte{1}
	_, _ = unix.Write(fd, one[:])
}

// breakDown takes a queue out of service until it is configured anew. Workers
// that are still at it end.
func (q *queue) breakDown(err error) {
	if q.broken.Swap(true) {
		return
	}
	q.session.log(slog.LevelError, "virtqueue stopped", slog.Int("queue", q.index), slog.Any("err", err))
	if q.err >= 0 {
		signal(q.err)
	}
	if q.kick != nil {
		_ = q.kick.SetReadDeadline(time.Unix(1, 0)) // nobody need wait there any more
	}
}

// worker returns one that does not run. The turn is the caller's, or nobody runs.
func (q *queue) worker() *worker {
	if n := len(q.idle); n > 0 {
		w := q.idle[n-1]
		q.idle = q.idle[:n-1]
		return w
	}
	return new(worker)
}

// run is the life of a worker. The first one of a run prepares the ring.
func (q *queue) run(w *worker, first bool) {
	// Guest memory whose file was made shorter: the fault is one of this ring,
	// not of the process.
	debug.SetPanicOnFault(true)
	defer q.leave(w)
	q.take(w)
	if first {
		if err := q.begin(); err != nil {
			q.breakDown(err)
			return
		}
	}
	for {
		head, ok, err := q.next()
		if err == nil && ok {
			err = q.serve(w, head)
		}
		if err != nil {
			q.breakDown(err)
		}
		if err != nil || !ok {
			return
		}
	}
}

// leave ends a worker, also in the middle of a request if memory went away under
// it. All others end as well: they see that the queue stops or is broken.
func (q *queue) leave(w *worker) {
	if v := recover(); v != nil {
		fault, ok := v.(interface {
			runtime.Error
			Addr() uintptr
		})
		if !ok {
			panic(v)
		}
		q.breakDown(fmt.Errorf("guest memory is not there any more: %w", fault))
	}
	if !w.turn {
		q.take(w)
	}
	q.idle = append(q.idle, w)
	q.pass(w)
}

func (q *queue) take(w *worker) {
	q.waiting.Add(1)
	q.turn.Lock()
	q.waiting.Add(-1)
	w.turn = true
}

func (q *queue) pass(w *worker) {
	w.turn = false
	q.turn.Unlock()
}

// passOn passes the turn to another worker, which it starts if none waits.
func (q *queue) passOn(w *worker) {
	if q.waiting.Load() == 0 && q.count < q.most && !q.stopping.Load() {
		q.count++
		other := q.worker()
		q.workers.Go(func() { q.run(other, false) })
	}
	q.pass(w)
}

// begin reads where the ring stands and finds what an earlier back end has left.
func (q *queue) begin() error {
	r := &q.ring
	q.give.Lock()
	defer q.give.Unlock()
	r.usedIndex = r.readUsedIndex()
	r.told = r.usedIndex
	r.taken = q.base
	if q.track != nil {
		left, err := q.track.resume(q.size, r.usedIndex)
		if err != nil {
			return err
		}
		// What was taken is given back, or noted.
		r.taken = r.usedIndex + uint16(len(left))
		q.resume = left
		for _, head := range left {
			q.busy[head] = true
		}
	}
	r.offered = r.taken
	r.ignore()
	if q.call >= 0 {
		signal(q.call) // an earlier back end may have died before it did
	}
	return nil
}

// next waits for a chain. It returns false when the queue stops.
func (q *queue) next() (head uint16, ok bool, err error) {
	for {
		if q.stopping.Load() || q.broken.Load() {
			return 0, false, nil
		}
		if len(q.resume) > 0 {
			head, q.resume = q.resume[0], q.resume[1:]
			return head, true, nil
		}
		head, ok, err = q.ring.take()
		if err != nil {
			return 0, false, err
		}
		if ok {
			return head, true, q.claim(head)
		}
		if err := q.await(); err != nil {
			return 0, false, err
		}
	}
}

// claim notes that a chain is in work.
func (q *queue) claim(head uint16) error {
	q.give.Lock()
	defer q.give.Unlock()
	if q.busy[head] {
		return errTwice
	}
	q.busy[head] = true
	if q.track != nil {
		q.track.take(head)
	}
	return nil
}

// await waits until the driver kicks or the queue stops.
func (q *queue) await() error {
	more, err := q.listen()
	if err != nil || more {
		return err
	}
	var count [8]byte
	if _, err := q.kick.Read(count[:]); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("cannot wait for kicks: %w", err)
	}
	if !q.ring.events {
		q.give.Lock()
		defer q.give.Unlock()
		q.ring.ignore()
	}
	return nil
}

func (q *queue) listen() (more bool, err error) {
	q.give.Lock()
	defer q.give.Unlock()
	q.tell()
	return q.ring.listen()
}

// tell tells the driver of what was given back, if it wants to know. q.give is
// held.
func (q *queue) tell() {
	q.untold = 0
	if q.ring.wantsCall() && q.call >= 0 {
		signal(q.call)
	}
}

// serve does one request and gives its chain back. It begins with the turn, and
// ends with it. An error means that the ring is broken.
func (q *queue) serve(w *worker, head uint16) error {
	s, r := q.session, &w.request
	if err := r.chain.collect(&q.ring, &s.memory, head); err != nil {
		return err
	}
	status, written, err := r.prepare()
	if err != nil {
		return err
	}
	quick := !q.pace.isSlow()
	switch r.kind() {
	case opRead:
		quick = quick && total(r.chain.in) < long
	case opWrite:
		quick = quick && total(r.chain.out) < long && !q.durable
	default:
		quick = r.kind() == opGetID
	}
	if !quick {
		q.passOn(w)
	}
	start := time.Now()
	err = r.serve(s.config, q.durable)
	switch {
	case err == nil:
		status[0] = statusOK
	case errors.Is(err, errUnsupported):
		status[0] = statusUnsupported
	default:
		status[0] = statusFailed
		s.failed(r, err)
	}
	if k := r.kind(); k == opRead || k == opWrite {
		q.pace.note(time.Since(start))
	}
	q.giveBack(head, written, !quick)
	if !quick {
		q.take(w)
	}
	return nil
}

// giveBack publishes a chain that is done. It tells the driver at once, or when
// there is nothing more to do.
func (q *queue) giveBack(head uint16, written uint32, now bool) {
	q.give.Lock()
	defer q.give.Unlock()
	q.ring.put(head, written)
	if q.track != nil {
		q.track.put(head)
	}
	q.ring.publish()
	if q.track != nil {
		q.track.published(head, q.ring.usedIndex)
	}
	q.busy[head] = false
	if q.untold++; now || q.untold >= untoldMax {
		q.tell()
	}
}

// failed logs the first request that fails in a session. A disk that has died
// fails every one of them.
func (s *session) failed(r *request, err error) {
	if s.failure.Swap(true) {
		return
	}
	s.config.Log.LogAttrs(context.Background(), slog.LevelError, "vhost-user request failed",
		slog.String("disk", s.config.Name), slog.String("op", opName(r.kind())), slog.Uint64("sector", r.sector()), slog.Any("err", err))
}
