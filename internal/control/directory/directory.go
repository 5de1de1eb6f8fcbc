// Package directory knows who may use a key management server: accounts, the
// groups in them, the applications in those, and the applications' credentials. A
// group's applications see the same keys and are under the group's policy. An
// account is a tenant: what it holds are its groups and applications, and their
// names are "ACCOUNT/NAME". Those of the account [DefaultAccount], which there
// always is, are "NAME".
//
// An application has one [Interface], KMIP or REST; its credentials are good for
// that alone. A credential is a user name with a password, a client certificate
// that is pinned by its fingerprint: who has its key is the application, whoever
// signed it; or an API key, for REST. Passwords and API keys are 256 random bits
// made here, shown once, and kept as a SHA-256 hash (docs/spec/kms-directory.md).
//
// Invariants: what is revoked is refused from the moment on that the call which
// revoked it returns, by other nodes of the KMS from their next
// [Directory.Refresh] on; secrets are not stored. A [Directory] is safe for
// concurrent use.
package directory

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Group is whose applications share keys.
type Group struct {
	Name        string    `json:"name"` // with its account; where its keys belong; never changes
	Title       string    `json:"title,omitempty"`
	Description string    `json:"description,omitempty"`
	Policy      Policy    `json:"policy"`
	Quota       Quota     `json:"quota,omitzero"`
	Rotation    Rotation  `json:"rotation,omitzero"`
	Quorum      Quorum    `json:"quorum,omitzero"`
	Created     time.Time `json:"created"`
}

// Rotation is when a group's keys are replaced, in days. Zero means never.
type Rotation struct {
	EveryDays           int `json:"everyDays,omitempty"`           // of a key's age since its activation
	DeactivateAfterDays int `json:"deactivateAfterDays,omitempty"` // since its replacement was made
}

// Quota bounds how much may be done. Zero numbers bound nothing.
type Quota struct {
	// Keys is how many keys a group or account may have. An application has none of
	// its own.
	Keys int64 `json:"keys,omitempty"`
	// Operations is how many may be carried out in a Period, which is whole
	// seconds, a minute to a year.
	Operations int64         `json:"operations,omitempty"`
	Period     time.Duration `json:"period,omitempty"`
}

// Policy is what the applications of a group may do.
type Policy struct {
	// Operations are the KMIP operations allowed, as the specification writes
	// them without spaces ("GetAttributes"); none means all.
	Operations []string `json:"operations,omitempty"`
	// NoExport keeps key material in the server.
	NoExport bool `json:"noExport,omitempty"`
	// KeyTypes are the symmetric keys allowed, such as "AES-256" or, for any
	// length, "AES"; none means all objects.
	KeyTypes []string `json:"keyTypes,omitempty"`
}

// Quorum is how many of which people must approve what is asked of a group's
// keys before it is done. The zero Quorum asks nobody. A group that has one also
// has its policy, and the quorum itself, changed with their approval only.
type Quorum struct {
	Approvers []string      `json:"approvers,omitempty"` // users
	Needed    int           `json:"needed,omitempty"`    // of them
	Destroy   bool          `json:"destroy,omitempty"`   // for destroying keys
	Export    bool          `json:"export,omitempty"`    // for giving out key material
	Expiry    time.Duration `json:"expiry,omitempty"`    // of a request, since it was made
}

// On reports whether anybody must be asked.
func (q Quorum) On() bool { return q.Needed > 0 }

// Application is a program that uses keys.
type Application struct {
	Name        string       `json:"name"` // with its account
	Title       string       `json:"title,omitempty"`
	Description string       `json:"description,omitempty"`
	Group       string       `json:"group"`
	Interface   Interface    `json:"interface,omitempty"` // never changes
	Disabled    bool         `json:"disabled,omitempty"`
	Quota       Quota        `json:"quota,omitzero"`
	Credentials []Credential `json:"credentials,omitempty"`
	Created     time.Time    `json:"created"`
}

// Credential is one way in which an application proves who it is.
type Credential struct {
	ID   string `json:"id"` // unique in the application
	Kind Kind   `json:"kind"`
	// User is that of a password. Hash is SHA-256, in hex, of the password or the
	// whole API key.
	User string `json:"user,omitempty"`
	Hash string `json:"hash,omitempty"`
	// Fingerprint is SHA-256 of a certificate, DER, in hex.
	Fingerprint string    `json:"fingerprint,omitempty"`
	Expires     time.Time `json:"expires,omitzero"` // zero: never
	Created     time.Time `json:"created"`
}

// Kind is the kind of a credential.
type Kind string

// The kinds.
const (
	Password    Kind = "password"
	Certificate Kind = "certificate"
	APIKey      Kind = "api-key"
)

// Interface is how an application asks.
type Interface string

// The interfaces. Applications that are older than REST have KMIP.
const (
	KMIP Interface = ""
	REST Interface = "rest"
)

// String returns what people call it.
func (i Interface) String() string {
	switch i {
	case KMIP:
		return "KMIP"
	case REST:
		return "REST"
	}
	return string(i)
}

const (
	nameMax       = 64
	titleMax      = 128
	textMax       = 1024
	credentialMax = 16    // of an application
	listMax       = 64    // entries of a policy's lists
	rotationMax   = 36500 // days
	periodMin     = time.Minute
	periodMax     = 365 * 24 * time.Hour
	approverMax   = 32 // of a group

	// groupSchema is 2 since groups have a quorum, which an older release would
	// drop when it changes one.
	groupSchema = 2
	// restSchema is that of an application whose interface is not KMIP: an older
	// release would take it for one whose is.
	restSchema = 2
)

// The bounds of [Quorum.Expiry].
const (
	ExpiryMin = time.Minute
	ExpiryMax = 30 * 24 * time.Hour
)

// Directory is the groups and applications in a state database.
type Directory struct {
	db       *store.DB
	accounts *store.Table[Account]
	groups   *store.Table[Group]
	apps     *store.Table[Application] // of any interface
	kmipApps *store.Table[Application] // to write those that older releases know
	latest   *store.Table[latest]
	now      func() time.Time
	clear    func(ctx context.Context, tx *store.Tx, group string) error // [Directory.RequireClear]

	change sync.Mutex // one change at a time, so that memory follows the database
	mu     sync.RWMutex
	index  index
}

// index is the directory in memory.
type index struct {
	accounts map[string]Account // the account default only if it was changed
	groups   map[string]Group
	apps     map[string]Application
	certs    map[string]string // fingerprint -> application
	users    map[string]string // user name -> application
	keys     map[string]string // id of an API key -> application
	as       int64             // revision of the latest change that is in it
}

// latest is stored with each change, so that one read tells whether there was
// one.
type latest struct {
	Changed time.Time `json:"changed"`
}

const latestKey = "change"

// Open reads the directory in db.
func Open(ctx context.Context, db *store.DB) (*Directory, error) {
	d := &Directory{db: db, accounts: store.NewTable[Account](db, "kms-account", 1), groups: store.NewTable[Group](db, "kms-group", groupSchema), apps: store.NewTable[Application](db, "kms-application", restSchema), kmipApps: store.NewTable[Application](db, "kms-application", 1), latest: store.NewTable[latest](db, "kms-directory", 1), now: time.Now}
	return d, errs.Wrap(d.reload(ctx), "cannot read the directory")
}

func (d *Directory) reload(ctx context.Context) error {
	next := index{accounts: map[string]Account{}, groups: map[string]Group{}, apps: map[string]Application{}, certs: map[string]string{}, users: map[string]string{}, keys: map[string]string{}}
	err := d.db.View(ctx, func(tx *store.Tx) (err error) {
		if next.as, err = d.revision(ctx, tx); err != nil {
			return err
		}
		accounts, err := d.accounts.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, a := range accounts {
			next.accounts[a.Name] = a
		}
		groups, err := d.groups.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		apps, err := d.apps.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, g := range groups {
			next.groups[g.Name] = g
		}
		for _, a := range apps {
			next.apps[a.Name] = a
			for _, c := range a.Credentials {
				switch c.Kind {
				case Certificate:
					next.certs[c.Fingerprint] = a.Name
				case Password:
					next.users[c.User] = a.Name
				case APIKey:
					next.keys[c.ID] = a.Name
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.index = next
	d.mu.Unlock()
	return nil
}

// RequireClear has check asked, in the transaction, when a group is made: its error,
// for what is left of an earlier group of that name, refuses it. It is called before
// the directory is used.
func (d *Directory) RequireClear(check func(ctx context.Context, tx *store.Tx, group string) error) {
	d.clear = check
}

// revision returns that of the latest change.
func (d *Directory) revision(ctx context.Context, tx *store.Tx) (int64, error) {
	e, err := d.latest.In(tx).Entry(ctx, latestKey)
	if store.IsNotFound(err) {
		return 0, nil
	}
	return e.Revision, err
}

// Refresh brings memory in line with what other nodes have changed before the
// call. It costs one read. A node that is cut off from the others cannot know:
// that is an error.
func (d *Directory) Refresh(ctx context.Context) error {
	var now int64
	err := d.db.View(ctx, func(tx *store.Tx) (err error) {
		now, err = d.revision(ctx, tx)
		return err
	})
	if err != nil {
		return err
	}
	if d.isAt(now) {
		return nil
	}
	d.change.Lock()
	defer d.change.Unlock()
	if d.isAt(now) {
		return nil
	}
	return d.reload(ctx)
}

func (d *Directory) isAt(revision int64) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.index.as >= revision
}

// alter runs f in a transaction and brings memory in line before it returns. f
// sees the directory in memory as the transaction does.
func (d *Directory) alter(ctx context.Context, f func(*store.Tx) error) error {
	d.change.Lock()
	defer d.change.Unlock()
	err := d.db.Txn(ctx, func(tx *store.Tx) error {
		now, err := d.revision(ctx, tx)
		if err == nil && !d.isAt(now) {
			err = d.reload(ctx)
		}
		if err != nil {
			return err
		}
		if err := f(tx); err != nil {
			return err
		}
		return d.latest.In(tx).Set(latestKey, latest{Changed: d.now().UTC()})
	})
	// Also after an error: the transaction may have been committed.
	if reloadErr := d.reload(context.WithoutCancel(ctx)); err == nil {
		err = reloadErr
	}
	return err
}

// Proof is what a client shows. Password and Key stay the caller's; at most one of
// them is not nil.
type Proof struct {
	Interface   Interface         // by which it asks
	Certificate *x509.Certificate // of a connection whose handshake it has passed; or nil
	User        string
	Password    []byte
	Key         []byte // an API key
}

// Proven is who a proof is of.
type Proven struct {
	Application Application
	Group       Group // of the application
	// Credential is the identifier of the one that counted: of the password or API
	// key, if there was one, else of the certificate.
	Credential string
}

// Authenticate returns whom a proof is of. A client that shows a certificate and a
// password or API key must have both right, and of one application; a certificate
// that is not known counts for nothing. With an error that is [ErrAccountDisabled] it
// returns that, too: the proof was right.
func (d *Directory) Authenticate(p Proof) (Proven, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	byCert, certKnown, credential := "", false, ""
	if p.Certificate != nil {
		sum := sha256.Sum256(p.Certificate.Raw)
		fingerprint := hex.EncodeToString(sum[:])
		byCert, certKnown = d.index.certs[fingerprint]
		for _, c := range d.index.apps[byCert].Credentials {
			if c.Kind == Certificate && c.Fingerprint == fingerprint {
				credential = c.ID
			}
		}
		if now := d.now(); certKnown && (now.Before(p.Certificate.NotBefore) || now.After(p.Certificate.NotAfter)) {
			return Proven{}, errs.New(errs.Denied, "the certificate of application %s is not valid now", byCert).WithHint("strongroom kms credential create %s", byCert)
		}
	}
	name := byCert
	if p.Password != nil {
		var ok bool
		if name, ok = d.index.users[p.User]; ok {
			credential, ok = d.byPassword(name, p.User, p.Password)
		}
		if !ok {
			return Proven{}, errs.New(errs.Denied, "user name %.64q or its password is wrong", p.User)
		}
	} else if p.Key != nil {
		var ok bool
		if name, credential, ok = d.byKey(p.Key); !ok {
			return Proven{}, errs.New(errs.Denied, "the API key is not valid (any more)")
		}
	} else if !certKnown {
		return Proven{}, errs.New(errs.Denied, "no credential that is known here")
	}
	if certKnown && byCert != name {
		return Proven{}, errs.New(errs.Denied, "the certificate is of application %s, the password or API key of %s", byCert, name)
	}
	a := d.index.apps[name]
	if a.Interface != p.Interface {
		return Proven{}, errs.New(errs.Denied, "application %s asks by %v, and its interface is %v", name, p.Interface, a.Interface)
	}
	if a.Disabled {
		return Proven{}, errs.New(errs.Denied, "application %s is disabled", name)
	}
	g := d.index.groups[a.Group]
	if account := AccountOf(a.Name); d.index.accounts[account].Disabled {
		return Proven{a, g, credential}, errs.New(errs.Denied, "%w: %s", ErrAccountDisabled, account)
	}
	return Proven{a, g, credential}, nil
}

// byPassword looks at all of an application's passwords for that user name.
func (d *Directory) byPassword(app, user string, password []byte) (credential string, ok bool) {
	return d.fits(app, password, func(c Credential) bool { return c.Kind == Password && c.User == user })
}

// byKey returns the application that has that API key.
func (d *Directory) byKey(key []byte) (app, credential string, ok bool) {
	id, ok := apiKeyID(key)
	if !ok {
		return "", "", false
	}
	if app, ok = d.index.keys[id]; ok {
		credential, ok = d.fits(app, key, func(c Credential) bool { return c.Kind == APIKey && c.ID == id })
	}
	return app, credential, ok
}

// fits looks at those of an application's credentials which have a hash, and returns
// the one that a secret is of.
func (d *Directory) fits(app string, secret []byte, which func(Credential) bool) (credential string, ok bool) {
	sum := sha256.Sum256(secret)
	got, now := []byte(hex.EncodeToString(sum[:])), d.now()
	for _, c := range d.index.apps[app].Credentials {
		if which(c) && (c.Expires.IsZero() || now.Before(c.Expires)) && subtle.ConstantTimeCompare(got, []byte(c.Hash)) == 1 {
			credential, ok = c.ID, true
		}
	}
	return credential, ok
}

// Groups returns all groups, by name.
func (d *Directory) Groups() []Group {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.SortedFunc(maps.Values(d.index.groups), func(a, b Group) int { return strings.Compare(a.Name, b.Name) })
}

// Applications returns all applications, by name.
func (d *Directory) Applications() []Application {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.SortedFunc(maps.Values(d.index.apps), func(a, b Application) int { return strings.Compare(a.Name, b.Name) })
}

// Group returns one group.
func (d *Directory) Group(name string) (Group, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	g, ok := d.index.groups[name]
	if !ok {
		return Group{}, noGroup(name)
	}
	return g, nil
}

func noGroup(name string) error {
	return errs.New(errs.NotFound, "there is no group %.64q", name).WithHint("strongroom kms group ls")
}

// Application returns one application.
func (d *Directory) Application(name string) (Application, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	a, ok := d.index.apps[name]
	if !ok {
		return Application{}, noApplication(name)
	}
	return a, nil
}

func noApplication(name string) error {
	return errs.New(errs.NotFound, "there is no application %.64q", name).WithHint("strongroom kms app ls")
}

func checkName(what, name string) error { return checkNameOf(what, name, nameMax) }

func checkNameOf(what, name string, limit int) error {
	bad := strings.ContainsFunc(name, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !letter && !strings.ContainsRune("._-", r)
	})
	if name == "" || len(name) > limit || bad {
		return errs.New(errs.Invalid, "%s name %.80q must be 1 to %d letters, digits, '.', '_' and '-'", what, name, limit)
	}
	return nil
}

func checkText(title, description string) error {
	if len(title) > titleMax || len(description) > textMax {
		return errs.New(errs.Invalid, "a title has at most %d bytes, a description %d", titleMax, textMax)
	}
	return nil
}
