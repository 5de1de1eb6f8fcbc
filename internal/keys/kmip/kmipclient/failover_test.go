package kmipclient

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/port"
)

// losing is a listener that can lose an answer: armed with n, the n-th write
// of its connections from then on is lost together with the connection.
type losing struct {
	net.Listener
	armed    atomic.Int32
	refusing atomic.Bool // close new connections at once
	accepted atomic.Int32
}

func (l *losing) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	if l.refusing.Load() {
		c.Close()
	}
	return &losingConn{Conn: c, l: l}, nil
}

type losingConn struct {
	net.Conn
	l *losing
}

func (c *losingConn) Write(b []byte) (int, error) {
	if c.l.armed.Load() > 0 && c.l.armed.Add(-1) == 0 {
		c.Close()
		return 0, io.ErrClosedPipe
	}
	return c.Conn.Write(b)
}

func TestFailoverAndReturn(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	addr := port.For(t)
	_, stopFirst := start(t, ca, store, addr)
	second, stopSecond := start(t, ca, store, "127.0.0.1:0")
	c := newClient(t, ca, nil, addr, second.Addr().String())
	life(t, c)
	if len(c.servers[1].idle) != 0 {
		t.Error("the second server was asked while the first works")
	}
	stopFirst()
	life(t, c)
	if len(c.servers[1].idle) == 0 {
		t.Error("the second server was not asked")
	}
	_, stopAgain := start(t, ca, store, addr)
	defer stopAgain()
	stopSecond()
	life(t, c)
	stopAgain()
	_, err := c.Create(t.Context())
	if errs.KindOf(err) != errs.Unavailable || !strings.Contains(err.Error(), addr) || !strings.Contains(err.Error(), second.Addr().String()) || !strings.Contains(err.Error(), "kp-1") {
		t.Errorf("with both down: %v; want both named", err)
	}
}

// TestLostAnswers loses the answer to each kind of change: it is done once.
func TestLostAnswers(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	c := newClient(t, ca, nil, l.Addr().String())
	ctx := t.Context()
	arm := func(n int32) {
		t.Helper()
		if _, err := c.locate(ctx, kmip.Name{NameValue: "x", NameType: 1}); err != nil { // so that a connection is there
			t.Fatal(err)
		}
		l.armed.Store(n)
	}
	count := func() (n int) {
		t.Helper()
		err := store.View(ctx, "controller", func(r kmipserver.Reader) error {
			for range r.Find(kmipserver.Query{}) {
				n++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if l.armed.Load() != 0 {
			t.Fatalf("%s: no answer was lost", what)
		}
	}
	arm(1)
	id, err := c.Create(ctx)
	check("create", err)
	if n := count(); n != 1 {
		t.Errorf("create made %d keys", n)
	}
	key, err := c.Get(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	key.Close()
	arm(1)
	check("activate", c.Activate(ctx, id))
	arm(2) // not the answer to the look before the change
	_, err = c.Rekey(ctx, id)
	check("re-key", err)
	if n := count(); n != 2 {
		t.Errorf("re-key left %d keys, want 2", n)
	}
	arm(1)
	check("revoke", c.Revoke(ctx, id, kmip.RevocationReasonCodeCessationOfOperation))
	arm(1)
	check("destroy", c.Destroy(ctx, id))
	if state, err := c.State(ctx, id); err != nil || state != kmip.StateDestroyed {
		t.Errorf("state %v, %v", state, err)
	}

	t.Log("and nobody is left to tell")
	arm(1)
	l.refusing.Store(true)
	_, err = c.Create(ctx)
	var unknown *UnknownOutcome
	if !errors.As(err, &unknown) || !strings.HasPrefix(unknown.Key, "strongroom-") {
		t.Errorf("got %v, want an unknown outcome that names the key", err)
	}
}

// TestLostOnNewConnection loses each write of a server on a new connection, of
// handshake, negotiation and answer: what reads is asked once more, with nobody
// else to ask, and a change is done once. What breaks twice is told.
func TestLostOnNewConnection(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	c := newClient(t, ca, nil, l.Addr().String())
	ctx := t.Context()
	id, err := c.Create(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fresh := func(n int32) {
		s := c.servers[0]
		s.forget()
		s.mark(errors.New("so that the version is negotiated anew"))
		l.armed.Store(n)
	}
	const writesMax = 20
	n := int32(1)
	for ; ; n++ {
		if n > writesMax {
			t.Fatalf("an answer over a new connection takes more than %d writes", writesMax)
		}
		fresh(n)
		key, err := c.Get(ctx, id)
		if err != nil {
			t.Errorf("write %d lost: %v", n, err)
			continue
		}
		key.Close()
		if l.armed.Swap(0) > 0 {
			break
		}
		made := fmt.Sprintf("strongroom-%d", n)
		fresh(n)
		if _, err := c.CreateNamed(ctx, made); err != nil {
			t.Errorf("creation, write %d lost: %v", n, err)
		}
		if found, err := c.Find(ctx, made); err != nil || len(found) != 1 {
			t.Errorf("creation, write %d lost: %d keys, %v", n, len(found), err)
		}
	}
	if n < 4 {
		t.Errorf("only %d writes were lost", n-1)
	}
	l.refusing.Store(true)
	for what, do := range map[string]func() error{
		"get":    func() error { _, err := c.Get(ctx, id); return err },
		"create": func() error { _, err := c.CreateNamed(ctx, "strongroom-never"); return err },
	} {
		fresh(0)
		before := l.accepted.Load()
		if err := do(); errs.KindOf(err) != errs.Unavailable {
			t.Errorf("%s, from a server that breaks each connection: %v", what, err)
		}
		// A creation looks for the name, too, before it and after.
		if n := l.accepted.Load() - before; n < 2 || n > 6 {
			t.Errorf("%s: %d connections to a server that breaks each", what, n)
		}
	}
}

// TestReturnToPreferred: the first server is asked again once it has been left
// alone for long enough, although the second works.
func TestReturnToPreferred(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	addr := port.For(t)
	first, stopFirst := start(t, ca, store, addr)
	second, _ := start(t, ca, store, "127.0.0.1:0")
	c := newClient(t, ca, func(c *Config) { c.Retry = time.Hour }, addr, second.Addr().String())
	id, err := c.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// asked says which of the servers are asked: those that take another connection.
	asked := func() [2]bool {
		t.Helper()
		var before [2]int32
		for i, l := range []*losing{first, second} {
			before[i] = l.accepted.Load()
			c.servers[i].forget()
		}
		if _, err := c.State(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		return [2]bool{first.accepted.Load() > before[0], second.accepted.Load() > before[1]}
	}
	if got := asked(); got != [2]bool{true, false} {
		t.Errorf("with both: asked %v", got)
	}
	stopFirst()
	if got := asked(); got != [2]bool{false, true} {
		t.Errorf("with the second alone: asked %v", got)
	}
	first, _ = start(t, ca, store, addr)
	if got := asked(); got != [2]bool{false, true} {
		t.Errorf("just after the return: asked %v, want the second for a while", got)
	}
	s := c.servers[0]
	s.mu.Lock()
	s.failed = s.failed.Add(-c.config.Retry) // as if that time had passed
	s.mu.Unlock()
	for range 2 {
		if got := asked(); got != [2]bool{true, false} {
			t.Errorf("later: asked %v, want the first", got)
		}
	}
}

func TestServersThatDoNotAnswer(t *testing.T) {
	t.Parallel()
	ca, other := testca.New(t), testca.New(t)
	hole, err := net.Listen("tcp", "127.0.0.1:0") // accepts, in the kernel, and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	quick := func(c *Config) { c.Handshake = 100 * time.Millisecond }
	for _, c := range []struct {
		name, server, want string
		edit               func(*Config)
	}{
		{"black hole", hole.Addr().String(), "cannot agree on TLS", quick},
		{"nobody", "127.0.0.1:1", "connection refused", nil},
		{"foreign certificate", l.Addr().String(), "certificate signed by unknown authority", func(c *Config) { c.TLS.RootCAs = other.Pool() }},
		{"unknown client", l.Addr().String(), "cannot agree on TLS: remote error", func(c *Config) { c.TLS.Certificates = nil; c.TLS.MaxVersion = tls.VersionTLS12 }},
		{"wrong password", l.Addr().String(), "AuthenticationNotSuccessful", func(c *Config) { c.User = "vcenter" }},
	} {
		_, err := newClient(t, ca, c.edit, c.server).Create(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.server) {
			t.Errorf("%s: got %v, want %q and the server's address", c.name, err, c.want)
		}
	}
	t.Log("a black hole in front does not hurt for long: once, and then it is left alone")
	patient := func(c *Config) { c.Handshake, c.Retry = 5*time.Second, time.Hour }
	life(t, newClient(t, ca, patient, hole.Addr().String(), l.Addr().String()))
}
