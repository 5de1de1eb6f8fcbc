package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/api/apierr"
	"strongroom/api/rule"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// restTime bounds one request, from when its header has come.
const restTime = 30 * time.Second

// keyAPI serves KMSKeyService to applications whose interface is REST. What it does
// are the operations of KMIP, under the same rules; here they only get another
// form (docs/adr/0025-keys-over-rest.md).
type keyAPI struct {
	strongroomv1connect.UnimplementedKMSKeyServiceHandler
	k          *KMS
	operations *kmipserver.Server
	imports    importKeys
}

// handler returns the path of the service and what serves it. A client is known
// before anything of its request's body is read.
func (a *keyAPI) handler() (string, http.Handler, error) {
	rules, err := rule.Of(strongroomv1connect.KMSKeyServiceName)
	if err != nil {
		return "", nil, err
	}
	for procedure, r := range rules {
		if !r.Application {
			return "", nil, fmt.Errorf("%s is not for applications", procedure)
		}
	}
	refused := connect.NewErrorWriter()
	path, service := strongroomv1connect.NewKMSKeyServiceHandler(a, connect.WithInterceptors(restErrors), connect.WithReadMaxBytes(requestMax))
	return path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), restTime)
		defer cancel()
		client, err := a.authenticate(ctx, r)
		if err != nil {
			w.Header().Set("WWW-Authenticate", `Bearer, Basic realm="key management server"`)
			refused.Write(w, r, apierr.To(restError(err)))
			return
		}
		caller := kmipserver.Caller{Client: client, Peer: r.RemoteAddr}
		service.ServeHTTP(w, r.WithContext(context.WithValue(ctx, applicationKey{}, caller)))
	}), nil
}

type applicationKey struct{}

// callerOf returns the application that a request is of.
func callerOf(ctx context.Context) kmipserver.Caller {
	c, _ := ctx.Value(applicationKey{}).(kmipserver.Caller)
	return c
}

// applicationOf returns the full name of the application that a request is of.
func applicationOf(ctx context.Context) string {
	return strings.TrimPrefix(callerOf(ctx).Client.Name, "application:")
}

// authenticate finds out who calls. Refusals are on record, as those of KMIP.
func (a *keyAPI) authenticate(ctx context.Context, r *http.Request) (kmipserver.Client, error) {
	p, err := proofOf(r)
	defer clear(p.Password)
	defer clear(p.Key)
	var client kmipserver.Client
	if err == nil {
		client, err = a.k.clientOf(ctx, p)
	}
	if err == nil {
		return client, nil
	}
	told := (*kmipserver.Refusal)(nil)
	known := errors.As(err, &told)
	if !known && errs.KindOf(err) == errs.Unavailable {
		a.k.log.LogAttrs(ctx, slog.LevelError, "rest client not looked up", slog.String("peer", r.RemoteAddr), slog.Any("err", err))
		return kmipserver.Client{}, err
	}
	a.k.log.LogAttrs(ctx, slog.LevelInfo, "rest client refused", slog.String("peer", r.RemoteAddr), slog.Any("err", err))
	event := kmipserver.Event{Client: kmipserver.Client{Interface: string(directory.REST)}, Peer: r.RemoteAddr, Reason: kmip.ResultReasonAuthenticationNotSuccessful}
	if known {
		event.Client, event.Reason, event.Cause = client, told.Reason, told.Cause
	} else {
		// What was wrong a stranger does not learn.
		err = errs.New(errs.Denied, "who you are could not be established").WithReason(apierr.ReasonUnauthenticated).WithHint("Authorization: Bearer API-KEY, of an application whose interface is REST")
	}
	if recordErr := a.k.observe(ctx, event); recordErr != nil {
		a.k.log.LogAttrs(ctx, slog.LevelError, "rest refusal not recorded", slog.Any("err", recordErr))
	}
	return kmipserver.Client{}, err
}

// proofOf returns what a request shows of who sends it.
func proofOf(r *http.Request) (directory.Proof, error) {
	p := directory.Proof{Interface: directory.REST}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		p.Certificate = r.TLS.PeerCertificates[0]
	}
	switch values := r.Header.Values("Authorization"); {
	case len(values) == 0:
		return p, nil
	case len(values) > 1:
		return p, errs.New(errs.Denied, "%d headers Authorization", len(values))
	}
	if user, password, ok := r.BasicAuth(); ok {
		p.User, p.Password = user, []byte(password)
		return p, nil
	}
	scheme, key, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return p, errs.New(errs.Denied, "a header Authorization that is neither Bearer nor Basic")
	}
	p.Key = []byte(key)
	return p, nil
}

// restErrors gives the errors of all methods the form of the API.
var restErrors = connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if err != nil {
			return nil, apierr.To(restError(err))
		}
		return res, nil
	}
})

// restError returns the error of the API that stands for a refusal; others it
// leaves alone.
func restError(err error) error {
	told := (*kmipserver.Refusal)(nil)
	if !errors.As(err, &told) {
		return err
	}
	out := errs.New(restKind(told.Reason), "%s", told.Message)
	if id, ok := strings.CutPrefix(told.Cause, causeApproval); ok {
		return out.WithReason("NotApproved").WithHint("strongroom kms approval show %s", id)
	}
	switch {
	case strings.HasPrefix(told.Cause, causeQuota):
		return out.WithReason("QuotaExceeded")
	case told.Cause == causeDisabled:
		return out.WithReason("AccountDisabled")
	}
	return out.WithReason(ttlv.EnumStr(told.Reason))
}

func restKind(reason kmip.ResultReason) errs.Kind {
	switch reason {
	case kmip.ResultReasonItemNotFound:
		return errs.NotFound
	case kmip.ResultReasonPermissionDenied, kmip.ResultReasonSensitive, kmip.ResultReasonNotExtractable:
		return errs.Denied
	case kmip.ResultReasonObjectArchived:
		return errs.InvalidState
	case kmip.ResultReasonGeneralFailure: // too many requests
		return errs.Unavailable
	}
	return errs.Invalid
}
