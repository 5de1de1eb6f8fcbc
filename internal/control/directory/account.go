package directory

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Account is a tenant of a key management server.
type Account struct {
	Name        string    `json:"name"` // never changes
	Title       string    `json:"title,omitempty"`
	Description string    `json:"description,omitempty"`
	Disabled    bool      `json:"disabled,omitempty"` // its applications are refused
	Quota       Quota     `json:"quota,omitzero"`     // of its groups together
	Created     time.Time `json:"created,omitzero"`   // not of [DefaultAccount]
}

const (
	// DefaultAccount is the account of groups and applications whose names name
	// none. It needs no record: it is there, also of data that is older than accounts.
	DefaultAccount = "default"

	// accountNameMax leaves room for a group's name in the key of an object.
	accountNameMax = 32
)

// ErrAccountDisabled says that an application's account is disabled.
var ErrAccountDisabled = errors.New("the account is disabled")

// SplitName returns the account that the name of a group or application names, and
// what it is called in that.
func SplitName(name string) (account, own string) {
	if account, own, ok := strings.Cut(name, "/"); ok {
		return account, own
	}
	return DefaultAccount, name
}

// AccountOf returns the account that the name of a group or application names.
func AccountOf(name string) string {
	account, _ := SplitName(name)
	return account
}

// FullName is the name, with its account, of what is called own in it.
func FullName(account, own string) string {
	if account == DefaultAccount {
		return own
	}
	return account + "/" + own
}

// checkFullName checks a name that may name an account.
func checkFullName(what, name string) error {
	account, own, ok := strings.Cut(name, "/")
	if !ok {
		return checkName(what, name)
	}
	if account == DefaultAccount {
		return errs.New(errs.Invalid, "%s name %.80q names the account %s: leave that out", what, name, DefaultAccount)
	}
	if err := checkNameOf("account", account, accountNameMax); err != nil {
		return err
	}
	return checkName(what, own)
}

// CreateAccount adds an account.
func (d *Directory) CreateAccount(ctx context.Context, a Account) error {
	if err := errors.Join(checkNameOf("account", a.Name, accountNameMax), checkText(a.Title, a.Description)); err != nil {
		return errs.Wrap(err, "cannot create account")
	}
	a.Created = d.now().UTC()
	err := d.alter(ctx, func(tx *store.Tx) error {
		err := store.ErrExists
		if a.Name != DefaultAccount {
			err = d.accounts.In(tx).Create(ctx, a.Name, a)
		}
		if errors.Is(err, store.ErrExists) {
			return errs.New(errs.Exists, "it exists already")
		}
		return err
	})
	return errs.Wrap(err, "cannot create account %s", a.Name)
}

// Accounts returns all accounts, by name.
func (d *Directory) Accounts() []Account {
	d.mu.RLock()
	defer d.mu.RUnlock()
	all := maps.Clone(d.index.accounts)
	if _, ok := all[DefaultAccount]; !ok {
		all[DefaultAccount] = Account{Name: DefaultAccount}
	}
	return slices.SortedFunc(maps.Values(all), func(a, b Account) int { return strings.Compare(a.Name, b.Name) })
}

// Account returns one account.
func (d *Directory) Account(name string) (Account, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if a, ok := d.index.accounts[name]; ok {
		return a, nil
	}
	if name == DefaultAccount {
		return Account{Name: name}, nil
	}
	return Account{}, noAccount(name)
}

func noAccount(name string) error {
	return errs.New(errs.NotFound, "there is no account %.64q", name).WithHint("strongroom kms account ls")
}

// CheckAccount refuses an account that there is not. It is part of tx.
func (d *Directory) CheckAccount(ctx context.Context, tx *store.Tx, name string) error {
	_, err := d.accountIn(ctx, tx, name)
	return err
}

// CheckGroup refuses a group that there is not. It is part of tx.
func (d *Directory) CheckGroup(ctx context.Context, tx *store.Tx, name string) error {
	_, err := d.QuorumIn(ctx, tx, name)
	return err
}

// RequireGroup has tx commit only while there is the group.
func (d *Directory) RequireGroup(ctx context.Context, tx *store.Tx, name string) error {
	err := d.groups.In(tx).Require(ctx, name)
	if store.IsNotFound(err) || errors.Is(err, store.ErrInvalidKey) {
		return noGroup(name)
	}
	return err
}

func (d *Directory) accountIn(ctx context.Context, tx *store.Tx, name string) (Account, error) {
	a, err := d.accounts.In(tx).Get(ctx, name)
	if store.IsNotFound(err) || errors.Is(err, store.ErrInvalidKey) {
		if name == DefaultAccount {
			return Account{Name: name}, nil
		}
		return Account{}, noAccount(name)
	}
	return a, err
}

// Describe gives an account another title and description.
func (d *Directory) Describe(ctx context.Context, account, title, description string) error {
	if err := checkText(title, description); err != nil {
		return errs.Wrap(err, "cannot change account %.64s", account)
	}
	return d.changeAccount(ctx, account, func(a *Account) { a.Title, a.Description = title, description })
}

// SetAccountQuota is [Directory.SetGroupQuota] for an account: its groups
// together.
func (d *Directory) SetAccountQuota(ctx context.Context, account string, q Quota) error {
	if err := checkQuota(q); err != nil {
		return errs.Wrap(err, "cannot change account %.64s", account)
	}
	return d.changeAccount(ctx, account, func(a *Account) { a.Quota = q })
}

// SetAccountDisabled has all applications of an account refused, or accepted
// again.
func (d *Directory) SetAccountDisabled(ctx context.Context, account string, disabled bool) error {
	return d.changeAccount(ctx, account, func(a *Account) { a.Disabled = disabled })
}

func (d *Directory) changeAccount(ctx context.Context, name string, f func(*Account)) error {
	err := d.alter(ctx, func(tx *store.Tx) error {
		a, err := d.accountIn(ctx, tx, name)
		if err != nil {
			return err
		}
		f(&a)
		return d.accounts.In(tx).Set(name, a)
	})
	return errs.Wrap(err, "cannot change account %.64s", name)
}

// DeleteAccount removes an account that has no groups, if allow, which is called
// in the transaction, lets it.
func (d *Directory) DeleteAccount(ctx context.Context, name string, allow func(context.Context, *store.Tx) error) error {
	err := d.alter(ctx, func(tx *store.Tx) error {
		if name == DefaultAccount {
			return errs.New(errs.InvalidState, "there is always an account %s", name)
		}
		if _, err := d.accountIn(ctx, tx, name); err != nil {
			return err
		}
		groups, err := d.groups.In(tx).List(ctx, name+"/")
		if err != nil {
			return err
		}
		if len(groups) > 0 {
			return errs.New(errs.InvalidState, "it has %d groups, %s among them", len(groups), groups[0].Name).WithReason("ResourceInUse").
				WithHint("strongroom kms group delete %s; or have its applications refused: strongroom kms account disable %s", groups[0].Name, name)
		}
		if err := allow(ctx, tx); err != nil {
			return err
		}
		return d.accounts.In(tx).Delete(ctx, name)
	})
	return errs.Wrap(err, "cannot delete account %.64s", name)
}
