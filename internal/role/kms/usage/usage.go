// Package usage counts what applications do at a key management server, and
// tells what goes beyond a quota.
//
// Counters are in memory and go to the database every [FlushEvery]: counting
// costs no write and no sync per operation. What was counted since the last
// flush is lost in a crash, so counters may fall short, and a quota of
// operations may be exceeded, by what was done in that time; an orderly stop
// loses nothing. Flushes add to what is stored, so several nodes may count in
// one database: each learns of the others' operations with its next flush.
//
// A [Meter] is safe for concurrent use.
package usage

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

const (
	// FlushEvery is the time between two flushes.
	FlushEvery = 10 * time.Second
	// flushBatch bounds the records of one transaction: etcd takes 128 operations.
	flushBatch = 50
)

// Subject is who is counted, such as "application/vcenter-1".
type Subject string

// Application is the subject of an application.
func Application(name string) Subject { return Subject("application/" + name) }

// Group is the subject of a group: all that its applications did, also those
// that have been deleted.
func Group(name string) Subject { return Subject("group/" + name) }

// Account is the subject of an account, which is counted for its quota alone: what
// it did is what its groups did.
func Account(name string) Subject { return Subject("account/" + name) }

// Client is whose operations are counted.
type Client struct {
	Application directory.Application
	Group       directory.Group
	Account     directory.Account
	// Groups returns the names of all groups of the account.
	Groups func() []string
}

// subjects returns whom c counts for, from the narrowest, with their quotas.
func (c Client) subjects() []limited {
	return []limited{
		{Application(c.Application.Name), c.Application.Quota}, {Group(c.Group.Name), c.Group.Quota}, {Account(c.Account.Name), c.Account.Quota},
	}
}

type limited struct {
	subject Subject
	quota   directory.Quota
}

// Sum adds up what several subjects did; a quota's period is of none of them.
func Sum(all ...Counters) Counters {
	var sum Counters
	for _, c := range all {
		c.Window = Window{}
		sum.add(c)
	}
	return sum
}

// Counters are what a subject has done.
type Counters struct {
	Operations int64     `json:"operations,omitempty"` // carried out, also those that failed
	Made       int64     `json:"made,omitempty"`       // keys
	Refused    int64     `json:"refused,omitempty"`    // because of a quota
	LastUse    time.Time `json:"lastUse,omitzero"`
	Window     Window    `json:"window,omitzero"`
}

// Window is a quota's current period.
type Window struct {
	Start      time.Time `json:"start"`
	Operations int64     `json:"operations"`
}

func (c *Counters) add(more Counters) {
	c.Operations += more.Operations
	c.Made += more.Made
	c.Refused += more.Refused
	if more.LastUse.After(c.LastUse) {
		c.LastUse = more.LastUse
	}
	switch {
	case more.Window.Start.Equal(c.Window.Start):
		c.Window.Operations += more.Window.Operations
	case more.Window.Start.After(c.Window.Start):
		c.Window = more.Window
	}
}

// In returns the operations in the period of q that now is in, and its end.
func (c Counters) In(q directory.Quota, now time.Time) (operations int64, ends time.Time) {
	if q.Operations == 0 {
		return 0, time.Time{}
	}
	start := now.UTC().Truncate(q.Period)
	if c.Window.Start.Equal(start) {
		operations = c.Window.Operations
	}
	return operations, start.Add(q.Period)
}

// Exceeded says which quota an operation goes beyond.
type Exceeded struct {
	Subject Subject
	What    string // "keys" or "operations"
	Limit   int64
	Until   time.Time // of operations: when the period ends
}

// Error implements error.
func (e *Exceeded) Error() string {
	if e.What == "keys" {
		return fmt.Sprintf("the quota of %s is reached: %d keys; destroy some that are not needed, or have the quota raised", e.Subject, e.Limit)
	}
	return fmt.Sprintf("the quota of %s is reached: %d operations until %s", e.Subject, e.Limit, e.Until.Format(time.RFC3339))
}

// Meter counts. Make it with [Open].
type Meter struct {
	db    *store.DB
	table *store.Table[Counters]
	keys  func(ctx context.Context, group string) (int64, error)
	log   *slog.Logger
	now   func() time.Time

	flushing sync.Mutex // one flush at a time

	mu       sync.Mutex // guards the rest
	subjects map[Subject]*counted
	making   map[Subject]int64 // by group and account: keys that are being made
}

// counted is what is known of a subject.
type counted struct {
	total   Counters // with what is pending
	pending Counters // not stored yet
}

func (c *counted) add(more Counters) {
	c.total.add(more)
	c.pending.add(more)
}

// Open reads the counters in db. keys tells how many keys a group has.
func Open(ctx context.Context, db *store.DB, keys func(ctx context.Context, group string) (int64, error), log *slog.Logger) (*Meter, error) {
	m := &Meter{
		db: db, table: store.NewTable[Counters](db, "kms-usage", 1), keys: keys, log: log, now: time.Now,
		subjects: map[Subject]*counted{}, making: map[Subject]int64{},
	}
	return m, errs.Wrap(m.refresh(ctx), "cannot read the usage counters")
}

// Admit counts one operation of c, or returns an [Exceeded] error. The operation
// makes so many keys: all or none of them, which count until done. The caller calls
// that once, with whether they were made.
func (m *Meter) Admit(ctx context.Context, c Client, makes int64) (done func(made bool), err error) {
	done = func(bool) {}
	if makes > 0 {
		// In this order: what is made is among the keys before it is no longer
		// among those being made, so none is overlooked.
		ofGroup, ofAccount := m.begin(c, makes)
		done = func(made bool) { m.end(c, makes, made) }
		err = m.checkKeys(ctx, c, Group(c.Group.Name), c.Group.Quota.Keys, ofGroup, func() []string { return []string{c.Group.Name} })
		if err == nil {
			err = m.checkKeys(ctx, c, Account(c.Account.Name), c.Account.Quota.Keys, ofAccount, c.Groups)
		}
	}
	if err == nil {
		err = m.count(c)
	}
	if err != nil {
		done(false)
		return nil, err
	}
	return done, nil
}

// checkKeys refuses keys that go beyond a limit; being are those that are being made,
// with these.
func (m *Meter) checkKeys(ctx context.Context, c Client, s Subject, limit, being int64, groups func() []string) error {
	if limit == 0 {
		return nil
	}
	sum := being
	for _, g := range groups() {
		n, err := m.keys(ctx, g)
		if err != nil {
			return err
		}
		sum += n
	}
	if sum > limit {
		return m.refuse(c, &Exceeded{Subject: s, What: "keys", Limit: limit})
	}
	return nil
}

// begin returns how many keys of c's group and account are being made, with so
// many more.
func (m *Meter) begin(c Client, makes int64) (ofGroup, ofAccount int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	group, account := Group(c.Group.Name), Account(c.Account.Name)
	m.making[group] += makes
	m.making[account] += makes
	return m.making[group], m.making[account]
}

func (m *Meter) end(c Client, makes int64, made bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range []Subject{Group(c.Group.Name), Account(c.Account.Name)} {
		if m.making[s] -= makes; m.making[s] == 0 {
			delete(m.making, s)
		}
	}
	if made {
		m.addTo(c, Counters{Made: makes})
	}
}

// count counts one operation unless it goes beyond a quota.
func (m *Meter) count(c Client) error {
	m.mu.Lock()
	now := m.now().UTC()
	var exceeded *Exceeded
	for _, l := range c.subjects() {
		if exceeded = beyond(m.subject(l.subject), l.subject, l.quota, now); exceeded != nil {
			break
		}
	}
	if exceeded == nil {
		for _, l := range c.subjects() {
			if l.subject != Account(c.Account.Name) || l.quota.Operations > 0 {
				m.subject(l.subject).add(once(l.quota, now))
			}
		}
	}
	m.mu.Unlock()
	if exceeded != nil {
		return m.refuse(c, exceeded)
	}
	return nil
}

// refuse counts a refusal and returns it.
func (m *Meter) refuse(c Client, e *Exceeded) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addTo(c, Counters{Refused: 1})
	return e
}

// addTo adds to what c's application and group did.
func (m *Meter) addTo(c Client, more Counters) {
	m.subject(Application(c.Application.Name)).add(more)
	m.subject(Group(c.Group.Name)).add(more)
}

func (m *Meter) subject(s Subject) *counted {
	c := m.subjects[s]
	if c == nil {
		c = &counted{}
		m.subjects[s] = c
	}
	return c
}

// once is one operation at now.
func once(q directory.Quota, now time.Time) Counters {
	c := Counters{Operations: 1, LastUse: now.Truncate(time.Second)}
	if q.Operations > 0 {
		c.Window = Window{Start: now.Truncate(q.Period), Operations: 1}
	}
	return c
}

// beyond reports whether one more operation goes beyond q.
func beyond(c *counted, s Subject, q directory.Quota, now time.Time) *Exceeded {
	if done, ends := c.total.In(q, now); q.Operations > 0 && done >= q.Operations {
		return &Exceeded{Subject: s, What: "operations", Limit: q.Operations, Until: ends}
	}
	return nil
}

// Of returns what a subject has done.
func (m *Meter) Of(s Subject) Counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.subjects[s]; c != nil {
		return c.total
	}
	return Counters{}
}

// Forget drops the counters of a subject that is no more.
func (m *Meter) Forget(ctx context.Context, s Subject) error {
	m.flushing.Lock()
	defer m.flushing.Unlock()
	m.mu.Lock()
	delete(m.subjects, s)
	m.mu.Unlock()
	if err := m.table.Delete(ctx, string(s)); err != nil && !store.IsNotFound(err) {
		return errs.Wrap(err, "cannot drop the usage counters of %s", s)
	}
	return nil
}

// Run flushes every [FlushEvery] until ctx ends. The last flush is the caller's.
func (m *Meter) Run(ctx context.Context) error {
	tick := time.NewTicker(FlushEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := m.Flush(ctx); err != nil && ctx.Err() == nil {
			m.log.LogAttrs(ctx, slog.LevelError, "usage counters not stored", slog.Any("err", err))
		}
	}
}

// Flush stores what was counted, and learns what other nodes have.
func (m *Meter) Flush(ctx context.Context) error {
	m.flushing.Lock()
	defer m.flushing.Unlock()
	pending := m.take()
	for subjects := range slices.Chunk(slices.Sorted(maps.Keys(pending)), flushBatch) {
		if err := m.store(ctx, subjects, pending); err != nil {
			m.putBack(pending)
			return err
		}
		for _, s := range subjects {
			delete(pending, s)
		}
	}
	return m.refresh(ctx)
}

// take returns what is pending, which then no longer is.
func (m *Meter) take() map[Subject]Counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	pending := map[Subject]Counters{}
	for s, c := range m.subjects {
		if c.pending != (Counters{}) {
			pending[s], c.pending = c.pending, Counters{}
		}
	}
	return pending
}

func (m *Meter) putBack(pending map[Subject]Counters) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s, p := range pending {
		c := m.subject(s)
		p.add(c.pending) // what came since is newer
		c.pending = p
	}
}

func (m *Meter) store(ctx context.Context, subjects []Subject, pending map[Subject]Counters) error {
	return m.db.Txn(ctx, func(tx *store.Tx) error {
		for _, s := range subjects {
			stored, err := m.table.In(tx).Get(ctx, string(s))
			if err != nil && !store.IsNotFound(err) {
				return err
			}
			stored.add(pending[s])
			if err := m.table.In(tx).Set(string(s), stored); err != nil {
				return err
			}
		}
		return nil
	})
}

// refresh brings the totals in line with the database.
func (m *Meter) refresh(ctx context.Context) error {
	stored, err := m.table.Scan(ctx, store.Range{})
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.subjects {
		c.total = c.pending // nothing is left of one that another node has forgotten
	}
	for _, e := range stored {
		c := m.subject(Subject(e.Key))
		c.total = e.Value
		c.total.add(c.pending)
	}
	return nil
}
