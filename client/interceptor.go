package client

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	"strongroom/internal/errs"
)

// interceptor adds the token to every call and turns its errors into
// [errs.Error].
type interceptor struct {
	server string
	token  string
}

func (i *interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		i.authorize(req.Header())
		res, err := next(ctx, req)
		if err != nil {
			return nil, i.explain(err)
		}
		return res, nil
	}
}

func (i *interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		i.authorize(conn.RequestHeader())
		return &streamConn{StreamingClientConn: conn, explain: i.explain}
	}
}

func (*interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func (i *interceptor) authorize(h http.Header) {
	if i.token != "" {
		h.Set("Authorization", "Bearer "+i.token)
	}
}

// explain tells what the server said from what became of the connection to it.
func (i *interceptor) explain(err error) error {
	if connect.IsWireError(err) || err == nil {
		return apierr.From(err)
	}
	var untrusted *tls.CertificateVerificationError
	var known *errs.Error
	var ce *connect.Error
	switch {
	case errors.As(err, &known): // from this package, through the transport
		return known
	case errors.As(err, &untrusted):
		return errs.New(errs.Denied, "cannot trust %s: %w", i.server, untrusted.Err).
			WithHint("if the server has a new certificate authority: strongroom login --server %s --ca FILE", i.server)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return apierr.From(err)
	case errors.As(err, &ce) && ce.Code() == connect.CodeUnavailable:
		return errs.New(errs.Unavailable, "cannot reach %s: %s", i.server, ce.Message()).
			WithHint("see that it runs there; another one is named by --server")
	case errors.As(err, &ce) && ce.Code() == connect.CodeUnimplemented:
		return errs.New(errs.Invalid, "%s does not do this: it has another role, or is older than this program", i.server).
			WithHint("name the right one by --server: a controller, the socket of a host, or a key management server (kms.sock in its data folder)")
	}
	return apierr.From(err)
}

// streamConn is a stream whose errors are explained.
type streamConn struct {
	connect.StreamingClientConn
	explain func(error) error
}

func (c *streamConn) Send(m any) error     { return c.end(c.StreamingClientConn.Send(m)) }
func (c *streamConn) Receive(m any) error  { return c.end(c.StreamingClientConn.Receive(m)) }
func (c *streamConn) CloseRequest() error  { return c.end(c.StreamingClientConn.CloseRequest()) }
func (c *streamConn) CloseResponse() error { return c.end(c.StreamingClientConn.CloseResponse()) }

// end explains an error, other than the end of the stream, which Connect marks
// by one that wraps io.EOF.
func (c *streamConn) end(err error) error {
	if errors.Is(err, io.EOF) {
		return err
	}
	return c.explain(err)
}
