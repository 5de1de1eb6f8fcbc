package nbd_test

import (
	"bytes"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
)

// answers sends b on a new connection, closes the sending side and returns all
// that the server says until it hangs up, which it must.
func answers(t testing.TB, path string, b []byte) []byte {
	t.Helper()
	r := connect(t, path)
	defer r.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		// The server may hang up before it has read everything.
		if _, err := r.Write(b); err == nil {
			r.Conn.(*net.UnixConn).CloseWrite()
		}
	}()
	// 64 MiB is more than any answer below.
	got, err := io.ReadAll(io.LimitReader(r, 64<<20))
	if err != nil && !isReset(err) {
		t.Fatalf("the server does not hang up: %v", err)
	}
	<-sent
	return got
}

// alive fails unless the server still serves.
func alive(t testing.TB, path string) {
	t.Helper()
	c, err := nbd.Dial(testContext(t), "unix", path, "ro")
	check(t, err)
	defer c.Close()
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
}

func FuzzNegotiation(f *testing.F) {
	path := pair(f, config())
	for _, s := range []string{
		"", "\x00\x00\x00\x03",
		string(option(3, "")),
		string(option(8, "")) + string(option(10, text("rw")+"\x00\x00\x00\x01"+text("base:allocation"))) + string(goOption("rw")),
		string(option(6, text("rw")+"\x00\x02\x00\x01\x00\x02")),
		string(option(1, "ro")) + string(request(0, 0, 1, 0, 512)),
		string(option(9, text("")+"\xff\xff\xff\xff")),
		string(option(7, "\xff\xff\xff\xff")),
		strings.Repeat(string(option(99, "abc")), 300),
	} {
		f.Add([]byte("\x00\x00\x00\x03" + s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got := answers(t, path, b)
		if len(got) < 18 && len(b) > 0 && len(got) > 0 {
			t.Errorf("the server's first words are %q", got)
		}
		alive(t, path)
	})
}

// FuzzRequests sends bytes to a connection in the transmission phase and checks
// that what comes back is a sequence of well-formed replies to requests that
// were sent.
func FuzzRequests(f *testing.F) {
	path := pair(f, config())
	for _, structured := range []bool{true, false} {
		for _, b := range [][]byte{
			request(0, 0, 1, 0, 4096),
			request(0, 0, 2, 512, 600<<10),
			append(request(1, 1, 3, 0, 512), make([]byte, 512)...),
			append(request(0, 1, 4, 0, 300<<10), make([]byte, 300<<10)...),
			request(0, 3, 5, 0, 0),
			request(0, 4, 6, 4096, 4096),
			request(0, 5, 7, 0, 1<<20),
			request(2, 6, 8, 0, 1<<20),
			request(8, 7, 9, 0, 1<<20),
			bytes.Repeat(request(0, 0, 10, 0, 4096), 50),
			append(request(0, 0, 11, 1<<63, 4096), request(0, 2, 0, 0, 0)...),
			append(request(0, 99, 12, 0, 0), request(0xffff, 0, 13, 0, 1)...),
		} {
			f.Add(structured, b)
		}
	}
	f.Fuzz(func(t *testing.T, structured bool, b []byte) {
		hello := []byte{0, 0, 0, 3}
		if structured {
			hello = append(hello, option(8, "")...)
			hello = append(hello, option(10, text("rw")+"\x00\x00\x00\x01"+text("base:allocation"))...)
		}
		hello = append(hello, goOption("rw")...)
		skip := 18 + 3*20 + 12 + 14
		if structured {
			skip += 3*20 + 4 + len("base:allocation")
		}
		got := answers(t, path, append(hello, b...))
		if len(got) < skip {
			t.Fatalf("the negotiation gives %d bytes, want %d", len(got), skip)
		}
		for got = got[skip:]; len(got) >= 20 && structured; {
			switch be.Uint32(got) {
			case 0x67446698:
				if !bytes.Contains(b, got[8:16]) {
					t.Fatalf("reply to a request that was not sent: %x", got[:16])
				}
				got = got[16:]
			case 0x668e33ef:
				n := int(be.Uint32(got[16:]))
				if !bytes.Contains(b, got[8:16]) || n > 32<<20+8 {
					t.Fatalf("reply to a request that was not sent: %x", got[:20])
				}
				if n > len(got)-20 {
					return // the rest did not arrive before the end
				}
				got = got[20+n:]
			default:
				t.Fatalf("the replies go on with %x", got[:20])
			}
		}
		alive(t, path)
	})
}

// FuzzClient lets a client talk to a server that says whatever it likes. Reads
// that succeed have filled their buffer from the server's bytes.
func FuzzClient(f *testing.F) {
	// Record what a real server says.
	mem := blockdev.NewMemory(1<<20, 4096)
	write(f, mem, pattern(1<<20), 0)
	_, path := start(f, config(), nbd.Export{Name: "rw", Device: mem}, nbd.Export{Name: "ro", Device: mem})
	hello := []byte{0, 0, 0, 3}
	hello = append(hello, option(8, "")...)
	hello = append(hello, option(10, text("rw")+"\x00\x00\x00\x01"+text("base:allocation"))...)
	hello = append(hello, goOption("rw")...)
	for _, r := range [][]byte{nil, request(0, 0, 0, 0, 8192), request(0, 7, 0, 0, 8192), request(0, 99, 0, 0, 8192)} {
		f.Add(answers(f, path, append(bytes.Clone(hello), r...)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		check(t, err)
		defer l.Close()
		served := make(chan struct{})
		go func() {
			defer close(served)
			sock, err := l.Accept()
			if err != nil {
				return
			}
			defer sock.Close()
			sock.SetDeadline(time.Now().Add(deadline))
			sock.Write(b) // the client may hang up
			sock.(*net.UnixConn).CloseWrite()
			io.Copy(io.Discard, sock)
		}()
		c, err := nbd.Dial(testContext(t), "unix", path, "rw")
		if err == nil {
			p := make([]byte, 8192)
			if c.Size() >= 8192 {
				if n, err := c.ReadAt(p, 0); err == nil && n != len(p) {
					t.Errorf("ReadAt returns %d bytes and no error", n)
				}
				if e, err := c.NextExtent(0); err == nil && (e.Length <= 0 || e.Length > c.Size()) {
					t.Errorf("NextExtent returns %+v on %d bytes", e, c.Size())
				}
			}
			c.Close()
		}
		<-served
	})
}
