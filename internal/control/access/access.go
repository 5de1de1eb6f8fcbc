// Package access says who may do what: principals (local users, API tokens,
// certificates), roles made of privileges with vSphere's names, and permissions
// that give a principal a role on an object of the inventory and below.
//
// Invariants:
//   - Denied unless a permission says otherwise.
//   - There is always an enabled local user with the Administrator role on
//     everything; the change that would remove the last one is refused.
//   - Passwords are stored as argon2id hashes, tokens as SHA-256 hashes. Methods
//     that take a password as bytes wipe those bytes before they return. This
//     package may not use locked key memory: a password's bytes are the
//     caller's, and they are never copied, printed or stored.
//
// All methods are safe for concurrent use.
package access

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// PrincipalKind is how a principal proved who it is.
type PrincipalKind string

// The kinds of principal.
const (
	UserPrincipal        PrincipalKind = "user"        // a local user, by password or token
	CertificatePrincipal PrincipalKind = "certificate" // a client certificate of the cluster CA
	InternalPrincipal    PrincipalKind = "internal"    // the controller itself
)

// Principal is somebody who acts. The zero Principal may do nothing.
type Principal struct {
	Kind PrincipalKind `json:"kind"`
	Name string        `json:"name"`
	// Token is the id of the token that the principal came with, if any.
	Token string `json:"token,omitempty"`
}

// String is how a principal is written in permissions, events and the audit
// log: "user:ann", "certificate:backup".
func (p Principal) String() string { return string(p.Kind) + ":" + p.Name }

// Object is a path in the inventory, such as "/", "/provider/kp-1" or
// "/cluster/lab/vm/web-1". A permission on a path holds below it, too, if it
// propagates.
type Object string

// Root is above everything.
const Root Object = "/"

// Home returns what a user belongs to: nobody who may not manage users there may
// manage this one, and it has no permission elsewhere. A user called "A/NAME" is
// at home in the account A of a key management server, "/account/A"; others are in
// [Root].
func Home(user string) Object {
	if account, _, ok := strings.Cut(user, "/"); ok {
		return Object("/account/" + account)
	}
	return Root
}

// Has reports whether below is o or below it.
func (o Object) Has(below Object) bool {
	return o == below || o == Root || strings.HasPrefix(string(below), string(o)+"/")
}

// parent of o, or false for the root.
func (o Object) parent() (Object, bool) {
	if o == Root {
		return "", false
	}
	i := strings.LastIndexByte(string(o), '/')
	if i <= 0 {
		return Root, true
	}
	return o[:i], true
}

func (o Object) check() error {
	s := string(o)
	if o == Root {
		return nil
	}
	if len(s) > 400 || !strings.HasPrefix(s, "/") || strings.HasSuffix(s, "/") || strings.Contains(s, "//") {
		return errs.New(errs.Invalid, "%q is no path of an object", s)
	}
	return nil
}

// Role is a named set of privileges.
type Role struct {
	Name        string      `json:"name"`
	Description string      `json:"description,omitempty"`
	BuiltIn     bool        `json:"built_in,omitempty"`
	Privileges  []Privilege `json:"privileges"`
}

// Permission gives a principal roles on an object: the privileges of all of
// them. A permission nearer to the object replaces those further up, as in
// vSphere.
type Permission struct {
	Principal string   `json:"principal"` // as [Principal.String] writes it
	Object    Object   `json:"object"`
	Roles     []string `json:"roles"`     // at least one
	Propagate bool     `json:"propagate"` // to everything below
}

// Control decides and keeps who may do what. Use [New].
type Control struct {
	db       *store.DB
	users    *store.Table[user]
	tokens   *store.Table[token]
	roles    *store.Table[Role]
	perms    *store.Table[Permission] // by principal "@" object
	hashing  Hashing
	builtin  []Role // Administrator among them
	keepUser func(ctx context.Context, tx *store.Tx, name string) error
	object   func(ctx context.Context, tx *store.Tx, on Object) error // nil: there are no accounts
	throttle *throttle
	slots    chan struct{} // bounds hashes computed at a time, and so memory
	now      func() time.Time
}

// Config of a [Control].
type Config struct {
	DB *store.DB
	// Hashing is how new passwords are hashed. Zero means [DefaultHashing].
	Hashing Hashing
	// BuiltIn are the roles that always exist, beside Administrator. Nil means
	// NoCryptoAdmin and ReadOnly.
	BuiltIn []Role
	// KeepUser is asked, in the transaction, before a user is deleted; its error
	// refuses that. Nil refuses nothing.
	KeepUser func(ctx context.Context, tx *store.Tx, name string) error
	// CheckObject is asked, in the transaction, before a user gets a permission on
	// an object below the root, or is made at home there; its error, for an object
	// that there is not, refuses that. Nil: permissions may be on any path, and
	// all users are at home in the root.
	CheckObject func(ctx context.Context, tx *store.Tx, on Object) error
}

// New returns the access control kept in cfg.DB.
func New(cfg Config) (*Control, error) {
	if cfg.Hashing == (Hashing{}) {
		cfg.Hashing = DefaultHashing
	}
	if err := cfg.Hashing.check(); err != nil {
		return nil, err
	}
	if cfg.BuiltIn == nil {
		cfg.BuiltIn = []Role{noCryptoAdmin(), readOnly()}
	}
	if cfg.KeepUser == nil {
		cfg.KeepUser = func(context.Context, *store.Tx, string) error { return nil }
	}
	now := func() time.Time { return time.Now().UTC() }
	return &Control{
		db:       cfg.DB,
		users:    store.NewTable[user](cfg.DB, "user", 1),
		tokens:   store.NewTable[token](cfg.DB, tokenTable, 1),
		roles:    store.NewTable[Role](cfg.DB, "role", 1),
		perms:    store.NewTable[Permission](cfg.DB, "permission", 1),
		hashing:  cfg.Hashing,
		builtin:  append([]Role{administrator()}, cfg.BuiltIn...),
		keepUser: cfg.KeepUser,
		object:   cfg.CheckObject,
		throttle: newThrottle(now),
		slots:    make(chan struct{}, hashesAtOnce),
		now:      now,
	}, nil
}

const tokenTable = "token"

// KeepsTokens reports whether a table of the database is that of sessions and tokens.
func KeepsTokens(table string) bool { return table == tokenTable }

// Check returns nil if p has the privilege on the object, else an error of kind
// Denied that names what is missing.
func (c *Control) Check(ctx context.Context, p Principal, priv Privilege, on Object) error {
	have, err := c.PrivilegesOn(ctx, p, on)
	if err != nil {
		return errs.Wrap(err, "cannot check privileges of %s", p)
	}
	if !slices.Contains(have, priv) {
		return errs.New(errs.Denied, "%s lacks the privilege %s on %s", p, priv, on).WithReason("NoPermission")
	}
	return nil
}

// Scope is where a principal has a privilege. The zero Scope is nowhere.
type Scope struct {
	always bool
	grants map[Object]grant // the principal's permissions
}

// grant is what a permission means for one privilege.
type grant struct{ allows, propagates bool }

// Nowhere reports whether it is no object at all.
func (s Scope) Nowhere() bool {
	for _, g := range s.grants {
		if g.allows {
			return false
		}
	}
	return !s.always
}

// Has reports whether the principal has the privilege on o, as
// [Control.PrivilegesOn] tells it.
func (s Scope) Has(o Object) bool {
	if s.always {
		return true
	}
	for at, ok := o, true; ok; at, ok = at.parent() {
		if g, found := s.grants[at]; found && (at == o || g.propagates) {
			return g.allows
		}
	}
	return false
}

// Where returns on which objects p has a privilege.
func (c *Control) Where(ctx context.Context, p Principal, priv Privilege) (Scope, error) {
	switch p.Kind {
	case InternalPrincipal:
		return Scope{always: true}, nil
	case UserPrincipal, CertificatePrincipal:
	default:
		return Scope{}, nil
	}
	s := Scope{}
	err := c.db.View(ctx, func(tx *store.Tx) error {
		s.grants = map[Object]grant{}
		if p.Kind == UserPrincipal {
			u, err := c.users.In(tx).Get(ctx, p.Name)
			if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) || err == nil && u.Disabled {
				return nil
			}
			if err != nil {
				return err
			}
		}
		perms, err := c.perms.In(tx).List(ctx, p.String()+"@")
		if err != nil {
			return err
		}
		for _, perm := range perms {
			g := grant{propagates: perm.Propagate}
			for _, name := range perm.Roles {
				role, err := c.role(ctx, tx, name)
				if err != nil {
					return err
				}
				g.allows = g.allows || slices.Contains(role.Privileges, priv)
			}
			s.grants[perm.Object] = g
		}
		return nil
	})
	return s, errs.Wrap(err, "cannot check privileges of %s", p)
}

// CheckNone refuses an object on which, or below which, somebody has a
// permission. It is part of tx.
func (c *Control) CheckNone(ctx context.Context, tx *store.Tx, on Object) error {
	perms, err := c.perms.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	for _, p := range perms {
		if on.Has(p.Object) {
			return errs.New(errs.InvalidState, "%s has a permission on %s", p.Principal, p.Object).WithReason("ResourceInUse").
				WithHint("strongroom user revoke %s --on %s", strings.TrimPrefix(p.Principal, string(UserPrincipal)+":"), p.Object)
		}
	}
	users, err := c.users.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	for _, u := range users {
		if home := Home(u.Name); home != Root && on.Has(home) {
			return errs.New(errs.InvalidState, "user %s belongs to it", u.Name).WithReason("ResourceInUse").WithHint("strongroom user delete %s", u.Name)
		}
	}
	return nil
}

// RolesOf returns the names of all roles that p has somewhere.
func (c *Control) RolesOf(ctx context.Context, p Principal) ([]string, error) {
	perms, err := c.Permissions(ctx, p.String())
	var names []string
	for _, perm := range perms {
		for _, r := range perm.Roles {
			if !slices.Contains(names, r) {
				names = append(names, r)
			}
		}
	}
	return names, err
}

// PrivilegesOn returns what p may do on an object, sorted.
func (c *Control) PrivilegesOn(ctx context.Context, p Principal, on Object) ([]Privilege, error) {
	if err := on.check(); err != nil {
		return nil, err
	}
	switch p.Kind {
	case InternalPrincipal:
		all, _ := Privileges()
		return all, nil
	case UserPrincipal, CertificatePrincipal:
	default:
		return nil, nil
	}
	if p.Name == "" {
		return nil, nil
	}
	var privs []Privilege
	err := c.db.View(ctx, func(tx *store.Tx) (err error) {
		privs, err = c.privilegesIn(ctx, tx, p, on)
		return err
	})
	slices.Sort(privs)
	return slices.Compact(privs), err
}

// privilegesIn is [Control.PrivilegesOn] in tx, not sorted, of a user or a
// certificate.
func (c *Control) privilegesIn(ctx context.Context, tx *store.Tx, p Principal, on Object) (privs []Privilege, err error) {
	if p.Kind == UserPrincipal {
		u, err := c.users.In(tx).Get(ctx, p.Name)
		if errors.Is(err, store.ErrNotFound) || err == nil && u.Disabled {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	for o, ok := on, true; ok; o, ok = o.parent() {
		perm, err := c.perms.In(tx).Get(ctx, permKey(p.String(), o))
		if errors.Is(err, store.ErrNotFound) || err == nil && o != on && !perm.Propagate {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, name := range perm.Roles {
			role, err := c.role(ctx, tx, name)
			if err != nil {
				return nil, err
			}
			privs = append(privs, role.Privileges...)
		}
		return privs, nil
	}
	return nil, nil
}

func permKey(principal string, o Object) string { return principal + "@" + string(o) }

// role returns the role called name.
func (c *Control) role(ctx context.Context, tx *store.Tx, name string) (Role, error) {
	for _, r := range c.builtin {
		if r.Name == name {
			return r, nil
		}
	}
	r, err := c.roles.In(tx).Get(ctx, name)
	return r, missing(err, "role", name)
}

func missing(err error, kind, name string) error {
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) {
		return errs.New(errs.NotFound, "no %s %s", kind, name).WithHint("strongroom %s ls", kind)
	}
	return err
}

// Roles returns all roles, those that always exist first.
func (c *Control) Roles(ctx context.Context) ([]Role, error) {
	custom, err := c.roles.List(ctx)
	return append(slices.Clone(c.builtin), custom...), err
}

// PutRole creates or changes a custom role.
func (c *Control) PutRole(ctx context.Context, r Role) error {
	err := c.putRole(ctx, r)
	return errs.Wrap(err, "cannot store role %s", r.Name)
}

func (c *Control) putRole(ctx context.Context, r Role) error {
	if err := checkName("role", r.Name); err != nil {
		return err
	}
	for _, b := range c.builtin {
		if strings.EqualFold(b.Name, r.Name) {
			return errs.New(errs.InvalidState, "role %s is built in", b.Name)
		}
	}
	for _, p := range r.Privileges {
		if !Known(p) {
			return errs.New(errs.Invalid, "no privilege %s", p)
		}
	}
	r.BuiltIn = false
	slices.Sort(r.Privileges)
	r.Privileges = slices.Compact(r.Privileges)
	return c.roles.Put(ctx, r.Name, r)
}

// DeleteRole removes a custom role that no permission gives.
func (c *Control) DeleteRole(ctx context.Context, name string) error {
	err := c.db.Txn(ctx, func(tx *store.Tx) error {
		perms, err := c.perms.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, p := range perms {
			if slices.Contains(p.Roles, name) {
				return errs.New(errs.InvalidState, "%s has it on %s", p.Principal, p.Object).WithReason("ResourceInUse")
			}
		}
		return missing(c.roles.In(tx).Delete(ctx, name), "role", name)
	})
	return errs.Wrap(err, "cannot delete role %s", name)
}

// maxName is the longest name of a user or role, in bytes.
const maxName = 64

// maxRoles is how many roles one permission can give.
const maxRoles = 16

func checkName(kind, name string) error {
	ok := name != "" && len(name) <= maxName
	for i, r := range name {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		ok = ok && (letter || i > 0 && strings.ContainsRune("._-", r))
	}
	if !ok {
		return errs.New(errs.Invalid, "%q is no name for a %s: it takes 1 to %d letters, digits, '.', '_' and '-', the first a letter or digit", name, kind, maxName)
	}
	return nil
}

// errDenied is the one answer to every failed proof of identity: it does not
// tell which part was wrong.
func errDenied(what string) error {
	return errs.New(errs.Denied, "%s", what).WithReason("InvalidLogin")
}
