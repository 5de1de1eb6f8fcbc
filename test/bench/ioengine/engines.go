package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func openRaw(path string, direct bool) (int, error) {
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if direct {
		flags |= unix.O_DIRECT
	}
	return unix.Open(path, flags, 0)
}

// checked returns the error of a request of size bytes.
func checked(res int32, size int) error {
	switch {
	case res < 0:
		return unix.Errno(-res)
	case int(res) != size:
		return fmt.Errorf("%d of %d bytes", res, size)
	}
	return nil
}

// runLoop is the engine "ring".
func runLoop(path string, direct bool, l load, size int64, d time.Duration) (int, error) {
	runtime.LockOSThread() // the ring has one issuer
	defer runtime.UnlockOSThread()
	buffers, free, err := newBuffers(l.depth, l.size)
	if err != nil {
		return 0, err
	}
	defer free()
	fd, err := openRaw(path, direct)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	r, err := newRing(l.depth, fd, buffers)
	if err != nil {
		return 0, err
	}
	defer r.close()

	rng := rand.New(rand.NewPCG(1, 1))
	started, done := 0, 0
	start := func(buffer int) {
		r.transfer(buffer, l.write, buffers[buffer], l.next(started, rng, size))
		started++
	}
	for i := range l.depth {
		start(i)
	}
	deadline := time.Now().Add(d)
	over := false
	for done < started {
		if err := r.enter(1); err != nil {
			return 0, err
		}
		over = over || time.Now().After(deadline)
		n, err := r.pop(func(buffer uint64, res int32) error {
			if !over {
				start(int(buffer))
			}
			return checked(res, l.size)
		})
		if err != nil {
			return 0, err
		}
		done += n
	}
	return done, nil
}

// queue is a ring behind blocking calls: one thread owns the ring, submits what the
// callers have put into the queue in batches, and wakes them.
type queue struct {
	fd, event int
	buffers   [][]byte
	stopped   chan error

	mu      sync.Mutex // guards the fields below
	pending []call
	asleep  bool // the thread waits for completions; event wakes it
	closing bool

	results []chan int32 // by worker
}

type call struct {
	worker int
	write  bool
	p      []byte
	off    int64
}

// wakeUp is the user data of the read that waits for event.
const wakeUp = 1 << 32

func openQueue(path string, direct bool, buffers [][]byte) (target, error) {
	fd, err := openRaw(path, direct)
	if err != nil {
		return nil, err
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	q := &queue{fd: fd, event: event, buffers: buffers, stopped: make(chan error, 1)}
	for range buffers {
		q.results = append(q.results, make(chan int32, 1))
	}
	go func() { q.stopped <- q.run() }()
	return q, nil
}

func (q *queue) do(worker int, write bool, p []byte, off int64) error {
	q.mu.Lock()
	q.pending = append(q.pending, call{worker, write, p, off})
	wake := q.asleep
	q.asleep = false
	q.mu.Unlock()
	if wake {
		if err := q.wake(); err != nil {
			return err
		}
	}
	return checked(<-q.results[worker], len(p))
}

func (q *queue) wake() error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, err := unix.Write(q.event, one[:])
	return err
}

func (q *queue) run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, err := newRing(len(q.buffers)+1, q.fd, q.buffers)
	if err != nil {
		return q.fail(err)
	}
	defer r.close()
	counter := new([8]byte) // of the eventfd
	listen := func() {
		r.push(sqe{opcode: opRead, fd: int32(q.event), addr: uint64(uintptr(unsafe.Pointer(counter))), len: 8, userData: wakeUp})
	}
	listen()
	var taken []call
	for {
		q.mu.Lock()
		taken, q.pending = q.pending, taken[:0]
		closing := q.closing
		wait := 0
		if len(taken) == 0 {
			q.asleep, wait = true, 1
		}
		q.mu.Unlock()
		if closing {
			return nil
		}
		for _, c := range taken {
			r.transfer(c.worker, c.write, c.p, c.off)
		}
		if err := r.enter(wait); err != nil {
			return q.fail(err)
		}
		_, _ = r.pop(func(worker uint64, res int32) error {
			if worker == wakeUp {
				listen()
			} else {
				q.results[worker] <- res
			}
			return nil
		})
	}
}

// fail answers every caller, now and later.
func (q *queue) fail(err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		errno = unix.EIO
	}
	for {
		q.mu.Lock()
		pending, closing := q.pending, q.closing
		q.pending, q.asleep = nil, false
		q.mu.Unlock()
		for _, c := range pending {
			q.results[c.worker] <- -int32(errno)
		}
		if closing {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

func (q *queue) Close() error {
	q.mu.Lock()
	q.closing = true
	q.mu.Unlock()
	err := errors.Join(q.wake(), <-q.stopped)
	unix.Close(q.fd)
	unix.Close(q.event)
	return err
}
