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
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
	"go.uber.org/goleak"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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
		Provider: "kp-1", Servers: servers, Retry: time.Nanosecond, Connect: time.Minute, Handshake: time.Minute, Request: time.Minute,
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
	c := newClient(t, ca, nil, l.Addr().String())
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
