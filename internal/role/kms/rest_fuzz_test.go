package kms

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"

	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// FuzzRESTRequest sends bodies to all methods: each is answered, in JSON, and not
// with an internal error.
func FuzzRESTRequest(f *testing.F) {
	for _, seed := range [][2]string{
		{"CreateKMSKey", `{"name":"k","type":"AES-256","labels":{"a":"b"},"activationDate":"2026-01-01T00:00:00Z"}`},
		{"CreateKMSKey", `{"type":"SECRET-256","notExportable":true,"preActive":true}`},
		{"CreateKMSKey", `{"type":"SECRET-"}`},
		{"CreateKMSKey", `{"type":"HMAC-SHA256-512","usages":["MACGenerate"],"deactivationDate":"9999-12-31T23:59:59Z"}`},
		{"ListKMSKeys", `{"name":"k","state":"Active","type":"AES","pageSize":1,"pageToken":"01a21abd-5b98-7f16-87b5-10b6ce5c8aeb"}`},
		{"Encrypt", `{"name":"k","plaintext":"aGVsbG8=","additionalData":"aGVsbG8="}`},
		{"Decrypt", `{"id":"x","nonce":"AAAAAAAAAAAAAAAA","ciphertext":"AAAAAAAAAAAAAAAAAAAAAA=="}`},
		{"ExportKMSKey", `{"name":"k","recipientPublicKey":"AAAA"}`},
		{"RevokeKMSKey", `{"name":"k","compromised":true,"reason":"lost"}`},
		{"VerifyMAC", `{"id":"x","data":"AAAA","mac":"AAAA"}`},
		{"RotateKMSKey", `{"name":"k"}`},
		{"GenerateMAC", `{"name":"k"}`},
		{"DestroyKMSKey", `{"id":"x"}`},
		{"ActivateKMSKey", `{}`},
		{"GetKMSKey", `[]`},
		{"GetKMSImportKey", `{}`},
		{"ImportKMSKey", `{"importKey":"01a21abd-5b98-7f16-87b5-10b6ce5c8aeb","parcel":"AAAA","key":{"name":"k","type":"AES-256"}}`},
	} {
		f.Add(seed[0], []byte(seed[1]))
	}
	store := kmipserver.NewMemory()
	operations, err := kmipserver.New(kmipserver.Config{
		Store: store, TLS: &tls.Config{}, Log: slog.New(slog.DiscardHandler),
		Authenticate: func(context.Context, tls.ConnectionState, []kmip.Credential) (kmipserver.Client, error) {
			return kmipserver.Client{}, errs.New(errs.Denied, "nobody")
		},
	})
	if err != nil {
		f.Fatal(err)
	}
	_, service := strongroomv1connect.NewKMSKeyServiceHandler(&keyAPI{operations: operations, imports: importKeys{store: store}}, connect.WithInterceptors(restErrors), connect.WithReadMaxBytes(requestMax))
	ctx := context.WithValue(context.Background(), applicationKey{}, kmipserver.Caller{Client: kmipserver.Client{Account: "g", Name: "application:a"}})
	f.Fuzz(func(t *testing.T, method string, body []byte) {
		if strings.Trim(method, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") != "" {
			t.Skip()
		}
		req := httptest.NewRequestWithContext(ctx, http.MethodPost, "/"+strongroomv1connect.KMSKeyServiceName+"/"+method, strings.NewReader(string(body)))
		req.Header.Set("Content-Type", "application/json")
		res := httptest.NewRecorder()
		service.ServeHTTP(res, req)
		if res.Code == http.StatusInternalServerError {
			t.Errorf("%s %q: %s", method, body, res.Body)
		}
		if res.Header().Get("Content-Type") == "application/json" && !json.Valid(res.Body.Bytes()) {
			t.Errorf("%s %q: %q is no JSON", method, body, res.Body)
		}
	})
}
