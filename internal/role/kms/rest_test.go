package kms

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"google.golang.org/protobuf/types/known/timestamppb"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/crypto/clientcert"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

// TestRESTKeys is the life of keys over REST, beside an application with KMIP of the
// same group, and one of another account that sees nothing.
func TestRESTKeys(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	apiKey := b.newREST(t, "web", FirstGroup)
	evil := b.tenant(t, "evil")
	r := b.restAt(t, bearer(apiKey))
	strange := b.restAt(t, bearer(b.newREST(t, "evil/web", "evil/prod")))
	conn := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))

	t.Log("made, and what it is")
	end := timestamppb.New(time.Now().Add(time.Hour).Truncate(time.Second))
	id := do(t, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{
		Name: "orders", Type: "AES-256", Description: "of orders", Labels: map[string]string{"team": "shop", "tier": "1"}, DeactivationDate: end,
	}).GetId()
	k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Name: "orders"})
	if k.GetId() != id || k.GetName() != "orders" || k.GetType() != "AES-256" || k.GetState() != "Active" || strings.Join(k.GetUsages(), " ") != "Encrypt Decrypt" ||
		k.GetDescription() != "of orders" || k.GetLabels()["team"] != "shop" || k.GetLabels()["tier"] != "1" || k.GetNotExportable() ||
		k.GetCreated() == nil || k.GetActivated() == nil || k.GetDeactivated().AsTime() != end.AsTime() || k.GetDestroyed() != nil {
		t.Errorf("key: %v", k)
	}
	for _, kind := range []string{"AES-128", "AES-192", "AES", "HMAC-SHA256", "HMAC-SHA384", "hmac-sha512", "HMAC-SHA256-512", "SECRET-512"} {
		other := do(t, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: kind, Labels: map[string]string{"made": "in a row"}}).GetId()
		want := map[string]string{"AES": "AES-256", "HMAC-SHA256": "HMAC-SHA256-256", "HMAC-SHA384": "HMAC-SHA384-384", "hmac-sha512": "HMAC-SHA512-512"}[kind]
		if want == "" {
			want = kind
		}
		if k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: other}); k.GetType() != want {
			t.Errorf("%s: %v", kind, k)
		}
	}
	for what, m := range map[string]*strongroomv1.CreateKMSKeyRequest{
		"no type": {}, "such a type": {Type: "RSA-2048"}, "bits": {Type: "AES-200"}, "a secret without bits": {Type: "SECRET"}, "half a byte": {Type: "SECRET-100"},
		"a large secret": {Type: "SECRET-1000000"}, "a secret's usage": {Type: "SECRET-256", Usages: []string{"Encrypt"}}, "such a usage": {Type: "AES", Usages: []string{"Explode"}},
		"a name in use": {Type: "AES", Name: "orders"}, "a long name": {Type: "AES", Name: strings.Repeat("x", textMax+1)}, "a label": {Type: "AES", Labels: map[string]string{"A B": "x"}},
		"an empty label": {Type: "AES", Labels: map[string]string{"a": ""}}, "two wishes": {Type: "AES", PreActive: true, ActivationDate: end},
		"the past": {Type: "AES", DeactivationDate: timestamppb.New(time.Now().Add(-time.Hour))},
	} {
		failure(t, what, r.CreateKMSKey, m, errs.Invalid, "")
	}

	t.Log("listed, by pages, name, label, type and state")
	seen := map[string]bool{}
	for token := ""; ; {
		page := do(t, r.ListKMSKeys, &strongroomv1.ListKMSKeysRequest{PageSize: 4, PageToken: token})
		for _, k := range page.GetKeys() {
			if seen[k.GetId()] || k.GetType() == "" {
				t.Errorf("listed: %v", k)
			}
			seen[k.GetId()] = true
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
		if len(page.GetKeys()) != 4 {
			t.Errorf("a page of %d keys", len(page.GetKeys()))
		}
	}
	if len(seen) != 9 {
		t.Errorf("%d keys are listed", len(seen))
	}
	for what, c := range map[string]struct {
		m    *strongroomv1.ListKMSKeysRequest
		want int
	}{
		"name": {&strongroomv1.ListKMSKeysRequest{Name: "orders"}, 1}, "no name": {&strongroomv1.ListKMSKeysRequest{Name: "order"}, 0},
		"label": {&strongroomv1.ListKMSKeysRequest{Labels: map[string]string{"made": "in a row"}}, 8}, "two labels": {&strongroomv1.ListKMSKeysRequest{Labels: map[string]string{"team": "shop", "tier": "2"}}, 0},
		"AES": {&strongroomv1.ListKMSKeysRequest{Type: "AES"}, 4}, "AES-256": {&strongroomv1.ListKMSKeysRequest{Type: "AES-256"}, 2}, "secrets": {&strongroomv1.ListKMSKeysRequest{Type: "SECRET"}, 1},
		"active": {&strongroomv1.ListKMSKeysRequest{State: "Active"}, 9}, "compromised": {&strongroomv1.ListKMSKeysRequest{State: "Compromised"}, 0},
	} {
		if l := do(t, r.ListKMSKeys, c.m).GetKeys(); len(l) != c.want {
			t.Errorf("%s: %d keys, want %d", what, len(l), c.want)
		}
	}
	for what, m := range map[string]*strongroomv1.ListKMSKeysRequest{
		"token": {PageToken: "x"}, "size": {PageSize: pageMax + 1}, "negative": {PageSize: -1}, "state": {State: "Asleep"}, "type": {Type: "RSA"}, "label": {Labels: map[string]string{"": "x"}},
	} {
		failure(t, what, r.ListKMSKeys, m, errs.Invalid, "")
	}

	t.Log("encrypted and decrypted, by KMIP too")
	data, aad := []byte("4111 1111 1111 1111"), []byte("row 7")
	sealed := do(t, r.Encrypt, &strongroomv1.EncryptRequest{Name: "orders", Plaintext: data, AdditionalData: aad})
	if sealed.GetId() != id || len(sealed.GetNonce()) != 12 || len(sealed.GetCiphertext()) != len(data)+16 || bytes.Contains(sealed.GetCiphertext(), data) {
		t.Errorf("encrypted: %v", sealed)
	}
	open := &strongroomv1.DecryptRequest{Id: sealed.GetId(), Nonce: sealed.GetNonce(), Ciphertext: sealed.GetCiphertext(), AdditionalData: aad}
	if got := do(t, r.Decrypt, open).GetPlaintext(); !bytes.Equal(got, data) {
		t.Errorf("decrypted: %q", got)
	}
	gcm := kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeGCM, TagLength: 16}
	item := ask(t, conn, nil, &payloads.DecryptRequestPayload{
		UniqueIdentifier: id, CryptographicParameters: &gcm, IVCounterNonce: sealed.GetNonce(), Data: sealed.GetCiphertext()[:len(data)],
		AuthenticatedEncryptionTag: sealed.GetCiphertext()[len(data):], AuthenticatedEncryptionAdditionalData: aad,
	})
	if item.Err() != nil || !bytes.Equal(item.ResponsePayload.(*payloads.DecryptResponsePayload).Data, data) {
		t.Errorf("decrypted by KMIP: %v", item.Err())
	}
	if again := do(t, r.Encrypt, &strongroomv1.EncryptRequest{Id: id, Plaintext: data}); bytes.Equal(again.GetNonce(), sealed.GetNonce()) {
		t.Error("a nonce is used twice")
	}
	if empty := do(t, r.Encrypt, &strongroomv1.EncryptRequest{Id: id}); len(empty.GetCiphertext()) != 16 {
		t.Errorf("nothing, encrypted: %v", empty)
	}
	altered := bytes.Clone(sealed.GetCiphertext())
	altered[0] ^= 1
	for what, m := range map[string]*strongroomv1.DecryptRequest{
		"altered": {Id: id, Nonce: sealed.GetNonce(), Ciphertext: altered, AdditionalData: aad}, "without its data": {Id: id, Nonce: sealed.GetNonce(), Ciphertext: sealed.GetCiphertext()},
		"cut": {Id: id, Nonce: sealed.GetNonce(), Ciphertext: altered[:15]}, "a long nonce": {Id: id, Nonce: altered[:13], Ciphertext: altered}, "no id": {Nonce: sealed.GetNonce(), Ciphertext: altered},
	} {
		failure(t, what, r.Decrypt, m, errs.Invalid, "")
	}
	failure(t, "over a megabyte", r.Encrypt, &strongroomv1.EncryptRequest{Id: id, Plaintext: make([]byte, requestMax)}, errs.NoSpace, "")

	t.Log("a MAC")
	macKey := do(t, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Name: "webhook", Type: "HMAC-SHA256"}).GetId()
	mac := do(t, r.GenerateMAC, &strongroomv1.GenerateMACRequest{Name: "webhook", Data: data})
	if mac.GetId() != macKey || len(mac.GetMac()) != 32 {
		t.Errorf("MAC: %v", mac)
	}
	for want, of := range map[bool][]byte{true: data, false: aad} {
		if got := do(t, r.VerifyMAC, &strongroomv1.VerifyMACRequest{Id: macKey, Data: of, Mac: mac.GetMac()}).GetValid(); got != want {
			t.Errorf("MAC of %q: %v", of, got)
		}
	}
	failure(t, "a key that is for something else", r.Encrypt, &strongroomv1.EncryptRequest{Id: macKey, Plaintext: data}, errs.Denied, "PermissionDenied")
	failure(t, "no id", r.VerifyMAC, &strongroomv1.VerifyMACRequest{Data: data}, errs.Invalid, "")

	t.Log("exported: in a parcel, and nothing else")
	recipient, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer recipient.Close()
	export := func(r *restClient, m *strongroomv1.ExportKMSKeyRequest) ([]byte, error) {
		m.RecipientPublicKey = recipient.PublicKey()
		res, err := client.Call(t.Context(), r.ExportKMSKey, m)
		if err != nil {
			return nil, apierr.From(err)
		}
		key, err := recipient.Open(res.GetParcel(), res.GetContext())
		if err != nil {
			t.Fatal(err)
		}
		defer key.Close()
		if want := fmt.Sprintf("sender=\"kms\" application=\"web\" key_id=%q", res.GetId()); res.GetContext() != want {
			t.Errorf("context %s, want %s", res.GetContext(), want)
		}
		return bytes.Clone(key.Bytes()), nil
	}
	secret, err := export(r, &strongroomv1.ExportKMSKeyRequest{Name: "orders"})
	byKMIP, kmipErr := secretOf(ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}))
	if err != nil || kmipErr != nil || !bytes.Equal(secret, byKMIP) {
		t.Errorf("exported: %v, %v", err, kmipErr)
	}
	if l := do(t, r.ListKMSKeys, &strongroomv1.ListKMSKeysRequest{Type: "SECRET-512"}).GetKeys(); len(l) != 1 {
		t.Errorf("secrets: %v", l)
	} else if got, err := export(r, &strongroomv1.ExportKMSKeyRequest{Id: l[0].GetId()}); err != nil || len(got) != 64 || bytes.Equal(got, make([]byte, 64)) {
		t.Errorf("a secret of %d bytes: %v", len(got), err)
	}
	stays := do(t, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: "AES", NotExportable: true}).GetId()
	_, err = export(r, &strongroomv1.ExportKMSKeyRequest{Id: stays})
	wantKind(t, "a key that is not exportable", err, errs.Denied)
	if !do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: stays}).GetNotExportable() {
		t.Error("it is told as exportable")
	}
	failure(t, "no public key", r.ExportKMSKey, &strongroomv1.ExportKMSKeyRequest{Id: id}, errs.Invalid, "")

	t.Log("what KMIP made")
	made := ask(t, conn, nil, newAES("disk")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	if k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Name: "disk"}); k.GetId() != made || k.GetState() != "PreActive" || k.GetType() != "AES-256" {
		t.Errorf("key: %v", k)
	}
	failure(t, "pre-active", r.Encrypt, &strongroomv1.EncryptRequest{Name: "disk"}, errs.Denied, "")
	do(t, r.ActivateKMSKey, &strongroomv1.ActivateKMSKeyRequest{Name: "disk"})
	do(t, r.Encrypt, &strongroomv1.EncryptRequest{Name: "disk"})
	failure(t, "active already", r.ActivateKMSKey, &strongroomv1.ActivateKMSKeyRequest{Name: "disk"}, errs.Denied, "")

	t.Log("of another account there is nothing")
	if l := do(t, strange.ListKMSKeys, &strongroomv1.ListKMSKeysRequest{}).GetKeys(); len(l) != 0 {
		t.Errorf("listed: %v", l)
	}
	failure(t, "get", strange.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: id}, errs.NotFound, "")
	failure(t, "by name", strange.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Name: "orders"}, errs.NotFound, "")
	failure(t, "encrypt", strange.Encrypt, &strongroomv1.EncryptRequest{Id: id}, errs.NotFound, "")
	failure(t, "decrypt", strange.Decrypt, open, errs.NotFound, "")
	failure(t, "activate", strange.ActivateKMSKey, &strongroomv1.ActivateKMSKeyRequest{Id: id}, errs.NotFound, "")
	failure(t, "rotate", strange.RotateKMSKey, &strongroomv1.RotateKMSKeyRequest{Id: id}, errs.NotFound, "")
	failure(t, "revoke", strange.RevokeKMSKey, &strongroomv1.RevokeKMSKeyRequest{Id: id}, errs.NotFound, "")
	failure(t, "destroy", strange.DestroyKMSKey, &strongroomv1.DestroyKMSKeyRequest{Id: id}, errs.NotFound, "")
	failure(t, "MAC", strange.GenerateMAC, &strongroomv1.GenerateMACRequest{Id: macKey}, errs.NotFound, "")
	failure(t, "verify", strange.VerifyMAC, &strongroomv1.VerifyMACRequest{Id: macKey}, errs.NotFound, "")
	_, err = export(strange, &strongroomv1.ExportKMSKeyRequest{Id: id})
	wantKind(t, "export", err, errs.NotFound)
	if item := ask(t, conn, evil.user(), &payloads.GetRequestPayload{UniqueIdentifier: id}); item.Err() == nil {
		t.Error("another account's key, by KMIP")
	}
	failure(t, "no key", r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{}, errs.Invalid, "")
	failure(t, "two keys", r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: id, Name: "orders"}, errs.Invalid, "")
	failure(t, "a long id", r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: strings.Repeat("x", textMax+1)}, errs.Invalid, "")

	t.Log("rotated: the name is the new one's, the old one decrypts")
	rotated := do(t, r.RotateKMSKey, &strongroomv1.RotateKMSKeyRequest{Name: "orders"})
	if rotated.GetReplacedId() != id || rotated.GetId() == id {
		t.Errorf("rotated: %v", rotated)
	}
	fresh := do(t, r.Encrypt, &strongroomv1.EncryptRequest{Name: "orders", Plaintext: data})
	if fresh.GetId() != rotated.GetId() {
		t.Errorf("encrypted with %s", fresh.GetId())
	}
	if k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: id}); k.GetReplacedBy() != rotated.GetId() || k.GetName() != "" {
		t.Errorf("the old key: %v", k)
	}
	if k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Name: "orders"}); k.GetReplaces() != id || k.GetLabels()["team"] != "shop" {
		t.Errorf("the new key: %v", k)
	}
	failure(t, "active", r.DestroyKMSKey, &strongroomv1.DestroyKMSKeyRequest{Id: id}, errs.Denied, "")
	do(t, r.RevokeKMSKey, &strongroomv1.RevokeKMSKeyRequest{Id: id, Reason: "replaced"})
	failure(t, "revoked", r.Encrypt, &strongroomv1.EncryptRequest{Id: id}, errs.Denied, "")
	do(t, r.RevokeKMSKey, &strongroomv1.RevokeKMSKeyRequest{Id: macKey, Compromised: true})
	if k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: macKey}); k.GetState() != "Compromised" {
		t.Errorf("compromised: %v", k)
	}

	t.Log("a restart")
	b.stop()
	b = start(t, dir)
	r = b.restAt(t, bearer(apiKey))
	if got := do(t, r.Decrypt, open).GetPlaintext(); !bytes.Equal(got, data) {
		t.Errorf("decrypted after a restart: %q", got)
	}
	do(t, r.DestroyKMSKey, &strongroomv1.DestroyKMSKeyRequest{Id: id})
	failure(t, "destroyed", r.Decrypt, open, errs.Denied, "")
	if k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: id}); k.GetState() != "Destroyed" || k.GetDestroyed() == nil {
		t.Errorf("destroyed: %v", k)
	}
	if l := do(t, r.ListKMSKeys, &strongroomv1.ListKMSKeysRequest{State: "Destroyed"}).GetKeys(); len(l) != 1 || l[0].GetId() != id {
		t.Errorf("destroyed keys: %v", l)
	}
	app := do(t, b.local(t).KMS().GetKMSApplication, &strongroomv1.GetKMSApplicationRequest{Name: "web"})
	if app.GetInterface() != "REST" || app.GetUsage().GetKeys() < 11 || app.GetUsage().GetOperations() < 50 {
		t.Errorf("application: %v", app)
	}
	b.stop()
	b.checkAudit(t, "application:web rest.Create group/default/key/"+id+" success", "application:web rest.Encrypt group/default/key/"+id+" success", "application:web rest.Decrypt group/default/key/"+id+" error",
		"application:web rest.Get group/default/key/"+id+" success", "application:web rest.Get group/default/key/"+stays+" error", "application:web rest.ReKey group/default/key/"+rotated.GetId()+" success", "application:web rest.Locate group/default success",
		"application:web rest.Destroy group/default/key/"+id+" success", "application:first kmip.Get group/default/key/"+id+" success", "application:evil/web rest.Decrypt group/evil/prod/key/"+id+" error",
		"local administrator KMSService/CreateKMSAPIKey application/web success")
	text, err := readTree(dir)
	if err != nil || strings.Contains(text, apiKey) || strings.Contains(text, string(secret)) || strings.Contains(text, string(data)) {
		t.Errorf("a secret is on disk in the clear: %v", err)
	}
}

// TestRESTCredentials: who is known over REST, and from when on not any more.
func TestRESTCredentials(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	local := b.local(t).KMS()
	apiKey := b.newREST(t, "web", FirstGroup)
	password := string(do(t, local.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "web"}).GetPassword())
	certificate := func(app string) (tls.Certificate, string) {
		der, certPEM, keyPEM, err := clientcert.New("from elsewhere", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		if app == "" {
			return pair, ""
		}
		return pair, do(t, local.AddKMSCertificate, &strongroomv1.AddKMSCertificateRequest{Application: app, Certificate: der}).GetId()
	}
	cert, certID := certificate("web")
	unknown, _ := certificate("")
	otherKey := b.newREST(t, "other", FirstGroup)
	otherCert, _ := certificate("other")
	do(t, local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "by-kmip", Group: FirstGroup})
	kmipPassword := string(do(t, local.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "by-kmip"}).GetPassword())
	failure(t, "an API key for an application with KMIP", local.CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: "by-kmip"}, errs.Invalid, "")
	failure(t, "a lifetime", local.CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: "web", LifetimeSeconds: -1}, errs.Invalid, "")
	failure(t, "an interface", local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "x", Group: FirstGroup, Interface: "SOAP"}, errs.Invalid, "")

	list := &strongroomv1.ListKMSKeysRequest{}
	known := map[string]*restClient{
		"API key": b.restAt(t, bearer(apiKey)), "scheme in other letters": b.restAt(t, "bearer "+apiKey), "password": b.restAt(t, basic("web", password)), "certificate": b.restAt(t, "", cert),
		"API key and certificate": b.restAt(t, bearer(apiKey), cert), "API key and a certificate that is not known": b.restAt(t, bearer(apiKey), unknown),
	}
	for what, r := range known {
		if _, err := client.Call(t.Context(), r.ListKMSKeys, list); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	token := do(t, b.administrator(t).Access().CreateToken, &strongroomv1.CreateTokenRequest{}).GetToken()
	for what, r := range map[string]*restClient{
		"nothing": b.restAt(t, ""), "empty": b.restAt(t, "Bearer "), "another scheme": b.restAt(t, "Digest "+apiKey), "a wrong key": b.restAt(t, bearer(apiKey[:len(apiKey)-1]+"x")),
		"the id of another": b.restAt(t, bearer(otherKey[:17]+apiKey[17:])), "a wrong password": b.restAt(t, basic("web", password[1:])), "nobody": b.restAt(t, basic("nobody", password)),
		"the API key as a password": b.restAt(t, basic("web", apiKey)), "a password as an API key": b.restAt(t, bearer(password)), "a certificate that is not known": b.restAt(t, "", unknown),
		"a certificate of one, the API key of another": b.restAt(t, bearer(apiKey), otherCert), "a password of an application with KMIP": b.restAt(t, basic("by-kmip", kmipPassword)),
		"a certificate of an application with KMIP": b.restAt(t, "", first(t, dir)), "a user's token": b.restAt(t, bearer(token)),
	} {
		if err := failure(t, what, r.ListKMSKeys, list, errs.Denied, apierr.ReasonUnauthenticated); err != nil && !strings.Contains(err.Error(), "who you are could not be established") {
			t.Errorf("%s: a stranger learns %v", what, err)
		}
	}
	conn := dial(t, b.addr, tlsOf(t, dir))
	for what, edit := range map[string]func(*kmip.RequestHeader){"password": user("web", password), "API key": user("web", apiKey)} {
		if item := ask(t, conn, edit, &payloads.LocateRequestPayload{}); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
			t.Errorf("by KMIP, with its %s: %v", what, item.ResultReason)
		}
	}
	if item := ask(t, dial(t, b.addr, tlsOf(t, dir, cert)), nil, &payloads.LocateRequestPayload{}); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("by KMIP, with its certificate: %v", item.ResultReason)
	}
	ca, err := os.ReadFile(filepath.Join(dir, caCertName))
	if err != nil {
		t.Fatal(err)
	}
	users, err := client.New(client.Config{Server: "https://" + b.apiAddress.String(), Token: apiKey, CA: ca})
	if err != nil {
		t.Fatal(err)
	}
	defer users.Close()
	failure(t, "an API key as a user's token", users.KMS().GetKMS, &strongroomv1.GetKMSRequest{}, errs.Denied, "")

	t.Log("rotated without a gap, and revoked at once")
	more := do(t, local.CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: "web", LifetimeSeconds: 3600})
	next := b.restAt(t, bearer(string(more.GetKey())))
	do(t, next.ListKMSKeys, list)
	do(t, known["API key"].ListKMSKeys, list)
	for _, c := range do(t, local.GetKMSApplication, &strongroomv1.GetKMSApplicationRequest{Name: "web"}).GetCredentials() {
		if strings.HasPrefix(apiKey, "srk_"+c.GetId()) && c.GetKind() == "api-key" {
			do(t, local.RevokeKMSCredential, &strongroomv1.RevokeKMSCredentialRequest{Application: "web", Id: c.GetId()})
		}
	}
	failure(t, "revoked, on a connection that is open", known["API key"].ListKMSKeys, list, errs.Denied, apierr.ReasonUnauthenticated)
	do(t, next.ListKMSKeys, list)
	do(t, local.RevokeKMSCredential, &strongroomv1.RevokeKMSCredentialRequest{Application: "web", Id: certID})
	failure(t, "a revoked certificate", known["certificate"].ListKMSKeys, list, errs.Denied, apierr.ReasonUnauthenticated)

	t.Log("expired")
	short := do(t, local.CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: "web", LifetimeSeconds: 1})
	brief := b.restAt(t, bearer(string(short.GetKey())))
	eventually(t, "it has expired", func() bool {
		_, err := client.Call(t.Context(), brief.ListKMSKeys, list)
		return errs.KindOf(apierr.From(err)) == errs.Denied
	})
	if time.Now().Before(short.GetCredential().GetExpires().AsTime()) {
		t.Error("refused too early")
	}

	t.Log("disabled, and the whole account")
	do(t, local.SetKMSApplicationDisabled, &strongroomv1.SetKMSApplicationDisabledRequest{Name: "web", Disabled: true})
	failure(t, "disabled", next.ListKMSKeys, list, errs.Denied, apierr.ReasonUnauthenticated)
	do(t, local.SetKMSApplicationDisabled, &strongroomv1.SetKMSApplicationDisabledRequest{Name: "web"})
	do(t, next.ListKMSKeys, list)
	do(t, local.SetKMSAccountDisabled, &strongroomv1.SetKMSAccountDisabledRequest{Name: "default", Disabled: true})
	failure(t, "its account is disabled", next.ListKMSKeys, list, errs.Denied, "AccountDisabled")
	do(t, local.SetKMSAccountDisabled, &strongroomv1.SetKMSAccountDisabledRequest{Name: "default"})
	do(t, local.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: "web"})
	failure(t, "deleted", next.ListKMSKeys, list, errs.Denied, apierr.ReasonUnauthenticated)
	b.stop()
	b.checkAudit(t, "anonymous rest.connect kms denied", "application:web rest.connect group/default denied", "application:web rest.Locate group/default success", "local administrator KMSService/RevokeKMSCredential application/web success")
}

// TestRESTRules: the group's policy, quotas and quorum hold for REST as for KMIP.
func TestRESTRules(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	local := b.local(t).KMS()
	do(t, local.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "g"})
	r := b.restAt(t, bearer(b.newREST(t, "web", "g")))
	policy := func(p *strongroomv1.KMSPolicy) {
		t.Helper()
		do(t, local.SetKMSGroupPolicy, &strongroomv1.SetKMSGroupPolicyRequest{Name: "g", Policy: p})
	}
	recipient, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	defer recipient.Close()
	id := do(t, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Name: "k", Type: "AES-256"}).GetId()
	export := &strongroomv1.ExportKMSKeyRequest{Id: id, RecipientPublicKey: recipient.PublicKey()}

	policy(&strongroomv1.KMSPolicy{Operations: []string{"Locate", "Encrypt"}})
	do(t, r.Encrypt, &strongroomv1.EncryptRequest{Name: "k"})
	failure(t, "an operation that is not allowed", r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: "AES-256"}, errs.Denied, "PermissionDenied")
	failure(t, "export, not allowed", r.ExportKMSKey, export, errs.Denied, "PermissionDenied")
	if l := do(t, r.ListKMSKeys, &strongroomv1.ListKMSKeysRequest{}).GetKeys(); len(l) != 1 || l[0].GetId() != id || l[0].GetName() != "" || l[0].GetState() != "" {
		t.Errorf("without Get Attributes: %v", l)
	}
	policy(&strongroomv1.KMSPolicy{Operations: []string{"Encrypt"}})
	failure(t, "a name, without Locate", r.Encrypt, &strongroomv1.EncryptRequest{Name: "k"}, errs.Denied, "PermissionDenied")
	policy(&strongroomv1.KMSPolicy{NoExport: true, KeyTypes: []string{"AES-256"}})
	failure(t, "export from a group that keeps its keys", r.ExportKMSKey, export, errs.Denied, "PermissionDenied")
	for _, kind := range []string{"AES-128", "HMAC-SHA256", "SECRET-256"} {
		failure(t, kind, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: kind}, errs.Denied, "PermissionDenied")
	}
	policy(nil)

	t.Log("quotas")
	do(t, local.SetKMSGroupQuota, &strongroomv1.SetKMSGroupQuotaRequest{Name: "g", Quota: &strongroomv1.KMSQuota{Keys: 2}})
	spare := do(t, r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: "AES-256", PreActive: true}).GetId()
	for what, call := range map[string]func() error{
		"create": func() error {
			return failure(t, "create", r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: "AES-256"}, errs.Denied, "QuotaExceeded")
		},
		"secret": func() error {
			return failure(t, "secret", r.CreateKMSKey, &strongroomv1.CreateKMSKeyRequest{Type: "SECRET-256"}, errs.Denied, "QuotaExceeded")
		},
		"rotate": func() error {
			return failure(t, "rotate", r.RotateKMSKey, &strongroomv1.RotateKMSKeyRequest{Id: id}, errs.Denied, "QuotaExceeded")
		},
	} {
		if err := call(); err != nil && !strings.Contains(err.Error(), "quota of group/g is reached: 2 keys") {
			t.Errorf("%s: %v", what, err)
		}
	}
	do(t, local.SetKMSGroupQuota, &strongroomv1.SetKMSGroupQuotaRequest{Name: "g"})
	do(t, local.SetKMSApplicationQuota, &strongroomv1.SetKMSApplicationQuotaRequest{Name: "web", Quota: &strongroomv1.KMSQuota{Operations: 2, PeriodSeconds: 365 * 24 * 3600}})
	do(t, r.Encrypt, &strongroomv1.EncryptRequest{Id: id})
	do(t, r.Encrypt, &strongroomv1.EncryptRequest{Id: id})
	failure(t, "operations", r.Encrypt, &strongroomv1.EncryptRequest{Id: id}, errs.Denied, "QuotaExceeded")
	do(t, local.SetKMSApplicationQuota, &strongroomv1.SetKMSApplicationQuotaRequest{Name: "web"})

	t.Log("a quorum")
	ann := b.person(t, "ann", true, access.KeyCustodian)
	do(t, local.SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "g", Quorum: &strongroomv1.KMSQuorum{Approvers: []string{"ann"}, Needed: 1, Destroy: true, Export: true}})
	request := requestIn(t, failure(t, "export", r.ExportKMSKey, export, errs.Denied, "NotApproved").Error())
	if again := requestIn(t, failure(t, "export", r.ExportKMSKey, export, errs.Denied, "NotApproved").Error()); again != request {
		t.Errorf("requests %s and %s", request, again)
	}
	a := do(t, ann.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: request})
	if a.GetObject() != id || a.GetObjectName() != "k" || a.GetOperation() != "Export" || a.GetRequester() != "application:web" {
		t.Errorf("request: %v", a)
	}
	ann.mustApprove(t, request, "approved")
	if got := do(t, r.ExportKMSKey, export); len(got.GetParcel()) != 32+parcel.Overhead {
		t.Errorf("a parcel of %d bytes", len(got.GetParcel()))
	}
	failure(t, "an approval used twice", r.ExportKMSKey, export, errs.Denied, "NotApproved")
	destroy := &strongroomv1.DestroyKMSKeyRequest{Id: spare}
	request = requestIn(t, failure(t, "destroy", r.DestroyKMSKey, destroy, errs.Denied, "NotApproved").Error())
	ann.mustApprove(t, request, "approved")
	do(t, r.DestroyKMSKey, destroy)
	b.stop()
	b.checkAudit(t, "application:web approval.Ask group/g/approval/"+request+" success", "application:web rest.Get group/g/key/"+id+" denied", "application:web rest.Get group/g/key/"+id+" success",
		"application:web rest.Destroy group/g/key/"+spare+" success", "application:web rest.Create group/g denied", "application:web rest.ReKey group/g denied")
}

// TestRESTByHand sends what curl sends: plain JSON, and what is no request at all.
func TestRESTByHand(t *testing.T) {
	t.Parallel()
	b := start(t, filepath.Join(t.TempDir(), "kms"))
	apiKey := b.newREST(t, "web", FirstGroup)
	r := b.restAt(t, "")
	send := func(verb, method, kind, authorization, body string) (status int, answer string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), verb, r.url+"/strongroom.v1.KMSKeyService/"+method, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kind)
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		res, err := r.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.StatusCode == http.StatusUnauthorized && res.Header.Get("WWW-Authenticate") == "" {
			t.Error("no WWW-Authenticate with 401")
		}
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(text)
	}
	const kind = "application/json"
	for _, c := range []struct {
		what, verb, method, kind, authorization, body string
		status                                        int
		answer                                        string
	}{
		{"create", "POST", "CreateKMSKey", kind, bearer(apiKey), `{"name":"k","type":"AES-256"}`, 200, `{"id":"`},
		{"encrypt", "POST", "Encrypt", kind, bearer(apiKey), `{"name":"k","plaintext":"aGVsbG8="}`, 200, `"ciphertext":"`},
		{"a key that is not there", "POST", "GetKMSKey", kind, bearer(apiKey), `{"name":"other"}`, 404, `"code":"not_found"`},
		{"nobody", "POST", "GetKMSKey", kind, "", `{"name":"k"}`, 401, `"code":"unauthenticated"`},
		{"nobody, with no JSON", "POST", "GetKMSKey", kind, "", `{`, 401, `"code":"unauthenticated"`},
		{"no JSON", "POST", "GetKMSKey", kind, bearer(apiKey), `{`, 400, `"code":"invalid_argument"`},
		{"such a field", "POST", "GetKMSKey", kind, bearer(apiKey), `{"key":"k"}`, 400, `"code":"invalid_argument"`},
		{"no base64", "POST", "Encrypt", kind, bearer(apiKey), `{"name":"k","plaintext":"?"}`, 400, `"code":"invalid_argument"`},
		{"such a method", "POST", "GetMaterial", kind, bearer(apiKey), `{}`, 404, ""},
		{"by GET", "GET", "ListKMSKeys", kind, bearer(apiKey), ``, 405, ""},
		{"a form", "POST", "ListKMSKeys", "application/x-www-form-urlencoded", bearer(apiKey), `a=b`, 415, ""},
	} {
		status, answer := send(c.verb, c.method, c.kind, c.authorization, c.body)
		if status != c.status || !strings.Contains(strings.ReplaceAll(answer, `": "`, `":"`), c.answer) {
			t.Errorf("%s: %d %s, want %d and %s", c.what, status, answer, c.status, c.answer)
		}
	}
}
