package nbd_test

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

var be = binary.BigEndian

// raw is a client that sends what it is told to. Its numbers are typed in from
// the protocol's text, not taken from the code under test.
type raw struct {
	testing.TB
	net.Conn
}

func connect(t testing.TB, path string) raw {
	t.Helper()
	return connectTo(t, "unix", path)
}

func connectTo(t testing.TB, network, address string) raw {
	t.Helper()
	sock, err := net.Dial(network, address)
	check(t, err)
	t.Cleanup(func() { sock.Close() })
	check(t, sock.SetDeadline(time.Now().Add(deadline)))
	return raw{t, sock}
}

func (r raw) send(b []byte) {
	r.Helper()
	if _, err := r.Write(b); err != nil {
		r.Fatal(err)
	}
}

func (r raw) recv(n int) []byte {
	r.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		r.Fatalf("receiving %d bytes: %v", n, err)
	}
	return b
}

// wantEnd fails unless the server has closed the connection.
func (r raw) wantEnd() {
	r.Helper()
	if _, err := io.Copy(io.Discard, r); err != nil && !isReset(err) {
		r.Errorf("waiting for the end of the connection: %v", err)
	}
}

// hello exchanges the first words.
func (r raw) hello(flags uint32) {
	r.Helper()
	if got := string(r.recv(16)); got != "NBDMAGICIHAVEOPT" {
		r.Fatalf("server begins with %q", got)
	}
	if got := be.Uint16(r.recv(2)); got != 3 {
		r.Fatalf("handshake flags are %#x, want 3", got)
	}
	r.send(be.AppendUint32(nil, flags))
}

func option(opt uint32, data string) []byte {
	b := append([]byte("IHAVEOPT"), be.AppendUint32(nil, opt)...)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// text is a string with its length in front.
func text(s string) string { return string(be.AppendUint32(nil, uint32(len(s)))) + s }

// goOption asks for an export, without information items.
func goOption(name string) []byte { return option(7, text(name)+"\x00\x00") }

type optionReply struct {
	typ  uint32
	data string
}

// reply reads a reply to an option.
func (r raw) reply(opt uint32) optionReply {
	r.Helper()
	b := r.recv(20)
	if be.Uint64(b) != 0x3e889045565a9 || be.Uint32(b[8:]) != opt {
		r.Fatalf("reply to option %d begins with %x", opt, b)
	}
	return optionReply{be.Uint32(b[12:]), string(r.recv(int(be.Uint32(b[16:]))))}
}

// ask sends an option and returns the replies until the last.
func (r raw) ask(opt uint32, data string) []optionReply {
	r.Helper()
	r.send(option(opt, data))
	var all []optionReply
	for {
		one := r.reply(opt)
		all = append(all, one)
		if one.typ == 1 || one.typ>>31 == 1 {
			return all
		}
	}
}

// open begins the transmission phase, with or without structured replies and
// base:allocation.
func open(t testing.TB, path, name string, structured bool) raw {
	t.Helper()
	r := connect(t, path)
	r.hello(3)
	if structured {
		r.ask(8, "")
		r.ask(10, text(name)+"\x00\x00\x00\x01"+text("base:allocation"))
	}
	if all := r.ask(7, text(name)+"\x00\x00"); all[len(all)-1].typ != 1 {
		t.Fatalf("GO: %x", all)
	}
	return r
}

func request(flags, typ uint16, cookie, offset uint64, length uint32) []byte {
	b := be.AppendUint32(nil, 0x25609513)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, cookie)
	b = be.AppendUint64(b, offset)
	return be.AppendUint32(b, length)
}

// chunk is a reply: a structured one's chunk, or a simple one, whose type is
// -1 and whose data is not read.
type chunk struct {
	typ    int
	done   bool
	cookie uint64
	errno  uint32
	data   string
}

func (r raw) chunk() chunk {
	r.Helper()
	switch magic := be.Uint32(r.recv(4)); magic {
	case 0x67446698:
		b := r.recv(12)
		return chunk{typ: -1, done: true, errno: be.Uint32(b), cookie: be.Uint64(b[4:])}
	case 0x668e33ef:
		b := r.recv(16)
		c := chunk{typ: int(be.Uint16(b[2:])), done: be.Uint16(b)&1 != 0, cookie: be.Uint64(b[4:])}
		c.data = string(r.recv(int(be.Uint32(b[12:]))))
		if c.typ>>15 == 1 {
			c.errno = be.Uint32([]byte(c.data))
			if n := int(be.Uint16([]byte(c.data[4:]))); n != len(c.data)-6 {
				r.Fatalf("error chunk has a message of %d bytes and %d bytes of payload", n, len(c.data))
			}
			c.data = c.data[6:]
		}
		return c
	default:
		r.Fatalf("reply begins with %#x", magic)
		return chunk{}
	}
}

// do sends a request and reads the one chunk of its reply.
func (r raw) do(flags, typ uint16, offset uint64, length uint32, payload string) chunk {
	r.Helper()
	r.send(append(request(flags, typ, 77, offset, length), payload...))
	c := r.chunk()
	if c.cookie != 77 || !c.done {
		r.Fatalf("reply is %+v, want cookie 77 and done", c)
	}
	return c
}
