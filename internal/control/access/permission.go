package access

import (
	"context"
	"errors"
	"slices"
	"strings"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Permissions returns all permissions, or those of one principal if it is not
// empty.
func (c *Control) Permissions(ctx context.Context, principal string) ([]Permission, error) {
	all, err := c.perms.List(ctx)
	if principal != "" {
		all = slices.DeleteFunc(all, func(p Permission) bool { return p.Principal != principal })
	}
	return all, err
}

// Grant gives a permission; the principal's earlier one on the same object is
// replaced.
func (c *Control) Grant(ctx context.Context, p Permission) error {
	err := c.db.Txn(ctx, func(tx *store.Tx) error {
		if err := c.grant(ctx, tx, p); err != nil {
			return err
		}
		return c.keepAdministrator(ctx, tx)
	})
	return errs.Wrap(err, "cannot give %s %s on %s", p.Principal, strings.Join(p.Roles, ", "), p.Object)
}

func (c *Control) grant(ctx context.Context, tx *store.Tx, p Permission) error {
	if err := p.Object.check(); err != nil {
		return err
	}
	kind, name, _ := strings.Cut(p.Principal, ":")
	switch PrincipalKind(kind) {
	case UserPrincipal:
		if _, err := c.users.In(tx).Get(ctx, name); err != nil {
			return missing(err, "user", name)
		}
		if home := Home(name); !home.Has(p.Object) {
			return errs.New(errs.Invalid, "user %s belongs to %s and can have no permission on %s", name, home, p.Object)
		}
	case CertificatePrincipal:
		if err := checkName("certificate's principal", name); err != nil {
			return err
		}
	default:
		return errs.New(errs.Invalid, "%q is no principal: it is user:NAME or certificate:NAME", p.Principal)
	}
	if c.object != nil && p.Object != Root {
		if err := c.object(ctx, tx, p.Object); err != nil {
			return err
		}
	}
	if len(p.Roles) == 0 || len(p.Roles) > maxRoles {
		return errs.New(errs.Invalid, "a permission gives 1 to %d roles", maxRoles)
	}
	for _, name := range p.Roles {
		if _, err := c.role(ctx, tx, name); err != nil {
			return err
		}
	}
	return c.perms.In(tx).Put(ctx, permKey(p.Principal, p.Object), p)
}

// GrantRoles gives a user roles on an object and below it, beside those that the
// user has there.
func (c *Control) GrantRoles(ctx context.Context, user string, roles []string, on Object) error {
	err := c.changeRoles(ctx, user, on, func(have []string) ([]string, error) {
		if len(roles) == 0 {
			return nil, errs.New(errs.Invalid, "no role is named")
		}
		for _, r := range roles {
			if !slices.Contains(have, r) {
				have = append(have, r)
			}
		}
		return have, nil
	})
	return errs.Wrap(err, "cannot give %.64s %s on %s", user, strings.Join(roles, ", "), on)
}

// RevokeRoles takes roles on exactly that object from a user, or if none are named
// all. It holds from the moment on that it returns. The last administrator is
// refused.
func (c *Control) RevokeRoles(ctx context.Context, user string, roles []string, on Object) error {
	err := c.changeRoles(ctx, user, on, func(have []string) ([]string, error) {
		if len(have) == 0 {
			return nil, errs.New(errs.NotFound, "it has no role there").WithHint("strongroom user show %s", user)
		}
		for _, r := range roles {
			if !slices.Contains(have, r) {
				return nil, errs.New(errs.NotFound, "it does not have the role %.64s there", r).WithHint("strongroom user show %s", user)
			}
		}
		if len(roles) == 0 {
			return nil, nil
		}
		return slices.DeleteFunc(have, func(r string) bool { return slices.Contains(roles, r) }), nil
	})
	return errs.Wrap(err, "cannot take roles of %.64s on %s", user, on)
}

// changeRoles replaces the roles of a user on an object.
func (c *Control) changeRoles(ctx context.Context, user string, on Object, f func(have []string) ([]string, error)) error {
	principal := string(UserPrincipal) + ":" + user
	return c.db.Txn(ctx, func(tx *store.Tx) error {
		if _, err := c.users.In(tx).Get(ctx, user); err != nil {
			return missing(err, "user", user)
		}
		if err := on.check(); err != nil {
			return err
		}
		perm, err := c.perms.In(tx).Get(ctx, permKey(principal, on))
		if errors.Is(err, store.ErrNotFound) {
			perm, err = Permission{Principal: principal, Object: on, Propagate: true}, nil
		}
		if err != nil {
			return err
		}
		if perm.Roles, err = f(perm.Roles); err != nil {
			return err
		}
		if len(perm.Roles) == 0 {
			err = c.perms.In(tx).Delete(ctx, permKey(principal, on))
		} else {
			err = c.grant(ctx, tx, perm)
		}
		if err != nil {
			return err
		}
		return c.keepAdministrator(ctx, tx)
	})
}

// Revoke takes back the permission that the principal has on exactly that
// object.
func (c *Control) Revoke(ctx context.Context, principal string, on Object) error {
	err := c.db.Txn(ctx, func(tx *store.Tx) error {
		err := c.perms.In(tx).Delete(ctx, permKey(principal, on))
		if errors.Is(err, store.ErrNotFound) {
			return errs.New(errs.NotFound, "no permission of %s on %s", principal, on)
		}
		if err != nil {
			return err
		}
		return c.keepAdministrator(ctx, tx)
	})
	return errs.Wrap(err, "cannot take permission of %s on %s", principal, on)
}

// keepAdministrator refuses what tx has done if it leaves nobody who can do
// everything.
func (c *Control) keepAdministrator(ctx context.Context, tx *store.Tx) error {
	users, err := c.users.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	for _, u := range users {
		if u.Disabled {
			continue
		}
		p, err := c.perms.In(tx).Get(ctx, permKey(string(UserPrincipal)+":"+u.Name, Root))
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if slices.Contains(p.Roles, Administrator) && p.Propagate {
			return nil
		}
	}
	return errs.New(errs.InvalidState, "nobody would be left with the role %s on everything", Administrator).
		WithHint("create another administrator first: strongroom user create NAME --role %s", Administrator)
}
