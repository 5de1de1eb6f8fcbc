// Package event tells what happened (events), what is wrong now (alarms), and
// how well things are (health). One registry of types drives API, command line,
// console, metrics and the runbooks in docs/runbooks, one per alarm.
//
// Invariants: every event has a registered type; sequence numbers grow without
// gaps; an alarm is active at most once per target, and its change is stored in
// one transaction with the event that tells of it. The log of events is bounded:
// it is for operators, the audit log is for proof. All types are safe for
// concurrent use.
package event

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// DefaultKeep is how many events are kept.
const DefaultKeep = 10_000

const (
	// pruneEvery is how many events are posted between prunings.
	pruneEvery = 100
	// An argument is cut at this length, in bytes: errors can be long.
	maxArg = 1000
)

// Event is something that happened.
type Event struct {
	Sequence  uint64            `json:"sequence"`
	Type      string            `json:"type"`
	Severity  Severity          `json:"severity"`
	Time      time.Time         `json:"time"`
	Principal string            `json:"principal,omitempty"` // who did it
	Target    string            `json:"target,omitempty"`    // to what: "vm/web-1"
	Args      map[string]string `json:"args,omitempty"`
	Message   string            `json:"message"`
}

// New is what one says of a new event.
type New struct {
	Type      string
	Principal string
	Target    string
	Args      map[string]string // no secrets
}

// Log keeps events and alarms.
type Log struct {
	db     *store.DB
	events *store.Table[Event]  // by sequence number
	last   *store.Table[uint64] // the last sequence number, under one key
	active *store.Table[Alarm]  // by alarm id "/" target
	types  map[string]Type
	alarms []AlarmType
	keep   int
	posted atomic.Int64 // since the last pruning
	now    func() time.Time
	// evaluating is held while alarms are computed: an older look at the
	// inventory must not undo what a newer one found.
	evaluating sync.Mutex
}

// Open returns the events and alarms kept in db: at most keep events, 0 means
// [DefaultKeep].
func Open(db *store.DB, keep int) *Log {
	if keep <= 0 {
		keep = DefaultKeep
	}
	l := &Log{
		db:     db,
		events: store.NewTable[Event](db, "event", 1),
		last:   store.NewTable[uint64](db, "event-sequence", 1),
		active: store.NewTable[Alarm](db, "alarm", 1),
		types:  map[string]Type{},
		alarms: AlarmTypes(),
		keep:   keep,
		now:    func() time.Time { return time.Now().UTC() },
	}
	for _, t := range Types() {
		l.types[t.ID] = t
	}
	return l
}

// Post stores an event and returns it. A type that is not registered is a bug
// and an error.
func (l *Log) Post(ctx context.Context, n New) (Event, error) {
	var e Event
	err := l.db.Txn(ctx, func(tx *store.Tx) error {
		var err error
		e, err = l.post(ctx, tx, n)
		return err
	})
	if err != nil {
		return Event{}, errs.Wrap(err, "cannot store event %s", n.Type)
	}
	l.pruneSometimes(ctx)
	return e, nil
}

// post is Post inside a transaction.
func (l *Log) post(ctx context.Context, tx *store.Tx, n New) (Event, error) {
	t, ok := l.types[n.Type]
	if !ok {
		return Event{}, errs.New(errs.Invalid, "no event type %q", n.Type)
	}
	args := map[string]string{}
	for name, v := range n.Args {
		if len(v) > maxArg {
			v = v[:maxArg] + "..."
		}
		args[name] = v
	}
	const key = "last"
	seq, err := l.last.In(tx).Get(ctx, key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return Event{}, err
	}
	seq++
	e := Event{
		Sequence: seq, Type: t.ID, Severity: t.Severity, Time: l.now(), Principal: n.Principal, Target: n.Target,
		Args: args, Message: fill(t.Text, withCommon(args, n)),
	}
	if err := l.last.In(tx).Put(ctx, key, seq); err != nil {
		return Event{}, err
	}
	return e, l.events.In(tx).Create(ctx, seqKey(seq), e)
}

func withCommon(args map[string]string, n New) map[string]string {
	all := map[string]string{"target": n.Target, "principal": n.Principal}
	if n.Principal == "" {
		all["principal"] = "The controller"
	}
	for name, v := range args {
		all[name] = v
	}
	return all
}

// seqKey sorts as the number does.
func seqKey(seq uint64) string { return fmt.Sprintf("%020d", seq) }

func (l *Log) pruneSometimes(ctx context.Context) {
	if l.posted.Add(1)%pruneEvery == 0 {
		// A failure is made good by the next pruning.
		_, _ = l.events.Prune(ctx, l.keep)
	}
}

// List returns the newest events, oldest of them first: at most limit, 0 means
// 100.
func (l *Log) List(ctx context.Context, limit int) ([]Event, error) {
	if limit <= 0 {
		limit = 100
	}
	entries, err := l.events.Scan(ctx, store.Range{Descending: true, Limit: limit})
	if err != nil {
		return nil, errs.Wrap(err, "cannot list events")
	}
	out := make([]Event, len(entries))
	for i, e := range entries {
		out[len(out)-1-i] = e.Value
	}
	return out, nil
}

// Watch calls f with each event posted from now on, once and in order, until ctx
// ends or f returns an error; ready, if not nil, is called when "now" is fixed.
// It returns that reason.
func (l *Log) Watch(ctx context.Context, ready func(), f func(Event) error) error {
	newest, err := l.events.Scan(ctx, store.Range{Descending: true, Limit: 1})
	if err != nil {
		return errs.Wrap(err, "cannot watch events")
	}
	var seen uint64
	if len(newest) > 0 {
		seen = newest[0].Value.Sequence
	}
	rev, err := l.db.Revision(ctx)
	if err != nil {
		return errs.Wrap(err, "cannot watch events")
	}
	// What came between the two reads is before rev: look again.
	between, err := l.events.Scan(ctx, store.Range{After: seqKey(seen)})
	if err != nil {
		return errs.Wrap(err, "cannot watch events")
	}
	if ready != nil {
		ready()
	}
	deliver := func(e Event) error {
		if e.Sequence <= seen {
			return nil
		}
		seen = e.Sequence
		return f(e)
	}
	for _, e := range between {
		if err := deliver(e.Value); err != nil {
			return err
		}
	}
	return l.events.Watch(ctx, "", rev, func(c store.Change[Event]) error {
		if c.Op != store.Put {
			return nil // events go when they are old; a Reset brings what was seen
		}
		return deliver(c.Value)
	})
}
