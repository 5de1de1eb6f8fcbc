package inventory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// ProviderType is the kind of a key provider.
type ProviderType string

// The kinds.
const (
	Native       ProviderType = "native"   // the controller made its KDK
	StandardType ProviderType = "standard" // a key server keeps its keys
)

// ProviderState is how far a provider is ready.
type ProviderState string

// The states of a provider, as vSphere shows them.
const (
	NotBackedUp    ProviderState = "Not backed up"   // native: unusable before a backup was downloaded
	NotEstablished ProviderState = "Not established" // standard: no key was got from it ever
	NotConnected   ProviderState = "Not connected"   // standard: none of its servers can be used now
	Warning        ProviderState = "Warning"         // usable, but not on all hosts, or not for long
	Active         ProviderState = "Active"          // all is well
)

// MaxProviders is vSphere's limit of key providers.
const MaxProviders = 32

// Provider is a key provider: its address and state, never its key.
type Provider struct {
	Name string       `json:"name"` // immutable
	Type ProviderType `json:"type"`
	// KeyID is the id of a native provider's KDK, a UUID; empty of a standard one.
	KeyID string `json:"key_id"`
	// TPMRequired keeps the key off hosts that have no TPM.
	TPMRequired bool `json:"tpm_required,omitempty"`
	// Default: new keys come from here if nothing else is said. One at most.
	Default bool          `json:"default,omitempty"`
	State   ProviderState `json:"state"`
	// Details says why it is not Active, one sentence each.
	Details    []string  `json:"details,omitempty"`
	Created    time.Time `json:"created"`
	BackedUpAt time.Time `json:"backed_up_at,omitzero"`
	// Export is a backup that was made but not confirmed as stored.
	Export *Export `json:"export,omitempty"`
	// Standard is set if and only if Type is StandardType.
	Standard *Standard `json:"standard,omitempty"`
}

// Export is a backup on its way to the user.
type Export struct {
	ID     string    `json:"id"`
	SHA256 string    `json:"sha256"` // of the file, lower-case hex
	Made   time.Time `json:"made"`
}

// exportValid is how long a download may take until it is confirmed.
const exportValid = time.Hour

// providerName is what a provider's name has been given to, for ever.
type providerName struct {
	Type  ProviderType `json:"type"`
	KeyID string       `json:"key_id"`
}

// CreateProvider adds a new provider, not backed up; name and type are set in p,
// and what its type needs.
func (inv *Inventory) CreateProvider(ctx context.Context, p Provider) (Provider, error) {
	p.BackedUpAt, p.Default, p.Export = time.Time{}, false, nil
	_, err := inv.addProvider(ctx, &p)
	if err != nil {
		return Provider{}, errs.Wrap(err, "cannot create key provider %s", p.Name)
	}
	return p, nil
}

// ImportProvider adds a provider from its backup, or reports false if this very
// provider is here already. A name that stands for other key material is
// refused. An imported provider is backed up: the backup is what it came from.
func (inv *Inventory) ImportProvider(ctx context.Context, p Provider) (_ Provider, imported bool, err error) {
	p.BackedUpAt, p.Default, p.Export = inv.now(), false, nil
	existed, err := inv.addProvider(ctx, &p)
	if err != nil {
		return Provider{}, false, errs.Wrap(err, "cannot import key provider %s", p.Name)
	}
	return p, !existed, nil
}

// CheckImport says whether [Inventory.ImportProvider] would refuse p, and
// whether p is here already. It changes nothing.
func (inv *Inventory) CheckImport(ctx context.Context, p Provider) (existed bool, err error) {
	err = inv.db.View(ctx, func(tx *store.Tx) error {
		existed, err = inv.checkNewProvider(ctx, tx, p)
		return err
	})
	return existed, errs.Wrap(err, "cannot import key provider %s", p.Name)
}

// addProvider stores *p, or if that very provider exists and p is an import
// (backed up), leaves it and sets *p to it.
func (inv *Inventory) addProvider(ctx context.Context, p *Provider) (existed bool, err error) {
	p.Created = inv.now()
	err = inv.db.Txn(ctx, func(tx *store.Tx) error {
		existed, err = inv.checkNewProvider(ctx, tx, *p)
		if err != nil {
			return err
		}
		if existed {
			old, err := inv.providers.In(tx).Get(ctx, p.Name)
			if err != nil {
				return err
			}
			if p.BackedUpAt.IsZero() {
				return errs.New(errs.Exists, "key provider %s exists already", p.Name)
			}
			if old.BackedUpAt.IsZero() {
				// Who could import it has the backup.
				old.BackedUpAt, old.Export = p.BackedUpAt, nil
				if err := inv.setState(ctx, tx, &old); err != nil {
					return err
				}
				if err := inv.providers.In(tx).Put(ctx, old.Name, old); err != nil {
					return err
				}
			}
			*p = old
			return nil
		}
		if err := inv.setState(ctx, tx, p); err != nil {
			return err
		}
		if err := inv.burnt.In(tx).Put(ctx, p.Name, providerName{Type: p.Type, KeyID: p.KeyID}); err != nil {
			return err
		}
		return inv.providers.In(tx).Create(ctx, p.Name, *p)
	})
	return existed, err
}

// checkNewProvider refuses what would break the rules of names, and reports
// whether this very provider exists.
func (inv *Inventory) checkNewProvider(ctx context.Context, tx *store.Tx, p Provider) (existed bool, err error) {
	if err := CheckName("key provider", p.Name); err != nil {
		return false, err
	}
	switch {
	case p.Type == Native && p.KeyID != "" && p.Standard == nil:
	case p.Type == StandardType && p.KeyID == "" && p.Standard != nil:
	default:
		return false, errs.New(errs.Invalid, "no key provider is of type %q with key id %q", p.Type, p.KeyID)
	}
	all, err := inv.providers.In(tx).List(ctx, "")
	if err != nil {
		return false, err
	}
	for _, o := range all {
		switch {
		case o.Name == p.Name && o.Type == p.Type && o.KeyID == p.KeyID:
			return true, nil
		case o.Name == p.Name && o.Type != p.Type:
			return false, errs.New(errs.Exists, "key provider %s exists already, of type %s", p.Name, o.Type).
				WithReason("NameCollision").WithHint("strongroom provider ls")
		case o.Name == p.Name:
			return false, errs.New(errs.Exists, "key provider %s exists already, with other key material (key id %s, not %s)", p.Name, o.KeyID, p.KeyID).
				WithReason("NameCollision").WithHint("strongroom provider ls")
		case o.KeyID == p.KeyID && p.Type == Native:
			return false, errs.New(errs.Exists, "key %s belongs to key provider %s", p.KeyID, o.Name).WithReason("NameCollision")
		}
	}
	old, err := inv.burnt.In(tx).Get(ctx, p.Name)
	switch {
	case err == nil && (old.Type != p.Type || old.KeyID != p.KeyID):
		return false, errs.New(errs.Exists, "the name %s stood for a deleted key provider with other key material (key id %s), and objects elsewhere may still refer to it", p.Name, old.KeyID).
			WithReason("NameCollision").WithHint("choose a name that was never used, or import the backup of the deleted provider: strongroom provider import F.p12")
	case err != nil && !errors.Is(err, store.ErrNotFound):
		return false, err
	}
	if len(all) >= MaxProviders {
		return false, errs.New(errs.InvalidState, "there are %d key providers already, the limit", len(all))
	}
	return false, nil
}

// Provider returns the key provider called name.
func (inv *Inventory) Provider(ctx context.Context, name string) (Provider, error) {
	p, err := inv.providers.Get(ctx, name)
	return p, missing(err, "provider", name)
}

// Providers returns all key providers.
func (inv *Inventory) Providers(ctx context.Context) ([]Provider, error) {
	return inv.providers.List(ctx)
}

// DefaultProvider returns the default provider, or false if there is none.
func (inv *Inventory) DefaultProvider(ctx context.Context) (Provider, bool, error) {
	all, err := inv.providers.List(ctx)
	if i := slices.IndexFunc(all, func(p Provider) bool { return p.Default }); i >= 0 {
		return all[i], true, err
	}
	return Provider{}, false, err
}

// SetDefaultProvider makes name the one default provider; an empty name leaves
// none.
func (inv *Inventory) SetDefaultProvider(ctx context.Context, name string) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		providers := inv.providers.In(tx)
		all, err := providers.List(ctx, "")
		if err != nil {
			return err
		}
		found := name == ""
		for _, p := range all {
			found = found || p.Name == name
			if want := p.Name == name; p.Default != want {
				p.Default = want
				if err := providers.Put(ctx, p.Name, p); err != nil {
					return err
				}
			}
		}
		if !found {
			return missing(store.ErrNotFound, "provider", name)
		}
		return nil
	})
	return errs.Wrap(err, "cannot set default key provider")
}

// ProviderForEncryption returns the provider that gives a new key: the one
// called name, or if name is empty the cluster's default (clusterID may be
// empty), or the default one. It refuses, with the next command as hint, if
// there is none or if it was not backed up, or not established.
func (inv *Inventory) ProviderForEncryption(ctx context.Context, name, clusterID string) (Provider, error) {
	var p Provider
	err := inv.db.View(ctx, func(tx *store.Tx) error {
		if name == "" && clusterID != "" {
			c, err := inv.clusters.In(tx).Get(ctx, clusterID)
			if err != nil {
				return missing(err, "cluster", clusterID)
			}
			name = c.DefaultProvider
		}
		if name == "" {
			all, err := inv.providers.In(tx).List(ctx, "")
			if err != nil {
				return err
			}
			i := slices.IndexFunc(all, func(p Provider) bool { return p.Default })
			if i < 0 {
				return errs.New(errs.InvalidState, "there is no default key provider").
					WithReason("NoDefaultProvider").WithHint("strongroom provider default NAME")
			}
			p = all[i]
		} else {
			var err error
			if p, err = inv.providers.In(tx).Get(ctx, name); err != nil {
				return missing(err, "provider", name)
			}
		}
		if p.Type == StandardType && p.Standard.Established.IsZero() {
			return errs.New(errs.InvalidState, "key provider %s is not established: no key was got from its key server yet", p.Name).
				WithReason("NotEstablished").WithHint("strongroom provider check %s", p.Name)
		}
		if p.Type == Native && p.BackedUpAt.IsZero() {
			return errs.New(errs.InvalidState, "key provider %s is not backed up", p.Name).
				WithReason("NotBackedUp").WithHint("strongroom provider backup %s --out %s.p12", p.Name, p.Name)
		}
		return nil
	})
	if err != nil {
		return Provider{}, err
	}
	return p, nil
}

// StartExport notes that a backup of provider name was made whose file has that
// SHA-256 (lower-case hex), and returns the export's id for
// [Inventory.ConfirmBackup].
func (inv *Inventory) StartExport(ctx context.Context, name, sha256 string) (id string, err error) {
	id = newID()
	_, err = inv.providers.Update(ctx, name, func(p *Provider) error {
		p.Export = &Export{ID: id, SHA256: sha256, Made: inv.now()}
		return nil
	})
	return id, errs.Wrap(missing(err, "provider", name), "cannot export key provider %s", name)
}

// ConfirmBackup makes a provider backed up: the user stored the file of that
// export and found this SHA-256 when reading it back.
func (inv *Inventory) ConfirmBackup(ctx context.Context, name, exportID, sha256 string) (Provider, error) {
	var p Provider
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		var err error
		if p, err = inv.providers.In(tx).Get(ctx, name); err != nil {
			return missing(err, "provider", name)
		}
		again := errs.New(errs.InvalidState, "this export is unknown or older than %v", exportValid).
			WithHint("strongroom provider backup %s --out %s.p12", name, name)
		switch {
		case p.Export == nil || p.Export.ID != exportID || inv.now().Sub(p.Export.Made) > exportValid:
			return again
		case p.Export.SHA256 != sha256:
			return errs.New(errs.Corrupt, "the stored file differs from the exported one").WithHint("%s", again.Hint)
		}
		p.BackedUpAt, p.Export = inv.now(), nil
		if err := inv.setState(ctx, tx, &p); err != nil {
			return err
		}
		return inv.providers.In(tx).Put(ctx, name, p)
	})
	if err != nil {
		return Provider{}, errs.Wrap(err, "cannot confirm backup of key provider %s", name)
	}
	return p, nil
}

// Usage returns every registered object that needs a key of provider name, or
// just the key keyID if it is not empty. The provider need not exist. Copies
// elsewhere (backups, replicas) cannot be known.
func (inv *Inventory) Usage(ctx context.Context, name, keyID string) ([]KeyUser, error) {
	vms, err := inv.vms.List(ctx)
	if err != nil {
		return nil, errs.Wrap(err, "cannot list usage of key provider %s", name)
	}
	return usage(vms, name, keyID), nil
}

func usage(vms []VM, name, keyID string) []KeyUser {
	var users []KeyUser
	for _, v := range vms {
		for _, u := range v.keyUsers() {
			if u.Key.Provider == name && (keyID == "" || u.Key.KeyID == keyID) {
				users = append(users, u)
			}
		}
	}
	return users
}

// DeleteProvider removes the provider called name. One that registered objects
// need is refused unless force is set. If it was a default, there is none then.
func (inv *Inventory) DeleteProvider(ctx context.Context, name string, force bool) error {
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		if !force {
			vms, err := inv.vms.In(tx).List(ctx, "")
			if err != nil {
				return err
			}
			if users := usage(vms, name, ""); len(users) > 0 {
				var names []string
				for _, u := range users {
					if !slices.Contains(names, u.VM) {
						names = append(names, u.VM)
					}
				}
				return errs.New(errs.InvalidState, "it is in use by %s", describe(names)).WithReason("ResourceInUse").
					WithHint("rekey them to another provider first: strongroom vm rekey VM --provider NAME (see strongroom provider usage %s)", name)
			}
		}
		clusters, err := inv.clusters.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, c := range clusters {
			if c.DefaultProvider == name {
				c.DefaultProvider = ""
				if err := inv.clusters.In(tx).Put(ctx, c.ID, c); err != nil {
					return err
				}
			}
		}
		return missing(inv.providers.In(tx).Delete(ctx, name), "provider", name)
	})
	return errs.Wrap(err, "cannot delete key provider %s", name)
}

// ComputeState returns what state a native provider is in with these hosts, and
// why it is not Active.
func ComputeState(p Provider, hosts []Host) (ProviderState, []string) {
	if p.BackedUpAt.IsZero() {
		return NotBackedUp, []string{"It cannot be used until its backup was downloaded."}
	}
	var details []string
	holders := 0
	for _, h := range hosts {
		switch {
		case p.TPMRequired && !h.Capabilities[CapabilityTPM]:
			details = append(details, fmt.Sprintf("Host %s has no TPM and takes no part: encrypted VMs cannot run there.", h.Name))
		case !h.Holds(p.Name, p.KeyID):
			details = append(details, fmt.Sprintf("Host %s (%s) does not have the key yet.", h.Name, h.State))
		default:
			holders++
		}
	}
	if len(hosts) == 0 {
		details = append(details, "There is no host yet.")
	} else if holders == 0 {
		details = append(details, "No host has the key.")
	}
	if len(details) > 0 {
		return Warning, details
	}
	return Active, nil
}

func (inv *Inventory) setState(ctx context.Context, tx *store.Tx, p *Provider) error {
	hosts, err := inv.hosts.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	p.State, p.Details = inv.stateOf(*p, hosts)
	return nil
}

func (inv *Inventory) stateOf(p Provider, hosts []Host) (ProviderState, []string) {
	if p.Type == StandardType {
		return standardState(p.Standard, inv.now())
	}
	return ComputeState(p, hosts)
}

// StateChange is a provider that has gone from one state to another.
type StateChange struct {
	Provider Provider // as it is now
	Was      ProviderState
}

// RefreshProviderStates computes all providers' states anew from what the hosts
// hold, stores what is different, and returns the providers whose state changed.
func (inv *Inventory) RefreshProviderStates(ctx context.Context) ([]StateChange, error) {
	var changes []StateChange
	err := inv.db.Txn(ctx, func(tx *store.Tx) error {
		changes = nil
		all, err := inv.providers.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		hosts, err := inv.hosts.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, p := range all {
			was, details := p.State, p.Details
			p.State, p.Details = inv.stateOf(p, hosts)
			if p.State == was && slices.Equal(p.Details, details) {
				continue
			}
			if p.State != was {
				changes = append(changes, StateChange{Provider: p, Was: was})
			}
			if err := inv.providers.In(tx).Put(ctx, p.Name, p); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errs.Wrap(err, "cannot refresh states of key providers")
	}
	return changes, nil
}
