package nbd

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"strongroom/internal/block/blockdev"
)

// job is what a worker does at a time: a request, or one piece of a long one.
type job struct {
	request
	off   int64  // the piece: bytes from the start of the device
	n     int    // and its length in bytes
	data  []byte // what to write
	whole *split // nil unless the request has several pieces
	err   error  // not nil: refuse the request with this error
}

// split is a request that several workers serve in pieces. Each of them leaves
// when its piece is done; the last one ends the reply.
type split struct {
	left atomic.Int32

	mu  sync.Mutex // guards err
	err error      // the first failure
}

func (s *split) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// failure returns the first failure. All pieces but the caller's are done.
func (s *split) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// part is the rest of a long request whose first pieces were taken.
type part struct {
	request
	off   int64
	left  int // bytes; 0: there is no such request
	whole *split
}

// mistake is an error of the client's: it is answered, not logged.
type mistake struct {
	errno   uint32
	message string
}

func (m *mistake) Error() string { return m.message }

// The mistakes, allocated once: a hostile client makes them by the million.
var (
	errCommand    = &mistake{errnoInval, "unknown command"}
	errFlags      = &mistake{errnoInval, "flag is not valid for the command"}
	errEmpty      = &mistake{errnoInval, "length is zero"}
	errBeyond     = &mistake{errnoInval, "request is beyond the end of the export"}
	errBeyondEnd  = &mistake{errnoNoSpace, "write is beyond the end of the export"}
	errTooLong    = &mistake{errnoInval, "request is longer than the maximum payload"}
	errFragments  = &mistake{errnoOverflow, "read is too long to be sent unfragmented"}
	errReadOnly   = &mistake{errnoPerm, "export is read-only"}
	errNoMetadata = &mistake{errnoInval, "base:allocation was not negotiated"}
)

// errLeft: the client said good-bye, or went without.
var errLeft = fmt.Errorf("client left: %w", io.EOF)

// next reads the next job. The turn is with w. Before it waits for the client,
// it sends the replies that w has gathered. A write's data is not yet read.
func (w *worker) next() (job, error) {
	c := w.conn
	if c.part.left > 0 {
		return c.nextPiece(), nil
	}
	for len(c.in.buffered()) < sizeRequest {
		if err := w.flush(); err != nil {
			return job{}, err
		}
		if c.stopping.Load() {
			return job{}, errLeft
		}
		if err := c.in.fill(); err != nil {
			if errors.Is(err, io.EOF) && len(c.in.buffered()) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return job{}, err
		}
	}
	r, ok := parseRequest(c.in.buffered())
	if !ok {
		return job{}, errors.New("a request does not begin with its magic")
	}
	c.in.skip(sizeRequest)
	if r.typ == cmdDisc {
		return job{}, errLeft
	}
	if r.typ == cmdWrite && r.length > MaxPayload {
		return job{}, fmt.Errorf("a write of %d bytes", r.length)
	}
	j := job{request: r, off: int64(r.offset), n: int(r.length), err: c.check(r)}
	splits := r.typ == cmdWrite || r.typ == cmdRead && c.structured
	if j.err == nil && splits && j.n > pieceSize {
		c.part = part{request: r, off: j.off, left: j.n, whole: c.newSplit()}
		c.part.whole.left.Store(int32((j.n + pieceSize - 1) / pieceSize))
		return c.nextPiece(), nil
	}
	return j, nil
}

// nextPiece takes the next piece of the long request.
func (c *conn) nextPiece() job {
	p := &c.part
	j := job{request: p.request, off: p.off, n: min(p.left, pieceSize), whole: p.whole}
	p.off += int64(j.n)
	p.left -= j.n
	return j
}

// newSplit returns a split without failure. The turn is with the caller.
func (c *conn) newSplit() *split {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.splits); n > 0 {
		s := c.splits[n-1]
		c.splits = c.splits[:n-1]
		return s
	}
	return &split{}
}

// freeSplit takes back a split that all its pieces have left.
func (c *conn) freeSplit(s *split) {
	s.err = nil
	c.mu.Lock()
	defer c.mu.Unlock()
	c.splits = append(c.splits, s)
}

// check tells what is wrong with a request; nil is nothing.
func (c *conn) check(r request) error {
	if m := c.mistake(r); m != nil {
		return m
	}
	return nil
}

func (c *conn) mistake(r request) *mistake {
	// FUA is allowed with every command and means nothing with most.
	allowed := uint16(flagFUA)
	changes := false
	switch r.typ {
	case cmdRead:
		if c.structured {
			allowed |= flagDF
		}
	case cmdWrite, cmdTrim:
		changes = true
	case cmdWriteZeroes:
		changes = true
		// FAST_ZERO is not offered: the data path does not promise to be
		// faster at zeros than at data.
		allowed |= flagNoHole
	case cmdBlockStatus:
		allowed |= flagReqOne
	case cmdFlush, cmdCache:
	default:
		return errCommand
	}
	switch {
	case r.flags&^allowed != 0:
		return errFlags
	case changes && c.export.ReadOnly:
		return errReadOnly
	case r.typ == cmdFlush:
		return nil
	case r.length == 0:
		return errEmpty
	case r.typ == cmdBlockStatus && !c.blockStatus:
		return errNoMetadata
	case r.offset > 1<<63-1, blockdev.CheckRange(c.export.Device.Size(), int64(r.offset), int64(r.length)) != nil:
		if r.typ == cmdWrite || r.typ == cmdWriteZeroes {
			return errBeyondEnd
		}
		return errBeyond
	case r.typ == cmdRead && r.length > MaxPayload:
		return errTooLong
	case r.typ == cmdRead && r.flags&flagDF != 0 && r.length > pieceSize:
		return errFragments
	}
	return nil
}
