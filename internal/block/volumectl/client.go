package volumectl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// Client controls a volume process. After a connection broke, the next call
// makes a new one. It must be closed.
type Client struct {
	path string

	mu     sync.Mutex // held during a call
	link   *link      // guarded by mu; nil while not connected
	closed bool       // guarded by mu
	hello  reply      // guarded by mu: of the latest connection
	pid    int        // guarded by mu: the kernel's word on who listens
}

// Dial connects to the volume process that listens at path. It returns an error
// of kind [errs.Unavailable] if there is none, and refuses one of another user.
func Dial(ctx context.Context, path string) (*Client, error) {
	c := &Client{path: path}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// VM returns the name of the VM, as the volume process was started with.
func (c *Client) VM() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hello.VM
}

// PID returns the process that listens at the socket, by the kernel's word.
func (c *Client) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pid
}

// Close ends the connection. The volume process lives on. It waits for a call
// that is under way, is idempotent and never fails.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.disconnect()
	return nil
}

// AddDisk makes the volume process open and serve a disk. file is the open disk,
// with the locks that whoever opened it has taken, which the volume process then
// shares; dek is its key, or nil for a raw disk; next is the key that a deep rekey
// leads to, or nil if none is under way. All stay the caller's. Errors:
// kind [errs.Corrupt] if the key is not the disk's or the header is bad,
// [errs.Exists], [errs.InvalidState] if the disk is in use, ...
func (c *Client) AddDisk(ctx context.Context, d Disk, file *os.File, dek, next *keymem.Key) error {
	r := request{Op: opAddDisk, Disk: d.Name, Format: d.Format, ReadOnly: d.ReadOnly, Size: d.SizeMin}
	if dek != nil {
		r.KeyBytes = dek.Len()
	}
	if next != nil {
		r.NextKeyBytes = next.Len()
	}
	_, err := c.call(ctx, r, file, dek, next)
	return errs.Wrap(err, "cannot add disk %s", d.Name)
}

// RemoveDisk makes the volume process flush and close a disk. NBD clients that
// do not leave by themselves are disconnected.
func (c *Client) RemoveDisk(ctx context.Context, disk string) error {
	_, err := c.call(ctx, request{Op: opRemoveDisk, Disk: disk}, nil)
	return errs.Wrap(err, "cannot remove disk %s", disk)
}

// Listen makes the volume process serve NBD on a listening unix stream socket,
// in place of an earlier one. listener stays the caller's.
func (c *Client) Listen(ctx context.Context, listener *os.File) error {
	_, err := c.call(ctx, request{Op: opListen}, listener)
	return errs.Wrap(err, "cannot serve NBD")
}

// ListenVhostUser makes the volume process serve a disk over vhost-user on a
// listening unix stream socket, in place of an earlier one of that disk. The
// disk's name is then its serial number: at most 20 bytes. listener stays the
// caller's.
func (c *Client) ListenVhostUser(ctx context.Context, disk string, listener *os.File) error {
	_, err := c.call(ctx, request{Op: opListenVhost, Disk: disk}, listener)
	return errs.Wrap(err, "cannot serve disk %s over vhost-user", disk)
}

// ReplaceSafe replaces the key safe of a disk in use: the live shallow rekey.
// When it returns nil, both header copies have the new safe, durably, and the
// old KEK is not needed any more; after an error both KEKs must be kept.
func (c *Client) ReplaceSafe(ctx context.Context, disk string, safe *keysafe.Safe) error {
	_, err := c.call(ctx, request{Op: opReplaceSafe, Disk: disk, Safe: safe}, nil)
	return errs.Wrap(err, "cannot replace key safe of disk %s", disk)
}

// Rekey makes the volume process rekey a disk in use deeply: with next as its new
// DEK, which stays the caller's, in safe, the new key safe; or go on with the rekey
// under way, under safe if that is not nil, if next is nil. It may rewrite rate
// bytes a second; 0: any number. It returns when the rekey is at work; [Client.Status]
// tells of its progress and of its end. Of one that is at work it changes the rate
// and nothing else.
//
// From now on both KEKs are needed, until the rekey has come to its end without
// failure.
func (c *Client) Rekey(ctx context.Context, disk string, next *keymem.Key, safe *keysafe.Safe, rate int64) error {
	r := request{Op: opRekey, Disk: disk, Safe: safe, Rate: rate}
	if next != nil {
		r.NextKeyBytes = next.Len()
	}
	_, err := c.call(ctx, r, nil, next)
	return errs.Wrap(err, "cannot rekey disk %s", disk)
}

// StopRekey stops the deep rekey of a disk at the next safe point. If no data were
// moved yet it is undone, else it can go on later, by [Client.Rekey]. Without a
// rekey it does nothing.
func (c *Client) StopRekey(ctx context.Context, disk string) error {
	_, err := c.call(ctx, request{Op: opStopRekey, Disk: disk}, nil)
	return errs.Wrap(err, "cannot stop the rekey of disk %s", disk)
}

// Convert makes the volume process move a disk to another file while it is in
// use: it copies and compares, while [Client.Status] tells how far it is. file is
// the new one, an empty volume under dek or an empty plain file (dek is nil), of the
// disk's size; both stay the caller's. At most rate bytes a second are copied; 0:
// any number. It returns when that is at work.
func (c *Client) Convert(ctx context.Context, disk string, format Format, file *os.File, dek *keymem.Key, rate int64) error {
	r := request{Op: opConvert, Disk: disk, Format: format, Rate: rate}
	if dek != nil {
		r.KeyBytes = dek.Len()
	}
	_, err := c.call(ctx, r, file, dek)
	return errs.Wrap(err, "cannot convert disk %s", disk)
}

// HoldConversion makes sure that both files of a conversion that is [Synced] stay
// so, until [Client.SwitchDisk] or [Client.StopConversion]: the caller may decide
// for the new one. Meanwhile what fails on the new file fails for the guest.
func (c *Client) HoldConversion(ctx context.Context, disk string) error {
	_, err := c.call(ctx, request{Op: opHold, Disk: disk}, nil)
	return errs.Wrap(err, "cannot hold the conversion of disk %s", disk)
}

// SwitchDisk ends a conversion that is [Held]: the disk is in the new file, and the
// old one is closed.
func (c *Client) SwitchDisk(ctx context.Context, disk string) error {
	_, err := c.call(ctx, request{Op: opSwitch, Disk: disk}, nil)
	return errs.Wrap(err, "cannot switch disk %s to its new file", disk)
}

// StopConversion ends a conversion in any phase: the disk stays in the old file,
// and the new one is closed. Without a conversion it does nothing.
func (c *Client) StopConversion(ctx context.Context, disk string) error {
	_, err := c.call(ctx, request{Op: opStopConvert, Disk: disk}, nil)
	return errs.Wrap(err, "cannot stop the conversion of disk %s", disk)
}

// Resize sets the size of a disk in bytes, a multiple of 512.
func (c *Client) Resize(ctx context.Context, disk string, size int64) error {
	_, err := c.call(ctx, request{Op: opResize, Disk: disk, Size: size}, nil)
	return errs.Wrap(err, "cannot resize disk %s", disk)
}

// Flush makes all completed writes of a disk durable.
func (c *Client) Flush(ctx context.Context, disk string) error {
	_, err := c.call(ctx, request{Op: opFlush, Disk: disk}, nil)
	return errs.Wrap(err, "cannot flush disk %s", disk)
}

// Suspend holds back what is asked of all disks, waits for what is in work and
// makes all of it durable: when it returns, their files stay as they are. Until
// [Client.Resume], which tells whether they did; the disks go on by themselves after
// limit, which is at most [SuspendMax], when the connection ends, and when anything
// else but [Client.Status] is asked of the volume process. It is refused, with kind
// [errs.InvalidState], while a disk is rekeyed deeply or converted.
func (c *Client) Suspend(ctx context.Context, limit time.Duration) error {
	_, err := c.call(ctx, request{Op: opSuspend, Limit: limit.Milliseconds()}, nil)
	return errs.Wrap(err, "cannot suspend the disks")
}

// Resume ends what [Client.Suspend] began. An error says that the disks may have
// been written meanwhile; they go on in any case.
func (c *Client) Resume(ctx context.Context) error {
	_, err := c.call(ctx, request{Op: opResume}, nil)
	return errs.Wrap(err, "the disks were not suspended all the time")
}

// Status returns what the volume process is doing.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	answer, err := c.call(ctx, request{Op: opStatus}, nil)
	if err == nil && answer.Status == nil {
		err = fmt.Errorf("%w: status is missing", ErrProtocol)
	}
	if err != nil {
		return nil, errs.Wrap(err, "cannot get status of volume process")
	}
	return answer.Status, nil
}

// Shutdown makes the volume process flush and close everything and end. It
// returns when all is durable, a moment before the process ends.
func (c *Client) Shutdown(ctx context.Context) error {
	_, err := c.call(ctx, request{Op: opShutdown}, nil)
	return errs.Wrap(err, "cannot shut down volume process")
}

// call sends a request and returns its reply. When ctx ends meanwhile, the
// connection is given up, since what comes on it is not known any more.
func (c *Client) call(ctx context.Context, r request, file *os.File, keys ...*keymem.Key) (*reply, error) {
	if err := r.validate(); err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, net.ErrClosed
	}
	if c.link == nil {
		if err := c.connect(ctx); err != nil {
			return nil, err
		}
	}
	answer, err := c.exchange(ctx, r, file, keys...)
	if err != nil {
		c.disconnect()
		return nil, err
	}
	return answer, answer.Error.Err()
}

// exchange runs one request on the connection.
func (c *Client) exchange(ctx context.Context, r request, file *os.File, keys ...*keymem.Key) (*reply, error) {
	conn := c.link.conn
	conn.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	// An interrupt that comes late must not hit the next request.
	defer func() {
		if !stop() {
			c.disconnect()
		}
	}()

	answer, err := func() (*reply, error) {
		if err := c.link.send(r, file); err != nil {
			return nil, err
		}
		for _, key := range keys {
			if key == nil {
				continue
			}
			if err := c.link.sendKey(key); err != nil {
				return nil, err
			}
		}
		message, fds, err := c.link.receive()
		if err != nil {
			return nil, err
		}
		closeAll(fds) // none is expected
		return parseReply(message)
	}()
	switch {
	case err == nil:
		return answer, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no answer to %s: %w", r.Op, ctx.Err())
	case errors.Is(err, ErrProtocol):
		return nil, err
	default:
		return nil, errs.New(errs.Unavailable, "connection to volume process broke during %s: %w", r.Op, err)
	}
}

func (c *Client) connect(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unixpacket", c.path)
	if err != nil {
		return errs.New(errs.Unavailable, "cannot reach volume process: %w", err)
	}
	c.link = newLink(conn.(*net.UnixConn))
	pid, err := checkPeer(c.link.conn)
	var answer *reply
	if err == nil {
		answer, err = c.exchange(ctx, request{Op: opHello, Version: Version}, nil)
	}
	if err == nil {
		err = answer.Error.Err()
	}
	if err == nil && answer.Version != Version {
		err = fmt.Errorf("%w: it speaks version %d", ErrProtocol, answer.Version)
	}
	if err != nil {
		c.disconnect()
		return errs.Wrap(err, "cannot talk to volume process")
	}
	c.hello, c.pid = *answer, pid
	return nil
}

func (c *Client) disconnect() {
	if c.link != nil {
		c.link.conn.Close()
		c.link = nil
	}
}
