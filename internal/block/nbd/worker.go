package nbd

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"time"

	"strongroom/internal/block/blockdev"
)

// holeSize is the length in bytes of a read from which on it pays to look for
// zeros, so as not to send them.
const holeSize = 16 << 10

// worker serves requests of one connection, one at a time.
type worker struct {
	conn  *conn
	turn  chan struct{} // receives the turn; closed when the connection ends
	batch batch
}

// run is the life of a worker; it begins with the turn.
func (w *worker) run() {
	defer w.conn.server.pool.put(w.batch.space)
	for {
		passed, err := w.turnOnce()
		if err != nil {
			w.conn.end(err)
			_ = w.flush() // a failure has ended the connection already
			if !passed {
				return
			}
		}
		if passed && !w.conn.take(w) {
			return
		}
	}
}

// turnOnce serves one job. It reports whether the turn was passed on.
func (w *worker) turnOnce() (passed bool, err error) {
	c := w.conn
	j, err := w.next()
	if err != nil {
		return false, err
	}
	room := j.n
	switch j.typ {
	case cmdRead, cmdWrite, cmdCache:
		room = min(room, pieceSize)
	case cmdBlockStatus:
		room = extentsRoom
	default:
		room = 0
	}
	if !w.batch.fits(room) {
		if err := w.flush(); err != nil {
			return false, err
		}
	}

	quick := j.err != nil || (j.typ == cmdRead || j.typ == cmdWrite) && !c.pace.isSlow() && j.whole == nil
	if j.typ == cmdWrite {
		if err := w.receive(&j, quick); err != nil {
			return false, err
		}
	}
	if quick {
		w.serve(&j)
		if w.batch.bytes >= batchBytes {
			return false, w.flush()
		}
		return false, nil
	}
	c.pass()
	// The replies gathered so far must not wait for this job.
	if j.typ != cmdWrite {
		if err := w.flush(); err != nil {
			return true, err
		}
	}
	w.serve(&j)
	return true, w.flush()
}

// receive reads the data of a write. If it is served at once, its data may stay
// where it was received.
func (w *worker) receive(j *job, atOnce bool) error {
	in := &w.conn.in
	switch {
	case j.err != nil:
		for left := j.n; left > 0; {
			n := min(left, pieceSize)
			if err := w.discard(n); err != nil {
				return err
			}
			left -= n
		}
		return nil
	case atOnce && len(in.buffered()) >= j.n:
		j.data = in.buffered()[:j.n]
		in.skip(j.n)
		return nil
	}
	// The client may wait for a reply before it goes on sending.
	if len(in.buffered()) < j.n {
		if err := w.flush(); err != nil {
			return err
		}
	}
	j.data = w.batch.scratch(j.n)
	return in.read(j.data)
}

// discard reads n bytes, n <= pieceSize, that nobody wants.
func (w *worker) discard(n int) error {
	if err := w.flush(); err != nil {
		return err
	}
	return w.conn.in.read(w.batch.scratch(n))
}

// serve does one job and gathers its reply.
func (w *worker) serve(j *job) {
	if j.err != nil {
		w.answer(j, j.err)
		return
	}
	dev := w.conn.export.Device
	switch j.typ {
	case cmdRead:
		w.read(j)
	case cmdWrite:
		w.serveWrite(j)
	case cmdFlush:
		w.answer(j, dev.Flush())
	case cmdTrim:
		w.answer(j, w.durable(j, dev.Discard(j.off, int64(j.n))))
	case cmdWriteZeroes:
		w.answer(j, w.durable(j, dev.WriteZeroes(j.off, int64(j.n), j.flags&flagNoHole == 0)))
	case cmdCache:
		w.answer(j, w.cache(j))
	case cmdBlockStatus:
		w.status(j)
	}
}

// durable flushes after a command that succeeded and asked for it.
func (w *worker) durable(j *job, err error) error {
	if err == nil && j.flags&flagFUA != 0 {
		return w.conn.export.Device.Flush()
	}
	return err
}

func (w *worker) serveWrite(j *job) {
	c := w.conn
	start := time.Now()
	_, err := c.export.Device.WriteAt(j.data, j.off)
	c.pace.note(int64(time.Since(start)))
	if s := j.whole; s != nil {
		if err != nil {
			s.fail(err)
		}
		if s.left.Add(-1) > 0 {
			return
		}
		err = s.failure()
		c.freeSplit(s)
	}
	w.answer(j, w.durable(j, err))
}

func (w *worker) read(j *job) {
	c := w.conn
	switch {
	case j.whole != nil:
		w.readPiece(j)
		return
	case j.n > pieceSize:
		w.readSimple(j)
		return
	}
	data := w.batch.scratch(j.n)
	if err := w.readAt(data, j.off); err != nil {
		w.answer(j, err)
		return
	}
	if w.sendsHole(data) {
		w.batch.hole(chunkDone, j.cookie, j.off, j.n)
		return
	}
	if c.structured {
		w.batch.chunk(chunkDone, chunkOffsetData, j.cookie, 8+j.n)
		w.batch.offset(j.off)
	} else {
		w.batch.simple(j.cookie, 0)
	}
	w.batch.keep(data)
}

// readAt reads from the device and notes how long it took.
func (w *worker) readAt(p []byte, off int64) error {
	start := time.Now()
	_, err := w.conn.export.Device.ReadAt(p, off)
	w.conn.pace.note(int64(time.Since(start)))
	return err
}

// sendsHole reports whether data that was read can be sent as a hole, which in
// a read's reply says no more than that it is zeros. The device is not asked for
// its extents: a file system takes longer to find a hole than to read one.
func (w *worker) sendsHole(data []byte) bool {
	return w.conn.structured && len(data) >= holeSize && data[0] == 0 && bytes.Equal(data[1:], data[:len(data)-1])
}

// hole appends a chunk of n zeros.
func (b *batch) hole(flags uint16, cookie uint64, off int64, n int) {
	b.chunk(flags, chunkOffsetHole, cookie, 8+4)
	b.offset(off)
	b.uint32(uint32(n))
}

// readPiece serves a piece of a long read: a chunk of its own, in any order.
// The batch was sent, so w's first header is this one's.
func (w *worker) readPiece(j *job) {
	c, b, s := w.conn, &w.batch, j.whole
	data := b.scratch(j.n)
	err := w.readAt(data, j.off)
	if err != nil {
		s.fail(err)
	}
	hole := err == nil && w.sendsHole(data)

	// Who is the last one is decided while nobody else can send, for its chunk
	// must be the last one on the wire as well.
	c.send.Lock()
	defer c.send.Unlock()
	last := s.left.Add(-1) == 0
	var failed error
	var flags uint16
	if last {
		if failed = s.failure(); failed == nil {
			flags = chunkDone
		}
		c.freeSplit(s)
	}
	switch {
	case err != nil:
	case hole:
		b.hole(flags, j.cookie, j.off, j.n)
	default:
		b.chunk(flags, chunkOffsetData, j.cookie, 8+j.n)
		b.offset(j.off)
		b.keep(data)
	}
	if failed != nil {
		w.answer(j, failed)
	}
	_ = w.write() // a failure has ended the connection
}

// readSimple serves a long read for a client without structured replies: one
// header, then all the data. An error in the middle cannot be told but by
// closing the connection.
func (w *worker) readSimple(j *job) {
	c, b := w.conn, &w.batch
	data := b.scratch(pieceSize)
	if err := w.readAt(data, j.off); err != nil {
		w.answer(j, err)
		return
	}
	c.send.Lock()
	defer c.send.Unlock()
	b.simple(j.cookie, 0)
	for done := 0; ; {
		b.keep(data)
		done += len(data)
		if w.write() != nil || done == j.n {
			return
		}
		data = b.scratch(min(j.n-done, pieceSize))
		if err := w.readAt(data, j.off+int64(done)); err != nil {
			w.refusal(j, err)
			c.broken(fmt.Errorf("cannot end a read that has begun: %w", err))
			return
		}
	}
}

// cache reads the range, so that the storage's cache holds it.
func (w *worker) cache(j *job) error {
	for done := 0; done < j.n; {
		p := w.batch.scratch(min(j.n-done, pieceSize))
		if _, err := w.conn.export.Device.ReadAt(p, j.off+int64(done)); err != nil {
			return err
		}
		done += len(p)
	}
	return nil
}

// status answers BLOCK_STATUS for as much of the range as fits a reply.
func (w *worker) status(j *job) {
	list := w.batch.scratch(extentsRoom)
	be.PutUint32(list, contextAllocationID)
	out := list[:4]
	limit := 4 + maxExtents*sizeExtent
	if j.flags&flagReqOne != 0 {
		limit = 4 + sizeExtent
	}
	off, end := j.off, j.off+int64(j.n)
	last := uint32(0)
	for off < end {
		e := blockdev.Extent{Offset: off, Length: end - off}
		if w.conn.export.extents != nil {
			var err error
			if e, err = w.conn.export.extents.NextExtent(off); err != nil {
				w.answer(j, err)
				return
			}
		}
		state := uint32(0)
		if e.Hole {
			state = stateHole | stateZero
		}
		n := uint32(min(e.Length, end-off))
		off += int64(n)
		if len(out) > 4 && state == last {
			at := out[len(out)-sizeExtent:]
			be.PutUint32(at, be.Uint32(at)+n)
			continue
		}
		if len(out) == limit {
			break
		}
		out = be.AppendUint32(out, n)
		out = be.AppendUint32(out, state)
		last = state
	}
	w.batch.chunk(chunkDone, chunkBlockStatus, j.cookie, len(out))
	w.batch.keep(out)
}

// logFailure logs the first failed request of a connection. A disk that has
// died fails every one of them.
func (c *conn) logFailure(j *job, err error) {
	if c.failed.Swap(true) {
		return
	}
	c.server.config.Log.LogAttrs(context.Background(), slog.LevelError, "NBD request failed",
		slog.String("disk", c.export.Name), slog.String("op", commandName(j.typ)),
		slog.Int64("offset", j.off), slog.Int("length", j.n), slog.Any("err", err))
}

func commandName(typ uint16) string {
	switch typ {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdCache:
		return "cache"
	case cmdWriteZeroes:
		return "write zeroes"
	case cmdBlockStatus:
		return "block status"
	}
	return "unknown"
}
