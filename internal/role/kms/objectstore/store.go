// Package objectstore keeps a KMS's managed objects in the state database
// (docs/spec/kms-object.md), with their key material wrapped under the KEKs of a
// key ring, and makes destroyed keys unrecoverable (docs/spec/kms-keyring.md).
//
// Invariants: what [Store.Update] acknowledged is on disk; key material is in
// the database only wrapped, under the KEK of one epoch at a time; every read is
// checked against the database, so no answer is older than the last change
// that was acknowledged, by whichever node; a record that was altered is an
// error, never an object. A [Store] is safe for concurrent use.
package objectstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/keys/kmip/kmipserver"
)

const (
	// cacheLimit is how many opened records are kept.
	cacheLimit = 20000
	// perEpoch is how many new objects share a KEK.
	perEpoch = 1024
	// attempts bounds how often a transaction meets a KEK that is shredded
	// between reading and opening.
	attempts = 8

	accountMax = 128 // bytes; percent-encoded it is still a key
)

// Store is a [kmipserver.Store] in the state database.
type Store struct {
	db      *store.DB
	objects *store.Table[[]byte]
	names   names
	dates   dateIndex
	epochs  *store.Table[Epoch]
	ring    *keyring.Ring
	keeper  Keeper
	log     *slog.Logger
	cache   *cache
	dirty   chan struct{} // buffered by one: there is something to shred
	counts  counts
	account func(ctx context.Context, tx *store.Tx, account string) error // [Store.RequireAccount]

	mu    sync.Mutex // guards the two below
	epoch uint64     // that new objects go to; 0: none yet
	count int        // of objects that went to it
}

var _ kmipserver.Store = (*Store)(nil)

// New returns a store in db of the only node of a KMS. The ring stays the
// caller's and must be the one of this database.
func New(db *store.DB, ring *keyring.Ring, log *slog.Logger) *Store {
	return NewShared(db, ring, &alone{db: db, ring: ring, epochs: EpochTable(db)}, log)
}

// NewShared returns a store in db of one of several nodes, whose epochs keeper
// brings to the others.
func NewShared(db *store.DB, ring *keyring.Ring, keeper Keeper, log *slog.Logger) *Store {
	s := &Store{
		db: db, objects: store.NewRawTable(db, Objects), names: newNames(db), dates: newDateIndex(db),
		epochs: EpochTable(db),
		ring:   ring, keeper: keeper, log: log, cache: newCache(cacheLimit, ring.Has), dirty: make(chan struct{}, 1),
		counts: newCounts(),
	}
	ring.OnErase(s.cache.erase)
	return s
}

// RequireAccount has check asked, in the transaction, when an object is made: its
// error refuses that. So nothing is made in an account that is deleted meanwhile. It
// is called before the store is used.
func (s *Store) RequireAccount(check func(ctx context.Context, tx *store.Tx, account string) error) {
	s.account = check
}

// Close wipes the keys in memory. The store must not be in use.
func (s *Store) Close() error {
	s.cache.clear()
	return nil
}

func accountPrefix(account string) string { return url.PathEscape(account) + "/" }

// View implements [kmipserver.Store].
func (s *Store) View(ctx context.Context, account string, f func(kmipserver.Reader) error) error {
	if err := checkAccount(account); err != nil {
		return err
	}
	return s.again(ctx, func() error {
		held := &holding{}
		defer held.release()
		return s.db.View(ctx, func(tx *store.Tx) error {
			return f(s.in(ctx, tx, account, held))
		})
	})
}

// Update implements [kmipserver.Store].
func (s *Store) Update(ctx context.Context, account string, f func(kmipserver.Tx) error) error {
	if err := checkAccount(account); err != nil {
		return err
	}
	s.counts.gate.RLock()
	defer s.counts.gate.RUnlock()
	shred := false
	err := s.again(ctx, func() error {
		held := &holding{}
		defer held.release()
		var u *update
		err := s.db.Txn(ctx, func(tx *store.Tx) error {
			u = &update{view: s.in(ctx, tx, account, held), changed: map[string]change{}}
			return f(u)
		})
		if err != nil {
			return err
		}
		shred = u.shred
		s.counts.add(account, u.more)
		for id, c := range u.changed {
			s.cache.forget(accountPrefix(account) + id)
			if !held.has(c.object.Material) {
				c.object.Material.Close()
			}
		}
		return nil
	})
	if err == nil && shred {
		s.Wake()
	}
	return err
}

func checkAccount(account string) error {
	if account == "" || len(account) > accountMax {
		return errs.New(errs.Invalid, "account %.100q has not 1 to %d bytes", account, accountMax)
	}
	return nil
}

// again repeats f while it meets a KEK that was shredded since it read the
// record: the record has moved on; or one that this node does not have yet.
func (s *Store) again(ctx context.Context, f func() error) (err error) {
	for range attempts {
		if err = f(); !errors.Is(err, keyring.ErrNoEpoch) {
			break
		}
		if err := s.keeper.CatchUp(ctx); err != nil {
			return err
		}
	}
	return err
}

// holding is the opened records that a transaction uses.
type holding struct{ entries []*entry }

func (h *holding) release() {
	for _, e := range h.entries {
		e.release()
	}
	h.entries = nil
}

func (h *holding) has(material *keymem.Key) bool {
	return slices.ContainsFunc(h.entries, func(e *entry) bool { return e.object.Material == material })
}

// view is one transaction that reads.
type view struct {
	ctx     context.Context // of the transaction
	s       *Store
	tx      *store.Tx
	account string
	held    *holding
	opened  map[string]*entry // by identifier
}

func (s *Store) in(ctx context.Context, tx *store.Tx, account string, held *holding) *view {
	return &view{ctx: ctx, s: s, tx: tx, account: account, held: held, opened: map[string]*entry{}}
}

// Get implements [kmipserver.Reader].
func (v *view) Get(id string) (*kmipserver.Object, error) {
	e, err := v.open(id)
	if err != nil {
		return nil, err
	}
	return copyOf(e.object), nil
}

// copyOf returns a copy whose attribute list may be changed.
func copyOf(o *kmipserver.Object) *kmipserver.Object {
	c := *o
	c.Attributes = slices.Clone(o.Attributes)
	return &c
}

// open returns the opened record of id, which is held until the transaction
// ends.
func (v *view) open(id string) (*entry, error) {
	if !isID(id) {
		return nil, kmipserver.ErrNoObject
	}
	if e := v.opened[id]; e != nil {
		return e, nil
	}
	key := accountPrefix(v.account) + id
	record, err := v.s.objects.In(v.tx).Entry(v.ctx, key)
	if store.IsNotFound(err) {
		return nil, kmipserver.ErrNoObject
	}
	if err != nil {
		return nil, err
	}
	e := v.s.cache.get(key, record.Revision)
	if e == nil {
		o, epoch, err := unseal(v.s.ring, v.account, id, record.Value)
		if err != nil {
			return nil, fmt.Errorf("object %s: %w", id, err)
		}
		e = &entry{key: key, revision: record.Revision, epoch: epoch, object: o}
		e.holders.Store(1)
		if e.revision != 0 { // else it is this transaction's own
			v.s.cache.put(e)
		}
	}
	v.held.entries = append(v.held.entries, e)
	v.opened[id] = e
	return e, nil
}

// isID tells the identifiers that this KMS gives: others are nobody's.
func isID(id string) bool {
	u, err := uuid.Parse(id)
	return err == nil && u.String() == id
}

// update is one transaction that writes.
type update struct {
	*view
	changed  map[string]change
	shred    bool
	required bool  // the account is there
	more     int64 // objects with material than before; fewer, if negative
}

// change is what will be stored of an object.
type change struct {
	object *kmipserver.Object
	epoch  uint64
}

// Get implements [kmipserver.Reader].
func (u *update) Get(id string) (*kmipserver.Object, error) {
	if c, ok := u.changed[id]; ok {
		return copyOf(c.object), nil
	}
	return u.view.Get(id)
}

// before returns what is known of an object so far; the object is nil for a new
// one.
func (u *update) before(id string) (change, error) {
	if c, ok := u.changed[id]; ok {
		return c, nil
	}
	e, err := u.open(id)
	switch {
	case errors.Is(err, kmipserver.ErrNoObject):
		return change{}, nil
	case err != nil:
		return change{}, err
	}
	return change{object: e.object, epoch: e.epoch}, nil
}

// Put implements [kmipserver.Tx]. Material stays in the epoch that it is in: so
// that the KEKs of one epoch, and of those marked, are all that ever opened it.
func (u *update) Put(o *kmipserver.Object) error {
	if !isID(o.ID) {
		return errs.New(errs.Invalid, "object %.64q has no identifier of this KMS", o.ID)
	}
	was, err := u.before(o.ID)
	if err != nil {
		return err
	}
	if was.object == nil {
		if err := u.requireAccount(); err != nil {
			return err
		}
	}
	epoch := was.epoch
	if was.epoch != keyring.Metadata && o.Material != was.object.Material { // destroyed, or replaced
		if err := u.soil(was.epoch); err != nil {
			return err
		}
		epoch = keyring.Metadata
	}
	if o.Material != nil && epoch == keyring.Metadata {
		if epoch, err = u.fresh(); err != nil {
			return err
		}
	}
	record, err := seal(u.s.ring, u.account, o, epoch)
	if err == nil && len(record) > recordMax {
		err = errTooLarge
	}
	if errors.Is(err, errTooLarge) {
		return &kmipserver.Refusal{Reason: kmip.ResultReasonInvalidField, Message: "the object with its attributes is too large to be kept"}
	}
	if err != nil {
		return fmt.Errorf("object %s: %w", o.ID, err)
	}
	if err := u.s.objects.In(u.tx).Set(accountPrefix(u.account)+o.ID, record); err != nil {
		return err
	}
	u.more += withMaterial(epoch) - withMaterial(was.epoch)
	u.changed[o.ID] = change{object: copyOf(o), epoch: epoch}
	delete(u.opened, o.ID) // what is found by name is as it will be
	return u.index(o, was.object)
}

// requireAccount refuses to make an object in an account that there is not.
func (u *update) requireAccount() error {
	if u.required || u.s.account == nil {
		return nil
	}
	u.required = true
	return u.s.account(u.ctx, u.tx, u.account)
}

// index brings what is found by in line with o, which was another before, or nil.
func (u *update) index(o, was *kmipserver.Object) error {
	var before []string
	if was != nil {
		before = namesOf(was)
	}
	now := namesOf(o)
	for _, name := range before {
		if !slices.Contains(now, name) {
			if err := u.s.names.remove(u.ctx, u.tx, u.account, name, o.ID); err != nil {
				return err
			}
		}
	}
	for _, name := range now {
		if !slices.Contains(before, name) {
			if err := u.s.names.add(u.ctx, u.tx, u.account, name, o.ID); err != nil {
				return err
			}
		}
	}
	return u.s.dates.move(u.ctx, u.tx, u.account, o.ID, was, o)
}

// soil marks an epoch for shredding, unless it is marked.
func (u *update) soil(epoch uint64) error {
	u.shred = true
	e, err := epochIn(u.ctx, u.s.epochs.In(u.tx), epoch)
	if err != nil || e.State != EpochOpen {
		return err
	}
	return u.s.epochs.In(u.tx).Set(EpochKey(epoch), Epoch{State: EpochDirty})
}

// fresh returns the epoch for a new object. The transaction depends on its not
// being marked.
func (u *update) fresh() (uint64, error) {
	for {
		n, err := u.s.current(u.ctx)
		if err != nil {
			return 0, err
		}
		e, err := epochIn(u.ctx, u.s.epochs.In(u.tx), n)
		if err != nil || e.State == EpochOpen {
			return n, err
		}
		u.s.retire(n)
	}
}

// current returns the epoch that takes new objects, and counts one more.
func (s *Store) current(ctx context.Context) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.epoch == keyring.Metadata || s.count >= perEpoch {
		n, err := s.keeper.Begin(ctx)
		if err != nil {
			return 0, err
		}
		s.epoch, s.count = n, 0
	}
	s.count++
	return s.epoch, nil
}

// retire has no new object go to epoch n.
func (s *Store) retire(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.epoch == n {
		s.epoch = keyring.Metadata
	}
}

// namesOf returns an object's names, each once.
func namesOf(o *kmipserver.Object) []string {
	var names []string
	for _, a := range o.Attributes {
		if name, ok := a.AttributeValue.(kmip.Name); ok && a.AttributeName == kmip.AttributeNameName && !slices.Contains(names, name.NameValue) {
			names = append(names, name.NameValue)
		}
	}
	return names
}

// Wake has dirty epochs shredded soon.
func (s *Store) Wake() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}
