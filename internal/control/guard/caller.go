package guard

import (
	"context"
	"crypto/tls"
	"net/http"

	"strongroom/internal/control/access"
)

// Caller is who made a call. The zero Caller is nobody: what it did nobody asked
// for, and it may do nothing.
type Caller struct {
	Principal access.Principal
	// Host is the id of the host that called, if one did.
	Host string
	// Title is what the caller is called instead of its principal, if not empty.
	Title   string
	unknown bool // somebody who has not proved who he is
}

// Name is how the caller is called in events and the audit log; "" for nobody.
func (c Caller) Name() string {
	switch {
	case c.unknown:
		return Anonymous
	case c.Title != "":
		return c.Title
	case c.Principal == (access.Principal{}):
		return ""
	}
	return c.Principal.String()
}

// Anonymous is the name of callers who have not proved who they are.
const Anonymous = "anonymous"

type callerKey struct{}

// CallerOf returns who made the call that ctx is of.
func CallerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// connection is what there is to know of a client's connection.
type connection struct {
	tls     *tls.ConnectionState
	address string
}

type connectionKey struct{}

// WithConnection lets handlers below next, and the guard in front of them, know
// of the connection by which a call came.
func WithConnection(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), connectionKey{}, connection{r.TLS, r.RemoteAddr})))
	})
}

// AddressOf returns where a call comes from; "" if that is not known.
func AddressOf(ctx context.Context) string {
	c, _ := ctx.Value(connectionKey{}).(connection)
	return c.address
}

// VerifiedTLS returns the state of a call's connection if its client showed a
// certificate that was verified, or nil.
func VerifiedTLS(ctx context.Context) *tls.ConnectionState {
	c, _ := ctx.Value(connectionKey{}).(connection)
	if c.tls == nil || len(c.tls.VerifiedChains) == 0 {
		return nil
	}
	return c.tls
}
