package nbd

import (
	"bufio"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// conn is one client in the transmission phase.
//
// Its workers share the turn, which is the right to read from the socket. The
// turn is with one worker, or vacant; it guards in and part.
type conn struct {
	server      *Server
	raw         net.Conn      // the socket itself
	sock        net.Conn      // what is read and written: raw, or TLS on it
	out         *bufio.Writer // of TLS: makes whole records of many pieces; nil otherwise; guarded by send
	address     string        // the host at the other end; "" on a unix socket
	settled     bool          // an export was chosen; guarded by server.mu
	export      *export
	structured  bool
	blockStatus bool

	stopping atomic.Bool // the end was asked for from our side
	failed   atomic.Bool // a failed request was logged

	in   input // guarded by the turn
	part part  // guarded by the turn: what is left of a long request

	pace pace

	send sync.Mutex // guards writing to the socket

	mu      sync.Mutex // guards the fields below
	vacant  bool       // the turn is with nobody
	idle    []*worker  // waiting for the turn, the last one to come first
	workers int
	ended   bool     // no further request is read
	err     error    // why; nil if the client left in good order
	splits  []*split // not in use
	wg      sync.WaitGroup
}

func newConn(s *Server, sock net.Conn) *conn {
	c := &conn{server: s, raw: sock, sock: sock}
	if tcp, ok := sock.RemoteAddr().(*net.TCPAddr); ok {
		c.address = tcp.IP.String()
	}
	return c
}

// serve runs the transmission phase. It returns after every request has ended.
func (c *conn) serve(agreed outcome) error {
	c.export, c.structured, c.blockStatus = agreed.export, agreed.structured, agreed.blockStatus
	if agreed.tls != nil {
		c.sock = agreed.tls
		c.out = bufio.NewWriterSize(c.sock, batchBytes)
	}
	c.in.sock = c.sock
	c.in.buf = make([]byte, inputSize)
	widen(c.raw)
	w, err := c.newWorker(true)
	if err != nil {
		return err
	}
	w.run() // with the turn
	c.wg.Wait()
	return c.err
}

// abort breaks the connection. Requests in work end in the device, but nobody
// is told.
func (c *conn) abort() {
	c.stopping.Store(true)
	_ = shutdown(c.raw, unix.SHUT_RDWR) // fails only if it is closed already
}

// drain stops reading requests and lets the connection end by itself when
// those in work are answered.
func (c *conn) drain() {
	c.stopping.Store(true)
	_ = shutdown(c.raw, unix.SHUT_RD)
}

// end stops the workers: no further request is read. The first reason counts.
func (c *conn) end(err error) {
	c.mu.Lock()
	if !c.ended {
		c.ended = true
		if !errors.Is(err, io.EOF) {
			c.err = err
		}
	}
	idle := c.idle
	c.idle = nil
	c.mu.Unlock()
	for _, w := range idle {
		close(w.turn)
	}
}

// broken notes that replies cannot be sent any more and wakes the reader.
func (c *conn) broken(err error) {
	c.end(err)
	_ = shutdown(c.raw, unix.SHUT_RDWR)
}

// pass gives the turn away: to the worker who became idle last, as its memory
// is warm, or to a new one as long as the limits allow it, or to whoever comes
// first.
func (c *conn) pass() {
	c.mu.Lock()
	if n := len(c.idle); n > 0 {
		w := c.idle[n-1]
		c.idle = c.idle[:n-1]
		c.mu.Unlock()
		w.turn <- struct{}{}
		return
	}
	if c.workers < c.server.config.MaxWorkers && !c.ended {
		if w, err := c.newWorker(false); err == nil && w != nil {
			c.mu.Unlock()
			c.wg.Go(w.run)
			return
		}
	}
	c.vacant = true
	c.mu.Unlock()
}

// take waits for the turn. It reports false when the connection has ended.
func (c *conn) take(w *worker) bool {
	c.mu.Lock()
	switch {
	case c.ended:
		c.mu.Unlock()
		return false
	case c.vacant:
		c.vacant = false
		c.mu.Unlock()
		return true
	}
	c.idle = append(c.idle, w)
	c.mu.Unlock()
	_, ok := <-w.turn
	return ok
}

// newWorker returns a worker with its buffer, or nil if there is no buffer for
// it. The first worker of a connection always gets one. c.mu is held, or nobody
// else knows c yet.
func (c *conn) newWorker(first bool) (*worker, error) {
	space, err := c.server.pool.get(first)
	if space == nil {
		return nil, err
	}
	c.workers++
	w := &worker{conn: c, turn: make(chan struct{}, 1)}
	w.batch.init(space)
	return w, nil
}

// pace tells whether requests take long enough to pay for passing the turn on
// before serving one.
type pace struct {
	average atomic.Int64 // ns, of the last eight or so
}

// slow is about four times what it costs to wake another worker.
const slow = 20_000 // ns

func (p *pace) isSlow() bool { return p.average.Load() > slow }

// note counts one request. One that took very long counts no more than five
// slow ones: it is the scheduler's doing as often as the device's. Two workers
// may overwrite each other's count, which does no harm to an average.
func (p *pace) note(ns int64) {
	a := p.average.Load()
	p.average.Store(a + (min(ns, 5*slow)-a)/8)
}

// input is the buffered reading side of a socket.
type input struct {
	sock io.Reader
	buf  []byte
	r, w int // buf[r:w] was received and not yet taken
}

// inputSize holds a burst of requests, and of small writes with their data.
const inputSize = 64 << 10

// buffered returns what was received and not yet taken.
func (in *input) buffered() []byte { return in.buf[in.r:in.w] }

// skip takes n buffered bytes.
func (in *input) skip(n int) { in.r += n }

// fill waits until more has been received. The buffer must not be full of what
// was not taken.
func (in *input) fill() error {
	if in.r > 0 {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	n, err := in.sock.Read(in.buf[in.w:])
	in.w += n
	if n > 0 {
		return nil
	}
	return err
}

// read receives exactly len(p) bytes; those not yet buffered go straight to p.
func (in *input) read(p []byte) error {
	n := copy(p, in.buffered())
	in.skip(n)
	if n == len(p) {
		return nil
	}
	_, err := io.ReadFull(in.sock, p[n:])
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// widen lets a socket take a long reply at once, so that its writer need not
// wait for the other side to read it in parts. The system may allow less, which
// is slower and nothing else.
func widen(sock net.Conn) {
	if s, ok := sock.(interface{ SetWriteBuffer(bytes int) error }); ok {
		_ = s.SetWriteBuffer(1 << 20)
	}
}

// control runs f with sock's descriptor.
func control(sock net.Conn, f func(fd int) error) error {
	sc, ok := sock.(syscall.Conn)
	if !ok {
		return errors.New("connection is not a socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

func shutdown(sock net.Conn, how int) error {
	return control(sock, func(fd int) error { return unix.Shutdown(fd, how) })
}
