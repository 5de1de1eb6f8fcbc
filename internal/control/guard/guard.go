// Package guard is the way into a role's API: an interceptor that finds out who
// calls, lets a call through only as its method's rule says and puts it on
// record, and the two services by which users come in and are managed.
//
// Invariants: a method without a rule is called by nobody; a call that is not
// unauthenticated by its rule reaches no handler before its caller is known; what
// changes something, and what was denied, is on record before it is answered,
// and a call whose record cannot be written fails.
//
// All types are safe for concurrent use.
package guard

import (
	"context"
	"maps"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	"strongroom/api/rule"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// Config is what a [Guard] needs of its role. All must be set.
type Config struct {
	Rules  rule.Rules
	Access *access.Control
	// Identify returns who calls. [ByToken] is for callers with a token.
	Identify func(ctx context.Context, header http.Header) (Caller, error)
	// Subject returns what a request is about. A stream has no message.
	Subject func(ctx context.Context, procedure string, message any) Subject
	// Record puts a call on record. An error fails the call.
	Record func(audit.Entry) error
	// Self is what the role itself is called on record.
	Self string
}

// Subject is what a request is about.
type Subject struct {
	// On is the object on which the privilege is needed; [Anywhere] if it is needed
	// on any: then the handler answers with what [Users.May] shows.
	On access.Object
	// Name is how it is called on record and to a caller who is refused. A caller may
	// know it: it tells nothing that was not in the request.
	Name string
	// Details are for the record.
	Details map[string]string
}

// Anywhere stands for whatever object the caller has the privilege on.
const Anywhere access.Object = ""

// Guard is a [connect.Interceptor].
type Guard struct{ cfg Config }

// New returns a guard.
func New(cfg Config) *Guard { return &Guard{cfg} }

// WrapUnary implements [connect.Interceptor].
func (g *Guard) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		on := g.cfg.Subject(ctx, req.Spec().Procedure, req.Any())
		ctx, err := g.admit(ctx, req.Spec().Procedure, req.Header(), on)
		var res connect.AnyResponse
		if err == nil {
			res, err = next(ctx, req)
		}
		if recordErr := g.record(ctx, req.Spec().Procedure, on, err); err == nil {
			err = recordErr
		}
		if err != nil {
			return nil, apierr.To(err)
		}
		return res, nil
	}
}

// WrapStreamingHandler implements [connect.Interceptor]. A stream is about
// everything.
func (g *Guard) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		on := g.cfg.Subject(ctx, conn.Spec().Procedure, nil)
		on.On = access.Root
		ctx, err := g.admit(ctx, conn.Spec().Procedure, conn.RequestHeader(), on)
		if err == nil {
			err = next(ctx, conn)
		}
		// A stream that was watched to its end or broken off is not on record,
		// but one that was denied is.
		if recordErr := g.record(ctx, conn.Spec().Procedure, on, err); err == nil {
			err = recordErr
		}
		if err != nil {
			return apierr.To(err)
		}
		return nil
	}
}

// WrapStreamingClient implements [connect.Interceptor].
func (g *Guard) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// admit finds out who calls and whether they may.
func (g *Guard) admit(ctx context.Context, procedure string, header http.Header, on Subject) (context.Context, error) {
	ctx = context.WithValue(ctx, callerKey{}, Caller{unknown: true})
	r, ok := g.cfg.Rules[procedure]
	if !ok {
		return ctx, errs.New(errs.Denied, "nobody may call %s", procedure)
	}
	if r.Application {
		return ctx, errs.New(errs.Denied, "only applications of a key management server may do this")
	}
	if r.Unauthenticated {
		return ctx, nil
	}
	who, err := g.cfg.Identify(ctx, header)
	if err != nil {
		return ctx, err
	}
	ctx = context.WithValue(ctx, callerKey{}, who)
	switch {
	case r.PeerRole != "":
		if who.Host == "" || r.PeerRole != string(pki.Host) {
			return ctx, errs.New(errs.Denied, "only a %s may do this", r.PeerRole)
		}
		return ctx, nil
	case who.Host != "":
		return ctx, errs.New(errs.Denied, "hosts may not do this")
	case r.Authenticated:
		return ctx, nil
	}
	scope, err := g.cfg.Access.Where(ctx, who.Principal, access.Privilege(r.Privilege))
	if err != nil {
		return ctx, err
	}
	if on.On == Anywhere && !scope.Nowhere() || on.On != Anywhere && scope.Has(on.On) {
		return ctx, nil
	}
	return ctx, errs.New(errs.Denied, "%s lacks the privilege %s on %s", who.Name(), r.Privilege, on.Name).WithReason("NoPermission")
}

// ByToken returns who has the token in header; false if there is none.
func ByToken(ctx context.Context, a *access.Control, header http.Header) (Caller, bool, error) {
	token, ok := strings.CutPrefix(header.Get("Authorization"), "Bearer ")
	if !ok {
		return Caller{}, false, nil
	}
	p, err := a.Authenticate(ctx, token)
	if err != nil {
		return Caller{}, true, errs.Wrap(err, "cannot log in by token")
	}
	return Caller{Principal: p}, true, nil
}

// NotLoggedIn is the error for callers who show nothing by which to know them.
func NotLoggedIn() error {
	return errs.New(errs.Denied, "not logged in").WithReason(apierr.ReasonUnauthenticated).WithHint("strongroom login --server https://HOST:PORT --ca FILE")
}

// record puts a call on record that changes something, and every one that was
// denied. Reading and heartbeats are not on record.
func (g *Guard) record(ctx context.Context, procedure string, on Subject, callErr error) error {
	r := g.cfg.Rules[procedure]
	reads := r.Privilege == "System.Read" || r.Privilege == "Cryptographer.ReadKeyServersInfo" || r.PeerRole != "" || strings.HasSuffix(procedure, "/WhoAmI")
	denied := errs.KindOf(callErr) == errs.Denied
	if reads && !denied {
		return nil
	}
	who := CallerOf(ctx)
	entry := audit.Entry{Actor: who.Name(), Action: strings.TrimPrefix(procedure, "/strongroom.v1."), Object: on.Name, Outcome: audit.Success, Details: maps.Clone(on.Details)}
	if entry.Details == nil {
		entry.Details = map[string]string{}
	}
	if entry.Actor == "" {
		entry.Actor = g.cfg.Self
	}
	switch {
	case denied:
		entry.Outcome = audit.Denied
	case callErr != nil:
		entry.Outcome, entry.Details["kind"] = audit.Failed, errs.KindOf(callErr).String()
	}
	if who.unknown {
		entry.Details["address"] = AddressOf(ctx)
	}
	return errs.Wrap(g.cfg.Record(entry), "cannot write the audit log")
}
