package kms

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"go.uber.org/goleak"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/crypto/clientcert"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		child(dir)
	}
	goleak.VerifyTestMain(m)
}

func configOf(t testing.TB, dir string) Config {
	t.Helper()
	cfg, err := ParseConfig(fmt.Appendf(nil, "data_dir = %q\nlisten = \"127.0.0.1:0\"\nadvertise = \"127.0.0.1:5696\"\nmetrics_listen = \"127.0.0.1:0\"\napi_listen = \"127.0.0.1:0\"\napi_advertise = \"127.0.0.1:5700\"\n", dir))
	if err != nil {
		t.Fatal(err)
	}
	cfg.hashing = access.Hashing{Time: 1, MemoryKiB: 64, Threads: 1}
	cfg.LocalSocket = filepath.Join(socketDir(t), "s")
	return cfg
}

// socketDir is a folder with a short name: a socket's path must be short.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// bench is a KMS of a test.
type bench struct {
	*KMS
	addr string
	stop func()
}

// start runs a KMS in dir until the test ends or stop is called.
func start(t testing.TB, dir string) *bench {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan *KMS, 1), make(chan error, 1)
	go func() {
		ended <- RunReady(ctx, configOf(t, dir), slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})), func(k *KMS) error {
			if err := k.EnsureFirstApplication(ctx); err != nil {
				return err
			}
			ready <- k
			return nil
		})
	}()
	b := &bench{}
	select {
	case b.KMS = <-ready:
	case err := <-ended:
		cancel()
		t.Fatal("the KMS did not start: ", err)
	}
	b.addr = b.Address().String()
	stopped := false
	b.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(b.stop)
	return b
}

// admin is the client of the local socket.
func (b *bench) admin(t testing.TB) strongroomv1connect.KMSServiceClient {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", b.cfg.LocalSocket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return strongroomv1connect.NewKMSServiceClient(&http.Client{Transport: transport}, "http://kms")
}

// tlsOf is the TLS configuration of a client that trusts the KMS in dir and has
// those certificates.
func tlsOf(t testing.TB, dir string, certificates ...tls.Certificate) *tls.Config {
	t.Helper()
	ca, err := os.ReadFile(filepath.Join(dir, caCertName))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("ca.pem holds no certificate")
	}
	return &tls.Config{RootCAs: roots, Certificates: certificates}
}

// first is the certificate of the first application.
func first(t testing.TB, dir string) tls.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.pem"), filepath.Join(dir, "client.key"))
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// dial opens a connection that the test closes.
func dial(t testing.TB, addr string, cfg *tls.Config) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// exchange sends a message and returns the answer.
func exchange(conn net.Conn, m *kmip.RequestMessage) (*kmip.ResponseMessage, error) {
	if _, err := conn.Write(ttlv.MarshalTTLV(m)); err != nil {
		return nil, err
	}
	b := make([]byte, 8)
	if _, err := io.ReadFull(conn, b); err != nil {
		return nil, err
	}
	b = append(b, make([]byte, binary.BigEndian.Uint32(b[4:]))...)
	if _, err := io.ReadFull(conn, b[8:]); err != nil {
		return nil, err
	}
	var out kmip.ResponseMessage
	return &out, ttlv.UnmarshalTTLV(b, &out)
}

// ask does one operation and returns its answer's only item.
func ask(t testing.TB, conn net.Conn, edit func(*kmip.RequestHeader), p kmip.OperationPayload) kmip.ResponseBatchItem {
	t.Helper()
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	if edit != nil {
		edit(&m.Header)
	}
	conn.SetDeadline(time.Now().Add(patience)) // for this answer, however many there were
	r, err := exchange(conn, &m)
	if err != nil {
		t.Fatal(err)
	}
	return r.BatchItem[0]
}

func newAES(name string) *payloads.CreateRequestPayload {
	list := []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
	}
	if name != "" {
		list = append(list, kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}})
	}
	return &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: list}}
}

// secretOf returns the key in the answer to a Get.
func secretOf(item kmip.ResponseBatchItem) ([]byte, error) {
	if err := item.Err(); err != nil {
		return nil, err
	}
	key, ok := item.ResponsePayload.(*payloads.GetResponsePayload).Object.(*kmip.SymmetricKey)
	if !ok || key.KeyBlock.KeyValue == nil || key.KeyBlock.KeyValue.Plain == nil || key.KeyBlock.KeyValue.Plain.KeyMaterial.Bytes == nil {
		return nil, errors.New("the answer holds no key")
	}
	return *key.KeyBlock.KeyValue.Plain.KeyMaterial.Bytes, nil
}

// user sets user name and password in a request.
func user(name, password string) func(*kmip.RequestHeader) {
	return func(h *kmip.RequestHeader) {
		h.Authentication = &kmip.Authentication{Credential: kmip.Credential{
			CredentialType:  kmip.CredentialTypeUsernameAndPassword,
			CredentialValue: kmip.CredentialValue{UserPassword: &kmip.CredentialValueUserPassword{Username: name, Password: password}},
		}}
	}
}

// TestApplications is the life of an application: made, used, limited, given
// another credential, revoked.
func TestApplications(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	ctx, admin := t.Context(), b.admin(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(apierr.From(err))
		}
	}
	wantKind := func(what string, err error, kind errs.Kind) {
		t.Helper()
		if got := errs.KindOf(apierr.From(err)); got != kind {
			t.Errorf("%s: %v (%v), want %v", what, err, got, kind)
		}
	}
	_, err := admin.CreateKMSApplication(ctx, connect.NewRequest(&strongroomv1.CreateKMSApplicationRequest{Name: "vcenter", Group: "vsphere"}))
	wantKind("no such group", err, errs.NotFound)
	for name, policy := range map[string]*strongroomv1.KMSPolicy{
		"operation": {Operations: []string{"Create", "Explode"}}, "type": {KeyTypes: []string{"AES-x"}},
	} {
		_, err = admin.CreateKMSGroup(ctx, connect.NewRequest(&strongroomv1.CreateKMSGroupRequest{Name: "vsphere", Policy: policy}))
		wantKind(name, err, errs.Invalid)
	}
	_, err = admin.CreateKMSGroup(ctx, connect.NewRequest(&strongroomv1.CreateKMSGroupRequest{Name: "vsphere", Title: "vSphere", Policy: &strongroomv1.KMSPolicy{KeyTypes: []string{"aes-256"}}}))
	must(err)
	_, err = admin.CreateKMSGroup(ctx, connect.NewRequest(&strongroomv1.CreateKMSGroupRequest{Name: "vsphere"}))
	wantKind("twice", err, errs.Exists)
	_, err = admin.CreateKMSApplication(ctx, connect.NewRequest(&strongroomv1.CreateKMSApplicationRequest{Name: "vcenter", Group: "vsphere"}))
	must(err)
	made, err := admin.CreateKMSPassword(ctx, connect.NewRequest(&strongroomv1.CreateKMSPasswordRequest{Application: "vcenter"}))
	must(err)
	password := string(made.Msg.GetPassword())

	t.Log("a password alone, over a connection without a certificate")
	conn := dial(t, b.addr, tlsOf(t, dir))
	created := ask(t, conn, user("vcenter", password), newAES("vm-1"))
	if created.Err() != nil {
		t.Fatal(created.Err())
	}
	id := created.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	get := &payloads.GetRequestPayload{UniqueIdentifier: id}
	for what, edit := range map[string]func(*kmip.RequestHeader){
		"no credential": nil, "wrong password": user("vcenter", "x"+password[1:]), "no such user": user("nobody", password), "empty": user("vcenter", ""),
	} {
		if item := ask(t, conn, edit, get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
			t.Errorf("%s: reason %v", what, item.ResultReason)
		}
	}

	t.Log("a certificate that is known by itself")
	der, certPEM, keyPEM, err := clientcert.New("from elsewhere", time.Hour)
	must(err)
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	must(err)
	certified := dial(t, b.addr, tlsOf(t, dir, pair))
	if item := ask(t, certified, nil, get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("a certificate that is not known: reason %v", item.ResultReason)
	}
	trusted, err := admin.AddKMSCertificate(ctx, connect.NewRequest(&strongroomv1.AddKMSCertificateRequest{Application: "vcenter", Certificate: der}))
	must(err)
	_, err = admin.AddKMSCertificate(ctx, connect.NewRequest(&strongroomv1.AddKMSCertificateRequest{Application: FirstApplication, Certificate: der}))
	wantKind("another's certificate", err, errs.Exists)
	secret, err := secretOf(ask(t, certified, nil, get))
	must(err)
	if again, err := secretOf(ask(t, certified, user("vcenter", password), get)); err != nil || string(again) != string(secret) {
		t.Errorf("both credentials: %v", err)
	}
	other := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	if item := ask(t, other, user("vcenter", password), get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("the certificate of one, the password of another: reason %v", item.ResultReason)
	}
	if item := ask(t, other, nil, get); item.ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("another group's key: reason %v", item.ResultReason)
	}

	t.Log("the group's policy")
	short := newAES("")
	short.TemplateAttribute.Attribute[1].AttributeValue = int32(128)
	if item := ask(t, certified, nil, short); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("an AES-128 key: reason %v", item.ResultReason)
	}
	_, err = admin.SetKMSGroupPolicy(ctx, connect.NewRequest(&strongroomv1.SetKMSGroupPolicyRequest{Name: "vsphere", Policy: &strongroomv1.KMSPolicy{Operations: []string{"Locate"}}}))
	must(err)
	if item := ask(t, certified, nil, get); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("an operation that is not allowed: reason %v", item.ResultReason)
	}
	_, err = admin.SetKMSGroupPolicy(ctx, connect.NewRequest(&strongroomv1.SetKMSGroupPolicyRequest{Name: "vsphere"}))
	must(err)

	t.Log("revoked, on a connection that is open")
	_, err = admin.RevokeKMSCredential(ctx, connect.NewRequest(&strongroomv1.RevokeKMSCredentialRequest{Application: "vcenter", Id: trusted.Msg.GetId()}))
	must(err)
	if item := ask(t, certified, nil, get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("a revoked certificate: reason %v", item.ResultReason)
	}
	_, err = admin.SetKMSApplicationDisabled(ctx, connect.NewRequest(&strongroomv1.SetKMSApplicationDisabledRequest{Name: "vcenter", Disabled: true}))
	must(err)
	if item := ask(t, conn, user("vcenter", password), get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("a disabled application: reason %v", item.ResultReason)
	}
	_, err = admin.SetKMSApplicationDisabled(ctx, connect.NewRequest(&strongroomv1.SetKMSApplicationDisabledRequest{Name: "vcenter"}))
	must(err)

	t.Log("a restart; and all of it is on record")
	b.stop()
	b = start(t, dir)
	conn = dial(t, b.addr, tlsOf(t, dir))
	if again, err := secretOf(ask(t, conn, user("vcenter", password), get)); err != nil || string(again) != string(secret) {
		t.Errorf("after a restart: %v", err)
	}
	_, err = b.admin(t).DeleteKMSApplication(ctx, connect.NewRequest(&strongroomv1.DeleteKMSApplicationRequest{Name: "vcenter"}))
	must(err)
	if item := ask(t, conn, user("vcenter", password), get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("a deleted application: reason %v", item.ResultReason)
	}
	b.stop()
	b.checkAudit(t, "application:vcenter kmip.Create group/vsphere/key/"+id+" success", "application:vcenter kmip.Get group/vsphere/key/"+id+" success",
		"anonymous kmip.connect kms denied", "local administrator KMSService/RevokeKMSCredential application/vcenter success", "application:vcenter kmip.Create group/vsphere denied")
	text, err := readTree(dir)
	must(err)
	if strings.Contains(text, password) || strings.Contains(text, string(secret)) {
		t.Error("a secret is on disk in the clear")
	}
}

// readTree returns the contents of all files below dir.
func readTree(dir string) (string, error) {
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		all.Write(b)
		return err
	})
	return all.String(), err
}

// auditKey is the public key of the audit log.
func (b *bench) auditKey(t *testing.T) ed25519.PublicKey {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(b.cfg.DataDir, auditKeyName))
	if err != nil {
		t.Fatal(err)
	}
	key, err := publicKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// checkAudit verifies the log of a KMS that has stopped, and that it has those
// records ("actor action object outcome").
func (b *bench) checkAudit(t *testing.T, want ...string) {
	t.Helper()
	seen := map[string]bool{}
	if _, err := audit.Verify(filepath.Join(b.cfg.DataDir, "audit"), audit.Expect{Key: b.auditKey(t)}, func(r audit.Record) error {
		seen[strings.Join([]string{r.Actor, r.Action, r.Object, r.Outcome}, " ")] = true
		return nil
	}); err != nil {
		t.Errorf("audit log: %v", err)
	}
	for _, w := range want {
		if !seen[w] {
			t.Errorf("not on record: %s", w)
		}
	}
}
