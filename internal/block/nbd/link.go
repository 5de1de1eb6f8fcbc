package nbd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
)

// link is a client's connection in the transmission phase, with the calls that
// are under way. One goroutine at a time may send, and one receive.
type link struct {
	details
	sock  net.Conn
	in    input
	calls []call // a request's cookie is its place in here
	head  []byte // the header being sent
	all   net.Buffers
	vecs  net.Buffers
}

// call is a request under way.
type call struct {
	cookie uint64
	busy   atomic.Bool // sent, and its reply not yet received

	typ    uint16
	off    int64
	data   []byte          // where what is read goes
	got    int             // bytes of data received so far
	extent blockdev.Extent // the first one of a BLOCK_STATUS reply
	err    error

	done chan error // of a Client's call
}

func newLink(sock net.Conn, d details, depth int) *link {
	l := &link{details: d, sock: sock, calls: make([]call, depth)}
	l.in = input{sock: sock, buf: make([]byte, inputSize)}
	l.head = make([]byte, 0, sizeRequest)
	l.all = make(net.Buffers, 2)
	for i := range l.calls {
		l.calls[i].cookie = uint64(i)
	}
	return l
}

// begin fills in a call that is not busy.
func (c *call) begin(typ uint16, off int64, data []byte) {
	c.typ, c.off, c.data, c.got, c.err = typ, off, data, 0, nil
	c.extent = blockdev.Extent{}
	c.busy.Store(true)
}

// send sends a request; payload is a write's data.
func (l *link) send(r request, payload []byte) error {
	l.head = appendRequest(l.head[:0], r)
	if len(payload) == 0 {
		_, err := l.sock.Write(l.head)
		return err
	}
	l.vecs = append(l.all[:0], l.head, payload)
	_, err := l.vecs.WriteTo(l.sock)
	return err
}

// receive reads replies until one is complete, and returns its call, which is
// no longer busy. An error means that the connection is of no more use.
func (l *link) receive() (*call, error) {
	for {
		b, err := l.peek(4)
		if err != nil {
			return nil, err
		}
		var c *call
		var last bool
		switch magic := be.Uint32(b); magic {
		case magicSimple:
			c, err = l.simple()
			last = true
		case magicStructured:
			c, last, err = l.chunk()
		default:
			err = fmt.Errorf("server's reply begins with %#x", magic)
		}
		if err != nil {
			return nil, err
		}
		if last {
			if c.err == nil && c.typ == cmdRead && c.got != len(c.data) {
				return nil, fmt.Errorf("server sent %d bytes of a read of %d", c.got, len(c.data))
			}
			c.busy.Store(false)
			return c, nil
		}
	}
}

// peek waits until n bytes are buffered.
func (l *link) peek(n int) ([]byte, error) {
	for len(l.in.buffered()) < n {
		if err := l.in.fill(); err != nil {
			if errors.Is(err, io.EOF) && len(l.in.buffered()) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return l.in.buffered()[:n], nil
}

// call returns the busy call of a cookie.
func (l *link) call(cookie uint64) (*call, error) {
	if cookie >= uint64(len(l.calls)) || !l.calls[cookie].busy.Load() {
		return nil, errors.New("server answers a request that was not made")
	}
	return &l.calls[cookie], nil
}

func (l *link) simple() (*call, error) {
	b, err := l.peek(sizeSimple)
	if err != nil {
		return nil, err
	}
	errno, cookie := be.Uint32(b[4:]), be.Uint64(b[8:])
	l.in.skip(sizeSimple)
	c, err := l.call(cookie)
	if err != nil {
		return nil, err
	}
	switch {
	case errno != 0:
		c.err = &RemoteError{Errno: errno}
	case c.typ == cmdRead && l.structured, c.typ == cmdBlockStatus:
		return nil, errors.New("server sent a simple reply where a structured one is due")
	case c.typ == cmdRead:
		if err := l.in.read(c.data); err != nil {
			return nil, err
		}
		c.got = len(c.data)
	}
	return c, nil
}

func (l *link) chunk() (c *call, last bool, err error) {
	b, err := l.peek(sizeChunk)
	if err != nil {
		return nil, false, err
	}
	flags, typ, cookie, length := be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint32(b[16:])
	l.in.skip(sizeChunk)
	if c, err = l.call(cookie); err != nil {
		return nil, false, err
	}
	last = flags&chunkDone != 0
	switch {
	case !l.structured:
		return nil, false, errors.New("server sent a structured reply that was not negotiated")
	case typ == chunkNone && length == 0 && last:
		return c, last, nil
	case typ == chunkOffsetData && c.typ == cmdRead && length > 8:
		return c, last, l.offsetData(c, int(length)-8)
	case typ == chunkOffsetHole && c.typ == cmdRead && length == 12:
		return c, last, l.offsetHole(c)
	case typ == chunkBlockStatus && c.typ == cmdBlockStatus && length >= 4+sizeExtent && (length-4)%sizeExtent == 0:
		return c, last, l.extents(c, int(length))
	case typ&(1<<15) != 0 && length >= 6:
		return c, last, l.failure(c, int(length))
	}
	return nil, false, fmt.Errorf("server sent a chunk of type %d with %d bytes for a command of type %d", typ, length, c.typ)
}

// target returns the part of a read's buffer that a chunk is for.
func (c *call) target(off uint64, n int) ([]byte, error) {
	start := off - uint64(c.off)
	if start > uint64(len(c.data)) || n < 1 || uint64(n) > uint64(len(c.data))-start {
		return nil, errors.New("server sent data from outside a read")
	}
	c.got += n
	return c.data[start:][:n], nil
}

func (l *link) offsetData(c *call, n int) error {
	b, err := l.peek(8)
	if err != nil {
		return err
	}
	p, err := c.target(be.Uint64(b), n)
	if err != nil {
		return err
	}
	l.in.skip(8)
	return l.in.read(p)
}

func (l *link) offsetHole(c *call) error {
	b, err := l.peek(12)
	if err != nil {
		return err
	}
	p, err := c.target(be.Uint64(b), int(be.Uint32(b[8:])))
	if err != nil {
		return err
	}
	l.in.skip(12)
	clear(p)
	return nil
}

// extents takes the first extent and skips the others.
func (l *link) extents(c *call, length int) error {
	b, err := l.peek(4 + sizeExtent)
	if err != nil {
		return err
	}
	n, state := be.Uint32(b[4:]), be.Uint32(b[8:])
	if n == 0 {
		return errors.New("server sent an empty extent")
	}
	c.extent = blockdev.Extent{Offset: c.off, Length: int64(n), Hole: state&stateHole != 0 && state&stateZero != 0}
	l.in.skip(4 + sizeExtent)
	return l.drop(length - 4 - sizeExtent)
}

func (l *link) failure(c *call, length int) error {
	b, err := l.peek(6)
	if err != nil {
		return err
	}
	errno, size := be.Uint32(b), int(be.Uint16(b[4:]))
	if size > min(length-6, MaxName) || errno == 0 {
		return errors.New("server sent a malformed error")
	}
	l.in.skip(6)
	if b, err = l.peek(size); err != nil {
		return err
	}
	if c.err == nil {
		c.err = &RemoteError{Errno: errno, Message: string(b)}
	}
	l.in.skip(size)
	return l.drop(length - 6 - size)
}

// drop skips n bytes.
func (l *link) drop(n int) error {
	for n > 0 {
		if _, err := l.peek(1); err != nil {
			return err
		}
		k := min(n, len(l.in.buffered()))
		l.in.skip(k)
		n -= k
	}
	return nil
}
