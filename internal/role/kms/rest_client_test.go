package kms

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"net/http"
	"testing"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/client"
	"strongroom/internal/errs"
)

// restClient is an application with REST: JSON over TLS, as curl would send it.
type restClient struct {
	strongroomv1connect.KMSKeyServiceClient
	http *http.Client
	url  string
}

// restAt returns a client of the API of b that shows authorization, unless that is
// "", and a certificate, if one is given.
func (b *bench) restAt(t testing.TB, authorization string, certificates ...tls.Certificate) *restClient {
	t.Helper()
	return restOf(t, b.cfg.DataDir, b.apiAddress.String(), authorization, certificates...)
}

// restOf is restAt for the KMS in a folder, at an address.
func restOf(t testing.TB, dir, addr, authorization string, certificates ...tls.Certificate) *restClient {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: tlsOf(t, dir, certificates...), ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	r := &restClient{http: &http.Client{Transport: transport}, url: "https://" + addr}
	r.KMSKeyServiceClient = strongroomv1connect.NewKMSKeyServiceClient(r.http, r.url, connect.WithProtoJSON(), connect.WithInterceptors(
		connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
			return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
				if authorization != "" {
					req.Header().Set("Authorization", authorization)
				}
				return next(ctx, req)
			}
		})))
	return r
}

func bearer(key string) string { return "Bearer " + key }

func basic(name, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"+password))
}

// newREST makes an application with REST and an API key for it.
func (b *bench) newREST(t testing.TB, name, group string) (key string) {
	t.Helper()
	local := b.local(t).KMS()
	made := do(t, local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: name, Group: group, Interface: "rest"})
	if made.GetInterface() != "REST" {
		t.Errorf("interface %q", made.GetInterface())
	}
	return string(do(t, local.CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: name}).GetKey())
}

// failure calls a method that must fail.
func failure[Req, Res any](t testing.TB, what string, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), m *Req, kind errs.Kind, reason string) error {
	t.Helper()
	_, err := client.Call(t.Context(), method, m)
	if e := (*errs.Error)(nil); !asError(err, &e) || e.Kind != kind || reason != "" && e.Reason != reason {
		t.Errorf("%s: %#v, want kind %v, reason %q", what, err, kind, reason)
	}
	return err
}

func asError(err error, e **errs.Error) bool {
	var ok bool
	*e, ok = apierr.From(err).(*errs.Error)
	return ok
}
