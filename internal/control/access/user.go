package access

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// FirstUser is the name of the administrator that [Control.EnsureAdministrator]
// creates.
const FirstUser = "administrator"

// user is a local user as it is stored.
type user struct {
	Name     string    `json:"name"`
	Password string    `json:"password"` // argon2id, PHC string
	Disabled bool      `json:"disabled,omitempty"`
	Created  time.Time `json:"created"`
	Changed  time.Time `json:"changed"` // the password
}

// User is a local user.
type User struct {
	Name     string
	Disabled bool
	Created  time.Time
	Roles    []string // that it has anywhere
	Objects  []Object // on which it has them
	// Permissions are the roles by object.
	Permissions []Permission
}

// token is an API token or session as it is stored, under its id.
type token struct {
	ID          string    `json:"id"`
	Hash        string    `json:"hash"` // SHA-256 of the secret, hex
	User        string    `json:"user"`
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires"`
}

// Token describes a token; its secret is known to its owner only.
type Token struct {
	ID          string
	User        string
	Description string
	Created     time.Time
	Expires     time.Time
}

const (
	// MaxTokenLife is the longest life of a token.
	MaxTokenLife = 366 * 24 * time.Hour
	// maxTokens bounds what one user can pile up.
	maxTokens = 100

	tokenPrefix = "strongroom_"
	tokenIDLen  = 16 // hex digits
	secretBytes = 32
)

// EnsureAdministrator creates the user "administrator" with every privilege and
// a generated password if there is no user at all. deliver gets the password
// before the user exists, so that a crash in between cannot lose it; it must
// not keep the bytes, which are wiped when it returns. If deliver fails, no user
// is created. It reports whether it created the user.
func (c *Control) EnsureAdministrator(ctx context.Context, deliver func(user string, password []byte) error) (bool, error) {
	n, err := c.users.Count(ctx)
	if err != nil || n > 0 {
		return false, errs.Wrap(err, "cannot look for users")
	}
	password := newPassword()
	defer clear(password)
	hash, err := c.hash(ctx, password)
	if err == nil {
		err = deliver(FirstUser, password)
	}
	if err == nil {
		err = c.db.Txn(ctx, func(tx *store.Tx) error { return c.create(ctx, tx, FirstUser, hash, Root, []string{Administrator}) })
	}
	if err != nil {
		return false, errs.Wrap(err, "cannot create first administrator")
	}
	return true, nil
}

// CreateUser creates a local user with roles on its home: everything, or an
// account. It wipes password.
func (c *Control) CreateUser(ctx context.Context, name string, password []byte, roles []string) error {
	return c.CreateUserOn(ctx, name, password, Home(name), roles)
}

// CreateUserOn is [Control.CreateUser] with roles on an object, and below it. It
// wipes password.
func (c *Control) CreateUserOn(ctx context.Context, name string, password []byte, on Object, roles []string) error {
	defer clear(password)
	err := checkPassword(password)
	if err == nil {
		var hash string
		if hash, err = c.hash(ctx, password); err == nil {
			err = c.db.Txn(ctx, func(tx *store.Tx) error { return c.create(ctx, tx, name, hash, on, roles) })
		}
	}
	return errs.Wrap(err, "cannot create user %.*s", maxName, name)
}

func (c *Control) create(ctx context.Context, tx *store.Tx, name, hash string, on Object, roles []string) error {
	if err := c.checkUser(ctx, tx, name); err != nil {
		return err
	}
	now := c.now()
	err := c.users.In(tx).Create(ctx, name, user{Name: name, Password: hash, Created: now, Changed: now})
	if errors.Is(err, store.ErrExists) {
		return errs.New(errs.Exists, "user %s exists already", name)
	}
	if err != nil {
		return err
	}
	if len(roles) == 0 {
		return nil
	}
	return c.grant(ctx, tx, Permission{Principal: string(UserPrincipal) + ":" + name, Object: on, Roles: roles, Propagate: true})
}

// checkUser refuses a name that no new user can have.
func (c *Control) checkUser(ctx context.Context, tx *store.Tx, name string) error {
	home := Home(name)
	if home == Root || c.object == nil {
		return checkName("user", name)
	}
	account, own, _ := strings.Cut(name, "/")
	if len(name) > maxName {
		return errs.New(errs.Invalid, "%.80q is no name for a user: with its account it takes at most %d bytes", name, maxName)
	}
	if err := errors.Join(checkName("account", account), checkName("user", own)); err != nil {
		return err
	}
	return c.object(ctx, tx, home)
}

// Users returns all local users.
func (c *Control) Users(ctx context.Context) ([]User, error) {
	var out []User
	err := c.db.View(ctx, func(tx *store.Tx) error {
		out = nil
		users, err := c.users.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		perms, err := c.perms.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, u := range users {
			x := User{Name: u.Name, Disabled: u.Disabled, Created: u.Created}
			for _, p := range perms {
				if p.Principal == string(UserPrincipal)+":"+u.Name {
					x.Roles = append(x.Roles, p.Roles...)
					x.Objects = append(x.Objects, p.Object)
					x.Permissions = append(x.Permissions, p)
				}
			}
			slices.Sort(x.Roles)
			x.Roles = slices.Compact(x.Roles)
			out = append(out, x)
		}
		return nil
	})
	return out, errs.Wrap(err, "cannot list users")
}

// DeleteUser removes a user with its permissions and tokens. The last
// administrator is refused.
func (c *Control) DeleteUser(ctx context.Context, name string) error {
	err := c.db.Txn(ctx, func(tx *store.Tx) error {
		if err := c.users.In(tx).Delete(ctx, name); err != nil {
			return missing(err, "user", name)
		}
		if err := c.keepUser(ctx, tx, name); err != nil {
			return err
		}
		perms, err := c.perms.In(tx).List(ctx, string(UserPrincipal)+":"+name+"@")
		if err != nil {
			return err
		}
		for _, p := range perms {
			if err := c.perms.In(tx).Delete(ctx, permKey(p.Principal, p.Object)); err != nil {
				return err
			}
		}
		if err := c.dropTokens(ctx, tx, name, ""); err != nil {
			return err
		}
		return c.keepAdministrator(ctx, tx)
	})
	return errs.Wrap(err, "cannot delete user %s", name)
}

// CheckOwnPassword refuses a name that is of no enabled user, or of one who
// still has the password that somebody else has set: until it is changed, two
// people can come in by that name. It is part of tx.
func (c *Control) CheckOwnPassword(ctx context.Context, tx *store.Tx, name string) error {
	u, err := c.users.In(tx).Get(ctx, name)
	switch {
	case err != nil:
		return missing(err, "user", name)
	case u.Disabled:
		return errs.New(errs.InvalidState, "user %s is disabled", name)
	case u.Changed.Equal(u.Created):
		return errs.New(errs.InvalidState, "user %s has not changed the password that it was given", name).
			WithHint("have %s log in and run: strongroom user password", name)
	}
	return nil
}

// CredentialOf returns what tells a user's present password from former ones, or ""
// for a user who may not log in. It is no secret, and part of tx.
func (c *Control) CredentialOf(ctx context.Context, tx *store.Tx, name string) (string, error) {
	u, err := c.users.In(tx).Get(ctx, name)
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) || err == nil && u.Disabled {
		return "", nil
	}
	return u.Changed.UTC().Format(time.RFC3339Nano), err
}

// ApproverCredential is [Control.CredentialOf] of a user who has a privilege on an
// object; "" for one who does not. It is part of tx.
func (c *Control) ApproverCredential(ctx context.Context, tx *store.Tx, name string, priv Privilege, on Object) (string, error) {
	have, err := c.privilegesIn(ctx, tx, Principal{Kind: UserPrincipal, Name: name}, on)
	if err != nil || !slices.Contains(have, priv) {
		return "", err
	}
	return c.CredentialOf(ctx, tx, name)
}

// SetDisabled locks a user out, with all its tokens, or lets it in again. The
// last administrator is refused.
func (c *Control) SetDisabled(ctx context.Context, name string, disabled bool) error {
	err := c.db.Txn(ctx, func(tx *store.Tx) error {
		u, err := c.users.In(tx).Get(ctx, name)
		if err != nil {
			return missing(err, "user", name)
		}
		u.Disabled = disabled
		if err := c.users.In(tx).Put(ctx, name, u); err != nil {
			return err
		}
		if !disabled {
			return nil
		}
		if err := c.dropTokens(ctx, tx, name, ""); err != nil {
			return err
		}
		return c.keepAdministrator(ctx, tx)
	})
	return errs.Wrap(err, "cannot change user %s", name)
}

// ChangePassword changes a user's password, who proves to know the old one, and
// ends all its sessions and tokens but keepToken. It wipes both passwords. Attempts
// at the old one are bounded as those to log in are.
func (c *Control) ChangePassword(ctx context.Context, name string, oldPassword, newPassword []byte, keepToken, peer string) error {
	defer clear(oldPassword)
	defer clear(newPassword)
	err := func() error {
		if err := checkPassword(newPassword); err != nil {
			return err
		}
		if _, err := c.verify(ctx, name, oldPassword, peer); err != nil {
			return err
		}
		hash, err := c.hash(ctx, newPassword)
		if err != nil {
			return err
		}
		return c.db.Txn(ctx, func(tx *store.Tx) error {
			u, err := c.users.In(tx).Get(ctx, name)
			if err != nil {
				return missing(err, "user", name)
			}
			u.Password, u.Changed = hash, c.now()
			if err := c.users.In(tx).Put(ctx, name, u); err != nil {
				return err
			}
			return c.dropTokens(ctx, tx, name, keepToken)
		})
	}()
	return errs.Wrap(err, "cannot change password of %s", name)
}

// Login checks a user's password, which it wipes, and returns the principal. A
// wrong password, an unknown and a disabled user give the same error after the
// same work. After some failures that name has to wait at the peer, "host:port",
// and the peer with any name: [errs.Unavailable].
func (c *Control) Login(ctx context.Context, name string, password []byte, peer string) (Principal, error) {
	defer clear(password)
	p, err := c.verify(ctx, name, password, peer)
	return p, errs.Wrap(err, "cannot log in")
}

func (c *Control) verify(ctx context.Context, name string, password []byte, peer string) (Principal, error) {
	if len(password) > MaxPassword || len(name) > maxName {
		return Principal{}, errDenied("wrong user or password")
	}
	if err := c.throttle.begin(name, peer); err != nil {
		return Principal{}, err
	}
	u, err := c.users.Get(ctx, name)
	known := err == nil && !u.Disabled
	if err != nil && !errors.Is(err, store.ErrNotFound) && !errors.Is(err, store.ErrInvalidKey) {
		return Principal{}, err
	}
	stored := u.Password
	if !known {
		// Work of the same size, so that time does not tell who exists.
		stored = passwordHash{Hashing: c.hashing, salt: make([]byte, saltBytes), hash: make([]byte, hashBytes)}.String()
	}
	match, err := c.matches(ctx, stored, password)
	if err != nil {
		return Principal{}, err
	}
	if !match || !known {
		return Principal{}, errDenied("wrong user or password")
	}
	c.throttle.succeeded(name, peer)
	return Principal{Kind: UserPrincipal, Name: u.Name}, nil
}

// IssueToken makes a token with which user can come in until life has passed.
// The token's text is returned once and stored nowhere.
func (c *Control) IssueToken(ctx context.Context, userName, description string, life time.Duration) (text string, t Token, err error) {
	err = func() error {
		if life <= 0 || life > MaxTokenLife || len(description) > 200 {
			return errs.New(errs.Invalid, "a token lives at most %v and has a description of at most 200 bytes", MaxTokenLife)
		}
		raw := make([]byte, tokenIDLen/2+secretBytes)
		rand.Read(raw)
		id, secret := hex.EncodeToString(raw[:tokenIDLen/2]), raw[tokenIDLen/2:]
		hash := sha256.Sum256(secret)
		now := c.now()
		rec := token{ID: id, Hash: hex.EncodeToString(hash[:]), User: userName, Description: description, Created: now, Expires: now.Add(life)}
		text = tokenPrefix + id + "_" + base64.RawURLEncoding.EncodeToString(secret)
		clear(raw)
		t = rec.public()
		return c.db.Txn(ctx, func(tx *store.Tx) error {
			u, err := c.users.In(tx).Get(ctx, userName)
			if err != nil {
				return missing(err, "user", userName)
			}
			if u.Disabled {
				return errs.New(errs.Denied, "user %s is disabled", userName)
			}
			all, err := c.tokens.In(tx).List(ctx, "")
			if err != nil {
				return err
			}
			n := 0
			for _, o := range all {
				if !now.Before(o.Expires) { // a good time to tidy up
					if err := c.tokens.In(tx).Delete(ctx, o.ID); err != nil {
						return err
					}
				} else if o.User == userName {
					n++
				}
			}
			if n >= maxTokens {
				return errs.New(errs.InvalidState, "user %s has %d sessions and tokens, the limit", userName, n)
			}
			return c.tokens.In(tx).Create(ctx, id, rec)
		})
	}()
	if err != nil {
		return "", Token{}, errs.Wrap(err, "cannot make token for %s", userName)
	}
	return text, t, nil
}

func (t token) public() Token {
	return Token{ID: t.ID, User: t.User, Description: t.Description, Created: t.Created, Expires: t.Expires}
}

// parseToken splits a token's text; it returns false for anything else.
func parseToken(text string) (id string, secret []byte, ok bool) {
	rest, found := strings.CutPrefix(text, tokenPrefix)
	if !found || len(rest) != tokenIDLen+1+base64.RawURLEncoding.EncodedLen(secretBytes) || rest[tokenIDLen] != '_' {
		return "", nil, false
	}
	id = rest[:tokenIDLen]
	if strings.Trim(id, "0123456789abcdef") != "" {
		return "", nil, false
	}
	secret, err := base64.RawURLEncoding.Strict().DecodeString(rest[tokenIDLen+1:])
	if err != nil || len(secret) != secretBytes {
		return "", nil, false
	}
	return id, secret, true
}

// Authenticate returns the principal of a token's text, or a Denied error that
// does not tell what was wrong with it.
func (c *Control) Authenticate(ctx context.Context, text string) (Principal, error) {
	denied := errDenied("the token is not valid (any more)")
	id, secret, ok := parseToken(text)
	if !ok {
		return Principal{}, denied
	}
	defer clear(secret)
	var t token
	var u user
	err := c.db.View(ctx, func(tx *store.Tx) error {
		var err error
		if t, err = c.tokens.In(tx).Get(ctx, id); err != nil {
			return err
		}
		u, err = c.users.In(tx).Get(ctx, t.User)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return Principal{}, denied
	}
	if err != nil {
		return Principal{}, errs.Wrap(err, "cannot check token")
	}
	hash := sha256.Sum256(secret)
	same := subtle.ConstantTimeCompare([]byte(hex.EncodeToString(hash[:])), []byte(t.Hash)) == 1
	if !same || !c.now().Before(t.Expires) || u.Disabled {
		return Principal{}, denied
	}
	return Principal{Kind: UserPrincipal, Name: t.User, Token: t.ID}, nil
}

// Tokens returns the tokens of a user that have not expired.
func (c *Control) Tokens(ctx context.Context, userName string) ([]Token, error) {
	all, err := c.tokens.List(ctx)
	var out []Token
	for _, t := range all {
		if t.User == userName && c.now().Before(t.Expires) {
			out = append(out, t.public())
		}
	}
	return out, errs.Wrap(err, "cannot list tokens")
}

// RevokeToken ends the token with that id. One that is gone is no error.
func (c *Control) RevokeToken(ctx context.Context, id string) error {
	err := c.tokens.Delete(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return errs.Wrap(err, "cannot revoke token %s", id)
}

// dropTokens deletes the tokens of a user but one.
func (c *Control) dropTokens(ctx context.Context, tx *store.Tx, userName, but string) error {
	all, err := c.tokens.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	for _, t := range all {
		if t.User == userName && t.ID != but {
			if err := c.tokens.In(tx).Delete(ctx, t.ID); err != nil {
				return err
			}
		}
	}
	return nil
}
