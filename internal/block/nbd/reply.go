package nbd

import (
	"errors"
	"net"
)

// batch gathers replies, so that they go out with one system call. Data is read
// from the device into space, where it stays until it is sent.
type batch struct {
	space []byte // pieceSize bytes
	used  int    // of space

	head  []byte // headers and short payloads, in order
	vecs  net.Buffers
	all   net.Buffers // vecs from its start: sending consumes vecs
	tail  int         // where the last vec starts in head; -1: it is data
	bytes int         // in vecs
}

const (
	headRoom    = 8 << 10                   // bytes of headers in a batch
	replyRoom   = 64 + maxMessage           // bytes of headers of one reply, at most
	maxVecs     = 256                       // less than IOV_MAX
	batchBytes  = 64 << 10                  // a batch this long is sent, though more requests wait
	alignment   = 4096                      // of data of that size and more
	smallAlign  = 512                       // of smaller data
	maxExtents  = 2048                      // in one BLOCK_STATUS reply
	extentsRoom = 4 + maxExtents*sizeExtent // bytes of such a reply
)

func (b *batch) init(space []byte) {
	b.space = space
	b.head = make([]byte, 0, headRoom)
	b.all = make(net.Buffers, 0, maxVecs)
	b.reset()
}

func (b *batch) reset() {
	b.used, b.bytes, b.tail = 0, 0, -1
	b.head = b.head[:0]
	b.vecs = b.all[:0]
}

// fits reports whether there is room for one more reply with n bytes of data.
func (b *batch) fits(n int) bool {
	return b.start(n)+n <= len(b.space) && len(b.head)+replyRoom <= cap(b.head) && len(b.vecs)+2 <= maxVecs
}

// start returns where n bytes of data go in space.
func (b *batch) start(n int) int {
	align := smallAlign
	if n >= alignment {
		align = alignment
	}
	return (b.used + align - 1) &^ (align - 1)
}

// scratch returns n bytes of space. They may be used until the next call of
// another method, or become a reply's data by keep.
func (b *batch) scratch(n int) []byte {
	s := b.start(n)
	return b.space[s : s+n]
}

// mark ends what was appended to head: it goes out after all before it.
func (b *batch) mark(from int) {
	b.bytes += len(b.head) - from
	if b.tail >= 0 {
		b.vecs[len(b.vecs)-1] = b.head[b.tail:]
		return
	}
	b.tail = from
	b.vecs = append(b.vecs, b.head[from:])
}

// keep appends data, which is the latest scratch or its beginning, to what
// goes out.
func (b *batch) keep(data []byte) {
	b.used = b.start(len(data)) + len(data)
	b.vecs = append(b.vecs, data)
	b.tail = -1
	b.bytes += len(data)
}

func (b *batch) simple(cookie uint64, errno uint32) {
	from := len(b.head)
	b.head = appendSimple(b.head, cookie, errno)
	b.mark(from)
}

func (b *batch) chunk(flags, typ uint16, cookie uint64, length int) {
	from := len(b.head)
	b.head = appendChunk(b.head, flags, typ, cookie, uint32(length))
	b.mark(from)
}

// offset appends the offset with which a read's chunks begin.
func (b *batch) offset(off int64) {
	from := len(b.head)
	b.head = be.AppendUint64(b.head, uint64(off))
	b.mark(from)
}

func (b *batch) uint32(v uint32) {
	from := len(b.head)
	b.head = be.AppendUint32(b.head, v)
	b.mark(from)
}

// failure appends the chunk that ends a reply with an error.
func (b *batch) failure(cookie uint64, errno uint32, message string) {
	message = message[:min(len(message), maxMessage)]
	b.chunk(chunkDone, chunkError, cookie, 4+2+len(message))
	from := len(b.head)
	b.head = be.AppendUint32(b.head, errno)
	b.head = be.AppendUint16(b.head, uint16(len(message)))
	b.head = append(b.head, message...)
	b.mark(from)
}

// flush sends what w has gathered.
func (w *worker) flush() error {
	if w.batch.bytes == 0 {
		return nil
	}
	w.conn.send.Lock()
	defer w.conn.send.Unlock()
	return w.write()
}

// write is flush for one who holds conn.send.
func (w *worker) write() error {
	b := &w.batch
	var err error
	if out := w.conn.out; out != nil {
		for _, v := range b.vecs {
			_, _ = out.Write(v) // Flush repeats the error
		}
		err = out.Flush()
	} else if len(b.vecs) == 1 {
		_, err = w.conn.sock.Write(b.vecs[0])
	} else if len(b.vecs) > 1 {
		_, err = b.vecs.WriteTo(w.conn.sock)
	}
	b.reset()
	if err != nil {
		w.conn.broken(err)
	}
	return err
}

// answer appends the reply to a request that has no data in it.
func (w *worker) answer(j *job, err error) {
	if err == nil {
		w.batch.simple(j.cookie, 0)
		return
	}
	errno, message := w.refusal(j, err)
	if w.conn.structured {
		w.batch.failure(j.cookie, errno, message)
	} else {
		w.batch.simple(j.cookie, errno)
	}
}

// refusal returns what the client is told of err, and logs the first failure
// of a connection that is not the client's mistake.
func (w *worker) refusal(j *job, err error) (uint32, string) {
	var m *mistake
	if errors.As(err, &m) {
		return m.errno, m.message
	}
	w.conn.logFailure(j, err)
	return errnoOf(err), err.Error()
}
