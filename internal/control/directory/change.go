package directory

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// CreateGroup adds a group. Whether its policy names operations and key types
// that there are is the caller's to check.
func (d *Directory) CreateGroup(ctx context.Context, g Group) error {
	if err := checkGroup(g); err != nil {
		return errs.Wrap(err, "cannot create group")
	}
	g.Created = d.now().UTC()
	err := d.alter(ctx, func(tx *store.Tx) error {
		if err := d.CheckAccount(ctx, tx, AccountOf(g.Name)); err != nil {
			return err
		}
		// What belongs to a group that is there is not an earlier one's.
		if err := d.groups.In(tx).Create(ctx, g.Name, g); err != nil {
			return err
		}
		if d.clear == nil {
			return nil
		}
		return errs.Wrap(d.clear(ctx, tx, g.Name), "of an earlier group of that name")
	})
	if errors.Is(err, store.ErrExists) {
		err = errs.New(errs.Exists, "it exists already")
	}
	return errs.Wrap(err, "cannot create group %s", g.Name)
}

// DeleteGroup removes a group that has no applications, if allow lets it: what else
// belongs to a group is allow's to look for, in the transaction.
func (d *Directory) DeleteGroup(ctx context.Context, name string, allow Allow) error {
	err := d.alter(ctx, func(tx *store.Tx) error {
		g, err := d.groups.In(tx).Get(ctx, name)
		if store.IsNotFound(err) || errors.Is(err, store.ErrInvalidKey) {
			return noGroup(name)
		}
		if err != nil {
			return err
		}
		if err := d.checkNoApplications(ctx, tx, name); err != nil {
			return err
		}
		if err := allow(ctx, tx, g); err != nil {
			return err
		}
		return d.groups.In(tx).Delete(ctx, name)
	})
	return errs.Wrap(err, "cannot delete group %.100s", name)
}

func (d *Directory) checkNoApplications(ctx context.Context, tx *store.Tx, group string) error {
	apps, err := d.apps.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	apps = slices.DeleteFunc(apps, func(a Application) bool { return a.Group != group })
	if len(apps) > 0 {
		return errs.New(errs.InvalidState, "it has %d applications, %s among them", len(apps), apps[0].Name).WithReason("ResourceInUse").
			WithHint("strongroom kms app delete %s", apps[0].Name)
	}
	return nil
}

// CheckDeletable refuses a group that there is not, or that has applications. It is a
// look ahead: [Directory.DeleteGroup] looks again.
func (d *Directory) CheckDeletable(ctx context.Context, name string) error {
	err := d.db.View(ctx, func(tx *store.Tx) error {
		if err := d.CheckGroup(ctx, tx, name); err != nil {
			return err
		}
		return d.checkNoApplications(ctx, tx, name)
	})
	return errs.Wrap(err, "cannot delete group %.100s", name)
}

func checkGroup(g Group) error {
	if len(g.Policy.Operations) > listMax || len(g.Policy.KeyTypes) > listMax {
		return errs.New(errs.Invalid, "a policy names at most %d operations and %d key types", listMax, listMax)
	}
	if err := checkFullName("group", g.Name); err != nil {
		return err
	}
	return checkText(g.Title, g.Description)
}

// SetPolicy gives a group another policy, which holds for requests from then
// on, if allow lets it.
func (d *Directory) SetPolicy(ctx context.Context, group string, p Policy, allow Allow) error {
	if err := checkGroup(Group{Name: group, Policy: p}); err != nil {
		return errs.Wrap(err, "cannot change group")
	}
	return d.changeGroupIf(ctx, group, allow, func(g *Group) { g.Policy = p })
}

// SetGroupQuota gives a group another quota, which holds for operations from
// then on.
func (d *Directory) SetGroupQuota(ctx context.Context, group string, q Quota) error {
	if err := checkQuota(q); err != nil {
		return errs.Wrap(err, "cannot change group %.64s", group)
	}
	return d.changeGroup(ctx, group, func(g *Group) { g.Quota = q })
}

// SetRotation gives a group another rotation.
func (d *Directory) SetRotation(ctx context.Context, group string, r Rotation) error {
	if min(r.EveryDays, r.DeactivateAfterDays) < 0 || max(r.EveryDays, r.DeactivateAfterDays) > rotationMax {
		return errs.New(errs.Invalid, "cannot change group %.64s: rotation takes 0 to %d days", group, rotationMax)
	}
	return d.changeGroup(ctx, group, func(g *Group) { g.Rotation = r })
}

// SetApplicationQuota is [Directory.SetGroupQuota] for an application.
func (d *Directory) SetApplicationQuota(ctx context.Context, name string, q Quota) error {
	err := checkQuota(q)
	if err == nil && q.Keys != 0 {
		err = errs.New(errs.Invalid, "keys are its group's: they are bounded there").WithHint("strongroom kms group quota GROUP --keys %d", q.Keys)
	}
	if err != nil {
		return errs.Wrap(err, "cannot change application %.64s", name)
	}
	return d.changeApplication(ctx, name, func(a *Application) error {
		a.Quota = q
		return nil
	})
}

func checkQuota(q Quota) error {
	switch {
	case q.Keys < 0 || q.Operations < 0:
		return errs.New(errs.Invalid, "a quota is not negative")
	case q.Operations == 0 && q.Period != 0:
		return errs.New(errs.Invalid, "a period of %v without a number of operations", q.Period)
	case q.Operations > 0 && (q.Period < periodMin || q.Period > periodMax || q.Period%time.Second != 0):
		return errs.New(errs.Invalid, "a period of %v: it is whole seconds, from %v to %v", q.Period, periodMin, periodMax)
	}
	return nil
}

func (d *Directory) changeGroup(ctx context.Context, group string, f func(*Group)) error {
	return d.changeGroupIf(ctx, group, nil, f)
}

func (d *Directory) changeGroupIf(ctx context.Context, group string, allow Allow, f func(*Group)) error {
	err := d.alter(ctx, func(tx *store.Tx) error {
		g, err := d.groups.In(tx).Get(ctx, group)
		if store.IsNotFound(err) {
			return noGroup(group)
		}
		if err != nil {
			return err
		}
		if allow != nil {
			if err := allow(ctx, tx, g); err != nil {
				return err
			}
		}
		f(&g)
		return d.groups.In(tx).Put(ctx, group, g)
	})
	return errs.Wrap(err, "cannot change group %s", group)
}

// CreateApplication adds an application without credentials.
func (d *Directory) CreateApplication(ctx context.Context, a Application) error {
	if err := errors.Join(checkFullName("application", a.Name), checkText(a.Title, a.Description)); err != nil {
		return errs.Wrap(err, "cannot create application")
	}
	if account, own := SplitName(a.Name); account != AccountOf(a.Group) {
		return errs.New(errs.Invalid, "cannot create application %s: group %.100s is not of its account", a.Name, a.Group).
			WithHint("strongroom kms app create %s --group %.100s", FullName(AccountOf(a.Group), own), a.Group)
	}
	if a.Interface != KMIP && a.Interface != REST {
		return errs.New(errs.Invalid, "cannot create application %s: there is no interface %.16q", a.Name, a.Interface)
	}
	a.Created, a.Credentials = d.now().UTC(), nil
	err := d.alter(ctx, func(tx *store.Tx) error {
		if _, err := d.groups.In(tx).Get(ctx, a.Group); store.IsNotFound(err) {
			return errs.New(errs.NotFound, "there is no group %.64q", a.Group).WithHint("strongroom kms group create NAME")
		} else if err != nil {
			return err
		}
		if _, err := d.apps.In(tx).Get(ctx, a.Name); !store.IsNotFound(err) {
			if err == nil {
				err = errs.New(errs.Exists, "it exists already")
			}
			return err
		}
		return d.setApplication(tx, a)
	})
	return errs.Wrap(err, "cannot create application %s", a.Name)
}

// DeleteApplication removes an application and its credentials. The keys stay:
// they are its group's.
func (d *Directory) DeleteApplication(ctx context.Context, name string) error {
	err := d.alter(ctx, func(tx *store.Tx) error {
		err := d.apps.In(tx).Delete(ctx, name)
		if store.IsNotFound(err) {
			return noApplication(name)
		}
		return err
	})
	return errs.Wrap(err, "cannot delete application %s", name)
}

// SetDisabled has an application refused, or accepted again.
func (d *Directory) SetDisabled(ctx context.Context, name string, disabled bool) error {
	return d.changeApplication(ctx, name, func(a *Application) error {
		a.Disabled = disabled
		return nil
	})
}

func (d *Directory) changeApplication(ctx context.Context, name string, f func(*Application) error) error {
	err := d.alter(ctx, func(tx *store.Tx) error {
		a, err := d.apps.In(tx).Get(ctx, name)
		if store.IsNotFound(err) {
			return noApplication(name)
		}
		if err != nil {
			return err
		}
		if err := f(&a); err != nil {
			return err
		}
		return d.setApplication(tx, a)
	})
	return errs.Wrap(err, "cannot change application %s", name)
}

// setApplication stores an application that tx has looked for.
func (d *Directory) setApplication(tx *store.Tx, a Application) error {
	if a.Interface == KMIP {
		return d.kmipApps.In(tx).Set(a.Name, a)
	}
	return d.apps.In(tx).Set(a.Name, a)
}

// newCredentialID returns the identifier of a new credential.
func newCredentialID() string {
	id := make([]byte, credentialIDBytes)
	rand.Read(id)
	return hex.EncodeToString(id)
}

// add appends a credential and returns it. One without an identifier gets one.
func (d *Directory) add(ctx context.Context, app string, c Credential) (Credential, error) {
	if c.ID == "" {
		c.ID = newCredentialID()
	}
	c.Created = d.now().UTC()
	err := d.changeApplication(ctx, app, func(a *Application) error {
		if c.Kind == APIKey && a.Interface != REST {
			return errs.New(errs.Invalid, "API keys are for applications whose interface is REST, and this one's is %v", a.Interface).
				WithHint("strongroom kms credential create %s", app)
		}
		if len(a.Credentials) >= credentialMax {
			return errs.New(errs.InvalidState, "it has %d credentials; no more are possible", credentialMax).WithHint("strongroom kms credential revoke %s ID", app)
		}
		if holder := d.holder(c); c.Kind != APIKey && holder != "" && (holder != app || c.Kind == Certificate) {
			if AccountOf(holder) != AccountOf(app) {
				return errs.New(errs.Exists, "the certificate is a credential of another application")
			}
			return errs.New(errs.Exists, "the certificate is a credential of application %s", holder)
		}
		a.Credentials = append(a.Credentials, c)
		return nil
	})
	return c, err
}

// holder returns the application that has a credential like c.
func (d *Directory) holder(c Credential) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if c.Kind == Certificate {
		return d.index.certs[c.Fingerprint]
	}
	return d.index.users[c.User]
}

// AddPassword gives an application a user name, which is its own name, and a
// new password. The password is not kept: the caller shows it once and wipes
// it. An earlier password stays valid until it is revoked, so that passwords can
// be changed without a gap. life 0 means for ever.
func (d *Directory) AddPassword(ctx context.Context, app string, life time.Duration) (c Credential, password []byte, err error) {
	raw := make([]byte, 32)
	defer clear(raw)
	rand.Read(raw)
	password = make([]byte, base64.RawURLEncoding.EncodedLen(len(raw)))
	base64.RawURLEncoding.Encode(password, raw)
	return d.addSecret(ctx, app, Credential{Kind: Password, User: app}, password, life)
}

// addSecret adds a credential whose secret, which it takes over, is kept as a hash.
func (d *Directory) addSecret(ctx context.Context, app string, c Credential, secret []byte, life time.Duration) (Credential, []byte, error) {
	sum := sha256.Sum256(secret)
	c.Hash = hex.EncodeToString(sum[:])
	if life > 0 {
		c.Expires = d.now().Add(life).UTC()
	}
	c, err := d.add(ctx, app, c)
	if err != nil {
		clear(secret)
		return Credential{}, nil, err
	}
	return c, secret, nil
}

// AddCertificate has an application known by a client certificate.
func (d *Directory) AddCertificate(ctx context.Context, app string, cert *x509.Certificate) (Credential, error) {
	if d.now().After(cert.NotAfter) {
		return Credential{}, errs.New(errs.Invalid, "cannot change application %s: the certificate has expired on %s", app, cert.NotAfter.UTC().Format(time.DateOnly))
	}
	sum := sha256.Sum256(cert.Raw)
	return d.add(ctx, app, Credential{Kind: Certificate, Fingerprint: hex.EncodeToString(sum[:]), Expires: cert.NotAfter.UTC()})
}

// Revoke takes a credential from an application.
func (d *Directory) Revoke(ctx context.Context, app, id string) error {
	return d.changeApplication(ctx, app, func(a *Application) error {
		at := slices.IndexFunc(a.Credentials, func(c Credential) bool { return c.ID == id })
		if at < 0 {
			return errs.New(errs.NotFound, "it has no credential %.64q", id).WithHint("strongroom kms app show %s", app)
		}
		a.Credentials = slices.Delete(a.Credentials, at, at+1)
		return nil
	})
}
