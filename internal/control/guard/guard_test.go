package guard_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"strongroom/api/apierr"
	"strongroom/api/rule"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const password = "a long password of a user"

// role is a role with users and nothing else.
type role struct {
	t       *testing.T
	access  *access.Control
	server  *httptest.Server
	mu      sync.Mutex
	records []string // "actor action object outcome"
	events  []string // "type principal"
	full    error    // what Record returns
}

func newRole(t *testing.T) *role {
	t.Helper()
	db, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(t.TempDir(), "db"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	r := &role{t: t}
	if r.access, err = access.New(access.Config{DB: db, Hashing: access.Hashing{Time: 1, MemoryKiB: 64, Threads: 1}}); err != nil {
		t.Fatal(err)
	}
	rules, err := rule.Of(strongroomv1connect.SessionServiceName, strongroomv1connect.AccessServiceName)
	if err != nil {
		t.Fatal(err)
	}
	delete(rules, strongroomv1connect.AccessServiceListRolesProcedure) // forgotten, as it were
	g := guard.New(guard.Config{
		Rules: rules, Access: r.access, Self: "the role",
		Identify: func(ctx context.Context, header http.Header) (guard.Caller, error) {
			if header.Get("X-Host") != "" {
				return guard.Caller{Host: "h"}, nil
			}
			if who, ok, err := guard.ByToken(ctx, r.access, header); ok {
				return who, err
			}
			return guard.Caller{}, guard.NotLoggedIn()
		},
		Subject: func(_ context.Context, _ string, message any) guard.Subject {
			if m, ok := message.(interface{ GetName() string }); ok {
				return guard.Subject{On: access.Root, Name: "user/" + m.GetName()}
			}
			return guard.Subject{On: access.Root, Name: "everything"}
		},
		Record: func(e audit.Entry) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.records = append(r.records, strings.Join([]string{e.Actor, e.Action, e.Object, e.Outcome}, " "))
			return r.full
		},
	})
	users := guard.Users{Access: r.access, Version: "7", Post: func(ctx context.Context, n event.New) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if n.Principal == "" {
			n.Principal = guard.CallerOf(ctx).Name()
		}
		r.events = append(r.events, n.Type+" "+n.Principal)
	}}
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewSessionServiceHandler(users.Sessions(), connect.WithInterceptors(g)))
	mux.Handle(strongroomv1connect.NewAccessServiceHandler(users.Accounts(), connect.WithInterceptors(g)))
	r.server = httptest.NewServer(guard.WithConnection(mux))
	t.Cleanup(r.server.Close)
	return r
}

func (r *role) user(name string, roles ...string) {
	r.t.Helper()
	if err := r.access.CreateUser(r.t.Context(), name, []byte(password), roles); err != nil {
		r.t.Fatal(err)
	}
}

// call makes a call with headers, given as names and values.
func call[Req, Res any](t *testing.T, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), m *Req, header ...string) (*Res, error) {
	req := connect.NewRequest(m)
	for i := 0; i < len(header); i += 2 {
		req.Header().Set(header[i], header[i+1])
	}
	res, err := method(t.Context(), req)
	if err != nil {
		return nil, apierr.From(err)
	}
	return res.Msg, nil
}

func (r *role) sessions() strongroomv1connect.SessionServiceClient {
	return strongroomv1connect.NewSessionServiceClient(r.server.Client(), r.server.URL)
}

func (r *role) accounts() strongroomv1connect.AccessServiceClient {
	return strongroomv1connect.NewAccessServiceClient(r.server.Client(), r.server.URL)
}

func (r *role) login(name string) []string {
	r.t.Helper()
	res, err := call(r.t, r.sessions().Login, &strongroomv1.LoginRequest{User: name, Password: []byte(password)})
	if err != nil {
		r.t.Fatal(err)
	}
	return []string{"Authorization", "Bearer " + res.GetToken()}
}

func (r *role) wantRecord(want string) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, got := range r.records {
		if got == want {
			return
		}
	}
	r.t.Errorf("not on record: %s; but: %q", want, r.records)
}

// TestWhoMayCall calls as everybody.
func TestWhoMayCall(t *testing.T) {
	t.Parallel()
	r := newRole(t)
	r.user("root", access.Administrator)
	r.user("reader", access.ReadOnly)
	root, reader := r.login("root"), r.login("reader")
	create := &strongroomv1.CreateUserRequest{Name: "new", Password: []byte(password), Roles: []string{access.ReadOnly}}
	for what, c := range map[string]struct {
		header []string
		reason string
	}{
		"nobody":          {nil, apierr.ReasonUnauthenticated},
		"a made-up token": {[]string{"Authorization", "Bearer strongroom_0123456789abcdef_" + strings.Repeat("A", 43)}, "InvalidLogin"},
		"no privilege":    {reader, "NoPermission"},
		"a host":          {[]string{"X-Host", "h"}, ""},
	} {
		_, err := call(t, r.accounts().CreateUser, create, c.header...)
		if told := (*errs.Error)(nil); errs.KindOf(err) != errs.Denied || !errors.As(err, &told) || told.Reason != c.reason {
			t.Errorf("%s: %v", what, err)
		}
	}
	r.wantRecord("anonymous AccessService/CreateUser user/new denied")
	r.wantRecord("user:reader AccessService/CreateUser user/new denied")
	if _, err := call(t, r.accounts().ListRoles, &strongroomv1.ListRolesRequest{}, root...); errs.KindOf(err) != errs.Denied {
		t.Errorf("a method without a rule: %v", err)
	}
	if _, err := call(t, r.accounts().CreateUser, create, root...); err != nil {
		t.Fatal(err)
	}
	r.wantRecord("user:root AccessService/CreateUser user/new success")
	if _, err := call(t, r.accounts().CreateUser, create, root...); errs.KindOf(err) != errs.Exists {
		t.Errorf("a user that exists: %v", err)
	}
	r.wantRecord("user:root AccessService/CreateUser user/new error")

	// What cannot be put on record fails.
	r.mu.Lock()
	r.full = errs.New(errs.NoSpace, "full")
	r.mu.Unlock()
	if _, err := call(t, r.accounts().DeleteUser, &strongroomv1.DeleteUserRequest{Name: "new"}, root...); errs.KindOf(err) != errs.NoSpace {
		t.Errorf("a call that cannot be put on record: %v", err)
	}
}

// TestUsers is the life of a user: made by who may give its roles, coming in,
// changing its password, which ends its other sessions, going out.
func TestUsers(t *testing.T) {
	t.Parallel()
	r := newRole(t)
	r.user("root", access.Administrator)
	if err := r.access.PutRole(t.Context(), access.Role{Name: "HR", Privileges: []access.Privilege{"Authorization.ModifyUsers"}}); err != nil {
		t.Fatal(err)
	}
	r.user("hr", "HR")
	hr := r.login("hr")
	if _, err := call(t, r.accounts().CreateUser, &strongroomv1.CreateUserRequest{Name: "x", Password: []byte(password), Roles: []string{access.Administrator}}, hr...); errs.KindOf(err) != errs.Denied {
		t.Errorf("who may make users made an administrator: %v", err)
	}
	if _, err := call(t, r.accounts().CreateUser, &strongroomv1.CreateUserRequest{Name: "x", Password: []byte(password), Roles: []string{"HR"}}, hr...); err != nil {
		t.Fatal(err)
	}
	x, other := r.login("x"), r.login("x")
	me, err := call(t, r.sessions().WhoAmI, &strongroomv1.WhoAmIRequest{}, x...)
	if err != nil || me.GetPrincipal() != "user:x" || len(me.GetPrivileges()) != 1 || me.GetServerVersion() != "7" {
		t.Errorf("who am I: %v, %v", me, err)
	}
	if _, err := call(t, r.accounts().ChangePassword, &strongroomv1.ChangePasswordRequest{OldPassword: []byte("wrong"), NewPassword: []byte(password + "2")}, x...); errs.KindOf(err) != errs.Denied {
		t.Errorf("a wrong old password: %v", err)
	}
	if _, err := call(t, r.accounts().ChangePassword, &strongroomv1.ChangePasswordRequest{OldPassword: []byte(password), NewPassword: []byte(password + "2")}, x...); err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, r.sessions().WhoAmI, &strongroomv1.WhoAmIRequest{}, other...); errs.KindOf(err) != errs.Denied {
		t.Errorf("a session from before the password was changed: %v", err)
	}
	for what, life := range map[string]int64{"negative": -1, "too long": int64(access.MaxTokenLife/time.Second) + 1} {
		if _, err := call(t, r.accounts().CreateToken, &strongroomv1.CreateTokenRequest{LifetimeSeconds: life}, x...); errs.KindOf(err) != errs.Invalid {
			t.Errorf("a token with a life that is %s: %v", what, err)
		}
	}
	token, err := call(t, r.accounts().CreateToken, &strongroomv1.CreateTokenRequest{Description: "ci"}, x...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, r.sessions().Logout, &strongroomv1.LogoutRequest{}, x...); err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, r.sessions().WhoAmI, &strongroomv1.WhoAmIRequest{}, x...); errs.KindOf(err) != errs.Denied {
		t.Errorf("a session that was ended: %v", err)
	}
	if _, err := call(t, r.sessions().WhoAmI, &strongroomv1.WhoAmIRequest{}, "Authorization", "Bearer "+token.GetToken()); err != nil {
		t.Errorf("an API token: %v", err)
	}
	// Locked out, at once, and in again.
	root := r.login("root")
	if u, err := call(t, r.accounts().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: "hr", Disabled: true}, root...); err != nil || !u.GetDisabled() {
		t.Errorf("disabled: %v, %v", u, err)
	}
	if _, err := call(t, r.sessions().WhoAmI, &strongroomv1.WhoAmIRequest{}, hr...); errs.KindOf(err) != errs.Denied {
		t.Errorf("a session of a user who is disabled: %v", err)
	}
	if u, err := call(t, r.accounts().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: "hr"}, root...); err != nil || u.GetDisabled() {
		t.Errorf("enabled: %v, %v", u, err)
	}
	if _, err := call(t, r.sessions().WhoAmI, &strongroomv1.WhoAmIRequest{}, hr...); errs.KindOf(err) != errs.Denied {
		t.Errorf("a session from before its user was disabled: %v", err)
	}
	r.login("hr")
	if _, err := call(t, r.accounts().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: "root", Disabled: true}, root...); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("the last administrator disabled: %v", err)
	}
	if list, err := call(t, r.accounts().ListUsers, &strongroomv1.ListUsersRequest{}, root...); err != nil || len(list.GetUsers()) != 3 {
		t.Errorf("users: %v, %v", list, err)
	}
	// Guessing is slowed down.
	var last error
	for range 6 {
		_, last = call(t, r.sessions().Login, &strongroomv1.LoginRequest{User: "x", Password: []byte("wrong")})
	}
	if errs.KindOf(last) != errs.Unavailable {
		t.Errorf("a sixth wrong password: %v", last)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	all := strings.Join(r.events, "\n")
	for _, want := range []string{event.UserLoggedIn + " user:x", event.UserCreated + " user:hr", event.UserPasswordChanged + " user:x", event.UserLoginFailed + " anonymous"} {
		if !strings.Contains(all, want) {
			t.Errorf("no event %q: %s", want, all)
		}
	}
}
