package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

// clientDepth is how many requests a Client has under way at most; further
// ones wait.
const clientDepth = 128

// maxRange is the most bytes of one command without payload: the largest
// multiple of every block size that the protocol's 32 bits hold.
const maxRange = 1 << 31

// Client is an export of an NBD server as a [blockdev.Device]. It sends every
// request at once, whatever others are under way, and does not reconnect: after
// the connection is lost, all requests fail.
//
// Requests that are not aligned to the server's minimum block size are made
// from aligned ones; they exclude others on the same blocks.
type Client struct {
	link  *link
	name  string
	guard blockdev.Guard
	free  chan *call
	edges chan []byte // space for blocks, to be used again

	send sync.Mutex // guards sending on link, and lost
	lost error      // why the connection is of no more use

	received chan struct{} // closed when the receiving goroutine has ended
}

var _ blockdev.Extenter = (*Client)(nil)

// Dial connects to an NBD server and opens one of its exports. ctx limits the
// time of that and is not kept. It returns [ErrNotFound] if there is no such
// export.
func Dial(ctx context.Context, network, address, export string) (*Client, error) {
	sock, d, err := dial(ctx, network, address, export)
	if err != nil {
		return nil, fmt.Errorf("cannot open NBD export %q at %s: %w", export, address, err)
	}
	c := &Client{
		link:     newLink(sock, d, clientDepth),
		name:     fmt.Sprintf("NBD export %q at %s", export, address),
		free:     make(chan *call, clientDepth),
		edges:    make(chan []byte, clientDepth),
		received: make(chan struct{}),
	}
	for i := range c.link.calls {
		k := &c.link.calls[i]
		k.done = make(chan error, 1)
		c.free <- k
	}
	go c.receive()
	return c, nil
}

// receive hands out replies until the connection ends; Close waits for it.
func (c *Client) receive() {
	defer close(c.received)
	for {
		k, err := c.link.receive()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("server closed the connection")
			}
			c.lose(err)
			break
		}
		k.done <- k.err
	}
	// Nobody sends any more: see do.
	for i := range c.link.calls {
		if k := &c.link.calls[i]; k.busy.Swap(false) {
			k.done <- c.lost
		}
	}
}

// lose ends the connection for err. After that, no request is sent.
func (c *Client) lose(err error) {
	_ = shutdown(c.link.sock, unix.SHUT_RDWR) // wakes who is sending
	c.send.Lock()
	defer c.send.Unlock()
	c.lost = fmt.Errorf("connection is lost: %w", err)
}

// do sends a request and waits for its end.
func (c *Client) do(typ, flags uint16, off int64, n int64, data []byte) (blockdev.Extent, error) {
	k := <-c.free
	defer func() { c.free <- k }()
	r := request{flags: flags, typ: typ, cookie: k.cookie, offset: uint64(off), length: uint32(n)}
	var payload []byte
	if typ == cmdWrite {
		payload = data
	}

	c.send.Lock()
	if c.lost != nil {
		c.send.Unlock()
		return blockdev.Extent{}, c.lost
	}
	k.begin(typ, off, data)
	err := c.link.send(r, payload)
	c.send.Unlock()
	if err != nil {
		// The receiver ends for it, and with it this call.
		_ = shutdown(c.link.sock, unix.SHUT_RDWR)
	}
	err = <-k.done
	return k.extent, err
}

// enter admits a request and checks its range.
func (c *Client) enter(off, n int64, access blockdev.Access) (*blockdev.Pass, error) {
	wideOff, wideLen := blockdev.Widen(off, n, int64(c.link.minimum))
	pass, err := c.guard.Enter(wideOff, wideLen, access)
	if err != nil {
		return nil, err
	}
	if err := blockdev.CheckRange(c.link.size, off, n); err != nil {
		c.guard.Leave(pass)
		return nil, err
	}
	return pass, nil
}

// change admits a request that changes the device. It may run beside others on
// the same blocks, unless it has to read some of them first.
func (c *Client) change(off, n int64) (*blockdev.Pass, error) {
	whole := (off|n)&int64(c.link.minimum-1) == 0
	pass, err := c.enter(off, n, blockdev.Access(whole))
	if err == nil && c.link.has(exportReadOnly) {
		c.guard.Leave(pass)
		return nil, blockdev.ErrReadOnly
	}
	return pass, err
}

// fail puts the request in front of err.
func (c *Client) fail(op string, off, n int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("cannot %s %d bytes at %d of %s: %w", op, n, off, c.name, err)
}

// edge reads the block that off lies in, and returns it and where.
func (c *Client) edge(off int64) (block []byte, start, in int64, err error) {
	select {
	case block = <-c.edges:
	default:
		block = make([]byte, c.link.minimum)
	}
	in = off & int64(len(block)-1)
	if _, err = c.do(cmdRead, 0, off-in, int64(len(block)), block); err != nil {
		c.putEdge(block)
	}
	return block, off - in, in, err
}

func (c *Client) putEdge(block []byte) {
	select {
	case c.edges <- block:
	default:
	}
}

// ReadAt implements [blockdev.Device].
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	pass, err := c.enter(off, n, blockdev.Shared)
	if err != nil {
		return 0, c.fail("read", off, n, err)
	}
	defer c.guard.Leave(pass)
	done := 0
	for done < len(p) {
		k, err := c.readPart(p[done:], off+int64(done))
		if err != nil {
			return done, c.fail("read", off, n, err)
		}
		done += k
	}
	return done, nil
}

// part returns how many of n bytes at off one request can have: those left in
// a block that the range shares with others, or whole blocks.
func (c *Client) part(off int64, n int) (part int, whole bool) {
	block := c.link.minimum
	if in := int(off & int64(block-1)); in != 0 {
		return min(block-in, n), false
	}
	if n < block {
		return n, false
	}
	return min(n&^(block-1), c.link.maximum), true
}

func (c *Client) readPart(p []byte, off int64) (int, error) {
	n, whole := c.part(off, len(p))
	if whole {
		_, err := c.do(cmdRead, 0, off, int64(n), p[:n])
		return n, err
	}
	block, _, in, err := c.edge(off)
	if err != nil {
		return 0, err
	}
	defer c.putEdge(block)
	return copy(p[:n], block[in:]), nil
}

// WriteAt implements [blockdev.Device].
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	pass, err := c.change(off, n)
	if err != nil {
		return 0, c.fail("write", off, n, err)
	}
	defer c.guard.Leave(pass)
	done := 0
	for done < len(p) {
		k, err := c.writePart(p[done:], off+int64(done))
		if err != nil {
			return done, c.fail("write", off, n, err)
		}
		done += k
	}
	return done, nil
}

func (c *Client) writePart(p []byte, off int64) (int, error) {
	n, whole := c.part(off, len(p))
	if whole {
		_, err := c.do(cmdWrite, 0, off, int64(n), p[:n])
		return n, err
	}
	block, start, in, err := c.edge(off)
	if err != nil {
		return 0, err
	}
	defer c.putEdge(block)
	copy(block[in:], p[:n])
	_, err = c.do(cmdWrite, 0, start, int64(len(block)), block)
	return n, err
}

// zeros is what is written where a server cannot write zeros by itself, and at
// the ends of an unaligned range.
var zeros [64 << 10]byte

// WriteZeroes implements [blockdev.Device].
func (c *Client) WriteZeroes(off, n int64, mayPunch bool) error {
	pass, err := c.change(off, n)
	if err != nil {
		return c.fail("write zeros to", off, n, err)
	}
	defer c.guard.Leave(pass)
	var flags uint16
	if !mayPunch {
		flags = flagNoHole
	}
	for done := int64(0); done < n; {
		part, whole := c.part(off+done, int(min(n-done, maxRange)))
		if whole && c.link.has(exportWriteZeroes) {
			// No data goes with it, so the limit of payload does not apply.
			k := min(n-done, maxRange) &^ int64(c.link.minimum-1)
			if _, err := c.do(cmdWriteZeroes, flags, off+done, k, nil); err != nil {
				return c.fail("write zeros to", off, n, err)
			}
			done += k
			continue
		}
		k, err := c.writePart(zeros[:min(part, len(zeros))], off+done)
		if err != nil {
			return c.fail("write zeros to", off, n, err)
		}
		done += int64(k)
	}
	return nil
}

// Discard implements [blockdev.Device]. Blocks that the range does not wholly
// cover are kept.
func (c *Client) Discard(off, n int64) error {
	pass, err := c.change(off, n)
	if err != nil {
		return c.fail("discard", off, n, err)
	}
	defer c.guard.Leave(pass)
	if !c.link.has(exportTrim) {
		return nil
	}
	block := int64(c.link.minimum)
	start, end := (off+block-1)&^(block-1), (off+n)&^(block-1)
	for start < end {
		k := min(end-start, maxRange)
		if _, err := c.do(cmdTrim, 0, start, k, nil); err != nil {
			return c.fail("discard", off, n, err)
		}
		start += k
	}
	return nil
}

// Flush implements [blockdev.Device].
func (c *Client) Flush() error {
	pass, err := c.guard.Enter(0, 0, blockdev.Shared)
	if err == nil {
		defer c.guard.Leave(pass)
		if c.link.has(exportFlush) { // without it, a write is durable when it is answered
			_, err = c.do(cmdFlush, 0, 0, 0, nil)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot flush %s: %w", c.name, err)
	}
	return nil
}

// NextExtent implements [blockdev.Extenter]. Of a server that does not tell,
// everything is data.
func (c *Client) NextExtent(off int64) (blockdev.Extent, error) {
	pass, err := c.enter(off, 1, blockdev.Shared)
	if err != nil {
		return blockdev.Extent{}, c.fail("find the extent of", off, 1, err)
	}
	defer c.guard.Leave(pass)
	if !c.link.blockStatus {
		return blockdev.Extent{Offset: off, Length: c.link.size - off}, nil
	}
	in := off & int64(c.link.minimum-1)
	e, err := c.do(cmdBlockStatus, flagReqOne, off-in, min(c.link.size-off+in, maxRange), nil)
	if err == nil && e.Length <= in {
		err = errors.New("server's extent ends before its block")
	}
	if err != nil {
		return blockdev.Extent{}, c.fail("find the extent of", off, 1, err)
	}
	return blockdev.Extent{Offset: off, Length: min(e.Length-in, c.link.size-off), Hole: e.Hole}, nil
}

// Size implements [blockdev.Device].
func (c *Client) Size() int64 { return c.link.size }

// BlockSize implements [blockdev.Device].
func (c *Client) BlockSize() int { return max(c.link.minimum, 512) }

// Close implements [blockdev.Device]. It says good-bye to the server.
func (c *Client) Close() error {
	if !c.guard.Close() {
		<-c.received
		return nil
	}
	c.send.Lock()
	if c.lost == nil {
		_ = c.link.send(request{typ: cmdDisc}, nil) // the server may be gone
	}
	c.send.Unlock()
	_ = shutdown(c.link.sock, unix.SHUT_RDWR)
	<-c.received
	return c.link.sock.Close()
}
