package kms

import (
	"bytes"
	"crypto/rand"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// sealFor returns a parcel with secret for an import key.
func sealFor(t testing.TB, to *strongroomv1.KMSImportKey, c parcel.ImportContext, secret []byte) []byte {
	t.Helper()
	key, err := keymem.Take(bytes.Clone(secret))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	sealed, err := parcel.Seal(to.GetPublicKey(), c.String(), key)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// TestRESTImport brings keys from elsewhere: they are as they were, for their
// application only, once, under the group's policy.
func TestRESTImport(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	r := b.restAt(t, bearer(b.newREST(t, "web", FirstGroup)))
	conn := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	var atOnce [8]*strongroomv1.KMSImportKey
	var all sync.WaitGroup
	for i := range atOnce {
		all.Go(func() {
			atOnce[i], _ = client.Call(t.Context(), r.GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{})
		})
	}
	all.Wait()
	to := do(t, r.GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{})
	for _, other := range atOnce {
		if other.GetId() != to.GetId() {
			t.Errorf("asked at once they are %s and %s", other.GetId(), to.GetId())
		}
	}
	if left := time.Until(to.GetExpires().AsTime()); len(to.GetPublicKey()) != parcel.PublicKeySize || left < importTaken-importOffered || left > importTaken {
		t.Errorf("import key %s of %d bytes, for %v", to.GetId(), len(to.GetPublicKey()), left)
	}
	if again := do(t, r.GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{}); again.GetId() != to.GetId() || !bytes.Equal(again.GetPublicKey(), to.GetPublicKey()) {
		t.Error("asked twice it is another")
	}
	request := func(name, kind string, secret []byte) *strongroomv1.ImportKMSKeyRequest {
		return &strongroomv1.ImportKMSKeyRequest{
			ImportKey: to.GetId(), Parcel: sealFor(t, to, parcel.ImportContext{Application: "web", Name: name, Type: kind}, secret),
			Key: &strongroomv1.CreateKMSKeyRequest{Name: name, Type: kind, Labels: map[string]string{"from": "elsewhere"}},
		}
	}
	var id string
	for kind, size := range map[string]int{"AES-256": 32, "AES": 16, "HMAC-SHA256": 32, "SECRET": 21, "SECRET-512": 64, "3DES": 24} {
		secret := random(size)
		m := request("of type "+kind, kind, secret)
		id = do(t, r.ImportKMSKey, m).GetId()
		k := do(t, r.GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: id})
		if k.GetName() != "of type "+kind || k.GetState() != "Active" || k.GetLabels()["from"] != "elsewhere" || !strings.HasPrefix(k.GetType(), kind) {
			t.Errorf("%s: %v", kind, k)
		}
		got := ask(t, conn, nil, &payloads.GetRequestPayload{UniqueIdentifier: id}) // as KMIP has it
		if got.Err() != nil {
			t.Fatal(got.ResultMessage)
		}
		if held, err := materialOf(got); err != nil || !bytes.Equal(held, secret) {
			t.Errorf("%s: another key came in: %v", kind, err)
		}
		failure(t, kind+" sent twice", r.ImportKMSKey, m, errs.Exists, "")
	}
	if e := do(t, r.Encrypt, &strongroomv1.EncryptRequest{Name: "of type AES", Plaintext: []byte("text")}); len(e.GetCiphertext()) != 4+gcmTag {
		t.Errorf("encrypted: %v", e)
	}

	t.Log("a parcel is taken once, also when what came of it is gone")
	gone := request("gone", "AES-256", random(32))
	id = do(t, r.ImportKMSKey, gone).GetId()
	do(t, r.RevokeKMSKey, &strongroomv1.RevokeKMSKeyRequest{Id: id})
	do(t, r.DestroyKMSKey, &strongroomv1.DestroyKMSKeyRequest{Id: id})
	failure(t, "a key that was destroyed", r.ImportKMSKey, gone, errs.Exists, "")

	t.Log("what is refused")
	other := b.restAt(t, bearer(b.newREST(t, "other", FirstGroup)))
	failure(t, "another application's parcel", other.ImportKMSKey, request("mine", "AES-256", random(32)), errs.Invalid, "")
	for what, change := range map[string]func(*strongroomv1.ImportKMSKeyRequest){
		"another name":         func(m *strongroomv1.ImportKMSKeyRequest) { m.Key.Name = "yours" },
		"no name":              func(m *strongroomv1.ImportKMSKeyRequest) { m.Key.Name = "" },
		"another type":         func(m *strongroomv1.ImportKMSKeyRequest) { m.Key.Type = "HMAC-SHA256" },
		"no type":              func(m *strongroomv1.ImportKMSKeyRequest) { m.Key.Type = "ROT-13" },
		"no key":               func(m *strongroomv1.ImportKMSKeyRequest) { m.Key = nil },
		"altered":              func(m *strongroomv1.ImportKMSKeyRequest) { m.Parcel[len(m.Parcel)-1] ^= 1 },
		"cut":                  func(m *strongroomv1.ImportKMSKeyRequest) { m.Parcel = m.Parcel[:40] },
		"no parcel":            func(m *strongroomv1.ImportKMSKeyRequest) { m.Parcel = nil },
		"no such import key":   func(m *strongroomv1.ImportKMSKeyRequest) { m.ImportKey = "01a21abd-5b98-7f16-87b5-10b6ce5c8aeb" },
		"no import key":        func(m *strongroomv1.ImportKMSKeyRequest) { m.ImportKey = "" },
		"usages of a key pair": func(m *strongroomv1.ImportKMSKeyRequest) { m.Key.Usages = []string{"Fly"} },
	} {
		m := request("mine", "AES-256", random(32))
		change(m)
		failure(t, what, r.ImportKMSKey, m, errs.Invalid, "")
	}
	for kind, size := range map[string]int{"AES-256": 16, "AES": 33, "HMAC-SHA256": 8, "SECRET": 4, "SECRET-512": 32, "3DES": 8} {
		failure(t, kind+" of another length", r.ImportKMSKey, request("short", kind, random(size)), errs.Invalid, "")
	}
	local := b.local(t).KMS()
	m := request("mine", "AES-256", random(32))
	do(t, local.SetKMSGroupPolicy, &strongroomv1.SetKMSGroupPolicyRequest{Name: FirstGroup, Policy: &strongroomv1.KMSPolicy{KeyTypes: []string{"AES-128"}}})
	failure(t, "a type that the policy does not allow", r.ImportKMSKey, m, errs.Denied, "")
	do(t, local.SetKMSGroupPolicy, &strongroomv1.SetKMSGroupPolicyRequest{Name: FirstGroup, Policy: &strongroomv1.KMSPolicy{Operations: []string{"Create"}}})
	failure(t, "a policy without Register", r.ImportKMSKey, m, errs.Denied, "")
	do(t, local.SetKMSGroupPolicy, &strongroomv1.SetKMSGroupPolicyRequest{Name: FirstGroup})

	t.Log("an import key's life")
	keys := importKeys{store: b.objects}
	made := to.GetExpires().AsTime().Add(-importTaken)
	if offered, err := keys.offered(t.Context(), made.Add(importOffered)); err != nil || offered != nil {
		t.Errorf("after a day it is still given out: %v, %v", offered, err)
	}
	bound := parcel.ImportContext{Application: "web", Name: "mine", Type: "AES-256"}.String()
	if _, err := keys.open(t.Context(), to.GetId(), m.GetParcel(), bound, made.Add(importTaken)); errs.KindOf(err) != errs.Invalid || !strings.Contains(errs.HintOf(err), "GetKMSImportKey") {
		t.Errorf("after two days: %v", err)
	}
	next, err := keys.offer(t.Context(), made.Add(importTaken))
	if err != nil {
		t.Fatal(err)
	}
	err = b.objects.View(t.Context(), importAccount, func(v kmipserver.Reader) error {
		for id, destroyed := range map[string]bool{to.GetId(): true, next.GetId(): false} {
			if o, err := v.Get(id); err != nil || o.Destroyed() != destroyed || (o.Material == nil) != destroyed {
				t.Errorf("%s: %v, destroyed %v", id, err, !destroyed)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	failure(t, "to a key that is gone", r.ImportKMSKey, m, errs.Invalid, "")

	t.Log("after a restart")
	to = do(t, r.GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{})
	m = request("mine", "AES-256", random(32))
	b.stop()
	b.checkAudit(t, "application:web rest.Register group/default/key/"+id+" success")
	b = start(t, dir)
	r = b.restAt(t, bearer(string(do(t, b.local(t).KMS().CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: "web"}).GetKey())))
	do(t, r.ImportKMSKey, m)
}

// TestImportKeyIsRestored imports what was sealed before the KMS was lost.
func TestImportKeyIsRestored(t *testing.T) {
	t.Parallel()
	dir, restored := filepath.Join(t.TempDir(), "kms"), filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	apiKey := b.newREST(t, "web", FirstGroup)
	to := do(t, b.restAt(t, bearer(apiKey)).GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{})
	req, key := newRecipient(t)
	file, _ := takeBackup(t, backupClient(t, b.cfg.LocalSocket), req)
	b.stop()
	if _, err := Restore(t.Context(), configOf(t, restored), file, key, Since{BringBack: true}); err != nil {
		t.Fatal(err)
	}
	b = start(t, restored)
	do(t, b.restAt(t, bearer(apiKey)).ImportKMSKey, &strongroomv1.ImportKMSKeyRequest{
		ImportKey: to.GetId(), Parcel: sealFor(t, to, parcel.ImportContext{Application: "web", Name: "late", Type: "AES-256"}, random(32)),
		Key: &strongroomv1.CreateKMSKeyRequest{Name: "late", Type: "AES-256"},
	})
}

// testREST has an application with REST ask whichever node: one node's import key is
// that of the others, also when that node is gone; what was made is there, and an API
// key that was revoked opens none of them.
func (n *trio) testREST(t *testing.T) {
	a, b, c := n.sites[0], n.sites[1], n.sites[2]
	local, err := client.New(client.Config{Server: "unix:" + a.cfg.LocalSocket})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if _, err := client.Call(t.Context(), local.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "web", Group: FirstGroup, Interface: "rest"}); err != nil {
		t.Fatal(err)
	}
	apiKey, err := client.Call(t.Context(), local.KMS().CreateKMSAPIKey, &strongroomv1.CreateKMSAPIKeyRequest{Application: "web"})
	if err != nil {
		t.Fatal(err)
	}
	at := func(s *site) *restClient {
		return restOf(t, s.cfg.DataDir, s.cfg.APIListen, bearer(string(apiKey.GetKey())))
	}
	to, err := client.Call(t.Context(), at(a).GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if other, err := client.Call(t.Context(), at(b).GetKMSImportKey, &strongroomv1.GetKMSImportKeyRequest{}); err != nil || other.GetId() != to.GetId() {
		t.Errorf("node b has import key %s, %v; node a %s", other.GetId(), err, to.GetId())
	}
	a.stop() // kill -9
	secret := random(32)
	m := &strongroomv1.ImportKMSKeyRequest{
		ImportKey: to.GetId(), Parcel: sealFor(t, to, parcel.ImportContext{Application: "web", Name: "imported", Type: "AES-256"}, secret),
		Key: &strongroomv1.CreateKMSKeyRequest{Name: "imported", Type: "AES-256"},
	}
	id := ""
	eventually(t, "node b imports", func() bool { // while a leader is looked for
		made, err := client.Call(t.Context(), at(b).ImportKMSKey, m)
		id = made.GetId()
		return err == nil
	})
	a.run()
	n.has(c, id, secret)
	eventually(t, "node a has it", func() bool {
		k, err := client.Call(t.Context(), at(a).GetKMSKey, &strongroomv1.GetKMSKeyRequest{Name: "imported"})
		return err == nil && k.GetId() == id
	})
	eventually(t, "the API key is revoked", func() bool {
		_, err := client.Call(t.Context(), local.KMS().RevokeKMSCredential, &strongroomv1.RevokeKMSCredentialRequest{Application: "web", Id: apiKey.GetCredential().GetId()})
		return err == nil || errs.KindOf(err) == errs.NotFound
	})
	for _, s := range n.sites {
		failure(t, "an API key that was revoked, at node "+s.name, at(s).GetKMSKey, &strongroomv1.GetKMSKeyRequest{Id: id}, errs.Denied, apierr.ReasonUnauthenticated)
	}
}

// materialOf returns the bytes of a key or secret in the answer to Get.
func materialOf(item kmip.ResponseBatchItem) ([]byte, error) {
	if s, ok := item.ResponsePayload.(*payloads.GetResponsePayload).Object.(*kmip.SecretData); ok {
		return *s.KeyBlock.KeyValue.Plain.KeyMaterial.Bytes, nil
	}
	return secretOf(item)
}
