package guard_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/guard"
)

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// door is a server with limits, on loopback.
type door struct {
	t     *testing.T
	addr  string
	roots *x509.CertPool
	log   *lockedBuffer
}

// serve serves handler until the test ends.
func serve(t *testing.T, limits guard.Limits, handler http.Handler) *door {
	t.Helper()
	d := &door{t: t, log: &lockedBuffer{}}
	server := guard.NewServer(handler, limits, slog.New(slog.NewTextHandler(d.log, nil)))
	pair := httptest.NewUnstartedServer(nil)
	pair.StartTLS() // for its certificate
	server.HTTP.TLSConfig = &tls.Config{Certificates: pair.TLS.Certificates}
	d.roots = x509.NewCertPool()
	d.roots.AddCert(pair.Certificate())
	pair.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *door) dialer(from string) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
}

// dial opens a connection from a loopback address.
func (d *door) dial(from string) net.Conn {
	d.t.Helper()
	c, err := d.dialer(from).Dial("tcp", d.addr)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

func (d *door) dialTLS(from string) net.Conn {
	d.t.Helper()
	c := tls.Client(d.dial(from), &tls.Config{RootCAs: d.roots, ServerName: "example.com"})
	if err := c.Handshake(); err != nil {
		d.t.Fatal(err)
	}
	return c
}

// client asks from a loopback address, over HTTP/2 or 1.1.
func (d *door) client(from string, http2 bool) *http.Client {
	transport := &http.Transport{
		DialContext: d.dialer(from).DialContext, TLSClientConfig: &tls.Config{RootCAs: d.roots, ServerName: "example.com"}, Protocols: new(http.Protocols),
	}
	transport.Protocols.SetHTTP2(http2)
	transport.Protocols.SetHTTP1(!http2)
	d.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// post makes a call, and returns its status and answer.
func (d *door) post(c *http.Client, body io.Reader) (*http.Response, string) {
	d.t.Helper()
	req, err := http.NewRequestWithContext(d.t.Context(), http.MethodPost, "https://"+d.addr+strongroomv1connect.SessionServiceLoginProcedure, body)
	if err != nil {
		d.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.Do(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return res, string(text)
}

func (d *door) mustAnswer(from string) {
	d.t.Helper()
	res, text := d.post(d.client(from, true), strings.NewReader("{}"))
	if res.StatusCode != http.StatusOK || text != "2" {
		d.t.Errorf("from %s: %s, %q", from, res.Status, text)
	}
	if kept := res.Header.Get("Cache-Control"); kept != "no-store" {
		d.t.Errorf("from %s: an answer may be kept: %q", from, kept)
	}
}

// echo answers with the length of the body.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprint(w, len(b))
})

// wantClosed waits until the server closes a connection.
func wantClosed(t *testing.T, what string, c net.Conn) string {
	t.Helper()
	text, err := io.ReadAll(c)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Errorf("%s: the connection stays open", what)
	}
	return string(text)
}

// TestSlowClients: who connects and says nothing, or says it slowly, is closed
// soon, and nobody is alarmed.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	short := 2 * time.Second
	d := serve(t, guard.Limits{Header: short, Request: short, Idle: short}, echo)
	slow := map[string]net.Conn{"no handshake": d.dial("127.0.0.1"), "no request": d.dialTLS("127.0.0.1")}
	half := d.dial("127.0.0.1")
	half.Write([]byte{22, 3, 1, 2, 0, 1}) // of a handshake
	slow["half a handshake"] = half
	for what, text := range map[string]string{
		"half a header": "POST / HTTP/1.1\r\nHost: x\r\nX-Slow: ",
		"half a body":   "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345",
		"half a chunk":  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n123",
		"idle":          "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
	} {
		c := d.dialTLS("127.0.0.1")
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		slow[what] = c
	}
	d.dial("127.0.0.1").Close() // somebody looks whether the port is open
	for what, c := range slow {
		answer := wantClosed(t, what, c)
		if strings.HasSuffix(what, "body") && !strings.Contains(answer, " 400 ") {
			t.Errorf("%s was answered with %q", what, answer)
		}
	}
	d.mustAnswer("127.0.0.1")
	if log := d.log.String(); log != "" {
		t.Errorf("the log says:\n%s", log)
	}
}

// TestUnreadBody: a handler that reads no body does not have the server wait for it.
func TestUnreadBody(t *testing.T) {
	t.Parallel()
	d := serve(t, guard.Limits{Request: 500 * time.Millisecond}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "no") }))
	c := d.dialTLS("127.0.0.1")
	if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n1"); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, "a body that nobody reads", c)
}

// TestLongAnswers take their time, over both protocols: the deadlines are for
// clients.
func TestLongAnswers(t *testing.T) {
	t.Parallel()
	wait := 2 * time.Second
	d := serve(t, guard.Limits{Request: wait, Idle: wait}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		for range 2 {
			io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			select {
			case <-time.After(wait + wait/4):
			case <-r.Context().Done():
				return
			}
		}
		io.WriteString(w, "x")
	}))
	for _, http2 := range []bool{true, false} {
		t.Run(fmt.Sprint("http2=", http2), func(t *testing.T) {
			t.Parallel()
			c := d.client("127.0.0.1", http2)
			for range 2 { // on the same connection
				if res, text := d.post(c, strings.NewReader("{}")); text != "xxx" || (res.ProtoMajor == 2) != http2 {
					t.Errorf("%s: %q", res.Proto, text)
				}
			}
		})
	}
}

// TestManyConnections of one address stop no other, nor do so many of all that it
// has none left: some time later there are slots again.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	d := serve(t, guard.Limits{Connections: 40, PerAddress: 30, Header: 2 * time.Second}, echo)
	var open []net.Conn
	for range 2000 {
		c, err := d.dialer("127.0.0.2").Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	d.mustAnswer("127.0.0.3")
	for _, c := range open {
		c.Close()
	}
	// From all addresses: those in time are served when the slow ones are closed.
	for i := range 60 {
		d.dial(fmt.Sprintf("127.0.1.%d", i+1))
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+d.addr, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		if res, err := d.client("127.0.0.3", true).Do(req); err == nil {
			res.Body.Close()
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if n := strings.Count(d.log.String(), "too many are open"); n < 1 || n > 100 {
		t.Errorf("%d lines in the log", n)
	}
}

// TestFlood: who asks too often is told so, in his protocol; another is served
// meanwhile, and so is who shows a certificate.
func TestFlood(t *testing.T) {
	t.Parallel()
	d := serve(t, guard.Limits{RequestsPerSecond: 1}, echo)
	flooder := d.client("127.0.0.2", true)
	began, refused := time.Now(), 0
	for i := range 100 {
		res, text := d.post(flooder, strings.NewReader("{}"))
		if res.StatusCode == http.StatusTooManyRequests {
			refused++
			if res.Header.Get("Retry-After") == "" || !strings.Contains(text, `"code":"resource_exhausted"`) {
				t.Fatalf("refused with %q", text)
			}
		}
		if i == 50 {
			d.mustAnswer("127.0.0.3")
		}
	}
	// Two at once, and then one in a second.
	if took := time.Since(began); float64(100-refused) > 2+took.Seconds() {
		t.Errorf("of 100 requests in %v %d were refused", took, refused)
	}
	handler := guard.NewServer(echo, guard.Limits{RequestsPerSecond: 1}, slog.New(slog.DiscardHandler)).HTTP.Handler
	for range 100 {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("{}"))
		r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{}}}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			t.Fatalf("a member is refused: %d", w.Code)
		}
	}
}

// TestLargeRequests: headers and bodies are bounded, and so is how many bodies a
// client can have received at once.
func TestLargeRequests(t *testing.T) {
	t.Parallel()
	// The bodies that do not come are waited for as long as the test may take.
	d := serve(t, guard.Limits{PerAddress: 100, RequestsPerSecond: 1000, Request: 10 * time.Minute}, echo)
	for _, http2 := range []bool{true, false} {
		c := d.client("127.0.0.1", http2)
		if res, _ := d.post(c, bytes.NewReader(make([]byte, 1<<20))); res.StatusCode != http.StatusOK {
			t.Errorf("the largest body: %s", res.Status)
		}
		if res, _ := d.post(c, bytes.NewReader(make([]byte, 1<<20+1))); res.StatusCode != http.StatusBadRequest {
			t.Errorf("one too large: %s", res.Status)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+d.addr, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Large", strings.Repeat("x", 100<<10))
		if res, err := c.Do(req); err == nil {
			if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("a large header: %s", res.Status)
			}
			res.Body.Close()
		}
	}
	// Bodies that do not come.
	for range 64 {
		c := d.dialTLS("127.0.0.2")
		if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	late := d.client("127.0.0.2", true)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		res, _ := d.post(late, strings.NewReader("{}"))
		if res.StatusCode == http.StatusTooManyRequests {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("65 bodies are received at once")
		}
	}
	d.mustAnswer("127.0.0.3")
}
