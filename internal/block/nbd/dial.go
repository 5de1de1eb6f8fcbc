package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"time"
)

// details is what a client learns of an export.
type details struct {
	size        int64
	flags       uint16
	minimum     int // block size in bytes, a power of two
	maximum     int // payload in bytes, a multiple of minimum
	structured  bool
	blockStatus bool
}

// has reports whether the export has all of these transmission flags.
func (d *details) has(flags uint16) bool { return d.flags&flags == flags }

// dial connects to a server and opens an export.
func dial(ctx context.Context, network, address, name string) (net.Conn, details, error) {
	if len(name) > MaxName {
		return nil, details{}, fmt.Errorf("an export's name has at most %d bytes", MaxName)
	}
	var dialer net.Dialer
	sock, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, details{}, err
	}
	stop := context.AfterFunc(ctx, func() { sock.SetDeadline(time.Unix(1, 0)) })
	h := handshake{sock: sock}
	d, err := h.open(name)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		sock.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, details{}, err
	}
	widen(sock)
	return sock, d, nil
}

// handshake is the client's side of the negotiation.
type handshake struct {
	sock net.Conn
	data []byte
}

func (h *handshake) read(n int) ([]byte, error) {
	h.data = slices.Grow(h.data[:0], n)[:n]
	_, err := io.ReadFull(h.sock, h.data)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return h.data, err
}

// open negotiates what the server has to offer and begins the transmission
// phase.
func (h *handshake) open(name string) (details, error) {
	var d details
	b, err := h.read(18)
	if err != nil {
		return d, err
	}
	if be.Uint64(b) != magicInit || be.Uint64(b[8:]) != magicOption || be.Uint16(b[16:])&handshakeFixedNewstyle == 0 {
		return d, errors.New("not an NBD server of the fixed newstyle protocol")
	}
	flags := uint32(be.Uint16(b[16:]) & (handshakeFixedNewstyle | handshakeNoZeroes))
	if _, err := h.sock.Write(be.AppendUint32(nil, flags)); err != nil {
		return d, err
	}

	if err := h.send(optStructuredReply, nil); err != nil {
		return d, err
	}
	switch typ, _, err := h.reply(optStructuredReply); {
	case err != nil:
		return d, err
	default:
		d.structured = typ == repAck
	}
	option := append(be.AppendUint32(nil, uint32(len(name))), name...)
	if d.structured {
		query := be.AppendUint32(slices.Clone(option), 1)
		query = be.AppendUint32(query, uint32(len(contextAllocation)))
		if err := h.send(optSetMetaContext, append(query, contextAllocation...)); err != nil {
			return d, err
		}
		for more := true; more; {
			typ, data, err := h.reply(optSetMetaContext)
			if err != nil {
				return d, err
			}
			more = typ == repMetaContext
			if more && len(data) == 4+len(contextAllocation) && string(data[4:]) == contextAllocation {
				// Ours is the only one that was asked for, so its number
				// need not be kept.
				d.blockStatus = true
			}
		}
	}

	option = be.AppendUint16(option, 1)
	if err := h.send(optGo, be.AppendUint16(option, infoBlockSize)); err != nil {
		return d, err
	}
	d.minimum, d.maximum, d.size = 1, MaxPayload, -1
	for {
		typ, data, err := h.reply(optGo)
		switch {
		case err != nil:
			return d, err
		case typ == repErrUnknown:
			return d, fmt.Errorf("export %q: %w", name, ErrNotFound)
		case typ&repError != 0:
			return d, fmt.Errorf("server refuses export %q: %.200q (error %#x)", name, data, typ)
		case typ == repAck:
			return d, d.check()
		case typ != repInfo || len(data) < 2:
			return d, fmt.Errorf("server answers GO with %#x", typ)
		}
		switch item := be.Uint16(data); {
		case item == infoExport && len(data) == 2+sizeExportInfo:
			size := be.Uint64(data[2:])
			if size > math.MaxInt64 {
				return d, fmt.Errorf("export %q has %d bytes", name, size)
			}
			d.size, d.flags = int64(size), be.Uint16(data[10:])
		case item == infoBlockSize && len(data) == 2+3*4:
			d.minimum = int(be.Uint32(data[2:]))
			d.maximum = int(min(be.Uint32(data[10:]), MaxPayload))
		}
	}
}

// check makes sure that what the server said can be relied on.
func (d *details) check() error {
	switch m := d.minimum; {
	case d.size < 0:
		return errors.New("server does not tell the export's size")
	case m < 1 || m > 64<<10 || m&(m-1) != 0:
		return fmt.Errorf("server has a minimum block size of %d", m)
	case d.size%int64(m) != 0:
		return fmt.Errorf("export has %d bytes, which is not a multiple of its block size %d", d.size, m)
	case d.maximum < m:
		return fmt.Errorf("server takes %d bytes at most, and blocks of %d", d.maximum, m)
	}
	d.maximum -= d.maximum % d.minimum
	return nil
}

func (h *handshake) send(opt uint32, data []byte) error {
	b := be.AppendUint64(nil, magicOption)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, uint32(len(data)))
	_, err := h.sock.Write(append(b, data...))
	return err
}

// reply reads one reply to opt. The data is valid until the next one.
func (h *handshake) reply(opt uint32) (typ uint32, data []byte, err error) {
	b, err := h.read(sizeOptReply)
	if err != nil {
		return 0, nil, err
	}
	typ, length := be.Uint32(b[12:]), be.Uint32(b[16:])
	switch {
	case be.Uint64(b) != magicOptionReply || be.Uint32(b[8:]) != opt:
		return 0, nil, errors.New("server's reply does not belong to the option")
	case length > maxOptionLength:
		return 0, nil, fmt.Errorf("server's reply to an option has %d bytes", length)
	}
	data, err = h.read(int(length))
	return typ, data, err
}
