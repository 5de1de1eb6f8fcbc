package controller

import (
	"context"
	"crypto/tls"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	"strongroom/api/rule"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// caller is who made a call.
type caller struct {
	principal access.Principal
	host      string // id of the host, if one called
	unknown   bool   // somebody who has not proved who he is
}

// name is how the caller is called in events and the audit log. What nobody
// asked for, the controller did itself.
func (c caller) name() string {
	if c.unknown {
		return "anonymous"
	}
	if c.principal == (access.Principal{}) {
		return access.Principal{Kind: access.InternalPrincipal, Name: controllerName}.String()
	}
	return c.principal.String()
}

type callerKey struct{}

// callerOf returns who made the call; the zero caller may do nothing.
func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// connection is what the interceptor needs to know of a client's connection.
type connection struct {
	tls     *tls.ConnectionState
	address string
}

type connectionKey struct{}

func withConnection(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), connectionKey{}, connection{r.TLS, r.RemoteAddr})))
	})
}

// addressOf returns where a call comes from, for events.
func addressOf(ctx context.Context) string {
	c, _ := ctx.Value(connectionKey{}).(connection)
	return c.address
}

// guard is the interceptor that lets a call through only as its method's rule
// says, audits what changes anything, and gives errors their form on the wire.
type guard struct {
	c     *Controller
	rules rule.Rules
}

func (g *guard) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		object := objectOf(req.Spec().Procedure, req.Any())
		ctx, err := g.admit(ctx, req.Spec().Procedure, req.Header(), object)
		var res connect.AnyResponse
		if err == nil {
			res, err = next(ctx, req)
		}
		if auditErr := g.record(ctx, req.Spec().Procedure, object, err); err == nil {
			err = auditErr
		}
		if err != nil {
			return nil, apierr.To(err)
		}
		return res, nil
	}
}

func (g *guard) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		ctx, err := g.admit(ctx, conn.Spec().Procedure, conn.RequestHeader(), access.Root)
		if err == nil {
			err = next(ctx, conn)
		}
		// A stream that was watched to its end or broken off is not on record,
		// but one that was denied is.
		if auditErr := g.record(ctx, conn.Spec().Procedure, access.Root, err); err == nil {
			err = auditErr
		}
		if err != nil {
			return apierr.To(err)
		}
		return nil
	}
}

func (g *guard) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// admit finds out who calls and whether they may.
func (g *guard) admit(ctx context.Context, procedure string, header http.Header, object access.Object) (context.Context, error) {
	ctx = context.WithValue(ctx, callerKey{}, caller{unknown: true})
	r, ok := g.rules[procedure]
	if !ok {
		return ctx, errs.New(errs.Denied, "nobody may call %s", procedure)
	}
	if r.Unauthenticated {
		return ctx, nil
	}
	who, err := g.identify(ctx, header)
	if err != nil {
		return ctx, err
	}
	ctx = context.WithValue(ctx, callerKey{}, who)
	switch {
	case r.PeerRole != "":
		if who.host == "" || r.PeerRole != string(pki.Host) {
			return ctx, errs.New(errs.Denied, "only a %s may do this", r.PeerRole)
		}
		return ctx, nil
	case who.host != "":
		return ctx, errs.New(errs.Denied, "hosts may not do this")
	case r.Authenticated:
		return ctx, nil
	}
	return ctx, g.c.access.Check(ctx, who.principal, access.Privilege(r.Privilege), object)
}

// identify tells the caller by its token, or else by its certificate.
func (g *guard) identify(ctx context.Context, header http.Header) (caller, error) {
	if token, ok := strings.CutPrefix(header.Get("Authorization"), "Bearer "); ok {
		p, err := g.c.access.Authenticate(ctx, token)
		if err != nil {
			return caller{}, errs.Wrap(err, "cannot log in by token")
		}
		return caller{principal: p}, nil
	}
	conn, _ := ctx.Value(connectionKey{}).(connection)
	if conn.tls == nil || len(conn.tls.VerifiedChains) == 0 {
		return caller{}, errs.New(errs.Denied, "not logged in").WithReason(apierr.ReasonUnauthenticated).WithHint("strongroom login --server https://HOST:PORT --ca FILE")
	}
	id, err := pki.PeerIdentity(*conn.tls)
	if err != nil {
		return caller{}, errs.New(errs.Denied, "cannot tell who the certificate is for: %w", err)
	}
	switch id.Role {
	case pki.Host:
		h, err := g.c.inv.HostByID(ctx, id.Name)
		if err != nil || h.ClusterID != id.Cluster {
			return caller{}, errs.New(errs.Denied, "host %s is not in the inventory", id.Name).WithHint("strongroom host join")
		}
		return caller{host: h.ID, principal: access.Principal{Kind: access.CertificatePrincipal, Name: h.Name}}, nil
	case pki.Client:
		return caller{principal: access.Principal{Kind: access.CertificatePrincipal, Name: id.Name}}, nil
	}
	return caller{}, errs.New(errs.Denied, "%s may not use the API", id)
}

// objectOf returns what a request is about, for permissions and the audit log:
// the root unless it names one object.
func objectOf(procedure string, message any) access.Object {
	var name string
	switch m := message.(type) {
	case interface{ GetName() string }:
		name = m.GetName()
	case interface{ GetUser() string }:
		name = m.GetUser()
	}
	if name == "" || len(name) > inventory.MaxName || strings.ContainsAny(name, "/\x00") {
		return access.Root
	}
	for service, folder := range map[string]string{
		"VMService": "/vm/", "ProviderService": "/provider/", "DatastoreService": "/datastore/", "ClusterService": "/cluster/",
		"HostService": "/host/", "EnrollService": "/host/", "AccessService": "/user/", "SessionService": "/user/",
	} {
		if strings.Contains(procedure, "."+service+"/") {
			return access.Object(folder + name)
		}
	}
	return access.Root
}

func vmObject(name string) access.Object { return access.Object("/vm/" + name) }

// record audits a call that changes something, and every one that was denied.
// Reading and heartbeats are not audited. A call whose record cannot be written
// fails: what is not audited must not happen unseen.
func (g *guard) record(ctx context.Context, procedure string, object access.Object, callErr error) error {
	r := g.rules[procedure]
	reads := r.Privilege == "System.Read" || r.Privilege == "Cryptographer.ReadKeyServersInfo" || r.PeerRole != "" || strings.HasSuffix(procedure, "/WhoAmI")
	denied := errs.KindOf(callErr) == errs.Denied
	if reads && !denied {
		return nil
	}
	entry := audit.Entry{
		Actor: callerOf(ctx).name(), Action: strings.TrimPrefix(procedure, "/strongroom.v1."), Object: string(object), Outcome: audit.Success,
	}
	switch {
	case denied:
		entry.Outcome = audit.Denied
	case callErr != nil:
		entry.Outcome, entry.Details = audit.Failed, map[string]string{"kind": errs.KindOf(callErr).String()}
	}
	if callerOf(ctx).unknown {
		if entry.Details == nil {
			entry.Details = map[string]string{}
		}
		entry.Details["address"] = addressOf(ctx)
	}
	_, err := g.c.audit.Append(entry)
	return errs.Wrap(err, "cannot write the audit log")
}
