package access_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/access"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// quick is the cheapest hashing there is: tests are about logic.
var quick = access.Hashing{Time: 1, MemoryKiB: 8, Threads: 1}

func open(t *testing.T) (*access.Control, *store.DB) {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c, err := access.New(access.Config{DB: db, Hashing: quick})
	if err != nil {
		t.Fatal(err)
	}
	return c, db
}

// withAdmin returns a control whose first administrator is there, and his
// password.
func withAdmin(t *testing.T) (*access.Control, string) {
	t.Helper()
	c, _ := open(t)
	password := ""
	if _, err := c.EnsureAdministrator(t.Context(), func(_ string, p []byte) error { password = string(p); return nil }); err != nil {
		t.Fatal(err)
	}
	return c, password
}

const goodPassword = "correct horse battery"

// peer is where tests log in from.
const peer = "192.0.2.1:1234"

func create(t *testing.T, c *access.Control, name string, roles ...string) access.Principal {
	t.Helper()
	if err := c.CreateUser(t.Context(), name, []byte(goodPassword), roles); err != nil {
		t.Fatal(err)
	}
	return access.Principal{Kind: access.UserPrincipal, Name: name}
}

func wantKind(t *testing.T, what string, err error, want errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(err) != want {
		t.Errorf("%s: %v, want kind %v", what, err, want)
	}
}

func TestFirstAdministrator(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := open(t)
	boom := errors.New("disk full")
	var kept []byte
	if made, err := c.EnsureAdministrator(ctx, func(string, []byte) error { return boom }); made || !errors.Is(err, boom) {
		t.Fatalf("with failed delivery: %v, %v", made, err)
	}
	calls := 0
	password := ""
	deliver := func(user string, p []byte) error {
		calls++
		kept, password = p, string(p)
		if user != access.FirstUser {
			t.Errorf("user %q", user)
		}
		return nil
	}
	if made, err := c.EnsureAdministrator(ctx, deliver); !made || err != nil {
		t.Fatalf("%v, %v", made, err)
	}
	if len(password) < 26 || !bytes.Equal(kept, make([]byte, len(kept))) {
		t.Errorf("password of %d bytes, wiped after delivery: %v", len(password), bytes.Equal(kept, make([]byte, len(kept))))
	}
	if made, err := c.EnsureAdministrator(ctx, deliver); made || err != nil || calls != 1 {
		t.Errorf("second time: %v, %v, %d calls", made, err, calls)
	}
	given := []byte(password)
	p, err := c.Login(ctx, access.FirstUser, given, peer)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(given, make([]byte, len(given))) {
		t.Error("the password was not wiped")
	}
	all, _ := access.Privileges()
	for _, priv := range all {
		if err := c.Check(ctx, p, priv, "/cluster/lab/vm/web-1"); err != nil {
			t.Error(err)
		}
	}
}

func TestDeniedByDefault(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := withAdmin(t)
	ann := create(t, c, "ann")
	for _, p := range []access.Principal{
		{},
		{Kind: access.UserPrincipal},
		{Kind: access.UserPrincipal, Name: "nobody"},
		{Kind: "odd", Name: access.FirstUser},
		{Kind: access.CertificatePrincipal, Name: access.FirstUser},
		ann,
	} {
		wantKind(t, p.String(), c.Check(ctx, p, "System.Read", access.Root), errs.Denied)
	}
	admin := access.Principal{Kind: access.UserPrincipal, Name: access.FirstUser}
	wantKind(t, "unknown privilege", c.Check(ctx, admin, "System.Fly", access.Root), errs.Denied)
	for _, o := range []access.Object{"", "vm", "/vm/", "//", access.Object("/" + strings.Repeat("x", 500))} {
		wantKind(t, "object "+string(o), c.Check(ctx, admin, "System.Read", o), errs.Invalid)
	}
	if err := c.Check(ctx, access.Principal{Kind: access.InternalPrincipal, Name: "controller"}, "Cryptographer.Recrypt", access.Root); err != nil {
		t.Error(err)
	}
}

// The decisions are compared with a plain statement of the rule.
func TestPermissionsPropagateAndTheNearestHolds(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := withAdmin(t)
	if err := c.PutRole(ctx, access.Role{Name: "Operator", Privileges: []access.Privilege{"VirtualMachine.Interact.PowerOn", "System.Read"}}); err != nil {
		t.Fatal(err)
	}
	ann := create(t, c, "ann")
	for _, p := range []access.Permission{
		{Object: "/", Roles: []string{access.ReadOnly}, Propagate: true},
		{Object: "/cluster/lab", Roles: []string{"Operator"}, Propagate: true},
		{Object: "/cluster/lab/vm/secret", Roles: []string{access.ReadOnly}, Propagate: true},
		{Object: "/cluster/prod", Roles: []string{access.ReadOnly, "Operator"}, Propagate: false},
	} {
		p.Principal = ann.String()
		if err := c.Grant(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		priv access.Privilege
		on   access.Object
		want bool
	}{
		{"System.Read", "/", true},
		{"VirtualMachine.Interact.PowerOn", "/", false},
		{"VirtualMachine.Interact.PowerOn", "/cluster/lab", true},
		{"VirtualMachine.Interact.PowerOn", "/cluster/lab/vm/web-1", true},
		{"VirtualMachine.Interact.PowerOn", "/cluster/laboratory", false}, // not below
		{"VirtualMachine.Interact.PowerOn", "/cluster/lab/vm/secret", false},
		{"Cryptographer.ReadKeyServersInfo", "/cluster/lab/vm/web-1", false}, // Operator replaces ReadOnly
		{"Cryptographer.ReadKeyServersInfo", "/cluster/lab/vm/secret", true},
		{"VirtualMachine.Interact.PowerOn", "/cluster/prod", true},
		{"Cryptographer.ReadKeyServersInfo", "/cluster/prod", true},
		{"VirtualMachine.Interact.PowerOn", "/cluster/prod/vm/a", false}, // does not propagate
		{"System.Read", "/cluster/prod/vm/a", true},                      // the root's does
		{"Cryptographer.Recrypt", "/cluster/lab/vm/web-1", false},
	} {
		err := c.Check(ctx, ann, tc.priv, tc.on)
		if (err == nil) != tc.want || err != nil && errs.KindOf(err) != errs.Denied {
			t.Errorf("%s on %s: %v, want %v", tc.priv, tc.on, err, tc.want)
		}
	}
	if roles, err := c.RolesOf(ctx, ann); err != nil || len(roles) != 2 {
		t.Errorf("roles: %v, %v", roles, err)
	}
	wantKind(t, "delete of a role in use", c.DeleteRole(ctx, "Operator"), errs.InvalidState)
	for _, o := range []access.Object{"/cluster/lab", "/cluster/prod"} {
		if err := c.Revoke(ctx, ann.String(), o); err != nil {
			t.Fatal(err)
		}
	}
	wantKind(t, "second revoke", c.Revoke(ctx, ann.String(), "/cluster/lab"), errs.NotFound)
	if err := c.DeleteRole(ctx, "Operator"); err != nil {
		t.Error(err)
	}
	wantKind(t, "after revoke", c.Check(ctx, ann, "VirtualMachine.Interact.PowerOn", "/cluster/lab"), errs.Denied)
}

func TestRoles(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := withAdmin(t)
	roles, err := c.Roles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string][]access.Privilege{}
	for _, r := range roles {
		byName[r.Name] = r.Privileges
		for _, p := range r.Privileges {
			if !access.Known(p) {
				t.Errorf("role %s has the unknown privilege %s", r.Name, p)
			}
		}
	}
	all, texts := access.Privileges()
	crypto := 0
	for _, p := range all {
		if texts[p] == "" {
			t.Errorf("privilege %s has no text", p)
		}
		if strings.HasPrefix(string(p), "Cryptographer.") {
			crypto++
			if slices.Contains(byName[access.NoCryptoAdmin], p) {
				t.Errorf("NoCryptoAdmin has %s", p)
			}
		}
	}
	if crypto != 14 {
		t.Errorf("%d Cryptographer privileges, want vSphere's 14", crypto)
	}
	for _, p := range []access.Privilege{
		"Global.Diagnostics", "Host.Inventory.AddHostToCluster", "Host.Inventory.AddStandaloneHost",
		"Host.Local.ManageUserGroups", "VirtualMachine.Interact.GuestControl", "Authorization.ModifyPermissions",
		"Authorization.ModifyRoles", "Authorization.ModifyUsers",
	} {
		if slices.Contains(byName[access.NoCryptoAdmin], p) {
			t.Errorf("NoCryptoAdmin has %s", p)
		}
	}
	if len(byName[access.Administrator]) != len(all) || !slices.Contains(byName[access.NoCryptoAdmin], "VirtualMachine.Inventory.Create") {
		t.Error("Administrator lacks something, or NoCryptoAdmin too much")
	}
	wantKind(t, "change of a built-in role", c.PutRole(ctx, access.Role{Name: "readonly"}), errs.InvalidState)
	wantKind(t, "unknown privilege", c.PutRole(ctx, access.Role{Name: "X", Privileges: []access.Privilege{"Fly"}}), errs.Invalid)
	wantKind(t, "bad name", c.PutRole(ctx, access.Role{Name: "a/b"}), errs.Invalid)
	wantKind(t, "delete of nothing", c.DeleteRole(ctx, "Nothing"), errs.NotFound)
}

func TestLastAdministratorStays(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, password := withAdmin(t)
	first := "user:" + access.FirstUser
	attempts := map[string]func() error{
		"delete":  func() error { return c.DeleteUser(ctx, access.FirstUser) },
		"disable": func() error { return c.SetDisabled(ctx, access.FirstUser, true) },
		"revoke":  func() error { return c.Revoke(ctx, first, access.Root) },
		"demote": func() error {
			return c.Grant(ctx, access.Permission{Principal: first, Object: "/", Roles: []string{access.ReadOnly}, Propagate: true})
		},
		"unpropagate": func() error {
			return c.Grant(ctx, access.Permission{Principal: first, Object: "/", Roles: []string{access.Administrator}})
		},
	}
	for name, try := range attempts {
		wantKind(t, name, try(), errs.InvalidState)
	}
	if _, err := c.Login(ctx, access.FirstUser, []byte(password), peer); err != nil {
		t.Fatal(err)
	}
	// With a disabled second one it is still the last.
	create(t, c, "second", access.Administrator)
	if err := c.SetDisabled(ctx, "second", true); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "delete beside a disabled one", c.DeleteUser(ctx, access.FirstUser), errs.InvalidState)
	if err := c.SetDisabled(ctx, "second", false); err != nil {
		t.Fatal(err)
	}
	// Two administrators who delete each other at the same time: one stays.
	var wg sync.WaitGroup
	results := make([]error, 2)
	for i, name := range []string{access.FirstUser, "second"} {
		wg.Go(func() { results[i] = c.DeleteUser(ctx, name) })
	}
	wg.Wait()
	if (results[0] == nil) == (results[1] == nil) {
		t.Errorf("both deletions: %v, %v; want exactly one to succeed", results[0], results[1])
	}
}

func TestUsersAndPasswords(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := withAdmin(t)
	ann := create(t, c, "ann", access.ReadOnly, access.NoCryptoAdmin)
	wantKind(t, "same name", c.CreateUser(ctx, "ann", []byte(goodPassword), nil), errs.Exists)
	wantKind(t, "short password", c.CreateUser(ctx, "bob", []byte("short"), nil), errs.Invalid)
	wantKind(t, "long password", c.CreateUser(ctx, "bob", make([]byte, access.MaxPassword+1), nil), errs.Invalid)
	wantKind(t, "bad name", c.CreateUser(ctx, "user:bob", []byte(goodPassword), nil), errs.Invalid)
	wantKind(t, "unknown role", c.CreateUser(ctx, "bob", []byte(goodPassword), []string{"King"}), errs.NotFound)
	users, err := c.Users(ctx)
	if err != nil || len(users) != 2 || users[1].Name != "ann" || !slices.Equal(users[1].Roles, []string{access.NoCryptoAdmin, access.ReadOnly}) {
		t.Errorf("users: %+v, %v", users, err)
	}

	_, wrong := c.Login(ctx, "ann", []byte("wrong password!"), peer)
	_, unknown := c.Login(ctx, "eve", []byte("wrong password!"), peer)
	wantKind(t, "wrong password", wrong, errs.Denied)
	wantKind(t, "unknown user", unknown, errs.Denied)
	if wrong.Error() != unknown.Error() {
		t.Errorf("the errors tell who exists: %v, %v", wrong, unknown)
	}

	keep, kept, err := c.IssueToken(ctx, "ann", "session", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := c.IssueToken(ctx, "ann", "script", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	oldP, newP := []byte(goodPassword), []byte("another good password")
	if err := c.ChangePassword(ctx, "ann", oldP, newP, kept.ID, peer); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(oldP, make([]byte, len(oldP))) || !bytes.Equal(newP, make([]byte, len(newP))) {
		t.Error("passwords were not wiped")
	}
	wantKind(t, "old password", second(c.Login(ctx, "ann", []byte(goodPassword), peer)), errs.Denied)
	if _, err := c.Login(ctx, "ann", []byte("another good password"), peer); err != nil {
		t.Error(err)
	}
	if p, err := c.Authenticate(ctx, keep); err != nil || p.Name != "ann" || p.Token != kept.ID {
		t.Errorf("the kept token: %+v, %v", p, err)
	}
	wantKind(t, "the other token", second(c.Authenticate(ctx, other)), errs.Denied)
	wantKind(t, "change with wrong password", c.ChangePassword(ctx, "ann", []byte("nonsense nonsense"), []byte(goodPassword), "", peer), errs.Denied)

	if err := c.SetDisabled(ctx, "ann", true); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "disabled: login", second(c.Login(ctx, "ann", []byte("another good password"), peer)), errs.Denied)
	wantKind(t, "disabled: token", second(c.Authenticate(ctx, keep)), errs.Denied)
	wantKind(t, "disabled: check", c.Check(ctx, ann, "System.Read", access.Root), errs.Denied)
	if err := c.DeleteUser(ctx, "ann"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "second delete", c.DeleteUser(ctx, "ann"), errs.NotFound)
	// A new user of that name begins with nothing.
	ann = create(t, c, "ann")
	wantKind(t, "new user", c.Check(ctx, ann, "System.Read", access.Root), errs.Denied)
}

func second[T any](_ T, err error) error { return err }

func TestTokens(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, db := open(t)
	if _, err := c.EnsureAdministrator(ctx, func(string, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC()
	c.SetClock(func() time.Time { return now })
	text, tok, err := c.IssueToken(ctx, access.FirstUser, "backup script", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := c.Authenticate(ctx, text); err != nil || p != (access.Principal{Kind: access.UserPrincipal, Name: access.FirstUser, Token: tok.ID}) {
		t.Errorf("%+v, %v", p, err)
	}
	if all, err := c.Tokens(ctx, access.FirstUser); err != nil || len(all) != 1 || all[0] != tok {
		t.Errorf("tokens: %+v, %v", all, err)
	}
	// The store must not have what it takes to come in.
	var b bytes.Buffer
	if _, err := db.Snapshot(ctx, &b); err != nil {
		t.Fatal(err)
	}
	_, secret, _ := strings.Cut(text, tok.ID+"_") // the secret may hold a '_' of its own
	if bytes.Contains(b.Bytes(), []byte(secret)) || !bytes.Contains(b.Bytes(), []byte(tok.ID)) {
		t.Error("the token's secret is in the store, or its id is not")
	}
	for i := range text {
		changed := []byte(text)
		changed[i] ^= 1
		wantKind(t, fmt.Sprintf("byte %d changed", i), second(c.Authenticate(ctx, string(changed))), errs.Denied)
	}
	for _, bad := range []string{"", "x", text + "A", text[:len(text)-1], " " + text} {
		wantKind(t, "token "+bad, second(c.Authenticate(ctx, bad)), errs.Denied)
	}
	now = now.Add(time.Hour)
	wantKind(t, "expired", second(c.Authenticate(ctx, text)), errs.Denied)
	if all, err := c.Tokens(ctx, access.FirstUser); err != nil || len(all) != 0 {
		t.Errorf("expired tokens are listed: %+v, %v", all, err)
	}
	text, tok, err = c.IssueToken(ctx, access.FirstUser, "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.RevokeToken(ctx, tok.ID); err != nil {
			t.Fatal(err)
		}
	}
	wantKind(t, "revoked", second(c.Authenticate(ctx, text)), errs.Denied)
	for _, life := range []time.Duration{0, -1, access.MaxTokenLife + 1} {
		_, _, err := c.IssueToken(ctx, access.FirstUser, "", life)
		wantKind(t, "life "+life.String(), err, errs.Invalid)
	}
	_, _, err = c.IssueToken(ctx, "nobody", "", time.Hour)
	wantKind(t, "unknown user", err, errs.NotFound)
	for i := range 101 {
		if _, _, err = c.IssueToken(ctx, access.FirstUser, "", time.Hour); err != nil {
			if i != 100 {
				t.Fatalf("token %d: %v", i, err)
			}
			wantKind(t, "too many", err, errs.InvalidState)
		}
	}
	if err == nil {
		t.Error("101 tokens were made")
	}
}

func TestThrottle(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, password := withAdmin(t)
	now := time.Now()
	c.SetClock(func() time.Time { return now })
	for i := range 5 {
		wantKind(t, fmt.Sprint("attempt ", i), second(c.Login(ctx, access.FirstUser, []byte("guess guess guess"), peer)), errs.Denied)
	}
	wantKind(t, "right password, too early", second(c.Login(ctx, access.FirstUser, []byte(password), peer)), errs.Unavailable)
	if _, err := c.Login(ctx, "other", []byte("guess guess guess"), peer); errs.KindOf(err) != errs.Denied {
		t.Errorf("another name has to wait, too: %v", err)
	}
	// The wait grows, to a limit.
	waited := time.Duration(0)
	for range 20 {
		if err := c.BeginAttempt(access.FirstUser, peer); err == nil {
			continue
		}
		step := time.Duration(0)
		for c.BeginAttempt(access.FirstUser, peer) != nil {
			now = now.Add(time.Second)
			step += time.Second
		}
		if step < waited || step > 5*time.Minute+time.Second {
			t.Errorf("waited %v after %v", step, waited)
		}
		waited = step
	}
	if waited < 5*time.Minute {
		t.Errorf("the wait grew to %v only", waited)
	}
	now = now.Add(5*time.Minute + time.Second)
	if _, err := c.Login(ctx, access.FirstUser, []byte(password), peer); err != nil {
		t.Errorf("after the wait: %v", err)
	}
	wantKind(t, "after success it begins anew", second(c.Login(ctx, access.FirstUser, []byte("guess guess guess"), peer)), errs.Denied)
	// What is remembered is bounded.
	for i := range access.MaxThrottled + 10 {
		now = now.Add(time.Millisecond)
		if err := c.BeginAttempt(fmt.Sprint("name", i), fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255)); err != nil {
			t.Fatal(err)
		}
		if i > access.MaxThrottled && c.Throttled() > access.MaxThrottled {
			t.Fatalf("%d counters kept", c.Throttled())
		}
	}
}

// TestRolesOnObjects gives one user roles on several objects and takes them.
func TestRolesOnObjects(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := withObjects(t)
	ann := create(t, c, "acme/ann", access.ReadOnly)
	may := func(what string, on access.Object, want bool) {
		t.Helper()
		if err := c.Check(ctx, ann, "Cryptographer.ManageKeyServers", on); (err == nil) != want {
			t.Errorf("%s: on %s: %v", what, on, err)
		}
	}
	const account, group = access.Object("/account/acme"), access.Object("/account/acme/group/g")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.GrantRoles(ctx, "acme/ann", []string{access.Administrator}, group))
	may("given on a group", group, true)
	may("given on a group", account, false)
	must(c.GrantRoles(ctx, "acme/ann", []string{access.ReadOnly, access.Administrator}, group)) // again, and another
	users, err := c.Users(ctx)
	must(err)
	for _, u := range users {
		if u.Name == "acme/ann" && (len(u.Permissions) != 2 || fmt.Sprint(u.Permissions[1].Roles) != "[Administrator ReadOnly]") {
			t.Errorf("permissions: %+v", u.Permissions)
		}
	}
	must(c.RevokeRoles(ctx, "acme/ann", []string{access.Administrator}, group))
	may("taken", group, false)
	must(c.GrantRoles(ctx, "acme/ann", []string{access.Administrator}, account))
	may("the nearer object counts", group, false)
	must(c.RevokeRoles(ctx, "acme/ann", nil, group))
	may("none left on the group", group, true)

	wantKind(t, "a role that it does not have", c.RevokeRoles(ctx, "acme/ann", []string{access.NoCryptoAdmin}, account), errs.NotFound)
	wantKind(t, "no role at all", c.RevokeRoles(ctx, "acme/ann", nil, group), errs.NotFound)
	wantKind(t, "nothing given", c.GrantRoles(ctx, "acme/ann", nil, group), errs.Invalid)
	wantKind(t, "no such role", c.GrantRoles(ctx, "acme/ann", []string{"Owner"}, group), errs.NotFound)
	wantKind(t, "no such user", c.GrantRoles(ctx, "acme/eve", []string{access.ReadOnly}, group), errs.NotFound)
	wantKind(t, "no such object", c.GrantRoles(ctx, "acme/ann", []string{access.ReadOnly}, "/account/acme/group/none"), errs.NotFound)
	wantKind(t, "everything", c.GrantRoles(ctx, "acme/ann", []string{access.ReadOnly}, access.Root), errs.Invalid)
	wantKind(t, "no path", c.RevokeRoles(ctx, "acme/ann", nil, "//"), errs.Invalid)
	wantKind(t, "the last administrator", c.RevokeRoles(ctx, access.FirstUser, []string{access.Administrator}, access.Root), errs.InvalidState)
	must(c.GrantRoles(ctx, access.FirstUser, []string{access.ReadOnly}, access.Root)) // beside
	wantKind(t, "the last administrator, with another role", c.RevokeRoles(ctx, access.FirstUser, []string{access.Administrator}, access.Root), errs.InvalidState)
	create(t, c, "second", access.Administrator)
	must(c.RevokeRoles(ctx, access.FirstUser, []string{access.Administrator}, access.Root))
}

// TestStrangersLockNobodyOut: who guesses has to wait, wherever he is and whatever
// name he tries, and those whose names they are do not.
func TestStrangersLockNobodyOut(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, password := withAdmin(t)
	now := time.Now()
	c.SetClock(func() time.Time { return now })
	guess := func(name, peer string) error {
		return second(c.Login(ctx, name, []byte("guess guess guess"), peer))
	}
	own := func(what, peer string, want bool) {
		t.Helper()
		if _, err := c.Login(ctx, access.FirstUser, []byte(password), peer); (err == nil) != want {
			t.Errorf("%s: %v", what, err)
		}
	}
	own("at first", "192.0.2.7:1", true)
	for range 1000 {
		_ = guess(access.FirstUser, "192.0.2.66:1")
	}
	wantKind(t, "the guesser", guess(access.FirstUser, "192.0.2.66:2"), errs.Unavailable)
	own("from where he has never been", "192.0.2.8:1", true)

	// One address, many names.
	for i := range 20 {
		wantKind(t, "a name", guess(fmt.Sprint("name", i), "192.0.2.67:1"), errs.Denied)
	}
	wantKind(t, "one name too many", guess("another", "192.0.2.67:1"), errs.Unavailable)
	// An IPv6 network is one guesser.
	for i := range 5 {
		wantKind(t, "an address", guess(access.FirstUser, fmt.Sprintf("[2001:db8::%d]:1", i)), errs.Denied)
	}
	wantKind(t, "one address too many", guess(access.FirstUser, "[2001:db8::99]:1"), errs.Unavailable)

	// Many addresses, one name: they wait, and he does not, from where he was before.
	tried := 0
	for i := range 255 {
		if errs.KindOf(guess(access.FirstUser, fmt.Sprintf("198.51.100.%d:1", i))) == errs.Denied {
			tried++
		}
	}
	if tried > 60 {
		t.Errorf("%d addresses could try one name at once", tried)
	}
	own("while many guess", "192.0.2.7:2", true)
	own("while many guess, from elsewhere", "192.0.2.9:1", false)
	now = now.Add(2 * time.Second)
	own("when it is a stranger's turn", "192.0.2.9:1", true)

	// Whoever has a name of his own cannot begin anew with it.
	create(t, c, "eve", access.ReadOnly)
	tried = 0
	for i := range 100 {
		if _, err := c.Login(ctx, "eve", []byte(goodPassword), "192.0.2.68:1"); err == nil && errs.KindOf(guess(fmt.Sprint("victim", i), "192.0.2.68:1")) == errs.Denied {
			tried++
		}
	}
	if tried > 20 {
		t.Errorf("%d guesses between logins of one's own", tried)
	}
}

func TestHashingBounds(t *testing.T) {
	t.Parallel()
	for _, h := range []access.Hashing{
		{Time: 0, MemoryKiB: 8, Threads: 1},
		{Time: 11, MemoryKiB: 8, Threads: 1},
		{Time: 1, MemoryKiB: 7, Threads: 1},
		{Time: 1, MemoryKiB: 256<<10 + 1, Threads: 1},
		{Time: 1, MemoryKiB: 8, Threads: 17},
	} {
		if _, err := access.New(access.Config{Hashing: h}); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

// TestDefaultHashing logs in once with what production uses.
func TestDefaultHashing(t *testing.T) {
	t.Parallel()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	c, err := access.New(access.Config{DB: db})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CreateUser(t.Context(), "ann", []byte(goodPassword), nil); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := c.Login(t.Context(), "ann", []byte(goodPassword), peer); err != nil {
		t.Fatal(err)
	}
	t.Logf("a login takes %v", time.Since(start))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Login(ctx, "ann", []byte(goodPassword), peer); err == nil {
		t.Error("login with an ended context")
	}
}

func FuzzHash(f *testing.F) {
	f.Add("$argon2id$v=19$m=65536,t=3,p=4$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("$argon2id$v=19$m=4294967295,t=3,p=4$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("$argon2i$v=19$m=65536,t=3,p=4$$")
	f.Fuzz(func(t *testing.T, s string) {
		again, err := access.CanonicalHash(s)
		if err == nil && again != s {
			t.Errorf("%q became %q", s, again)
		}
	})
}

func FuzzToken(f *testing.F) {
	f.Add("strongroom_0123456789abcdef_" + strings.Repeat("A", 43))
	f.Add("strongroom_0123456789abcdef_" + strings.Repeat("A", 42) + "B")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		id, secret, ok := access.SplitToken(s)
		if ok && (len(id) != 16 || len(secret) != 32) || !ok && (id != "" || secret != nil) {
			t.Errorf("%q: %q, %x, %v", s, id, secret, ok)
		}
	})
}
