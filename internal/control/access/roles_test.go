package access_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/control/access"
	"strongroom/internal/errs"
)

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
