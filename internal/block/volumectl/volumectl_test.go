package volumectl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
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
