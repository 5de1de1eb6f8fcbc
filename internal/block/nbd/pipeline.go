package nbd

import (
	"context"
	"fmt"
	"net"
)

// Pipeline is a connection that one goroutine drives with many requests under
// way: it gathers requests into one write and takes replies out of one read.
// Where a [Client] needs a goroutine per request under way, a Pipeline costs
// little beside the server; load generators and bulk copies use it.
//
// It is not safe for concurrent use.
type Pipeline struct {
	link   *link
	free   []*call
	heads  []byte // requests not yet sent, without writes' data
	all    net.Buffers
	vecs   net.Buffers
	gather int // bytes in vecs
}

// DialPipeline connects to an NBD server and opens one of its exports, for at
// most depth requests under way, 1 to 4096. ctx limits the time of that and is
// not kept.
func DialPipeline(ctx context.Context, network, address, export string, depth int) (*Pipeline, error) {
	if depth < 1 || depth > 4096 {
		return nil, fmt.Errorf("cannot have %d requests under way: it must be 1 to 4096", depth)
	}
	sock, d, err := dial(ctx, network, address, export)
	if err != nil {
		return nil, fmt.Errorf("cannot open NBD export %q at %s: %w", export, address, err)
	}
	p := &Pipeline{
		link:  newLink(sock, d, depth),
		heads: make([]byte, 0, depth*sizeRequest),
		all:   make(net.Buffers, 0, 2*depth),
	}
	p.vecs = p.all
	for i := range p.link.calls {
		p.free = append(p.free, &p.link.calls[i])
	}
	return p, nil
}

// Size returns the export's size in bytes.
func (p *Pipeline) Size() int64 { return p.link.size }

// Idle returns how many more requests may be put under way.
func (p *Pipeline) Idle() int { return len(p.free) }

// Read puts a read of len(data) bytes at off under way and returns its number.
// data belongs to the Pipeline until Next returns that number. Offset and length
// must fit the server's limits; there must be an idle request.
func (p *Pipeline) Read(data []byte, off int64) int {
	return p.queue(cmdRead, data, off, nil)
}

// Write puts a write under way, as Read does. data may be read until Next
// returns its number.
func (p *Pipeline) Write(data []byte, off int64) int {
	return p.queue(cmdWrite, data, off, data)
}

// Flush puts a flush under way, as Read does.
func (p *Pipeline) Flush() int { return p.queue(cmdFlush, nil, 0, nil) }

func (p *Pipeline) queue(typ uint16, data []byte, off int64, payload []byte) int {
	k := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	k.begin(typ, off, data)
	from := len(p.heads)
	p.heads = appendRequest(p.heads, request{typ: typ, cookie: k.cookie, offset: uint64(off), length: uint32(len(data))})
	p.vecs = append(p.vecs, p.heads[from:])
	p.gather += sizeRequest
	if len(payload) > 0 {
		p.vecs = append(p.vecs, payload)
		p.gather += len(payload)
	}
	return int(k.cookie)
}

// send sends what was queued.
func (p *Pipeline) send() error {
	if len(p.vecs) == 0 {
		return nil
	}
	var err error
	if p.gather == len(p.heads) {
		_, err = p.link.sock.Write(p.heads) // no data between them
	} else {
		_, err = p.vecs.WriteTo(p.link.sock)
	}
	p.heads, p.vecs, p.gather = p.heads[:0], p.all, 0
	return err
}

// Next returns the number of a request that has ended and its error, which is
// a [*RemoteError]; the number is -1 if the connection is lost. It sends what was
// queued as soon as it would have to wait for the server. There must be a
// request under way.
func (p *Pipeline) Next() (int, error) {
	if len(p.link.in.buffered()) < sizeSimple {
		if err := p.send(); err != nil {
			return -1, err
		}
	}
	k, err := p.link.receive()
	if err != nil {
		return -1, err
	}
	p.free = append(p.free, k)
	return int(k.cookie), k.err
}

// Close ends the connection, without waiting for requests under way.
func (p *Pipeline) Close() error {
	_ = p.link.send(request{typ: cmdDisc}, nil) // the server may be gone
	return p.link.sock.Close()
}
