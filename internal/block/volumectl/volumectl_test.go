package volumectl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a Handler that writes down what it is asked for.
type recorder struct {
	mu    sync.Mutex
	calls []string
	block chan struct{} // if not nil, Flush waits for it
	err   error         // what Resize returns
	// refuse is what Suspend returns.
	refuse error
	end    func() // called by Shutdown
}

func (r *recorder) record(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf(format, args...))
}

func (r *recorder) seen() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

func (r *recorder) AddDisk(_ context.Context, d Disk, file *os.File, dek, next *keymem.Key) error {
	defer file.Close()
	defer dek.Close()
	defer next.Close()
	content, err := io.ReadAll(file)
	if err != nil {
		return err
	}
	r.record("add %+v with %q and keys of sums %d and %d", d, content, sum(dek), sum(next))
	return nil
}

func sum(key *keymem.Key) (n int) {
	if key != nil {
		for _, b := range key.Bytes() {
			n += int(b)
		}
	}
	return n
}

func (r *recorder) Rekey(_ context.Context, disk string, next *keymem.Key, safe *keysafe.Safe, rate int64) error {
	defer next.Close()
	text := "none"
	if safe != nil {
		text = string(safe.Encode())
	}
	r.record("rekey %s with a key of sum %d in %s at %d", disk, sum(next), text, rate)
	return nil
}

func (r *recorder) StopRekey(_ context.Context, disk string) error {
	r.record("stop the rekey of %s", disk)
	return nil
}

func (r *recorder) RemoveDisk(_ context.Context, disk string) error {
	r.record("remove %s", disk)
	return nil
}

func (r *recorder) Listen(_ context.Context, listener *os.File) error {
	defer listener.Close()
	l, err := net.FileListener(listener)
	if err != nil {
		return err
	}
	r.record("listen %s", l.Addr().Network())
	return l.Close()
}

func (r *recorder) ListenVhostUser(_ context.Context, disk string, listener *os.File) error {
	defer listener.Close()
	l, err := net.FileListener(listener)
	if err != nil {
		return err
	}
	r.record("listen %s for %s", l.Addr().Network(), disk)
	return l.Close()
}

func (r *recorder) ReplaceSafe(_ context.Context, disk string, safe *keysafe.Safe) error {
	r.record("replace %s %s", disk, safe.Encode())
	return nil
}

func (r *recorder) Convert(_ context.Context, disk string, format Format, file *os.File, dek *keymem.Key, rate int64) error {
	defer file.Close()
	defer dek.Close()
	r.record("convert %s to %s with a key: %v, at %d", disk, format, dek != nil, rate)
	return nil
}

func (r *recorder) HoldConversion(_ context.Context, disk string) error {
	r.record("hold %s", disk)
	return nil
}

func (r *recorder) SwitchDisk(_ context.Context, disk string) error {
	r.record("switch %s", disk)
	return nil
}

func (r *recorder) StopConversion(_ context.Context, disk string) error {
	r.record("stop converting %s", disk)
	return nil
}

func (r *recorder) Resize(_ context.Context, disk string, size int64) error {
	r.record("resize %s %d", disk, size)
	return r.err
}

func (r *recorder) Flush(_ context.Context, disk string) error {
	if r.block != nil {
		<-r.block
	}
	r.record("flush %s", disk)
	return nil
}

func (r *recorder) Suspend(_ context.Context, limit time.Duration) (func() error, error) {
	r.record("suspend for %v", limit)
	return func() error { r.record("resume"); return r.err }, r.refuse
}

func (r *recorder) Status(context.Context) (*Status, error) {
	return &Status{Listening: true, Disks: []DiskStatus{{Disk: "disk-0", Format: LUKS, Size: 512, Damage: []string{"bad"}, Rekey: &Rekey{
		Running: true, Done: 1, Total: 512, Rate: 3, Speed: 4, Failure: FailureOf(errs.New(errs.NoSpace, "full")),
	}, Conversion: &Conversion{
		Phase: Failed, Done: 1, Total: 1024, Failure: FailureOf(errs.New(errs.NoSpace, "full")),
	}}}}, nil
}

func (r *recorder) Shutdown(context.Context) error {
	r.record("shutdown")
	r.end()
	return nil
}

// serve runs a Server with r and returns its socket's path.
func serve(t *testing.T, r *recorder) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl") // short, unlike t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.end = cancel
	done := make(chan error)
	go func() {
		server := Server{VM: "web-1", Handler: r, Log: slog.New(slog.DiscardHandler)}
		done <- server.Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return path
}

func dial(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func testSafe(t testing.TB) *keysafe.Safe {
	t.Helper()
	kek, err := keymem.Random(keysafe.KEKSize)
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	dek, err := keymem.Random(keysafe.DEKSize)
	if err != nil {
		t.Fatal(err)
	}
	defer dek.Close()
	safe, err := keysafe.Wrap(kek, dek, keysafe.Ref{Provider: "kp-1", KeyID: "k/1"}, "disk:x", 1)
	if err != nil {
		t.Fatal(err)
	}
	return safe
}

func TestOperations(t *testing.T) {
	t.Parallel()
	r := &recorder{err: errs.New(errs.NoSpace, "full").WithReason("Why").WithHint("do this")}
	path := serve(t, r)
	c := dial(t, path)
	ctx := t.Context()
	if c.VM() != "web-1" || c.PID() != os.Getpid() {
		t.Errorf("VM %q, PID %d", c.VM(), c.PID())
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	file.WriteString("content")
	file.Seek(0, io.SeekStart)
	key, err := keymem.Take(bytes.Repeat([]byte{2}, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	other, err := keymem.Take(bytes.Repeat([]byte{3}, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	socket := filepath.Join(filepath.Dir(path), "nbd")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	listenerFile, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	defer listenerFile.Close()
	safe := testSafe(t)

	if err := c.AddDisk(ctx, Disk{Name: "disk-0", Format: LUKS, SizeMin: 512}, file, key, other); err != nil {
		t.Error(err)
	}
	if err := c.AddDisk(ctx, Disk{Name: "disk-1", Format: Raw, ReadOnly: true}, file, nil, nil); err != nil {
		t.Error(err)
	}
	if err := c.Listen(ctx, listenerFile); err != nil {
		t.Error(err)
	}
	if err := c.ListenVhostUser(ctx, "disk-0", listenerFile); err != nil {
		t.Error(err)
	}
	if err := c.ReplaceSafe(ctx, "disk-0", safe); err != nil {
		t.Error(err)
	}
	if err := c.Rekey(ctx, "disk-0", other, safe, 7); err != nil {
		t.Error(err)
	}
	if err := c.Rekey(ctx, "disk-0", nil, nil, 0); err != nil {
		t.Error(err)
	}
	if err := c.StopRekey(ctx, "disk-0"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Convert(ctx, "disk-0", LUKS, file, key, 7), c.Convert(ctx, "disk-0", Raw, file, nil, 0)); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.HoldConversion(ctx, "disk-0"), c.SwitchDisk(ctx, "disk-0"), c.StopConversion(ctx, "disk-0")); err != nil {
		t.Error(err)
	}
	err = c.Resize(ctx, "disk-0", 1024)
	if err == nil || err.Error() != "cannot resize disk disk-0: full" || errs.KindOf(err) != errs.NoSpace ||
		errs.ReasonOf(err) != "Why" || errs.HintOf(err) != "do this" {
		t.Errorf("an error crossed as %v (%v, %q, %q)", err, errs.KindOf(err), errs.ReasonOf(err), errs.HintOf(err))
	}
	if err := c.Flush(ctx, "disk-0"); err != nil {
		t.Error(err)
	}
	want, _ := r.Status(ctx)
	if status, err := c.Status(ctx); err != nil || !cmp.Equal(status, want) {
		t.Errorf("status %+v, %v", status, err)
	}
	if err := c.RemoveDisk(ctx, "disk-0"); err != nil {
		t.Error(err)
	}
	if err := c.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{
		`add {Name:disk-0 Format:luks ReadOnly:false SizeMin:512} with "content" and keys of sums 128 and 192`,
		`add {Name:disk-1 Format:raw ReadOnly:true SizeMin:0} with "" and keys of sums 0 and 0`,
		"listen unix",
		"listen unix for disk-0",
		fmt.Sprintf("replace disk-0 %s", safe.Encode()),
		fmt.Sprintf("rekey disk-0 with a key of sum 192 in %s at 7", safe.Encode()),
		"rekey disk-0 with a key of sum 0 in none at 0",
		"stop the rekey of disk-0",
		"convert disk-0 to luks with a key: true, at 7",
		"convert disk-0 to raw with a key: false, at 0",
		"hold disk-0",
		"switch disk-0",
		"stop converting disk-0",
		"resize disk-0 1024",
		"flush disk-0",
		"remove disk-0",
		"shutdown",
	}, r.seen()); diff != "" {
		t.Error(diff)
	}
	if err := key.Close(); err != nil || key == nil {
		t.Error("AddDisk took the caller's key")
	}
	if err := c.Flush(ctx, "disk-0"); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("after shutdown: %v, want kind Unavailable", err)
	}
}

// TestSuspensions end once: by the host that began it, by its leaving, and by
// whatever else is asked for but the status.
func TestSuspensions(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := new(recorder)
	path := serve(t, r)
	c, other := dial(t, path), dial(t, path)
	refused := func(what string, err error) {
		t.Helper()
		if errs.KindOf(err) != errs.InvalidState {
			t.Errorf("%s: %v, want kind InvalidState", what, err)
		}
	}
	done := func(errors ...error) {
		t.Helper()
		for _, err := range errors {
			if err != nil {
				t.Error(err)
			}
		}
	}
	refused("nothing to resume", c.Resume(ctx))
	done(c.Suspend(ctx, time.Second))
	_, err := c.Status(ctx)
	done(err)
	refused("another host's", other.Resume(ctx))
	done(c.Resume(ctx))
	refused("resumed twice", c.Resume(ctx))

	done(c.Suspend(ctx, time.Second), other.Flush(ctx, "disk-0"))
	refused("ended by another request", c.Resume(ctx))
	done(c.Suspend(ctx, time.Second), other.Suspend(ctx, 2*time.Second))
	refused("ended by another suspension", c.Resume(ctx))

	done(other.Close())
	for deadline := time.Now().Add(time.Minute); len(r.seen()) < 9 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if diff := cmp.Diff([]string{
		"suspend for 1s", "resume",
		"suspend for 1s", "resume", "flush disk-0",
		"suspend for 1s", "resume", "suspend for 2s", "resume",
	}, r.seen()); diff != "" {
		t.Error(diff)
	}

	c = dial(t, serve(t, &recorder{refuse: errs.New(errs.InvalidState, "a deep rekey is under way")}))
	refused("a rekey is under way", c.Suspend(ctx, time.Second))
	refused("after it was refused", c.Resume(ctx))
	c = dial(t, serve(t, &recorder{err: errs.New(errs.Unavailable, "too late")}))
	done(c.Suspend(ctx, time.Second))
	if err := c.Resume(ctx); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("one that had ended by itself: %v", err)
	}
}

func TestInvalidCalls(t *testing.T) {
	t.Parallel()
	r := new(recorder)
	path := serve(t, r)
	c := dial(t, path)
	short, err := keymem.New(32)
	if err != nil {
		t.Fatal(err)
	}
	defer short.Close()
	whole, err := keymem.New(KeySize)
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	for name, call := range map[string]func() error{
		"disk name":             func() error { return c.Flush(t.Context(), "../x") },
		"no limit":              func() error { return c.Suspend(t.Context(), 0) },
		"long limit":            func() error { return c.Suspend(t.Context(), SuspendMax+time.Second) },
		"size":                  func() error { return c.Resize(t.Context(), "disk-0", 513) },
		"no safe":               func() error { return c.ReplaceSafe(t.Context(), "disk-0", nil) },
		"no key":                func() error { return c.AddDisk(t.Context(), Disk{Name: "a", Format: LUKS}, os.Stdin, nil, nil) },
		"short key":             func() error { return c.AddDisk(t.Context(), Disk{Name: "a", Format: LUKS}, os.Stdin, short, nil) },
		"format":                func() error { return c.AddDisk(t.Context(), Disk{Name: "a"}, os.Stdin, nil, nil) },
		"conversion rate":       func() error { return c.Convert(t.Context(), "a", Raw, os.Stdin, nil, -1) },
		"no key to convert":     func() error { return c.Convert(t.Context(), "a", LUKS, os.Stdin, nil, 0) },
		"rate":                  func() error { return c.Rekey(t.Context(), "a", nil, nil, -1) },
		"short next key":        func() error { return c.Rekey(t.Context(), "a", short, testSafe(t), 0) },
		"next key without safe": func() error { return c.Rekey(t.Context(), "a", whole, nil, 0) },
	} {
		if err := call(); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%s: %v, want kind Invalid", name, err)
		}
	}
	if calls := r.seen(); len(calls) != 0 {
		t.Errorf("the handler saw %q", calls)
	}
	if _, err := Dial(t.Context(), path+"x"); errs.KindOf(err) != errs.Unavailable || !errors.Is(err, unix.ENOENT) {
		t.Errorf("dialling nobody: %v", err)
	}
}

// TestContextEnds: the caller does not wait, the operation goes on, and the next
// call is on a fresh connection.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	r := &recorder{block: make(chan struct{})}
	path := serve(t, r)
	c := dial(t, path)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Flush(ctx, "disk-0"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	if err := c.RemoveDisk(t.Context(), "disk-0"); err != nil {
		t.Error(err)
	}
	close(r.block)
	if err := c.Flush(t.Context(), "disk-1"); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := c.Flush(t.Context(), "disk-1"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestViolations sends what no Client sends: each ends the connection, does
// nothing, and leaves the server in order.
func TestViolations(t *testing.T) {
	t.Parallel()
	const hello = `{"op":"hello","version":1}`
	addDisk := fmt.Sprintf(`{"op":"add-disk","disk":"d","format":"luks","key_bytes":%d}`, KeySize)
	addBoth := fmt.Sprintf(`{"op":"add-disk","disk":"d","format":"luks","key_bytes":%d,"next_key_bytes":%d}`, KeySize, KeySize)
	key := strings.Repeat("k", KeySize)
	for name, packets := range map[string][]packet{
		"not hello first":    {{text: `{"op":"status"}`}},
		"hello twice":        {{text: hello, ok: true}, {text: hello}},
		"not JSON":           {{text: hello, ok: true}, {text: "\x00"}},
		"two objects":        {{text: hello, ok: true}, {text: `{"op":"status"}{}`}},
		"unknown operation":  {{text: hello, ok: true}, {text: `{"op":"format-disk"}`}},
		"unknown member":     {{text: hello, ok: true}, {text: `{"op":"status","x":1}`}},
		"foreign member":     {{text: hello, ok: true}, {text: `{"op":"status","disk":"d"}`}},
		"too long":           {{text: hello, ok: true}, {text: `{"op":"status"}` + strings.Repeat(" ", MessageMax)}},
		"no descriptor":      {{text: hello, ok: true}, {text: `{"op":"listen"}`}},
		"no vhost socket":    {{text: hello, ok: true}, {text: `{"op":"listen-vhost-user","disk":"d"}`}},
		"vhost of no disk":   {{text: hello, ok: true}, {text: `{"op":"listen-vhost-user"}`, fds: 1}},
		"stray descriptor":   {{text: hello, ok: true}, {text: `{"op":"status"}`, fds: 1}},
		"two descriptors":    {{text: hello, ok: true}, {text: `{"op":"listen"}`, fds: 2}},
		"many descriptors":   {{text: hello, ok: true}, {text: `{"op":"listen"}`, fds: 60}},
		"key too short":      {{text: hello, ok: true}, {text: addDisk, fds: 1, more: true}, {text: strings.Repeat("k", KeySize-1)}},
		"key too long":       {{text: hello, ok: true}, {text: addDisk, fds: 1, more: true}, {text: strings.Repeat("k", KeySize+1)}},
		"second key short":   {{text: hello, ok: true}, {text: addBoth, fds: 1, more: true}, {text: key, more: true}, {text: key[1:]}},
		"bad safe":           {{text: hello, ok: true}, {text: `{"op":"replace-safe","disk":"d","safe":{"version":1}}`}},
		"negative size":      {{text: hello, ok: true}, {text: `{"op":"resize","disk":"d","size":-512}`}},
		"version zero":       {{text: `{"op":"hello"}`}},
		"key for a raw disk": {{text: hello, ok: true}, {text: `{"op":"add-disk","disk":"d","format":"raw","key_bytes":64}`, fds: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := new(recorder)
			path := serve(t, r)
			conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, p := range packets {
				p.exchange(t, conn)
			}
			if calls := r.seen(); len(calls) != 0 {
				t.Errorf("the handler saw %q", calls)
			}
			if _, err := dial(t, path).Status(t.Context()); err != nil {
				t.Errorf("the server does not answer others any more: %v", err)
			}
		})
	}
}

type packet struct {
	text string
	fds  int
	ok   bool // an answer comes
	more bool // neither an answer nor the end of the connection comes
}

func (p packet) exchange(t *testing.T, conn *net.UnixConn) {
	t.Helper()
	var oob []byte
	if p.fds > 0 {
		fds := make([]int, p.fds)
		for i := range fds {
			fds[i] = 0 // anything open
		}
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := conn.WriteMsgUnix([]byte(p.text), oob, nil); err != nil {
		t.Fatal(err)
	}
	if p.more {
		return
	}
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	n, err := conn.Read(make([]byte, MessageMax))
	if p.ok && (n == 0 || err != nil) {
		t.Fatalf("no answer to %s: %v", p.text, err)
	}
	if !p.ok && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("after %.80s: %d bytes, %v; want the end of the connection", p.text, n, err)
	}
}

func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	path := serve(t, new(recorder))
	for range ConnectionsMax {
		dial(t, path)
	}
	if c, err := Dial(t.Context(), path); err == nil {
		c.Close()
		t.Error("one connection too many was served")
	}
}

func FuzzParseRequest(f *testing.F) {
	safe := testSafe(f)
	for _, r := range []request{
		{Op: opHello, Version: 1},
		{Op: opAddDisk, Disk: "disk-0", Format: LUKS, KeyBytes: KeySize, Size: 512, ReadOnly: true},
		{Op: opAddDisk, Disk: "disk-0", Format: Raw},
		{Op: opReplaceSafe, Disk: "disk-0", Safe: safe},
		{Op: opResize, Disk: "disk-0", Size: 1 << 40},
		{Op: opAddDisk, Disk: "disk-0", Format: LUKS, KeyBytes: KeySize, NextKeyBytes: KeySize},
		{Op: opRekey, Disk: "disk-0", NextKeyBytes: KeySize, Safe: safe, Rate: 100 << 20},
		{Op: opRekey, Disk: "disk-0"},
		{Op: opStopRekey, Disk: "disk-0"},
		{Op: opConvert, Disk: "disk-0", Format: LUKS, KeyBytes: KeySize, Rate: 100 << 20},
		{Op: opStopConvert, Disk: "disk-0"},
		{Op: opSuspend, Limit: 10_000},
		{Op: opResume},
		{Op: opStatus},
	} {
		message, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(message)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := parseRequest(message)
		if err != nil {
			if r != nil || !errors.Is(err, ErrProtocol) {
				t.Errorf("error %v with request %+v", err, r)
			}
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		second, err := parseRequest(again)
		if err != nil {
			t.Fatalf("%s is refused after it was parsed from %s: %v", again, message, err)
		}
		third, err := json.Marshal(second)
		if err != nil || !bytes.Equal(again, third) {
			t.Errorf("%s becomes %s", again, third)
		}
	})
}

func FuzzParseReply(f *testing.F) {
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"error":{"text":"x","kind":"Locked","reason":"r","hint":"h"}}`))
	f.Add([]byte(`{"version":1,"vm":"web-1","pid":7,"future":true}`))
	f.Add([]byte(`{"status":{"disks":[{"conversion":{"phase":"failed","done":1,"total":2,"error":{"text":"x","kind":"NoSpace"}}}]}}`))
	f.Add([]byte(`{"status":{"listening":true,"disks":[{"disk":"d","format":"luks","size":512,"damage":["x"]}]}}`))
	f.Add([]byte(`{"status":{"disks":[{"rekey":{"running":true,"done":1,"total":2,"rate":3,"error":{"text":"x","kind":"NoSpace"}}}]}}`))
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := parseReply(message)
		if err != nil {
			if r != nil || !errors.Is(err, ErrProtocol) {
				t.Errorf("error %v with reply %+v", err, r)
			}
			return
		}
		if r.Error != nil && r.Error.Err().Error() == "" {
			t.Error("an error without text")
		}
	})
}
