package access_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"strongroom/internal/control/access"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// withObjects returns a control of a role that has the account acme with a group
// g.
func withObjects(t *testing.T) (*access.Control, *store.DB) {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c, err := access.New(access.Config{DB: db, Hashing: quick, CheckObject: func(_ context.Context, _ *store.Tx, on access.Object) error {
		if on != "/account/acme" && on != "/account/acme/group/g" {
			return errs.New(errs.NotFound, "no %s", on)
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.EnsureAdministrator(t.Context(), func(string, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	return c, db
}

// TestHome: users of an account have permissions there and nowhere else.
func TestHome(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, db := withObjects(t)
	ann := create(t, c, "acme/ann", access.ReadOnly)
	create(t, c, "ann", access.ReadOnly) // another one
	for _, name := range []string{"none/ann", "acme/", "/ann", "acme/a/b", "acme/a b", "acme/" + string(make([]byte, 64))} {
		if err := c.CreateUser(ctx, name, []byte(goodPassword), nil); err == nil {
			t.Errorf("a user called %q", name)
		}
	}
	if p, err := c.Login(ctx, "acme/ann", []byte(goodPassword), peer); err != nil || p != ann {
		t.Errorf("%v, %v", p, err)
	}
	wantKind(t, "a role on everything", c.Grant(ctx, access.Permission{Principal: ann.String(), Object: access.Root, Roles: []string{access.ReadOnly}, Propagate: true}), errs.Invalid)
	wantKind(t, "a role elsewhere", c.Grant(ctx, access.Permission{Principal: ann.String(), Object: "/account/acme2", Roles: []string{access.ReadOnly}}), errs.Invalid)
	wantKind(t, "a role on what is not there", c.Grant(ctx, access.Permission{Principal: "user:ann", Object: "/account/none", Roles: []string{access.ReadOnly}}), errs.NotFound)
	for on, want := range map[access.Object]bool{access.Root: false, "/account/acme": true, "/account/acme/group/g": true, "/account/acme2": false} {
		if err := c.Check(ctx, ann, "System.Read", on); (err == nil) != want {
			t.Errorf("on %s: %v", on, err)
		}
	}
	none := func(on access.Object) error {
		return db.View(ctx, func(tx *store.Tx) error { return c.CheckNone(ctx, tx, on) })
	}
	wantKind(t, "an account with a user", none("/account/acme"), errs.InvalidState)
	if err := none("/account/acme2"); err != nil {
		t.Error(err)
	}
	// Whoever is called the same elsewhere stays.
	if err := c.DeleteUser(ctx, "ann"); err != nil {
		t.Fatal(err)
	}
	if err := c.Check(ctx, ann, "System.Read", "/account/acme"); err != nil {
		t.Error(err)
	}
	if err := c.DeleteUser(ctx, "acme/ann"); err != nil {
		t.Fatal(err)
	}
	if err := none("/account/acme"); err != nil {
		t.Error(err)
	}
	// A role without accounts knows no such users.
	plain, _ := open(t)
	wantKind(t, "without accounts", plain.CreateUser(ctx, "acme/ann", []byte(goodPassword), nil), errs.Invalid)
}

// TestWhere: where a privilege is held is where it is among the privileges, for
// permissions made at random.
func TestWhere(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	ctx := t.Context()
	c, _ := open(t)
	objects := []access.Object{"/", "/a", "/a/b", "/a/b/c", "/ab", "/a/bc", "/d/b"}
	roles := []string{access.ReadOnly, access.NoCryptoAdmin, access.Administrator}
	for i := range 10 {
		p := create(t, c, fmt.Sprint("user", i))
		for range r.IntN(5) {
			perm := access.Permission{Principal: p.String(), Object: objects[r.IntN(len(objects))], Roles: []string{roles[r.IntN(len(roles))]}, Propagate: r.IntN(3) > 0}
			// Somebody must keep everything: an administrator there would only be in the way.
			if err := c.Grant(ctx, perm); err != nil && errs.KindOf(err) != errs.InvalidState {
				t.Fatal(err)
			}
		}
		for _, priv := range []access.Privilege{"System.Read", "Cryptographer.ManageKeys", "VirtualMachine.Inventory.Create"} {
			where, err := c.Where(ctx, p, priv)
			if err != nil {
				t.Fatal(err)
			}
			for _, on := range objects {
				have, err := c.PrivilegesOn(ctx, p, on)
				if err != nil {
					t.Fatal(err)
				}
				if want := slices.Contains(have, priv); where.Has(on) != want || want && where.Nowhere() {
					t.Errorf("%s of %s on %s: %v, want %v", priv, p, on, where.Has(on), want)
				}
			}
		}
	}
	internal, err := c.Where(ctx, access.Principal{Kind: access.InternalPrincipal}, "System.Read")
	if err != nil || !internal.Has("/a") || internal.Nowhere() {
		t.Errorf("the role itself: %v", err)
	}
	nobody, err := c.Where(ctx, access.Principal{Kind: access.UserPrincipal, Name: "nobody"}, "System.Read")
	if err != nil || nobody.Has("/a") || !nobody.Nowhere() {
		t.Errorf("nobody: %v", err)
	}
}
