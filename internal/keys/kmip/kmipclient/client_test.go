package kmipclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"go.uber.org/goleak"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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

// start serves store at addr ("127.0.0.1:0" for any) until stop is called.
func start(t *testing.T, ca *testca.Authority, store kmipserver.Store, addr string, edit ...func(*kmipserver.Config)) (l *losing, stop func()) {
	t.Helper()
	config := kmipserver.Config{
		Store: store, TLS: kmipserver.TLSConfig(ca.Server(t), ca.Pool(), false), Log: slog.New(slog.DiscardHandler),
		Authenticate: func(_ context.Context, state tls.ConnectionState, credentials []kmip.Credential) (kmipserver.Client, error) {
			for _, c := range credentials {
				if v := c.CredentialValue.UserPassword; v == nil || v.Username != "vcenter" || v.Password != "s3cret\xc3\xa9" {
					return kmipserver.Client{}, errors.New("wrong credentials")
				}
			}
			return kmipserver.Client{Account: state.PeerCertificates[0].Subject.CommonName}, nil
		},
	}
	for _, f := range edit {
		f(&config)
	}
	server, err := kmipserver.New(config)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	l = &losing{Listener: raw}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return l, stop
}

func newClient(t *testing.T, ca *testca.Authority, edit func(*Config), servers ...string) *Client {
	t.Helper()
	c := Config{
		Provider: "kp-1", Servers: servers, Retry: time.Nanosecond,
		TLS: &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{ca.Client(t, "controller")}},
	}
	if edit != nil {
		edit(&c)
	}
	client, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// TestLabelled: all keys with a label are found, page by page, from a server of
// any version, and no others.
func TestLabelled(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	t.Cleanup(func() { store.Close() })
	const keys = 2*pageMax + 1
	if err := store.Update(t.Context(), "controller", func(tx kmipserver.Tx) error {
		for i := range keys + 3 {
			label := "ours"
			if i >= keys {
				label = "theirs"
			}
			o := &kmipserver.Object{ID: fmt.Sprintf("key-%05d", i), Type: kmip.ObjectTypeSymmetricKey, Attributes: []kmip.Attribute{
				{AttributeName: "x-Controller", AttributeValue: ttlv.Value{Tag: kmip.TagAttributeValue, Value: label}},
			}}
			if err := tx.Put(o); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	l, _ := start(t, ca, store, "127.0.0.1:0")
	c := newClient(t, ca, func(c *Config) { c.Request = time.Minute }, l.Addr().String())
	for _, version := range []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_2} {
		s := c.servers[0]
		s.mu.Lock()
		s.version = version
		s.mu.Unlock()
		ids, err := c.Labelled(t.Context(), "x-Controller", "ours")
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(ids)
		want := keys
		if version == kmip.V1_2 {
			want = min(keys, 10000) // in one answer: the server's limit
		}
		if n := len(slices.Compact(ids)); n != want || ids[len(ids)-1] >= fmt.Sprintf("key-%05d", keys) {
			t.Errorf("version %v: %d keys, want %d; the last is %s", version, n, want, ids[len(ids)-1])
		}
		if ids, err := c.Labelled(t.Context(), "x-Controller", "nobody's"); err != nil || len(ids) != 0 {
			t.Errorf("nobody's keys: %d, %v", len(ids), err)
		}
	}
}

// TestDescribe: what a server tells of a key, without its material.
func TestDescribe(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	t.Cleanup(func() { store.Close() })
	l, _ := start(t, ca, store, "127.0.0.1:0")
	c := newClient(t, ca, nil, l.Addr().String())
	begin := time.Now().Add(-time.Minute)
	id, err := c.CreateNamed(t.Context(), "strongroom-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetCustom(t.Context(), id, "x-Name", "web-1"); err != nil {
		t.Fatal(err)
	}
	d, err := c.Describe(t.Context(), id)
	if err != nil || d.State != kmip.StatePreActive || d.Name != "strongroom-1" || d.Labels["x-Name"] != "web-1" || len(d.Labels) != 1 || d.Created.Before(begin) || time.Now().Add(time.Minute).Before(d.Created) {
		t.Errorf("described as %+v, %v", d, err)
	}
	_, err = c.Describe(t.Context(), "no-such-key")
	if errs.KindOf(err) != errs.NotFound {
		t.Errorf("a key that is not there: %v", err)
	}
}

// TestDescribeAll asks for many keys, of a server that takes batches, and of one that
// does not.
func TestDescribeAll(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{batchMax, 1} {
		ca := testca.New(t)
		store := kmipserver.NewMemory()
		t.Cleanup(func() { store.Close() })
		var mu sync.Mutex
		calls := map[kmip.Operation]int{}
		l, _ := start(t, ca, store, "127.0.0.1:0", func(c *kmipserver.Config) {
			c.Limits.Batch = limit
			c.Observe = func(_ context.Context, events ...kmipserver.Event) error {
				mu.Lock()
				defer mu.Unlock()
				for _, e := range events {
					calls[e.Operation]++
				}
				return nil
			}
		})
		c := newClient(t, ca, nil, l.Addr().String())
		var ids []string
		for i := range batchMax + 3 {
			if i == 5 || i == batchMax+1 {
				ids = append(ids, fmt.Sprint("no-such-key-", i))
				continue
			}
			id, err := c.CreateNamed(t.Context(), fmt.Sprint("key-", i))
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, id)
		}
		got, err := c.DescribeAll(t.Context(), ids)
		if err != nil || len(got) != len(ids) {
			t.Fatalf("%d of %d keys described, %v", len(got), len(ids), err)
		}
		for i, d := range got {
			if missing := i == 5 || i == batchMax+1; missing != (errs.KindOf(d.Err) == errs.NotFound) || missing != (d.Err != nil) {
				t.Errorf("key %d: %v", i, d.Err)
			} else if !missing && d.Name != fmt.Sprint("key-", i) {
				t.Errorf("key %d is described as %+v", i, d.Description)
			}
		}
		mu.Lock()
		if calls[kmip.OperationGetAttributes] != len(ids) {
			t.Errorf("%d keys were looked at", calls[kmip.OperationGetAttributes])
		}
		mu.Unlock()
		if got, err := c.DescribeAll(t.Context(), nil); err != nil || len(got) != 0 {
			t.Errorf("of none: %v, %v", got, err)
		}
	}
	// Nobody is there.
	c := newClient(t, testca.New(t), func(c *Config) { c.Request = 5 * time.Second }, "127.0.0.1:1")
	for _, ids := range [][]string{{"a"}, {"a", "b"}} {
		if _, err := c.DescribeAll(t.Context(), ids); errs.KindOf(err) != errs.Unavailable {
			t.Errorf("without a server: %v", err)
		}
	}
}

// TestBatchAnswers has answers that do not fit what was asked refused.
func TestBatchAnswers(t *testing.T) {
	t.Parallel()
	ask := &payloads.GetAttributesRequestPayload{}
	good := func(id byte) kmip.ResponseBatchItem {
		return kmip.ResponseBatchItem{Operation: kmip.OperationGetAttributes, UniqueBatchItemID: []byte{id}, ResponsePayload: &payloads.GetAttributesResponsePayload{}}
	}
	other, empty := good(1), good(1)
	other.Operation, empty.ResponsePayload = kmip.OperationGet, nil
	for name, test := range map[string]struct {
		second kmip.ResponseBatchItem
		ok     bool
	}{"good": {good(1), true}, "twice": {good(0), false}, "another": {good(2), false}, "operation": {other, false}, "empty": {empty, false}} {
		b := &batch{items: []kmip.OperationPayload{ask, ask}}
		if err := b.take(&server{}, []kmip.ResponseBatchItem{test.second, good(0)}); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// life takes one key through everything.
func life(t *testing.T, c *Client) {
	t.Helper()
	ctx := t.Context()
	id, err := c.Create(ctx)
	if err != nil {
		t.Fatal(err)
	}
	key, err := c.Get(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	if key.Len() != 32 {
		t.Errorf("the key has %d bytes", key.Len())
	}
	if err := c.Destroy(ctx, "no-such-key"); err != nil {
		t.Errorf("destroy of a key that is gone: %v", err)
	}
	if err := c.Activate(ctx, id); err != nil {
		t.Fatal(err)
	}
	if state, err := c.State(ctx, id); err != nil || state != kmip.StateActive {
		t.Errorf("state %v, %v; want active", state, err)
	}
	if err := c.Destroy(ctx, id); errs.KindOf(err) != errs.Denied || !strings.Contains(err.Error(), id) || !strings.Contains(err.Error(), "PermissionDenied") {
		t.Errorf("destroy of an active key: %v", err)
	}
	again, err := c.Get(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if !again.Equal(key) {
		t.Error("the key changed")
	}
	if err := c.Revoke(ctx, id, kmip.RevocationReasonCodeCessationOfOperation); err != nil {
		t.Fatal(err)
	}
	if err := c.Destroy(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, id); errs.KindOf(err) != errs.NotFound {
		t.Errorf("get of a destroyed key: %v", err)
	}
}

func TestLifeOfAKey(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	c := newClient(t, ca, nil, l.Addr().String())
	life(t, c)

	id, err := c.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetCustom(t.Context(), id, "x-Name", "web-1"); err != nil {
		t.Error(err)
	}
	if got, err := c.Custom(t.Context(), id, "x-Name"); err != nil || got != "web-1" {
		t.Errorf("label %q, %v", got, err)
	}
	first, err := c.Rekey(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := c.Rekey(t.Context(), id); err != nil || second != first {
		t.Errorf("re-keyed twice: %s, %v; want %s", second, err, first)
	}
}

func TestFailoverAndReturn(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	first, stopFirst := start(t, ca, store, "127.0.0.1:0")
	second, stopSecond := start(t, ca, store, "127.0.0.1:0")
	addr := first.Addr().String()
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
	first, stopFirst := start(t, ca, store, "127.0.0.1:0")
	second, _ := start(t, ca, store, "127.0.0.1:0")
	addr := first.Addr().String()
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
	t.Log("a black hole in front does not hurt for long")
	patient := func(c *Config) { c.Handshake = 2 * time.Second }
	life(t, newClient(t, ca, patient, hole.Addr().String(), l.Addr().String()))
}

func TestPasswordAndProxy(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	var through atomic.Int32
	proxy := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		up, err := net.Dial("tcp", r.Host)
		if err != nil || r.Method != http.MethodConnect {
			http.Error(w, "no", http.StatusBadGateway)
			return
		}
		through.Add(1)
		w.WriteHeader(http.StatusOK)
		down, early, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		// The server may have read the first bytes of the client's handshake already.
		go func() { io.Copy(up, early); up.Close() }()
		io.Copy(down, up)
		down.Close()
	})}
	pl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go proxy.Serve(pl)
	defer proxy.Close()
	password, err := keymem.Take([]byte("s3cret\xc3\xa9"))
	if err != nil {
		t.Fatal(err)
	}
	defer password.Close()
	c := newClient(t, ca, func(c *Config) { c.User, c.Password, c.Proxy = "vcenter", password, pl.Addr().String() }, l.Addr().String())
	life(t, c)
	if through.Load() == 0 {
		t.Error("the proxy was not used")
	}
	refusing := newClient(t, ca, func(c *Config) { c.Proxy = pl.Addr().String() }, "127.0.0.1:1")
	if _, err := refusing.Create(t.Context()); err == nil || !strings.Contains(err.Error(), "proxy refused") {
		t.Errorf("a proxy that cannot reach the server: %v", err)
	}
	c.Close()
}

// TestPyKMIP takes a key through its life on the server that others test with.
func TestPyKMIP(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	addr := kms.StartPyKMIP(t, ca, ca.PEM()).Addr
	c := newClient(t, ca, nil, addr)
	id, err := c.CreateNamed(t.Context(), "described")
	if err != nil {
		t.Fatal(err)
	}
	all, err := c.DescribeAll(t.Context(), []string{id, "999", id})
	if err != nil || len(all) != 3 || all[0].Name != "described" || all[0].Err != nil || errs.KindOf(all[1].Err) != errs.NotFound || all[2].Name != "described" {
		t.Errorf("described as %+v, %v", all, err)
	}
	life(t, newClient(t, ca, nil, addr))
}
