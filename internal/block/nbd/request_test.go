package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
)

const (
	eperm  = 1
	eio    = 5
	einval = 22
	enospc = 28
)

func TestRefusals(t *testing.T) {
	t.Parallel()
	path := pair(t, config())
	const size = 1 << 20
	tests := []struct {
		name       string
		export     string
		flags, typ uint16
		offset     uint64
		length     uint32
		payload    string
		errno      uint32
	}{
		{"unknown command", "rw", 0, 8, 0, 0, "", einval},
		{"read nothing", "rw", 0, 0, 0, 0, "", einval},
		{"read beyond the end", "rw", 0, 0, size - 512, 1024, "", einval},
		{"read at the end of the world", "rw", 0, 0, 1<<64 - 1, 512, "", einval},
		{"read with wrapping end", "rw", 0, 0, 1<<63 - 100, 512, "", einval},
		{"read over the limit", "rw", 0, 0, 0, 32<<20 + 1, "", einval},
		{"read with unknown flag", "rw", 1 << 4, 0, 0, 512, "", einval},
		{"write beyond the end", "rw", 0, 1, size - 512, 1024, strings.Repeat("x", 1024), enospc},
		{"long write beyond the end", "rw", 0, 1, size - 512, 600 << 10, strings.Repeat("x", 600<<10), enospc},
		{"write to read-only", "ro", 0, 1, 0, 512, strings.Repeat("x", 512), eperm},
		{"long write to read-only", "ro", 0, 1, 0, 600 << 10, strings.Repeat("x", 600<<10), eperm},
		{"trim of read-only", "ro", 0, 4, 0, 512, "", eperm},
		{"zeroes to read-only", "ro", 0, 6, 0, 512, "", eperm},
		{"trim beyond the end", "rw", 0, 4, 0, size + 1, "", einval},
		{"zeroes beyond the end", "rw", 0, 6, 0, size + 1, "", enospc},
		{"fast zeroes", "rw", 1 << 4, 6, 0, 4096, "", einval},
		{"cache beyond the end", "rw", 0, 5, size, 1, "", einval},
		{"status beyond the end", "rw", 0, 7, size, 1, "", einval},
		{"read with DF of a trim", "rw", 1 << 2, 4, 0, 512, "", einval},
	}
	for _, structured := range []bool{true, false} {
		conns := map[string]raw{"rw": open(t, path, "rw", structured), "ro": open(t, path, "ro", structured)}
		for _, test := range tests {
			c := conns[test.export].do(test.flags, test.typ, test.offset, test.length, test.payload)
			if c.errno != test.errno {
				t.Errorf("structured %v, %s: %+v, want errno %d", structured, test.name, c, test.errno)
			}
			if structured && c.data == "" {
				t.Errorf("%s: the error has no message", test.name)
			}
		}
		for _, r := range conns {
			if c := r.do(0, 3, 0, 0, ""); c.errno != 0 {
				t.Errorf("flush after refusals: %+v", c)
			}
		}
	}
	got := make([]byte, size)
	if _, err := dial(t, path, "rw").ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, size)) {
		t.Errorf("a refused command has changed the device (or %v)", err)
	}
}

// TestSimpleReplies serves a client that knows no structured replies, such as
// the kernel's, with reads longer than a piece.
func TestSimpleReplies(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(4<<20, 4096)
	want := pattern(4 << 20)
	write(t, mem, want, 0)
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: mem})
	r := open(t, path, "rw", false)
	for _, n := range []int{1, 4096, 256 << 10, 256<<10 + 1, 3 << 20} {
		if c := r.do(0, 0, 512, uint32(n), ""); c.typ != -1 || c.errno != 0 {
			t.Fatalf("read of %d bytes: %+v", n, c)
		}
		if !bytes.Equal(r.recv(n), want[512:512+n]) {
			t.Errorf("read of %d bytes differs", n)
		}
	}
	if c := r.do(1<<2, 0, 0, 512, ""); c.errno != einval {
		t.Errorf("DF without structured replies: %+v, want EINVAL", c)
	}
}

// TestLongReads: pieces may arrive in any order, cover the range once, and only
// the last is marked.
func TestLongReads(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(4<<20, 4096)
	want := pattern(4 << 20)
	clear(want[1<<20 : 2<<20])
	write(t, mem, want, 0)
	check(t, mem.WriteZeroes(1<<20, 1<<20, true))
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: mem})
	r := open(t, path, "rw", true)
	for range 20 {
		r.send(request(0, 0, 5, 512, 4<<20-1024))
		got := make([]byte, 4<<20)
		covered, holes := 0, 0
		for {
			c := r.chunk()
			off := be.Uint64([]byte(c.data))
			switch c.typ {
			case 1:
				covered += copy(got[off:], c.data[8:])
			case 2:
				n := int(be.Uint32([]byte(c.data[8:])))
				clear(got[off:][:n])
				covered += n
				holes += n
			default:
				t.Fatalf("chunk %+v", c)
			}
			if c.done {
				break
			}
		}
		if covered != 4<<20-1024 || !bytes.Equal(got[512:4<<20-512], want[512:4<<20-512]) {
			t.Fatalf("%d bytes arrived, or wrong ones", covered)
		}
		if holes < 512<<10 {
			t.Errorf("%d bytes were sent as holes, of 1 MiB of zeros", holes)
		}
	}
	if c := r.do(1<<2, 0, 0, 256<<10, ""); c.typ != 1 || len(c.data) != 8+256<<10 {
		t.Errorf("unfragmented read: type %d with %d bytes", c.typ, len(c.data))
	}
	if c := r.do(1<<2, 0, 0, 256<<10+512, ""); c.errno != 75 {
		t.Errorf("long unfragmented read: %+v, want EOVERFLOW", c)
	}
}

func TestBlockStatus(t *testing.T) {
	t.Parallel()
	mem := blockdev.NewMemory(1<<20, 4096)
	write(t, mem, pattern(64<<10), 64<<10)
	write(t, mem, pattern(64<<10), 128<<10)
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: mem}, nbd.Export{Name: "dull", Device: dull{mem}})
	extent := func(pairs ...uint32) string {
		b := be.AppendUint32(nil, 1)
		for _, p := range pairs {
			b = be.AppendUint32(b, p)
		}
		return string(b)
	}
	r := open(t, path, "rw", true)
	if c := r.do(0, 7, 0, 1<<20, ""); c.typ != 5 || c.data != extent(64<<10, 3, 128<<10, 0, 832<<10, 3) {
		t.Errorf("status: %+v", c)
	}
	if c := r.do(1<<3, 7, 100<<10, 1<<20-100<<10, ""); c.typ != 5 || c.data != extent(92<<10, 0) {
		t.Errorf("status of one: %+v", c)
	}
	r = open(t, path, "dull", true)
	if c := r.do(0, 7, 0, 1<<20, ""); c.typ != 5 || c.data != extent(1<<20, 0) {
		t.Errorf("status of a device without extents: %+v", c)
	}
	// The client asks for base:allocation of a device with alternating blocks:
	// a reply has an end.
	many := blockdev.NewMemory(64<<20, 4096)
	for off := int64(0); off < 64<<20; off += 8192 {
		write(t, many, []byte{1}, off)
	}
	_, path = start(t, config(), nbd.Export{Name: "rw", Device: many})
	r = open(t, path, "rw", true)
	if c := r.do(0, 7, 0, 64<<20, ""); c.typ != 5 || len(c.data) != 4+2048*8 {
		t.Errorf("status of many extents: type %d, %d bytes", c.typ, len(c.data))
	}
}

// watched counts calls, and fails or waits at a hook.
type watched struct {
	blockdev.Device
	mu   sync.Mutex
	log  []string
	hook func(op string, off int64) error
}

func (w *watched) note(op string, off int64) error {
	w.mu.Lock()
	w.log = append(w.log, op)
	w.mu.Unlock()
	if w.hook != nil {
		return w.hook(op, off)
	}
	return nil
}

func (w *watched) took() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := strings.Join(w.log, " ")
	w.log = nil
	return s
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	if err := w.note("read", off); err != nil {
		return 0, err
	}
	return w.Device.ReadAt(p, off)
}

func (w *watched) WriteAt(p []byte, off int64) (int, error) {
	if err := w.note("write", off); err != nil {
		return 0, err
	}
	return w.Device.WriteAt(p, off)
}

func (w *watched) WriteZeroes(off, n int64, mayPunch bool) error {
	if err := w.note(fmt.Sprintf("zeroes(%v)", mayPunch), off); err != nil {
		return err
	}
	return w.Device.WriteZeroes(off, n, mayPunch)
}

func (w *watched) Discard(off, n int64) error {
	if err := w.note("discard", off); err != nil {
		return err
	}
	return w.Device.Discard(off, n)
}

func (w *watched) Flush() error { return w.note("flush", 0) }

func TestCommands(t *testing.T) {
	t.Parallel()
	dev := &watched{Device: blockdev.NewMemory(1<<20, 4096)}
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: dev})
	r := open(t, path, "rw", true)
	tests := []struct {
		name       string
		flags, typ uint16
		length     uint32
		payload    string
		want       string
	}{
		{"write", 0, 1, 4096, strings.Repeat("x", 4096), "write"},
		{"write FUA", 1, 1, 4096, strings.Repeat("x", 4096), "write flush"},
		{"long write FUA", 1, 1, 512 << 10, strings.Repeat("x", 512<<10), "write write flush"},
		{"flush", 0, 3, 0, "", "flush"},
		{"trim", 0, 4, 4096, "", "discard"},
		{"trim FUA", 1, 4, 4096, "", "discard flush"},
		{"zeroes", 0, 6, 4096, "", "zeroes(true)"},
		{"zeroes without hole, FUA", 3, 6, 4096, "", "zeroes(false) flush"},
		{"cache", 0, 5, 600 << 10, "", "read read read"},
		{"read FUA", 1, 0, 4096, "", "read"},
	}
	for _, test := range tests {
		if c := r.do(test.flags, test.typ, 4096, test.length, test.payload); c.errno != 0 {
			t.Errorf("%s: %+v", test.name, c)
		}
		if got := dev.took(); got != test.want {
			t.Errorf("%s: the device saw %q, want %q", test.name, got, test.want)
		}
	}
}

// TestDeviceErrors: each reply tells of its own failure, and the connection
// goes on.
func TestDeviceErrors(t *testing.T) {
	t.Parallel()
	var failing atomic.Pointer[error]
	dev := &watched{Device: blockdev.NewMemory(8<<20, 4096)}
	dev.hook = func(_ string, off int64) error {
		// In the middle of the longer requests below.
		if err := failing.Load(); err != nil && off >= 1<<20 && off < 1<<20+256<<10 {
			return *err
		}
		return nil
	}
	_, path := start(t, config(), nbd.Export{Name: "rw", Device: dev})
	c := dial(t, path, "rw")
	buf := make([]byte, 2<<20)
	for _, want := range []error{blockdev.ErrNoSpace, blockdev.ErrReadOnly, blockdev.ErrClosed, errors.ErrUnsupported} {
		failing.Store(&want)
		for _, n := range []int{4096, 2 << 20} {
			off := int64(1 << 20)
			if n > 4096 {
				off -= 512 << 10
			}
			_, err := c.ReadAt(buf[:n], off)
			wantError(t, err, want)
			_, err = c.WriteAt(buf[:n], off)
			wantError(t, err, want)
		}
		wantError(t, c.WriteZeroes(1<<20, 4096, true), want)
		wantError(t, c.Discard(1<<20, 4096), want)
		failing.Store(nil)
		if _, err := c.WriteAt(buf, 1<<20); err != nil {
			t.Fatalf("after a failure: %v", err)
		}
	}
	// A client without structured replies: a failure in the middle of a long
	// read cannot be told but by hanging up.
	failure := errors.New("bad sector")
	failing.Store(&failure)
	r := open(t, path, "rw", false)
	if got := r.do(0, 0, 1<<20, 4096, ""); got.errno != eio {
		t.Errorf("read of a bad sector: %+v, want EIO", got)
	}
	if got := r.do(0, 0, 0, 2<<20, ""); got.errno != 0 {
		t.Errorf("long read: %+v", got)
	}
	r.wantEnd()
}

// TestSlowRequestsRunTogether holds every request in the device until as many
// have arrived as a connection may have in work.
func TestSlowRequestsRunTogether(t *testing.T) {
	t.Parallel()
	const depth = 8
	var running atomic.Int32
	all := make(chan struct{})
	slow := atomic.Bool{}
	dev := &watched{Device: blockdev.NewMemory(1<<20, 4096)}
	dev.hook = func(op string, _ int64) error {
		if op == "flush" && slow.Load() && running.Add(1) == depth {
			close(all)
		}
		if op == "flush" && slow.Load() {
			<-all
		}
		return nil
	}
	c := config()
	c.MaxWorkers = depth + 1
	_, path := start(t, c, nbd.Export{Name: "rw", Device: dev})
	r := open(t, path, "rw", true)
	slow.Store(true)
	var b []byte
	for i := range depth {
		b = append(b, request(0, 3, uint64(i), 0, 0)...)
	}
	r.send(b)
	seen := map[uint64]bool{}
	for range depth {
		seen[r.chunk().cookie] = true
	}
	if len(seen) != depth {
		t.Errorf("%d different replies, want %d", len(seen), depth)
	}
}

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i>>9) ^ byte(i) | 1
	}
	return p
}

func write(t testing.TB, dev blockdev.Device, p []byte, off int64) {
	t.Helper()
	if _, err := dev.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}
