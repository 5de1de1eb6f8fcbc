// Package qmp is a client of QMP, the JSON protocol by which QEMU is
// controlled (QEMU's docs/interop/qmp-spec): greeting, capabilities
// negotiation, commands with their replies, and events.
//
// Everything QEMU sends is bounded by [LineMax] and checked before use: a
// guest that took over its QEMU must not take over the agent too.
//
// A [Client] owns one connection and one goroutine that reads it until Close
// or an error. All methods are safe for concurrent use.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// LineMax is the largest message accepted from QEMU, in bytes. The replies that
// this program asks for have a few kilobytes.
const LineMax = 1 << 20

// writeTimeout bounds the time to hand a command to QEMU: its socket buffer
// holds hundreds of our commands, so a full one means that QEMU hangs.
const writeTimeout = 10 * time.Second

// ErrClosed is reported by commands on a connection that has ended; it wraps
// the reason.
var ErrClosed = errors.New("QMP connection is closed")

// Error is a command's failure as QEMU reports it.
type Error struct {
	Command string // the command that failed
	Class   string // GenericError, CommandNotFound, DeviceNotFound, ...
	Desc    string // for people
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

// Event is something that happened in QEMU.
type Event struct {
	Name string          // such as SHUTDOWN or DEVICE_DELETED
	Time time.Time       // QEMU's clock
	Data json.RawMessage // arguments, may be nil; owned by the receiver
}

// Client is a QMP session in command mode.
type Client struct {
	conn net.Conn
	done chan struct{} // closed when the reader has ended

	writeMu sync.Mutex // serialises writes to conn

	mu      sync.Mutex
	nextID  uint64                  // guarded by mu
	pending map[uint64]chan message // guarded by mu: replies awaited, each channel has room for one
	watches map[*Watch]struct{}     // guarded by mu
	err     error                   // guarded by mu: why the session ended, set before done is closed
	ended   bool                    // guarded by mu: nothing is delivered any more
}

// Dial connects to the QMP server at the unix socket path and negotiates.
func Dial(ctx context.Context, path string) (*Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return New(ctx, conn)
}

// New negotiates on conn and returns a session. It owns conn from here on, also
// when it fails.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{
		conn:    conn,
		done:    make(chan struct{}),
		pending: make(map[uint64]chan message),
		watches: make(map[*Watch]struct{}),
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 4096), LineMax)

	// A context that ends during the greeting interrupts the read.
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	err := greet(lines)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("no QMP greeting: %w", err)
	}
	go c.read(lines)
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// greet reads the greeting, the first message of a session.
func greet(lines *bufio.Scanner) error {
	if !lines.Scan() {
		return scanError(lines)
	}
	m, err := parse(lines.Bytes())
	if err != nil {
		return err
	}
	if !m.greeting {
		return errors.New("the peer does not speak QMP")
	}
	return nil
}

func scanError(lines *bufio.Scanner) error {
	if err := lines.Err(); err != nil {
		return err
	}
	return errors.New("QEMU closed the connection")
}

// Do runs a command and decodes its result into result, unless that is nil.
// args is a struct or map for the command's arguments, or nil. It returns an
// [*Error] if QEMU refuses, an error wrapping [ErrClosed] if the connection
// ends, and ctx's error if ctx does: the command may then still take effect.
func (c *Client) Do(ctx context.Context, command string, args, result any) error {
	reply := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.closedError(command)
	}
	c.nextID++
	id := c.nextID
	c.pending[id] = reply
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()

	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", command, err)
	}
	c.writeMu.Lock()
	c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err = c.conn.Write(append(request, '\n'))
	c.writeMu.Unlock()
	if err != nil {
		// Half a command may be out: nothing after it would be understood.
		c.conn.Close()
		return fmt.Errorf("cannot send %s: %w", command, err)
	}

	select {
	case m := <-reply:
		return decodeReply(m, command, result)
	case <-ctx.Done():
		return fmt.Errorf("cannot wait for %s: %w", command, ctx.Err())
	case <-c.done:
		// The reply may have been the last thing that came.
		select {
		case m := <-reply:
			return decodeReply(m, command, result)
		default:
			return c.closedError(command)
		}
	}
}

func decodeReply(m message, command string, result any) error {
	if m.err != nil {
		return &Error{Command: command, Class: m.err.Class, Desc: m.err.Desc}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.result, result); err != nil {
		return fmt.Errorf("cannot decode the reply to %s: %w", command, err)
	}
	return nil
}

func (c *Client) closedError(command string) error {
	return fmt.Errorf("cannot run %s: %w: %w", command, ErrClosed, c.Err())
}

// read delivers messages until the connection ends.
func (c *Client) read(lines *bufio.Scanner) {
	var err error
	for err == nil && lines.Scan() {
		var m message
		if m, err = parse(lines.Bytes()); err == nil {
			c.deliver(m)
		}
	}
	if err == nil {
		err = scanError(lines)
	}
	c.conn.Close()

	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.ended = true
	for w := range c.watches {
		delete(c.watches, w)
		close(w.events)
	}
	c.mu.Unlock()
	close(c.done)
}

func (c *Client) deliver(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case m.event != nil:
		for w := range c.watches {
			w.offer(*m.event)
		}
	case m.hasID:
		if reply, ok := c.pending[m.id]; ok { // else its caller has given up
			delete(c.pending, m.id)
			reply <- m
		}
	}
}

// Done is closed when the session has ended, by Close or by itself.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns why the session ended, nil while it lasts.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the session and waits for its goroutine. QEMU runs on. It is
// idempotent and never fails.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.err == nil {
		c.err = net.ErrClosed
	}
	c.mu.Unlock()
	c.conn.Close()
	<-c.done
	return nil
}

// Conn returns the connection, for its peer's credentials. It must not be read,
// written or closed.
func (c *Client) Conn() net.Conn { return c.conn }
