package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/client"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers as little as these tests need.
type server struct {
	strongroomv1connect.UnimplementedVMServiceHandler
	strongroomv1connect.UnimplementedTaskServiceHandler
	err     error
	watches atomic.Int32 // streams that WatchTask has begun
}

func (s *server) ListVMs(_ context.Context, req *connect.Request[strongroomv1.ListVMsRequest]) (*connect.Response[strongroomv1.ListVMsResponse], error) {
	if s.err != nil {
		return nil, apierr.To(s.err)
	}
	name := "as " + req.Header().Get("Authorization")
	return connect.NewResponse(&strongroomv1.ListVMsResponse{Vms: []*strongroomv1.VM{{Name: name}}}), nil
}

// WatchTask breaks the first stream, as a controller that restarts does.
func (s *server) WatchTask(_ context.Context, req *connect.Request[strongroomv1.WatchTaskRequest], stream *connect.ServerStream[strongroomv1.Task]) error {
	switch req.Msg.GetId() {
	case "restart":
		if s.watches.Add(1) == 1 {
			if err := stream.Send(&strongroomv1.Task{Id: "restart", State: "running", Done: 1}); err != nil {
				return err
			}
			return apierr.To(errs.New(errs.Unavailable, "shutting down"))
		}
		return stream.Send(&strongroomv1.Task{Id: "restart", State: "success", Done: 2})
	case "fails":
		return stream.Send(&strongroomv1.Task{
			Id: "fails", State: "error", Error: "cannot encrypt VM web-1: disk is full",
			ErrorDetail: &strongroomv1.ErrorDetail{Kind: "NoSpace", Hint: "make room"},
		})
	case "canceled":
		return stream.Send(&strongroomv1.Task{Id: "canceled", State: "canceled"})
	}
	return apierr.To(errs.New(errs.NotFound, "no task %q", req.Msg.GetId()))
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewVMServiceHandler(s))
	mux.Handle(strongroomv1connect.NewTaskServiceHandler(s))
	return mux
}

// authority is a CA as the controller has one.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// serve starts an HTTPS server with a certificate for a role.
func (a *authority) serve(t *testing.T, h http.Handler, role string, presentCA bool) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		URIs:        []*url.URL{{Scheme: "strongroom", Host: "c1", Path: "/" + role + "/n1"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	chain := [][]byte{der}
	if presentCA {
		chain = append(chain, a.cert.Raw)
	}
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that fail on purpose
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: key}}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func connectTo(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func listVMs(t *testing.T, c *client.Client) (*strongroomv1.ListVMsResponse, error) {
	t.Helper()
	return client.Call(t.Context(), c.VM().ListVMs, &strongroomv1.ListVMsRequest{})
}

func TestHTTPS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	var version atomic.Int32
	h := (&server{}).handler()
	srv := ca.serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		version.Store(int32(r.ProtoMajor))
		h.ServeHTTP(w, r)
	}), "controller", true)
	res, err := listVMs(t, connectTo(t, client.Config{Server: srv, CA: ca.pem(), Token: "tok"}))
	if err != nil {
		t.Fatal(err)
	}
	if got := res.GetVms()[0].GetName(); got != "as Bearer tok" {
		t.Errorf("the server saw %q", got)
	}
	if v := version.Load(); v != 2 {
		t.Errorf("HTTP/%d was used", v)
	}
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: (&server{}).handler()}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	c := connectTo(t, client.Config{Server: "unix:" + path})
	if _, err := listVMs(t, c); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WaitTask(t.Context(), "restart", nil); err != nil {
		t.Errorf("wait over a unix socket: %v", err)
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	broken := &server{err: errs.New(errs.Locked, "cannot power on: no key").WithHint("import it").WithReason("KeyStateMissingInCache")}
	for _, tt := range []struct {
		name string
		cfg  client.Config
		kind errs.Kind
		text string
	}{
		{"from the server", client.Config{Server: ca.serve(t, broken.handler(), "controller", true), CA: ca.pem()}, errs.Locked, "cannot power on: no key"},
		{"other authority", client.Config{Server: ca.serve(t, broken.handler(), "controller", true), CA: other.pem()}, errs.Denied, "cannot trust https://"},
		{"a host poses as controller", client.Config{Server: ca.serve(t, broken.handler(), "host", true), CA: ca.pem()}, errs.Denied, "not a controller"},
		{"nobody listens", client.Config{Server: "https://127.0.0.1:1", CA: ca.pem()}, errs.Unavailable, "cannot reach https://127.0.0.1:1: "},
		{"no socket", client.Config{Server: "unix:/nonexistent/s"}, errs.Unavailable, "cannot reach unix:/nonexistent/s: "},
		{"unknown method", client.Config{Server: ca.serve(t, http.NotFoundHandler(), "controller", true), CA: ca.pem()}, errs.Invalid, "does not do this: it has another role"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := listVMs(t, connectTo(t, tt.cfg))
			if errs.KindOf(err) != tt.kind || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v (%v), want %v with %q", err, errs.KindOf(err), tt.kind, tt.text)
			}
		})
	}
}

func TestBadConfig(t *testing.T) {
	t.Parallel()
	for _, server := range []string{"", "http://h:1", "https://h", "https://:1", "https://h:1/path", "https://u@h:1", "unix:relative", "h:1"} {
		if c, err := client.New(client.Config{Server: server, CA: newAuthority(t).pem()}); err == nil || errs.KindOf(err) != errs.Invalid || c != nil {
			t.Errorf("%q: %v", server, err)
		}
	}
	if _, err := client.New(client.Config{Server: "https://h:1"}); errs.KindOf(err) != errs.Denied {
		t.Errorf("without a CA: %v", err)
	}
}

func TestFetchCA(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	got, pem, err := client.FetchCA(t.Context(), ca.serve(t, http.NotFoundHandler(), "controller", true))
	if err != nil {
		t.Fatal(err)
	}
	if !got.Equal(ca.cert) || string(pem) != string(ca.pem()) {
		t.Error("another certificate was fetched")
	}
	fp := client.Fingerprint(got)
	if parsed, err := client.ParseFingerprint(strings.ToUpper(fp)); err != nil || parsed != fp {
		t.Errorf("%s parsed as %q, %v", fp, parsed, err)
	}
	for name, server := range map[string]string{
		"no CA presented": ca.serve(t, http.NotFoundHandler(), "controller", false),
		"a host":          ca.serve(t, http.NotFoundHandler(), "host", true),
	} {
		if _, _, err := client.FetchCA(t.Context(), server); errs.KindOf(err) != errs.Denied {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []string{"", "sha256:", "sha256:00", "md5:" + strings.Repeat("0", 64), strings.Repeat("0", 64)} {
		if got, err := client.ParseFingerprint(bad); err == nil || got != "" {
			t.Errorf("fingerprint %q was accepted", bad)
		}
	}
}

func TestWaitTask(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	c := connectTo(t, client.Config{Server: ca.serve(t, (&server{}).handler(), "controller", true), CA: ca.pem()})

	var seen []int64
	task, err := c.WaitTask(t.Context(), "restart", func(t *strongroomv1.Task) { seen = append(seen, t.GetDone()) })
	if err != nil || task.GetState() != "success" || len(seen) != 2 || seen[0] != 1 || seen[1] != 2 {
		t.Errorf("over a restart: %v, %v, seen %v", task, err, seen)
	}
	_, err = c.WaitTask(t.Context(), "fails", nil)
	if errs.KindOf(err) != errs.NoSpace || errs.HintOf(err) != "make room" || err.Error() != "cannot encrypt VM web-1: disk is full" {
		t.Errorf("failed task: %#v", err)
	}
	if _, err = c.WaitTask(t.Context(), "canceled", nil); errs.KindOf(err) != errs.Canceled {
		t.Errorf("cancelled task: %v", err)
	}
	if _, err = c.WaitTask(t.Context(), "nope", nil); errs.KindOf(err) != errs.NotFound {
		t.Errorf("unknown task: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, err = c.WaitTask(ctx, "restart", nil); errs.KindOf(err) != errs.Canceled {
		t.Errorf("cancelled wait: %v", err)
	}
}
