package guard

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	"strongroom/internal/admission"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
)

// Limits bounds what clients of an API on the network can take of it. A zero field
// means its default.
type Limits struct {
	Connections       int           // open at once, 512; one more is closed unanswered
	PerAddress        int           // of these from one network address, 64
	RequestsPerSecond int           // from one network address, 100, and twice as many at once
	Header            time.Duration // for the TLS handshake, and for a request's header, 10 s
	Request           time.Duration // for a request's body, and for sending a piece of the answer, 30 s
	Idle              time.Duration // between two requests of a connection, 2 min
}

const (
	// receiving bounds the requests whose bodies are being received, and by that
	// what strangers can have a server hold in memory.
	receiving = 256
	// bodyMax bounds a body, in bytes, of clients that show no certificate.
	bodyMax = 1 << 20
	// streamsMax bounds the requests at once of a connection.
	streamsMax = 64
	// retryAfter is told to clients that ask too often, in seconds.
	retryAfter = "1"
)

func (l Limits) withDefaults() Limits {
	orElse := func(n *int, d int) {
		if *n == 0 {
			*n = d
		}
	}
	orWait := func(n *time.Duration, d time.Duration) {
		if *n == 0 {
			*n = d
		}
	}
	orElse(&l.Connections, 512)
	orElse(&l.PerAddress, 64)
	orElse(&l.RequestsPerSecond, 100)
	orWait(&l.Header, daemon.HeaderTimeout)
	orWait(&l.Request, 30*time.Second)
	orWait(&l.Idle, 2*time.Minute)
	return l
}

// Server is an API on the network whose clients it holds to [Limits]. Make it with
// [NewServer]; set TLSConfig of HTTP before it serves.
type Server struct {
	HTTP   *http.Server
	limits Limits
	log    *slog.Logger
}

// NewServer returns a server of next, which knows the connection by which a call
// came. Clients that show a certificate which its TLS configuration verifies may
// ask as often, and send bodies as large, as next allows.
func NewServer(next http.Handler, limits Limits, log *slog.Logger) *Server {
	limits = limits.withDefaults()
	d := &door{
		next: WithConnection(next), limits: limits, rates: admission.NewRates(limits.RequestsPerSecond),
		bodies: admission.NewSlots(receiving, receiving/4), refuse: connect.NewErrorWriter(),
	}
	return &Server{limits: limits, log: log, HTTP: &http.Server{
		Handler: d, ReadHeaderTimeout: limits.Header, IdleTimeout: limits.Idle, MaxHeaderBytes: daemon.HeaderMax,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: streamsMax, WriteByteTimeout: limits.Request}, ErrorLog: slog.NewLogLogger(quietly{log.Handler()}, slog.LevelWarn),
	}}
}

// Serve serves on l until ctx ends, as [daemon.Serve] does.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return daemon.Serve(ctx, s.HTTP, admission.Listen(l, admission.NewSlots(s.limits.Connections, s.limits.PerAddress), s.log))
}

// quietly has handshakes that fail told at debug level: whoever looks whether a
// port is open makes one.
type quietly struct{ slog.Handler }

// Handle implements [slog.Handler].
func (q quietly) Handle(ctx context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "http: TLS handshake error") {
		r.Level = slog.LevelDebug
		if !q.Enabled(ctx, r.Level) {
			return nil
		}
	}
	return q.Handler.Handle(ctx, r)
}

// door lets requests in.
type door struct {
	next   http.Handler
	limits Limits
	rates  *admission.Rates
	bodies *admission.Slots
	refuse *connect.ErrorWriter
}

// ServeHTTP implements [http.Handler].
func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store") // tokens, API keys and names are for who asks
	now := time.Now()
	leave := func() {}
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		var ok bool
		if !d.rates.Allow(r.RemoteAddr, now) {
			d.tooMany(w, r, "too many requests in a short time")
			return
		}
		if leave, ok = d.bodies.Enter(r.RemoteAddr); !ok {
			d.tooMany(w, r, "too many requests at once")
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, bodyMax)
	}
	control := http.NewResponseController(w)
	out := &answer{ResponseWriter: w, control: control, wait: d.limits.Request}
	out.whenever()     // of a connection that was used before
	defer out.within() // for what is still to be sent
	_ = control.SetReadDeadline(now.Add(d.limits.Request))
	b := &body{ReadCloser: r.Body, control: control, leave: leave}
	defer b.end()
	r.Body = b
	d.next.ServeHTTP(out, r)
}

// tooMany refuses a request in the protocol that it came in.
func (d *door) tooMany(w http.ResponseWriter, r *http.Request, text string) {
	w.Header().Set("Retry-After", retryAfter)
	if !d.refuse.IsSupported(r) {
		http.Error(w, text, http.StatusTooManyRequests)
		return
	}
	_ = d.refuse.Write(w, r, apierr.To(errs.New(errs.Unavailable, "%s; try again later", text).WithReason(apierr.ReasonThrottled)))
}

// body is a request's, to be received in time.
type body struct {
	io.ReadCloser
	control *http.ResponseController
	leave   func()
	done    bool
}

// Read implements [io.Reader]. With the end of the body the wait for it ends: what
// follows, an answer that takes long or a stream, may take its time.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) && !b.done {
		b.end()
		_ = b.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// end gives back the slot. The deadline stays: the server reads what is left of a
// body that was not read.
func (b *body) end() {
	if !b.done {
		b.done = true
		b.leave()
	}
}

// answer is a response each piece of which is to be taken in time.
type answer struct {
	http.ResponseWriter
	control *http.ResponseController
	wait    time.Duration
}

// Write implements [io.Writer].
func (a *answer) Write(p []byte) (int, error) {
	a.within()
	defer a.whenever()
	return a.ResponseWriter.Write(p)
}

// Flush implements [http.Flusher].
func (a *answer) Flush() {
	a.within()
	defer a.whenever()
	_ = a.control.Flush()
}

func (a *answer) within() { _ = a.control.SetWriteDeadline(time.Now().Add(a.wait)) }

// whenever takes the deadline back: over HTTP/2 it would end a stream that waits for
// something to tell.
func (a *answer) whenever() { _ = a.control.SetWriteDeadline(time.Time{}) }

// Unwrap is for [http.ResponseController].
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }
