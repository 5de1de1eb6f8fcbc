package store

import (
	"context"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Op says what a [Change] is.
type Op uint8

// The kinds of change.
const (
	// Put: the record at Key is now Value.
	Put Op = iota + 1
	// Deleted: the record at Key is gone; Value is zero.
	Deleted
	// Reset: forget all; the whole state follows as Puts, and then Synced.
	Reset
	// Synced: what came since Reset was the whole state.
	Synced
)

// Change is one step of a watch.
type Change[T any] struct {
	Op       Op
	Key      string // empty for Reset and Synced
	Value    T
	Revision int64
}

// Watch calls f with each change of the records whose keys start with prefix,
// in order of revision and without gaps, until ctx ends, f returns an error, or
// the database closes; it returns that reason, never nil.
//
// With from 0 it begins with [Reset], the current records and [Synced]. With
// from N it goes on behind revision N; if the history behind N has been
// compacted away, it begins anew as with 0. f is called by one goroutine, the
// caller's; while it is busy, changes queue up in memory.
func (t *Table[T]) Watch(ctx context.Context, prefix string, from int64, f func(Change[T]) error) error {
	for {
		if from == 0 {
			entries, rev, err := t.scanAt(ctx, Range{Prefix: prefix}, 0)
			if err != nil {
				return err
			}
			if err := f(Change[T]{Op: Reset, Revision: rev}); err != nil {
				return err
			}
			for _, e := range entries {
				if err := f(Change[T]{Op: Put, Key: e.Key, Value: e.Value, Revision: e.Revision}); err != nil {
					return err
				}
			}
			if err := f(Change[T]{Op: Synced, Revision: rev}); err != nil {
				return err
			}
			from = rev
		}
		compacted, err := t.follow(ctx, prefix, from, f)
		if err != nil {
			return err
		}
		if compacted {
			from = 0
		}
	}
}

// caughtUp returns when what was told to a watch can be read: etcd tells of changes
// shortly before it shows them to reads that ask nobody, those of a single member
// ([DB.get]).
func (db *DB) caughtUp(ctx context.Context) error {
	if db.clustered {
		return nil
	}
	_, err := db.client.Get(ctx, keyRoot, clientv3.WithCountOnly()) // a linearizable one
	return db.mapErr(err)
}

// follow delivers changes behind revision from. It returns true if that
// history is gone.
func (t *Table[T]) follow(ctx context.Context, prefix string, from int64, f func(Change[T]) error) (compacted bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch := t.db.client.Watch(ctx, t.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(from+1))
	for {
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-t.db.closing:
			return false, ErrClosed
		case resp, ok := <-ch:
			switch {
			case !ok && ctx.Err() != nil:
				return false, context.Cause(ctx)
			case !ok:
				return false, ErrClosed
			case resp.CompactRevision != 0:
				return true, nil
			case resp.Err() != nil:
				return false, t.db.mapErr(resp.Err())
			}
			if err := t.db.caughtUp(ctx); err != nil {
				return false, err
			}
			for _, ev := range resp.Events {
				c := Change[T]{Op: Deleted, Key: strings.TrimPrefix(string(ev.Kv.Key), t.prefix), Revision: ev.Kv.ModRevision}
				if ev.Type == clientv3.EventTypePut {
					c.Op = Put
					if c.Value, err = t.decode(string(ev.Kv.Key), ev.Kv.Value); err != nil {
						return false, err
					}
				}
				if err := f(c); err != nil {
					return false, err
				}
			}
		}
	}
}
