package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
)

// errAborted: the client ended the negotiation in good order.
var errAborted = errors.New("client left during the negotiation")

// negotiation is the handshake of one connection, up to the choice of an
// export. It reads exactly what it needs, so that nothing of the transmission
// phase is lost in a buffer.
type negotiation struct {
	conn     *conn
	sock     net.Conn    // the connection's, or TLS on it
	identify *tls.Config // nil: the client is known
	tls      *tls.Conn   // sock, once the client has begun TLS
	data     []byte      // space for one option's data
	out      []byte      // space for one reply

	noZeroes   bool
	structured bool
	allocation string // the export whose base:allocation was chosen
	chosen     bool   // whether one was
}

// outcome is what was agreed upon.
type outcome struct {
	export      *export   // which the connection has joined
	tls         *tls.Conn // what to use in place of the socket; nil: the socket itself
	structured  bool
	blockStatus bool
}

// negotiate runs the fixed newstyle handshake. It returns errAborted if the
// client said good-bye. With identify, the client must begin TLS first.
func negotiate(ctx context.Context, c *conn, identify *tls.Config) (outcome, error) {
	n := &negotiation{conn: c, sock: c.sock, identify: identify, data: make([]byte, maxOptionLength)}
	out := be.AppendUint64(nil, magicInit)
	out = be.AppendUint64(out, magicOption)
	out = be.AppendUint16(out, handshakeFixedNewstyle|handshakeNoZeroes)
	if _, err := n.sock.Write(out); err != nil {
		return outcome{}, err
	}
	flags, err := n.read(4)
	if err != nil {
		return outcome{}, err
	}
	switch f := be.Uint32(flags); {
	case f&^(handshakeFixedNewstyle|handshakeNoZeroes) != 0:
		return outcome{}, fmt.Errorf("unknown client flags %#x", f)
	default:
		n.noZeroes = f&handshakeNoZeroes != 0
	}

	for range maxOptions {
		e, err := n.option(ctx)
		if err != nil {
			return outcome{}, err
		}
		if e != nil {
			return outcome{
				export:      e,
				tls:         n.tls,
				structured:  n.structured,
				blockStatus: n.chosen && n.allocation == e.Name,
			}, nil
		}
	}
	return outcome{}, fmt.Errorf("more than %d options", maxOptions)
}

// read returns the next count bytes, count <= maxOptionLength. They are valid
// until the next read.
func (n *negotiation) read(count int) ([]byte, error) {
	b := n.data[:count]
	_, err := io.ReadFull(n.sock, b)
	return b, err
}

// option answers one option. It returns the export with which the transmission
// begins, or nil while the negotiation goes on.
func (n *negotiation) option(ctx context.Context) (*export, error) {
	head, err := n.read(sizeOption)
	if err != nil {
		return nil, err
	}
	if be.Uint64(head) != magicOption {
		return nil, errors.New("an option does not begin with its magic")
	}
	opt, length := be.Uint32(head[8:]), be.Uint32(head[12:])
	if length > maxOptionLength {
		// Reading it only to refuse it is a favour that a broken client can
		// do without.
		n.fail(opt, repErrTooBig, fmt.Sprintf("an option may have %d bytes", maxOptionLength))
		return nil, fmt.Errorf("option %d of %d bytes", opt, length)
	}
	data, err := n.read(int(length))
	if err != nil {
		return nil, err
	}

	if n.identify != nil && n.tls == nil {
		return nil, n.unidentified(ctx, opt, data)
	}
	switch opt {
	case optExportName:
		return n.exportName(string(data))
	case optAbort:
		n.reply(opt, repAck) // the client may be gone already
		return nil, errAborted
	case optList:
		return nil, n.list(data)
	case optInfo, optGo:
		return n.info(opt, data)
	case optStructuredReply:
		if len(data) != 0 {
			return nil, n.fail(opt, repErrInvalid, "STRUCTURED_REPLY has no data")
		}
		n.structured = true
		return nil, n.reply(opt, repAck)
	case optListMetaContext, optSetMetaContext:
		return nil, n.metaContext(opt, data)
	case optStartTLS:
		if n.tls != nil {
			return nil, n.fail(opt, repErrInvalid, "TLS was begun already")
		}
	}
	return nil, n.fail(opt, repErrUnsup, "unknown option")
}

// unidentified answers an option of a client who has yet to begin TLS. What it said
// before that counts for nothing afterwards, and as nothing was read ahead, nothing
// that somebody has slipped in is taken for the client's.
func (n *negotiation) unidentified(ctx context.Context, opt uint32, data []byte) error {
	switch opt {
	case optAbort:
		n.reply(opt, repAck) // the client may be gone already
		return errAborted
	case optExportName: // which has no way to report an error
		return errors.New("client chose an export without TLS")
	case optStartTLS:
	default:
		return n.fail(opt, repErrTLSReqd, "this server needs TLS with a client's certificate")
	}
	if len(data) != 0 {
		return n.fail(opt, repErrInvalid, "STARTTLS has no data")
	}
	if err := n.reply(opt, repAck); err != nil {
		return err
	}
	secure := tls.Server(n.sock, n.identify)
	if err := secure.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	n.tls, n.sock = secure, secure
	return nil
}

// exportName is the oldest way to choose an export: it cannot report an error.
func (n *negotiation) exportName(name string) (*export, error) {
	e := n.conn.server.join(name, n.conn)
	if e == nil {
		return nil, fmt.Errorf("unknown export %.64q", name)
	}
	out := be.AppendUint64(nil, uint64(e.Device.Size()))
	out = be.AppendUint16(out, e.flags(n.structured))
	if !n.noZeroes {
		out = append(out, make([]byte, 124)...)
	}
	if _, err := n.sock.Write(out); err != nil {
		e.leave(n.conn)
		return nil, err
	}
	return e, nil
}

func (n *negotiation) list(data []byte) error {
	if len(data) != 0 {
		return n.fail(optList, repErrInvalid, "LIST has no data")
	}
	for _, e := range n.conn.server.list() {
		item := be.AppendUint32(nil, uint32(len(e.Name)))
		item = append(item, e.Name...)
		item = append(item, e.Description...)
		if err := n.reply(optList, repServer, item...); err != nil {
			return err
		}
	}
	return n.reply(optList, repAck)
}

// info answers INFO and GO; after a GO the export is returned.
func (n *negotiation) info(opt uint32, data []byte) (*export, error) {
	d := decoder{data: data}
	name := d.text()
	wanted := make([]uint16, 0, 4)
	for range d.uint16() {
		wanted = append(wanted, d.uint16())
		if d.bad {
			break
		}
	}
	if d.bad || len(d.data) != 0 {
		return nil, n.fail(opt, repErrInvalid, "malformed option")
	}
	e := n.conn.server.join(name, n.conn)
	if e == nil {
		return nil, n.fail(opt, repErrUnknown, "unknown export")
	}
	if err := n.describe(opt, e, wanted); err != nil || opt == optInfo {
		e.leave(n.conn)
		return nil, err
	}
	return e, nil
}

// describe answers INFO and GO for e.
func (n *negotiation) describe(opt uint32, e *export, wanted []uint16) error {
	item := be.AppendUint16(nil, infoExport)
	item = be.AppendUint64(item, uint64(e.Device.Size()))
	item = be.AppendUint16(item, e.flags(n.structured))
	if err := n.reply(opt, repInfo, item...); err != nil {
		return err
	}
	minimum, preferred, maximum := e.blockSizes()
	item = be.AppendUint16(item[:0], infoBlockSize)
	item = be.AppendUint32(item, minimum)
	item = be.AppendUint32(item, preferred)
	item = be.AppendUint32(item, maximum)
	if err := n.reply(opt, repInfo, item...); err != nil {
		return err
	}
	texts := []struct {
		item uint16
		text string
	}{{infoName, e.Name}, {infoDescription, e.Description}}
	for _, t := range texts {
		if !slices.Contains(wanted, t.item) {
			continue
		}
		if err := n.reply(opt, repInfo, append(be.AppendUint16(nil, t.item), t.text...)...); err != nil {
			return err
		}
	}
	return n.reply(opt, repAck)
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT. The one context
// is base:allocation.
func (n *negotiation) metaContext(opt uint32, data []byte) error {
	if !n.structured {
		return n.fail(opt, repErrInvalid, "structured replies must be negotiated first")
	}
	if opt == optSetMetaContext {
		n.chosen = false // also where this one is refused
	}
	d := decoder{data: data}
	name := d.text()
	count := d.uint32()
	if count > maxQueries {
		return n.fail(opt, repErrTooBig, fmt.Sprintf("an option may have %d queries", maxQueries))
	}
	match := opt == optListMetaContext && count == 0
	for range count {
		q := d.text()
		match = match || q == contextAllocation || opt == optListMetaContext && q == "base:"
	}
	if d.bad || len(d.data) != 0 {
		return n.fail(opt, repErrInvalid, "malformed option")
	}
	if !n.conn.server.has(name) {
		return n.fail(opt, repErrUnknown, "unknown export")
	}
	if opt == optSetMetaContext {
		n.allocation, n.chosen = strings.Clone(name), match
	}
	if match {
		item := be.AppendUint32(nil, contextAllocationID)
		if err := n.reply(opt, repMetaContext, append(item, contextAllocation...)...); err != nil {
			return err
		}
	}
	return n.reply(opt, repAck)
}

// reply sends one reply to an option.
func (n *negotiation) reply(opt, typ uint32, data ...byte) error {
	n.out = be.AppendUint64(n.out[:0], magicOptionReply)
	n.out = be.AppendUint32(n.out, opt)
	n.out = be.AppendUint32(n.out, typ)
	n.out = be.AppendUint32(n.out, uint32(len(data)))
	n.out = append(n.out, data...)
	_, err := n.sock.Write(n.out)
	return err
}

// fail refuses an option; the negotiation goes on.
func (n *negotiation) fail(opt, typ uint32, message string) error {
	return n.reply(opt, typ, []byte(message)...)
}

// decoder takes fields from the front of an option's data. After a field that
// is not there or too long, bad is set and all further ones are zero.
type decoder struct {
	data []byte
	bad  bool
}

func (d *decoder) take(count int) []byte {
	if d.bad || count > len(d.data) {
		d.bad = true
		return nil
	}
	b := d.data[:count]
	d.data = d.data[count:]
	return b
}

func (d *decoder) uint16() uint16 {
	if b := d.take(2); b != nil {
		return be.Uint16(b)
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if b := d.take(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

// text takes a length and that many bytes, at most MaxName.
func (d *decoder) text() string {
	length := d.uint32()
	if length > MaxName {
		d.bad = true
		return ""
	}
	return string(d.take(int(length)))
}
