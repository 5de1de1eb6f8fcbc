package nbd_test

import (
	"errors"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
)

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// pair serves two exports of 1 MiB.
func pair(t testing.TB, c nbd.Config) string {
	t.Helper()
	mem := blockdev.NewMemory(1<<20, 4096)
	_, path := start(t, c,
		nbd.Export{Name: "rw", Device: mem, Description: "read and write"},
		nbd.Export{Name: "ro", Device: mem, ReadOnly: true})
	return path
}

const (
	ack     = 1
	invalid = 1<<31 | 3
	unknown = 1<<31 | 6
	tooBig  = 1<<31 | 9
)

func TestOptions(t *testing.T) {
	t.Parallel()
	path := pair(t, config())
	r := connect(t, path)
	r.hello(3)

	size := "\x00\x00" + "\x00\x00\x00\x00\x00\x10\x00\x00"
	blocks := "\x00\x03" + "\x00\x00\x02\x00" + "\x00\x00\x10\x00" + "\x02\x00\x00\x00"
	allocation := optionReply{4, "\x00\x00\x00\x01base:allocation"}
	// The order matters: SET_META_CONTEXT needs structured replies.
	tests := []struct {
		name string
		opt  uint32
		data string
		want []optionReply
	}{
		{"list", 3, "", []optionReply{{2, text("ro")}, {2, text("rw") + "read and write"}, {ack, ""}}},
		{"list with data", 3, "x", []optionReply{{invalid, "LIST has no data"}}},
		{"unknown option", 4711, "whatever", []optionReply{{1<<31 | 1, "unknown option"}}},
		{"starttls", 5, "", []optionReply{{1<<31 | 1, "unknown option"}}},
		{"info", 6, text("rw") + "\x00\x00", []optionReply{{3, size + "\x05\x6d"}, {3, blocks}, {ack, ""}}},
		{"info of read-only", 6, text("ro") + "\x00\x00", []optionReply{{3, size + "\x05\x07"}, {3, blocks}, {ack, ""}}},
		{"info with name and description", 6, text("rw") + "\x00\x02\x00\x01\x00\x02", []optionReply{
			{3, size + "\x05\x6d"}, {3, blocks}, {3, "\x00\x01rw"}, {3, "\x00\x02read and write"}, {ack, ""},
		}},
		{"info of unknown", 6, text("none") + "\x00\x00", []optionReply{{unknown, "unknown export"}}},
		{"info cut short", 6, text("rw") + "\x00\x01", []optionReply{{invalid, "malformed option"}}},
		{"info too long", 6, text("rw") + "\x00\x00\x00", []optionReply{{invalid, "malformed option"}}},
		{"name beyond the option", 6, "\xff\xff\xff\xffrw\x00\x00", []optionReply{{invalid, "malformed option"}}},
		{"name over the limit", 6, text(strings.Repeat("n", 4097)) + "\x00\x00", []optionReply{{invalid, "malformed option"}}},
		{"context too early", 10, text("rw") + "\x00\x00\x00\x01" + text("base:allocation"), []optionReply{{invalid, "structured replies must be negotiated first"}}},
		{"structured with data", 8, "x", []optionReply{{invalid, "STRUCTURED_REPLY has no data"}}},
		{"structured", 8, "", []optionReply{{ack, ""}}},
		{"info with fragments", 6, text("rw") + "\x00\x00", []optionReply{{3, size + "\x05\xed"}, {3, blocks}, {ack, ""}}},
		{"list contexts", 9, text("rw") + "\x00\x00\x00\x00", []optionReply{allocation, {ack, ""}}},
		{"list base", 9, text("rw") + "\x00\x00\x00\x02" + text("x:") + text("base:"), []optionReply{allocation, {ack, ""}}},
		{"list others", 9, text("rw") + "\x00\x00\x00\x01" + text("qemu:"), []optionReply{{ack, ""}}},
		{"set context", 10, text("rw") + "\x00\x00\x00\x01" + text("base:allocation"), []optionReply{allocation, {ack, ""}}},
		{"set no context", 10, text("rw") + "\x00\x00\x00\x01" + text("base:"), []optionReply{{ack, ""}}},
		{"context of unknown", 10, text("none") + "\x00\x00\x00\x00", []optionReply{{unknown, "unknown export"}}},
		{"too many queries", 10, text("rw") + "\xff\xff\xff\xff", []optionReply{{tooBig, "an option may have 64 queries"}}},
		{"query cut short", 10, text("rw") + "\x00\x00\x00\x02" + text("a"), []optionReply{{invalid, "malformed option"}}},
		{"go to unknown", 7, text("none") + "\x00\x00", []optionReply{{unknown, "unknown export"}}},
		{"go", 7, text("rw") + "\x00\x00", []optionReply{{3, size + "\x05\xed"}, {3, blocks}, {ack, ""}}},
	}
	for _, test := range tests {
		if diff := cmp.Diff(test.want, r.ask(test.opt, test.data), cmp.AllowUnexported(optionReply{})); diff != "" {
			t.Errorf("%s: replies differ (-want +got):\n%s", test.name, diff)
		}
	}
	// base:allocation was given up by the last SET_META_CONTEXT.
	if c := r.do(0, 7, 0, 4096, ""); c.errno != 22 {
		t.Errorf("BLOCK_STATUS without its context: %+v, want EINVAL", c)
	}
}

func TestContextOfAnotherExport(t *testing.T) {
	t.Parallel()
	r := connect(t, pair(t, config()))
	r.hello(3)
	r.ask(8, "")
	r.ask(10, text("rw")+"\x00\x00\x00\x01"+text("base:allocation"))
	r.ask(7, text("ro")+"\x00\x00")
	if c := r.do(0, 7, 0, 4096, ""); c.errno != 22 {
		t.Errorf("BLOCK_STATUS under another export's context: %+v, want EINVAL", c)
	}
}

func TestExportName(t *testing.T) {
	t.Parallel()
	path := pair(t, config())
	for _, test := range []struct{ flags, zeroes int }{{1, 124}, {3, 0}} {
		r := connect(t, path)
		r.hello(uint32(test.flags))
		r.send(option(1, "rw"))
		want := "\x00\x00\x00\x00\x00\x10\x00\x00\x05\x6d" + strings.Repeat("\x00", test.zeroes)
		if got := string(r.recv(len(want))); got != want {
			t.Errorf("flags %d: EXPORT_NAME answers %x, want %x", test.flags, got, want)
		}
		if c := r.do(0, 3, 0, 0, ""); c.errno != 0 {
			t.Errorf("flush: %+v", c)
		}
		r.send(request(0, 2, 0, 0, 0))
		r.wantEnd()
	}
	r := connect(t, path)
	r.hello(3)
	r.send(option(1, "none"))
	r.wantEnd()
}

func TestAbort(t *testing.T) {
	t.Parallel()
	r := connect(t, pair(t, config()))
	r.hello(3)
	if diff := cmp.Diff([]optionReply{{ack, ""}}, r.ask(2, ""), cmp.AllowUnexported(optionReply{})); diff != "" {
		t.Error(diff)
	}
	r.wantEnd()
}

// TestHostileNegotiation: each of these ends the connection, and the next
// client finds a server in good order.
func TestHostileNegotiation(t *testing.T) {
	t.Parallel()
	c := config()
	c.HandshakeTimeout = 3 * time.Second // the good clients' too, on a machine with much to do
	path := pair(t, c)
	flags := "\x00\x00\x00\x03"
	tests := []struct{ name, data string }{
		{"unknown flags", "\x00\x00\x00\x04"},
		{"wrong magic", flags + strings.Repeat("x", 16)},
		{"huge option", flags + "IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff"},
		{"option over the limit", flags + string(option(7, strings.Repeat("x", 17<<10)))},
		{"10,000 options", flags + strings.Repeat(string(option(3, "")), 10_000)},
		{"silence", ""},
		{"half an option", flags + "IHAVEOPT\x00\x00"},
		{"half an option's data", flags + "IHAVEOPT\x00\x00\x00\x07\x00\x00\x10\x00abc"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := connect(t, path)
			// The server may hang up before it has read all of it.
			if _, err := r.Write([]byte(test.data)); err != nil && !isReset(err) {
				t.Fatal(err)
			}
			r.wantEnd()
			if _, err := dial(t, path, "rw").ReadAt(make([]byte, 4096), 0); err != nil {
				t.Errorf("another client: %v", err)
			}
		})
	}
}

// TestSlowNegotiation: bytes that keep coming do not extend the time limit.
func TestSlowNegotiation(t *testing.T) {
	t.Parallel()
	c := config()
	c.HandshakeTimeout = 2 * time.Second
	r := connect(t, pair(t, c))
	r.hello(3)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for _, b := range option(7, strings.Repeat("x", 2000)) {
		<-tick.C
		if _, err := r.Write([]byte{b}); err != nil {
			if d := time.Since(began); !isReset(err) || d > 30*time.Second {
				t.Errorf("after %v: %v", d, err)
			}
			return
		}
	}
	t.Error("the server waited for the whole option")
}

func TestUnknownExport(t *testing.T) {
	t.Parallel()
	_, err := nbd.Dial(testContext(t), "unix", pair(t, config()), "none")
	wantError(t, err, nbd.ErrNotFound)
}

func TestServeNeedsUnix(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	if err := nbd.NewServer(config()).Serve(testContext(t), l); err == nil {
		t.Error("Serve accepts clients on TCP, where nothing says who they are")
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve has left its listener open: %v", err)
	}
}

// TestPeerCredentials runs a client as another user. Only root can do that;
// others test the same decision in TestMayConnect.
func TestPeerCredentials(t *testing.T) {
	t.Parallel()
	if syscall.Geteuid() != 0 {
		return
	}
	const nobody = 65534
	for _, allowed := range []bool{false, true} {
		c := config()
		if allowed {
			c.AllowedUIDs = []uint32{nobody}
		}
		path := openToAll(t, pair(t, c))
		cmd := exec.Command("nbdinfo", "--size", "nbd+unix:///rw?socket="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		if (err == nil) != allowed {
			t.Errorf("user %d, allowed %v: %v: %s", nobody, allowed, err, out)
		}
	}
}
