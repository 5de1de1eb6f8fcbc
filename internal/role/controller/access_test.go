package controller

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/rule"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// streams are the methods that answer with a stream.
var streams = map[string]bool{
	"/strongroom.v1.TaskService/WatchTask": true, "/strongroom.v1.EventService/WatchEvents": true, "/strongroom.v1.ProviderService/ListOrphanKeys": true,
}

// outcome is what became of an empty call: "unauthenticated", "denied" or
// "admitted" (whatever the method thought of an empty request).
func (s *site) outcome(t *testing.T, transport *http.Transport, procedure, token string) string {
	t.Helper()
	body, kind := "{}", "application/json"
	if streams[procedure] {
		body, kind = "\x00\x00\x00\x00\x02{}", "application/connect+json"
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.cfg.Listen+procedure, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var text []byte
	if streams[procedure] {
		text = make([]byte, 4096) // the first message, or the error; a watch goes on
		n, err := res.Body.Read(text)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		text = text[:n]
	} else if text, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	switch {
	case bytes.Contains(text, []byte(`"code":"unauthenticated"`)):
		return "unauthenticated"
	case bytes.Contains(text, []byte(`"code":"permission_denied"`)):
		return "denied"
	}
	return "admitted"
}

// certified returns a transport that shows a certificate for an identity.
func (s *site) certified(id pki.Identity) *http.Transport {
	s.t.Helper()
	cred, err := s.c.ca.Issue(id, []string{"127.0.0.1"})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.transport(pki.ClientConfig(cred, s.c.ca.Certificate(), s.c.identity()))
}

func (s *site) transport(config *tls.Config) *http.Transport {
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	s.t.Cleanup(transport.CloseIdleConnections)
	return transport
}

// TestEveryMethod calls every method of every service as everybody.
func TestEveryMethod(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cluster("lab")
	h := s.host("lab", "host-1")
	rules, err := rule.Of(
		strongroomv1connect.SessionServiceName, strongroomv1connect.AccessServiceName, strongroomv1connect.ClusterServiceName,
		strongroomv1connect.HostServiceName, strongroomv1connect.DatastoreServiceName, strongroomv1connect.ProviderServiceName,
		strongroomv1connect.VMServiceName, strongroomv1connect.TaskServiceName, strongroomv1connect.EventServiceName,
		strongroomv1connect.EnrollServiceName,
	)
	if err != nil {
		t.Fatal(err)
	}
	for name, roles := range map[string][]string{"nobody": nil, "reader": {access.ReadOnly}, "operator": {access.NoCryptoAdmin}, "root": {access.Administrator}} {
		s.user(name, roles...)
	}
	plain := s.transport(pki.ClientConfig(nil, s.c.ca.Certificate(), s.c.identity()))
	cluster, err := s.c.inv.Cluster(t.Context(), "lab")
	if err != nil {
		t.Fatal(err)
	}
	asHost := s.certified(pki.Identity{Cluster: cluster.ID, Role: pki.Host, Name: h.id})
	asStranger := s.certified(pki.Identity{Cluster: cluster.ID, Role: pki.Host, Name: "no-host"})
	asElsewhere := s.certified(pki.Identity{Cluster: "elsewhere", Role: pki.Host, Name: h.id})
	asClient := s.certified(pki.Identity{Cluster: cluster.ID, Role: pki.Client, Name: "backup"})

	read := func(r rule.Rule) bool {
		return r.Privilege == "System.Read" || r.Privilege == "Cryptographer.ReadKeyServersInfo"
	}
	operators, err := s.c.access.PrivilegesOn(t.Context(), access.Principal{Kind: access.UserPrincipal, Name: "operator"}, access.Root)
	if err != nil {
		t.Fatal(err)
	}
	may := map[string]bool{}
	for _, p := range operators {
		may[string(p)] = true
		if strings.HasPrefix(string(p), "Cryptographer.") {
			t.Errorf("NoCryptoAdmin has %s", p)
		}
	}
	verdict := func(ok bool) string {
		if ok {
			return "admitted"
		}
		return "denied"
	}
	defer s.chatter()()
	for procedure, r := range rules {
		if r.Unauthenticated {
			continue // Login and Join look at the request; they have tests of their own
		}
		for name, c := range map[string]struct {
			transport *http.Transport
			user      string
			want      string
		}{
			"without anything":   {plain, "", "unauthenticated"},
			"user without role":  {plain, "nobody", verdict(r.Authenticated)},
			"ReadOnly":           {plain, "reader", verdict(r.Authenticated || read(r))},
			"NoCryptoAdmin":      {plain, "operator", verdict(r.Authenticated || may[r.Privilege])},
			"Administrator":      {plain, "root", verdict(r.PeerRole == "")},
			"host":               {asHost, "", verdict(r.PeerRole == "host")},
			"unknown host":       {asStranger, "", "denied"},
			"host of elsewhere":  {asElsewhere, "", "denied"},
			"client certificate": {asClient, "", verdict(r.Authenticated)},
		} {
			token := ""
			if c.user != "" && !strings.HasSuffix(procedure, "/Logout") {
				_, token = s.token(c.user, time.Hour)
			} else if c.user != "" {
				continue // it would end the session that the test uses
			}
			if got := s.outcome(t, c.transport, procedure, token); got != c.want {
				t.Errorf("%s as %s: %s, want %s", procedure, name, got, c.want)
			}
			if token != "" {
				if p, err := s.c.access.Authenticate(t.Context(), token); err == nil {
					if err := s.c.access.RevokeToken(t.Context(), p.Token); err != nil {
						t.Fatal(err)
					}
				}
				if got := s.outcome(t, c.transport, procedure, token); got != "denied" && got != "unauthenticated" {
					t.Errorf("%s with a revoked token of %s: %s", procedure, name, got)
				}
			}
		}
	}
	// A controller's certificate is for hosts' agents, not for this API.
	if _, err := s.certified(s.c.identity()).RoundTrip(newRequest(t, s)); err == nil {
		t.Error("a controller's certificate is accepted")
	}
	for _, r := range s.records() {
		if r.Actor == "internal:controller" {
			t.Errorf("%s is recorded as the controller's own doing", r.Action)
		}
	}
}

// chatter posts events until stop is called: who may watch them sees one soon.
func (s *site) chatter() (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				s.c.post(ctx, event.New{Type: event.ClusterCreated, Target: "cluster/lab"})
			}
		}
	}()
	return func() { cancel(); <-ended }
}

func newRequest(t *testing.T, s *site) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.cfg.Listen+"/strongroom.v1.SessionService/WhoAmI", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	return req
}

func TestEncryptedCreateNeedsCrypto(t *testing.T) {
	t.Parallel()
	s, _ := ready(t)
	operator := s.user("operator", access.NoCryptoAdmin)
	_, err := client.Call(t.Context(), operator.VM().CreateVM, &strongroomv1.CreateVMRequest{Name: "web-1", Datastore: "lab", Encrypt: true})
	wantKind(t, err, errs.Denied)
	s.success(client.Call(t.Context(), operator.VM().CreateVM, &strongroomv1.CreateVMRequest{Name: "web-1", Datastore: "lab"}))
}

func TestSessions(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	ann := s.user("ann", access.ReadOnly)
	anonymous := s.as("")
	login := func(user, password string) (*strongroomv1.LoginResponse, error) {
		return client.Call(ctx, anonymous.Session().Login, &strongroomv1.LoginRequest{User: user, Password: []byte(password)})
	}
	_, wrong := login("ann", "not her password")
	_, unknown := login("bob", "not her password")
	if wrong == nil || unknown == nil || wrong.Error() != unknown.Error() || errs.KindOf(wrong) != errs.KindOf(unknown) || errs.HintOf(wrong) != errs.HintOf(unknown) {
		t.Errorf("who exists can be told: %v / %v", wrong, unknown)
	}
	if n := s.events(event.UserLoginFailed, "user/bob"); n != 1 {
		t.Errorf("%d events of the failed login, want one", n)
	}
	session := must[strongroomv1.LoginResponse](t)(login("ann", testPassword))
	in := s.as(session.GetToken())
	me := must[strongroomv1.WhoAmIResponse](t)(client.Call(ctx, in.Session().WhoAmI, &strongroomv1.WhoAmIRequest{}))
	if me.GetPrincipal() != "user:ann" {
		t.Errorf("she is %s", me.GetPrincipal())
	}

	// A life that overflows is no short one.
	_, err := client.Call(ctx, in.Access().CreateToken, &strongroomv1.CreateTokenRequest{LifetimeSeconds: 1<<63 - 1})
	wantKind(t, err, errs.Invalid)

	// A changed password ends the other sessions, not the one it was changed in.
	const newPassword = "another horse, another battery"
	must[strongroomv1.ChangePasswordResponse](t)(client.Call(ctx, in.Access().ChangePassword,
		&strongroomv1.ChangePasswordRequest{OldPassword: []byte(testPassword), NewPassword: []byte(newPassword)}))
	if _, err := client.Call(ctx, in.Session().WhoAmI, &strongroomv1.WhoAmIRequest{}); err != nil {
		t.Errorf("her own session: %v", err)
	}
	_, err = client.Call(ctx, ann.Session().WhoAmI, &strongroomv1.WhoAmIRequest{})
	wantKind(t, err, errs.Denied)
	must[strongroomv1.LogoutResponse](t)(client.Call(ctx, in.Session().Logout, &strongroomv1.LogoutRequest{}))
	_, err = client.Call(ctx, in.Session().WhoAmI, &strongroomv1.WhoAmIRequest{})
	wantKind(t, err, errs.Denied)

	// Who may make users may not give what he does not have.
	if err := s.c.access.PutRole(ctx, access.Role{Name: "Clerk", Privileges: []access.Privilege{"Authorization.ModifyUsers", "System.Read"}}); err != nil {
		t.Fatal(err)
	}
	clerk := s.user("clerk", "Clerk")
	makeUser := func(c *client.Client, name, role string) error {
		_, err := client.Call(ctx, c.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: name, Password: []byte(testPassword), Roles: []string{role}})
		return err
	}
	wantKind(t, makeUser(clerk, "eve", access.Administrator), errs.Denied)
	if err := makeUser(clerk, "carl", "Clerk"); err != nil {
		t.Error(err)
	}
	if err := makeUser(s.admin, "dora", access.Administrator); err != nil {
		t.Error(err)
	}
	s.provider("kp-1")

	// All of it is on record, and no secret is.
	want := map[string]string{
		"SessionService/Login /user/ann success": "anonymous", "SessionService/Login /user/ann denied": "anonymous", "SessionService/Login /user/bob denied": "anonymous",
		"SessionService/Logout / success": "user:ann", "AccessService/ChangePassword / success": "user:ann",
		"AccessService/CreateUser /user/eve denied": "user:clerk", "AccessService/CreateUser /user/carl success": "user:clerk",
		"ProviderService/ExportProvider /provider/kp-1 success": "user:administrator", "provider.export /provider/kp-1 success": "user:administrator",
		"ProviderService/CreateNativeProvider /provider/kp-1 success":  "user:administrator",
		"ProviderService/ConfirmProviderBackup /provider/kp-1 success": "user:administrator",
	}
	for _, r := range s.records() {
		key := r.Action + " " + r.Object + " " + r.Outcome
		if actor, ok := want[key]; ok && r.Actor != actor {
			t.Errorf("%s is recorded as done by %s, not %s", key, r.Actor, actor)
		}
		delete(want, key)
	}
	for key := range want {
		t.Errorf("not on record: %s", key)
	}
	paths, err := filepath.Glob(filepath.Join(s.cfg.DataDir, "audit", "*"))
	if err != nil || len(paths) == 0 {
		t.Fatal(paths, err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{testPassword, newPassword, session.GetToken(), "not her password"} {
			if bytes.Contains(text, []byte(secret)) {
				t.Errorf("%s holds a secret", path)
			}
		}
	}

	// What cannot be put on record is not answered.
	if err := s.c.audit.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Call(ctx, s.admin.Cluster().CreateCluster, &strongroomv1.CreateClusterRequest{Name: "unseen"}); err == nil {
		t.Error("a call that could not be audited succeeded")
	}
	if _, err := client.Call(ctx, s.admin.Cluster().ListClusters, &strongroomv1.ListClustersRequest{}); err != nil {
		t.Errorf("reading: %v", err)
	}
}

func TestJoin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cluster("lab")
	h := s.host("lab", "host-1")
	text := s.joinToken("lab")
	token, err := pki.ParseJoinToken(text)
	if err != nil {
		t.Fatal(err)
	}
	enroll := s.enrollClient(pki.JoinConfig(token.CA, pki.Controller))
	join := func(spoil func(*strongroomv1.JoinRequest)) (*connect.Response[strongroomv1.JoinResponse], error) {
		req, _, _ := newJoin(t, text, "host-2", "127.0.0.1:1")
		spoil(req)
		return enroll.Join(t.Context(), connect.NewRequest(req))
	}
	for name, c := range map[string]struct {
		spoil func(*strongroomv1.JoinRequest)
		want  connect.Code
	}{
		"no token":     {func(r *strongroomv1.JoinRequest) { r.Token = "" }, connect.CodeInvalidArgument},
		"other secret": {func(r *strongroomv1.JoinRequest) { other := token; other.Secret[0] ^= 1; r.Token = other.String() }, connect.CodePermissionDenied},
		"other secret, name taken": {func(r *strongroomv1.JoinRequest) {
			other := token
			other.Secret[0] ^= 1
			r.Token, r.Name = other.String(), "host-1"
		}, connect.CodePermissionDenied},
		"name taken":      {func(r *strongroomv1.JoinRequest) { r.Name = "host-1" }, connect.CodeAlreadyExists},
		"bad name":        {func(r *strongroomv1.JoinRequest) { r.Name = "../host" }, connect.CodeInvalidArgument},
		"short parcelkey": {func(r *strongroomv1.JoinRequest) { r.ParcelPublicKey = r.ParcelPublicKey[1:] }, connect.CodeInvalidArgument},
		"bad address":     {func(r *strongroomv1.JoinRequest) { r.Address = "host-2" }, connect.CodeInvalidArgument},
	} {
		if _, err := join(c.spoil); connect.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// None of that used the token up; a join does.
	if _, err := join(func(*strongroomv1.JoinRequest) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := join(func(r *strongroomv1.JoinRequest) { r.Name = "host-3" }); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("the token was taken twice: %v", err)
	}
	text = s.joinToken("lab")
	if _, err := join(func(r *strongroomv1.JoinRequest) { r.Name, r.Csr = "host-3", r.Csr[1:] }); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("bad certificate request: %v", err)
	}
	// The controller of another CA is not spoken to.
	other := token.CA
	other[0] ^= 1
	req, _, _ := newJoin(t, text, "host-3", "127.0.0.1:1")
	if _, err := s.enrollClient(pki.JoinConfig(other, pki.Controller)).Join(t.Context(), connect.NewRequest(req)); err == nil || !strings.Contains(err.Error(), "does not belong to the CA") {
		t.Errorf("wrong CA fingerprint: %v", err)
	}

	renewal, _, _ := newJoin(t, text, "host-1", h.address)
	renew := func() (*connect.Response[strongroomv1.RenewCertificateResponse], error) {
		return h.enroll.RenewCertificate(t.Context(), connect.NewRequest(&strongroomv1.RenewCertificateRequest{Csr: renewal.GetCsr()}))
	}
	res, err := renew()
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Msg.GetCertificate()) == 0 {
		t.Error("no new certificate")
	}
	must[strongroomv1.RemoveHostResponse](t)(client.Call(t.Context(), s.admin.Host().RemoveHost, &strongroomv1.RemoveHostRequest{Name: "host-1"}))
	if _, err := renew(); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("renewal for a removed host: %v", err)
	}
	if _, err := h.enroll.Heartbeat(t.Context(), connect.NewRequest(h.heartbeat())); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("heartbeat of a removed host: %v", err)
	}
}
