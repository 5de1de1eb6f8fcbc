package kms

import (
	"bytes"
	"crypto/ed25519"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/guard"
	"strongroom/internal/errs"
)

// person is a user of a KMS's API.
type person struct {
	*client.Client
	name     string
	password string
}

// login returns a client of the API at server, trusting ca.pem in dir.
func login(t testing.TB, server, dir, name, password string) *person {
	t.Helper()
	p, err := tryLogin(t, server, dir, name, password)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tryLogin is login at a server that may be looking for a leader.
func tryLogin(t testing.TB, server, dir, name, password string) (*person, error) {
	t.Helper()
	ca := caOf(t, dir)
	dial := func(token string) *client.Client {
		c, err := client.New(client.Config{Server: "https://" + server, CA: ca, Token: token})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	res, err := client.Call(t.Context(), dial("").Session().Login, &strongroomv1.LoginRequest{User: name, Password: []byte(password)})
	if err != nil {
		return nil, err
	}
	return &person{dial(res.GetToken()), name, password}, nil
}

// caOf returns the authority of the KMS in dir.
func caOf(t testing.TB, dir string) []byte {
	t.Helper()
	ca, err := os.ReadFile(filepath.Join(dir, caCertName))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// administrator logs in as the first user.
func (b *bench) administrator(t testing.TB) *person {
	t.Helper()
	password, err := os.ReadFile(filepath.Join(b.cfg.DataDir, FirstPasswordName))
	if err != nil {
		t.Fatal(err)
	}
	return login(t, b.apiAddress.String(), b.cfg.DataDir, access.FirstUser, string(password))
}

// person makes a user with roles; one that owns its password has changed it.
func (b *bench) person(t testing.TB, name string, own bool, roles ...string) *person {
	t.Helper()
	return newPerson(t, b.cfg.LocalSocket, b.apiAddress.String(), b.cfg.DataDir, name, own, roles...)
}

func newPerson(t testing.TB, socket, server, dir, name string, own bool, roles ...string) *person {
	t.Helper()
	local, err := client.New(client.Config{Server: "unix:" + socket})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	given := "given to " + name + " at first"
	if _, err := client.Call(t.Context(), local.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: name, Password: []byte(given), Roles: roles}); err != nil {
		t.Fatal(err)
	}
	p := login(t, server, dir, name, given)
	if own {
		p.change(t, "known to "+name+" alone")
	}
	return p
}

func (p *person) change(t testing.TB, password string) {
	t.Helper()
	if _, err := client.Call(t.Context(), p.Access().ChangePassword, &strongroomv1.ChangePasswordRequest{OldPassword: []byte(p.password), NewPassword: []byte(password)}); err != nil {
		t.Fatal(err)
	}
	p.password = password
}

// TestEveryMethod calls every method as everybody, over the network and on the
// local socket.
func TestEveryMethod(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	rules, err := serviceRules()
	if err != nil {
		t.Fatal(err)
	}
	admin := b.administrator(t)
	tokenOf := func(p *person) string {
		res, err := client.Call(t.Context(), p.Access().CreateToken, &strongroomv1.CreateTokenRequest{Description: "test"})
		if err != nil {
			t.Fatal(err)
		}
		return res.GetToken()
	}
	tokens := map[string]string{
		"nobody": "", "administrator": tokenOf(admin), "reader": tokenOf(b.person(t, "reader", false, access.ReadOnly)),
		"custodian": tokenOf(b.person(t, "custodian", false, access.KeyCustodian)),
	}
	transport := &http.Transport{TLSClientConfig: tlsOf(t, dir), ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	outcome := func(procedure, token string) string {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+b.apiAddress.String()+procedure, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		res, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case bytes.Contains(text, []byte(`"code":"unauthenticated"`)):
			return "unauthenticated"
		case bytes.Contains(text, []byte("lacks the privilege")):
			return "denied"
		case bytes.Contains(text, []byte("a KMS cannot do this")):
			return "absent"
		}
		return "admitted"
	}
	absent := func(procedure string) bool {
		for _, service := range []string{"KMSRoot", "KMSCluster", "KMSBackup", "Provider", "VM", "Host", "Cluster"} {
			if strings.Contains(procedure, "."+service+"Service/") {
				return true
			}
		}
		return false
	}
	for procedure, r := range rules {
		if strings.HasSuffix(procedure, "/Login") || strings.HasSuffix(procedure, "/Logout") || strings.HasSuffix(procedure, "/ListOrphanKeys") || strings.HasSuffix(procedure, "/BackupKMS") {
			continue // open to all; ends the session; streams
		}
		for who, token := range tokens {
			want := "admitted"
			reads := r.Privilege == "System.Read" || r.Privilege == "Cryptographer.ReadKeyServersInfo"
			switch {
			case who == "nobody":
				want = "unauthenticated"
			case who == "administrator", r.Authenticated, reads, who == "custodian" && r.Privilege == "KeyServer.ApproveOperations":
				if absent(procedure) {
					want = "absent"
				}
			default:
				want = "denied"
			}
			if got := outcome(procedure, token); got != want {
				t.Errorf("%s by %s: %s, want %s", procedure, who, got, want)
			}
		}
	}
}

// TestUsers: the first administrator comes in with the password in a file, of
// mode 0600, makes others, and all are there after a restart.
func TestUsers(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	info, err := os.Stat(filepath.Join(dir, FirstPasswordName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the first password's file: %v, %v", info, err)
	}
	admin := b.administrator(t)
	if _, err := client.Call(t.Context(), admin.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "g"}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Call(t.Context(), admin.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "x", Password: []byte("a long password"), Roles: []string{access.NoCryptoAdmin}}); errs.KindOf(err) != errs.NotFound {
		t.Errorf("a controller's role: %v", err)
	}
	reader := b.person(t, "reader", true, access.ReadOnly)
	if _, err := client.Call(t.Context(), reader.KMS().GetKMSGroup, &strongroomv1.GetKMSGroupRequest{Name: "g"}); err != nil {
		t.Error(err)
	}
	if _, err := client.Call(t.Context(), reader.KMS().SetKMSGroupQuota, &strongroomv1.SetKMSGroupQuotaRequest{Name: "g"}); errs.KindOf(err) != errs.Denied {
		t.Errorf("a reader changes a quota: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, FirstPasswordName)); err != nil {
		t.Fatal(err)
	}
	b.stop()
	b = start(t, dir)
	if _, err := os.Stat(filepath.Join(dir, FirstPasswordName)); !os.IsNotExist(err) {
		t.Error("there is a first administrator again")
	}
	login(t, b.apiAddress.String(), dir, access.FirstUser, admin.password)
	again := login(t, b.apiAddress.String(), dir, "reader", reader.password)
	who, err := client.Call(t.Context(), again.Session().WhoAmI, &strongroomv1.WhoAmIRequest{})
	if err != nil || who.GetPrincipal() != "user:reader" {
		t.Errorf("who am I: %v, %v", who, err)
	}
	b.stop()
	b.checkAudit(t, "user:administrator KMSService/CreateKMSGroup group/g success", "local administrator AccessService/CreateUser user/reader success",
		"user:reader KMSService/SetKMSGroupQuota group/g denied", "user:reader AccessService/ChangePassword kms success", "anonymous SessionService/Login user/reader success")
}

// local is the client of the approvals on a local socket.
func (b *bench) local(t testing.TB) *client.Client {
	t.Helper()
	c, err := client.New(client.Config{Server: "unix:" + b.cfg.LocalSocket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestStrangersFillNoDisk: of the calls of strangers that fail in a second some
// are on record, whatever made them fail, and those that succeed.
func TestStrangersFillNoDisk(t *testing.T) {
	t.Parallel()
	_, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Dir: filepath.Join(t.TempDir(), "audit"), Signer: signer})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	now := time.Now()
	k := &KMS{metrics: newMetrics(), audit: log, now: func() time.Time { return now }}
	record := func(outcome string) {
		t.Helper()
		e := audit.Entry{Actor: guard.Anonymous, Action: "SessionService/Login", Object: k.subjectOf(t.Context(), "", &strongroomv1.LoginRequest{User: strings.Repeat("\u00e4", 500)}).Name, Outcome: outcome}
		if err := k.recordCall(e); err != nil {
			t.Fatal(err)
		}
	}
	for range refusedPerSecond {
		record(audit.Denied)
		record(audit.Failed)
	}
	record(audit.Success)
	if got := log.Head().Seq; got != refusedPerSecond+1 {
		t.Errorf("%d are on record, want %d", got, refusedPerSecond+1)
	}
	now = now.Add(time.Second)
	record(audit.Denied)
	if got := log.Head().Seq; got != refusedPerSecond+2 {
		t.Errorf("a second later %d are on record, want %d", got, refusedPerSecond+2)
	}
}
