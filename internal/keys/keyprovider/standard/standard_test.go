package standard

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"go.uber.org/goleak"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/keyprovider/providertest"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open returns a provider that trusts ca's servers and is known as client.
func open(t *testing.T, ca *testca.Authority, client tls.Certificate, servers ...string) *Provider {
	t.Helper()
	p, err := New(Config{
		Name: "kms-1", Installation: "here", Servers: servers, Authorities: ca.Pool(), Certificate: func() *tls.Certificate { return &client }, Timeout: 30 * time.Second, Retry: time.Nanosecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func conformance(t *testing.T, ca *testca.Authority, addr string, missing ...string) {
	providertest.Run(t, func(t *testing.T) providertest.Fixture {
		client := ca.Client(t, "controller")
		f := providertest.Fixture{
			Provider: open(t, ca, client, addr),
			Reopen:   func(t *testing.T) keyprovider.Provider { return open(t, ca, client, addr) },
		}
		for _, id := range missing {
			f.Missing = append(f.Missing, keysafe.Ref{Provider: "kms-1", KeyID: id})
		}
		return f
	})
}

func TestConformance(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	server := kms.NewServer(t, ca)
	server.Start(t)
	conformance(t, ca, server.Addr, uuid.NewString(), "no such key")
}

func TestConformancePyKMIP(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	conformance(t, ca, kms.StartPyKMIP(t, ca, ca.PEM()).Addr, "123456")
}

// TestOldServers has a server that speaks KMIP 1.1 only, the least that a standard
// provider needs, and one of KMIP 1.0.
func TestOldServers(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"1.1", "1.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			ca := testca.New(t)
			server := kms.StartPyKMIP(t, ca, ca.PEM(), version)
			client := ca.Client(t, "controller")
			if answer := queryIn(t, &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{client}}, server.Addr, kmip.V1_2); answer.ResultStatus != kmip.ResultStatusOperationFailed {
				t.Fatal("it speaks KMIP 1.2")
			}
			p := open(t, ca, client, server.Addr)
			if err := p.Probe(t.Context()); err != nil {
				t.Fatal(err)
			}
			conformance(t, ca, server.Addr, "123456")
		})
	}
}

// queryIn returns a server's answer to Query in a version of KMIP.
func queryIn(t *testing.T, cfg *tls.Config, addr string, version kmip.ProtocolVersion) kmip.ResponseBatchItem {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream := ttlv.NewStream(conn, 1<<20)
	m := kmip.NewRequestMessage(version, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionOperations}})
	var r kmip.ResponseMessage
	if err := stream.RoundTrip(&m, &r); err != nil {
		t.Fatal(err)
	}
	return r.BatchItem[0]
}

// all returns the identifiers and states of the keys that p's account has and
// that are not destroyed.
func all(t *testing.T, p *Provider) map[string]kmip.State {
	t.Helper()
	ids, err := p.client.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]kmip.State{}
	for _, id := range ids {
		if states[id], err = p.client.State(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	return states
}

func TestProbeAndLabel(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	server := kms.NewServer(t, ca)
	server.Start(t)
	p := open(t, ca, ca.Client(t, "controller"), server.Addr)
	if err := p.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := all(t, p); len(left) != 0 {
		t.Errorf("the probe left %v", left)
	}
	ref, kek, err := p.NewKEK(t.Context(), uuid.New())
	if err != nil {
		t.Fatal(err)
	}
	kek.Close()
	want := Labels{Identifier: uuid.NewString(), Component: "Virtual Machine", Name: "web-1"}
	for range 2 { // again: it is there, which is no error
		if err := p.Label(t.Context(), ref, want); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range map[string]string{"x-Vendor": "Strongroom", "x-Product": "Strongroom", "x-Identifier": want.Identifier, "x-Component": want.Component, "x-Name": want.Name, "x-Controller": "here"} {
		if got, err := p.client.Custom(t.Context(), ref.KeyID, name); err != nil || got != value {
			t.Errorf("%s is %q, %v; want %q", name, got, err, value)
		}
	}
	// To look costs no key: some key servers have them charged.
	made := func() (n int) {
		t.Helper()
		if err := server.Store.View(t.Context(), "controller", func(r kmipserver.Reader) error {
			for _, err := range r.Find(kmipserver.Query{}) {
				if err != nil {
					return err
				}
				n++
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := made()
	for range 3 {
		found, err := p.Status(t.Context())
		if err != nil || len(found) != 1 || found[0].Problem != "" {
			t.Errorf("status %+v, %v", found, err)
		}
	}
	if n := made(); n != before || n != 2 { // the trial key, destroyed, and the KEK
		t.Errorf("%d keys were made, %d before three looks at the server", n, before)
	}
}

// TestProbeFindsStrangers: a server that does not share the keys of the first
// is found by the probe, and only by it.
func TestProbeFindsStrangers(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	first, other := kms.NewServer(t, ca), kms.NewServer(t, ca)
	first.Start(t)
	other.Start(t)
	p := open(t, ca, ca.Client(t, "controller"), first.Addr, other.Addr)
	found, err := p.Status(t.Context())
	if err != nil || found[0].Problem != "" || found[1].Problem != "" {
		t.Fatalf("status %+v, %v", found, err)
	}
	if err := p.Probe(t.Context()); !errors.Is(err, ErrProbe) || !strings.Contains(err.Error(), other.Addr) {
		t.Errorf("probe: %v", err)
	}
	if err := other.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := p.Probe(t.Context()); err != nil {
		t.Errorf("a server that is away fails the probe: %v", err)
	}
}

// TestStates: a key that the KMS took out of use is locked, one that it
// destroyed is gone.
func TestStates(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	server := kms.NewServer(t, ca)
	server.Start(t)
	p := open(t, ca, ca.Client(t, "controller"), server.Addr)
	id := uuid.New()
	ref, kek, err := p.NewKEK(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	kek.Close()
	if err := p.client.Revoke(t.Context(), ref.KeyID, kmip.RevocationReasonCodeCessationOfOperation); err != nil {
		t.Fatal(err)
	}
	if kek, err := p.KEK(t.Context(), ref); kek != nil || !errors.Is(err, ErrNotActive) || !errors.Is(err, keyprovider.ErrLocked) || !strings.Contains(err.Error(), "Deactivated") {
		t.Errorf("a revoked key: %v, %v", kek, err)
	}
	for range 2 { // a second time there is nothing left to do
		if err := p.Discard(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if kek, err := p.KEK(t.Context(), ref); kek != nil || !errors.Is(err, keyprovider.ErrNotFound) {
		t.Errorf("a destroyed key: %v, %v", kek, err)
	}
	// Another client is another account: it has no such key.
	if kek, err := open(t, ca, ca.Client(t, "somebody"), server.Addr).KEK(t.Context(), ref); kek != nil || !errors.Is(err, keyprovider.ErrNotFound) {
		t.Errorf("another account's key: %v, %v", kek, err)
	}
}

// cutting is a listener whose connections break at the n-th write of a server
// from now on: the request was done, its answer is lost.
type cutting struct {
	net.Listener
	armed *atomic.Int32
}

func (l cutting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return cuttingConn{c, l.armed}, nil
}

type cuttingConn struct {
	net.Conn
	armed *atomic.Int32
}

func (c cuttingConn) Write(b []byte) (int, error) {
	if c.armed.Load() > 0 && c.armed.Add(-1) == 0 {
		c.Close()
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

// TestLostAnswers loses each answer of a creation in turn, with the KMS gone
// since: the same call later gives the one key, or Discard leaves none.
func TestLostAnswers(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	for lost := int32(1); ; lost++ {
		var armed atomic.Int32
		server := kms.NewServer(t, ca)
		server.Listener = func(l net.Listener) net.Listener { return cutting{l, &armed} }
		server.Start(t)
		p := open(t, ca, ca.Client(t, "controller"), server.Addr)
		armed.Store(lost)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { // the KMS is gone with the answer
			for armed.Load() > 0 && ctx.Err() == nil {
				<-time.After(time.Millisecond)
			}
			cancel()
		}()
		id := uuid.New()
		_, kek, err := p.NewKEK(ctx, id)
		ended := armed.Load() > 0
		cancel()
		if err == nil {
			kek.Close()
		}
		ref, kek, err := p.NewKEK(t.Context(), id)
		if err != nil {
			t.Fatalf("lost answer %d: again: %v", lost, err)
		}
		kek.Close()
		states := all(t, p)
		if len(states) != 1 || states[ref.KeyID] != kmip.StateActive {
			t.Errorf("lost answer %d: keys %v, want only %s", lost, states, ref.KeyID)
		}
		if err := p.Discard(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if states := all(t, p); len(states) != 0 {
			t.Errorf("lost answer %d: discarded, and there are %v", lost, states)
		}
		if ended { // all answers had their turn
			t.Logf("%d answers lost, one at a time", lost-1)
			return
		}
	}
}

// distant is a listener of a server that is far away: an answer takes a while, and
// comes in pieces.
type distant struct {
	net.Listener
	answers *atomic.Int32
}

func (l distant) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return distantConn{c, l.answers}, nil
}

type distantConn struct {
	net.Conn
	answers *atomic.Int32
}

func (c distantConn) Write(b []byte) (n int, err error) {
	c.answers.Add(1)
	time.Sleep(100 * time.Millisecond)
	for piece := range slices.Chunk(b, 50) {
		m, err := c.Conn.Write(piece)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// TestDistant: nothing depends on a KMS that is near, and what a power-on asks for
// comes in two answers.
func TestDistant(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	var answers atomic.Int32
	server := kms.NewServer(t, ca)
	server.Listener = func(l net.Listener) net.Listener { return distant{l, &answers} }
	server.Start(t)
	p := open(t, ca, ca.Client(t, "controller"), server.Addr)
	if err := p.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	ref, kek, err := p.NewKEK(t.Context(), uuid.New())
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	answers.Store(0)
	again, err := p.KEK(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if !kek.Equal(again) || answers.Load() > 2 {
		t.Errorf("after %d answers the key is the one that was made: %v", answers.Load(), kek.Equal(again))
	}
}

// TestUnavailable: a KMS that is away, and one that does not know us, are no
// statement about a key.
func TestUnavailable(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	server := kms.NewServer(t, ca)
	server.User, server.Password = "app", "right"
	server.Start(t)
	guess, err := keymem.Take([]byte("wrong"))
	if err != nil {
		t.Fatal(err)
	}
	defer guess.Close()
	client := ca.Client(t, "controller")
	p, err := New(Config{
		Name: "kms-1", Servers: []string{server.Addr}, Authorities: ca.Pool(), User: "app", Password: guess,
		Certificate: func() *tls.Certificate { return &client },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ref := keysafe.Ref{Provider: "kms-1", KeyID: "1"}
	for _, what := range []string{"wrong password", "away"} {
		if kek, err := p.KEK(t.Context(), ref); kek != nil || !errors.Is(err, keyprovider.ErrUnavailable) {
			t.Errorf("%s: %v, %v", what, kek, err)
		}
		if err := p.Probe(t.Context()); !errors.Is(err, keyprovider.ErrUnavailable) {
			t.Errorf("%s: probe: %v", what, err)
		}
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCloseEndsCalls: a provider can be removed while its KMS hangs.
func TestCloseEndsCalls(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") // connects, and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ca := testca.New(t)
	p, err := New(Config{Name: "kms-1", Servers: []string{l.Addr().String()}, Authorities: ca.Pool(), Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	called := make(chan error, 1)
	go func() {
		_, err := p.KEK(context.Background(), keysafe.Ref{Provider: "kms-1", KeyID: "1"})
		called <- err
	}()
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	p.Close()
	if err := <-called; !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("the call ended with %v", err)
	}
}

func TestPair(t *testing.T) {
	t.Parallel()
	key, err := NewClientKey()
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	other, err := NewClientKey()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	der, err := SelfSigned("strongroom", key, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if pair, err := Pair([][]byte{der}, key); err != nil || pair.Leaf.Subject.CommonName != "strongroom" {
		t.Errorf("pair: %v", err)
	}
	if _, err := Pair([][]byte{der}, other); err == nil {
		t.Error("a certificate goes with another key")
	}
	ca := testca.New(t)
	certText, keyText := testca.KeyPEM(t, ca.Client(t, "uploaded"))
	chain, err := ParseChain(slices.Concat(certText, ca.PEM()))
	if err != nil || len(chain) != 2 {
		t.Fatalf("%d certificates, %v", len(chain), err)
	}
	uploaded, err := ParseKey(slices.Concat(certText, keyText))
	if err != nil {
		t.Fatal(err)
	}
	defer uploaded.Close()
	if _, err := Pair(chain, uploaded); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", string(certText)} {
		if _, err := ParseKey([]byte(bad)); err == nil {
			t.Errorf("a private key in %q", bad)
		}
	}
	if _, err := ParseChain(keyText); err == nil {
		t.Error("a certificate in a private key")
	}
}

// TestOwnKeys: a key is ours by its labels, and only such a key is destroyed.
func TestOwnKeys(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	server := kms.NewServer(t, ca)
	server.Start(t)
	client := ca.Client(t, "controller")
	p := open(t, ca, client, server.Addr)
	theirs, err := New(Config{
		Name: "kms-1", Installation: "there", Servers: []string{server.Addr}, Authorities: ca.Pool(), Certificate: func() *tls.Certificate { return &client }, Timeout: 30 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	newKey := func(p *Provider, labels *Labels) string {
		t.Helper()
		ref, kek, err := p.NewKEK(t.Context(), uuid.New())
		if err != nil {
			t.Fatal(err)
		}
		kek.Close()
		if labels != nil {
			if err := p.Label(t.Context(), ref, *labels); err != nil {
				t.Fatal(err)
			}
		}
		return ref.KeyID
	}
	labels := Labels{Component: ComponentVM, Identifier: uuid.NewString(), Name: "web-1"}
	ours := newKey(p, &labels)
	if ids, err := p.Mine(t.Context()); err != nil || len(ids) != 1 || ids[0] != ours {
		t.Errorf("mine: %v, %v", ids, err)
	}
	for what, id := range map[string]string{"of another installation": newKey(theirs, &labels), "without labels": newKey(p, nil), "that is not there": uuid.NewString()} {
		if keys, err := p.Marks(t.Context(), []string{id}); err != nil || len(keys) != 0 {
			t.Errorf("a key %s is ours: %+v, %v", what, keys, err)
		}
		if err := p.Deactivate(t.Context(), id); !errors.Is(err, ErrNotOurs) {
			t.Errorf("a key %s is deactivated: %v", what, err)
		}
		if err := p.Destroy(t.Context(), id); !errors.Is(err, ErrNotOurs) {
			t.Errorf("a key %s is destroyed: %v", what, err)
		}
	}
	keys, err := p.Marks(t.Context(), []string{uuid.NewString(), ours, newKey(p, nil)})
	if err != nil || len(keys) != 1 {
		t.Fatalf("ours are %+v, %v", keys, err)
	}
	if k := keys[0]; k.ID != ours || !strings.HasPrefix(k.Name, "strongroom-") || k.Labels != labels || k.Created.IsZero() {
		t.Errorf("ours is %+v", k)
	}
	if err := p.Destroy(t.Context(), ours); err == nil {
		t.Error("a key in use is destroyed")
	}
	for range 2 { // its use has ended: no error
		if err := p.Deactivate(t.Context(), ours); err != nil {
			t.Fatal(err)
		}
	}
	if k, err := p.KEK(t.Context(), keysafe.Ref{Provider: "kms-1", KeyID: ours}); k != nil || !errors.Is(err, ErrNotActive) {
		t.Errorf("deactivated, it is given out: %v", err)
	}
	if err := p.Destroy(t.Context(), ours); err != nil {
		t.Fatal(err)
	}
	if keys, err := p.Marks(t.Context(), []string{ours}); err != nil || len(keys) != 0 {
		t.Errorf("destroyed, it is ours: %+v, %v", keys, err)
	}
}
