package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// txnAttempts bounds the retries of a transaction whose keys others change.
	txnAttempts = 64
	// The pause before a retry grows to at most this.
	txnPauseMax = 50 * time.Millisecond
	// seenMax is how many records that it has read a transaction keeps.
	seenMax = 256
)

// Tx is a transaction under way. It is used by one goroutine, inside the
// function given to [DB.Txn] or [DB.View], through [Table.In].
type Tx struct {
	db     *DB
	rev    int64               // revision of all reads; 0 before the first
	again  bool                // f has run before
	reads  map[string]int64    // full key -> revision of its last change, 0 if absent, or present
	seen   map[string][]byte   // values of some reads, as they are stored
	ranges map[string]struct{} // full prefixes that were scanned
	writes map[string]write    // by full key
}

// present stands, for a record's revision, for any: [TxTable.Require].
const present = -1

type write struct {
	delete bool
	value  string
	lease  clientv3.LeaseID
}

// Txn runs f, which reads and writes tables through [Table.In], and commits its
// writes together: all or none. All reads see one revision and f's own writes.
// If anybody changed what f read, f runs again, so it must have no effect but
// on tx. An error of f ends the transaction with nothing written.
//
// A scan conflicts with records that others add or change in its range, not
// with records that they delete.
func (db *DB) Txn(ctx context.Context, f func(tx *Tx) error) error {
	for attempt := range txnAttempts {
		tx := &Tx{db: db, again: attempt > 0, reads: map[string]int64{}, seen: map[string][]byte{}, ranges: map[string]struct{}{}, writes: map[string]write{}}
		err := f(tx)
		done := false
		if err == nil {
			done, err = tx.commit(ctx)
		}
		// Compacted: the revision that tx reads at is history already.
		if err != nil && !errors.Is(err, rpctypes.ErrCompacted) || done {
			return err
		}
		pause := min(txnPauseMax, time.Millisecond<<min(attempt, 6))
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-db.closing:
			return ErrClosed
		case <-time.After(rand.N(pause)):
		}
	}
	return ErrConflict
}

// View runs f, which only reads: all reads see one revision. Writes of f are
// dropped.
func (db *DB) View(ctx context.Context, f func(tx *Tx) error) error {
	return db.Txn(ctx, func(tx *Tx) error {
		defer clear(tx.writes)
		return f(tx)
	})
}

// commit reports whether the writes are in, or were overtaken.
func (tx *Tx) commit(ctx context.Context) (bool, error) {
	if len(tx.writes) == 0 {
		return true, nil
	}
	var cmps []clientv3.Cmp
	for _, key := range slices.Sorted(maps.Keys(tx.reads)) {
		if tx.reads[key] == present {
			cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(key), ">", 0))
			continue
		}
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(key), "=", tx.reads[key]))
	}
	for _, prefix := range slices.Sorted(maps.Keys(tx.ranges)) {
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(prefix).WithPrefix(), "<", tx.rev+1))
	}
	var ops []clientv3.Op
	for _, key := range slices.Sorted(maps.Keys(tx.writes)) {
		w := tx.writes[key]
		switch {
		case w.delete:
			ops = append(ops, clientv3.OpDelete(key))
		case w.lease != 0:
			ops = append(ops, clientv3.OpPut(key, w.value, clientv3.WithLease(w.lease)))
		default:
			ops = append(ops, clientv3.OpPut(key, w.value))
		}
	}
	return tx.db.commit(ctx, tx, cmps, ops)
}

// TxTable is a table inside a transaction.
type TxTable[T any] struct {
	t  *Table[T]
	tx *Tx
}

// In returns t as seen and changed by tx.
func (t *Table[T]) In(tx *Tx) TxTable[T] { return TxTable[T]{t: t, tx: tx} }

// Get returns the record at key or [ErrNotFound].
func (x TxTable[T]) Get(ctx context.Context, key string) (T, error) {
	e, err := x.Entry(ctx, key)
	return e.Value, err
}

// Entry is Get with the revision of the record's last change, which is 0 if tx
// changed it.
func (x TxTable[T]) Entry(ctx context.Context, key string) (Entry[T], error) {
	if err := checkKey(key); err != nil {
		return Entry[T]{}, fmt.Errorf("%s %q: %w", x.t.name, key, err)
	}
	full := x.t.prefix + key
	if w, ok := x.tx.writes[full]; ok {
		if w.delete {
			return Entry[T]{}, x.t.notFound(key)
		}
		v, err := x.t.decode(full, []byte(w.value))
		return Entry[T]{Key: key, Value: v}, err
	}
	value, revision, err := x.tx.read(ctx, full)
	if err != nil {
		return Entry[T]{}, err
	}
	if revision == 0 {
		return Entry[T]{}, x.t.notFound(key)
	}
	v, err := x.t.decode(full, value)
	return Entry[T]{Key: key, Value: v, Revision: revision}, err
}

// read returns a record as it is stored, and the revision of its last change, which
// is 0 if there is none. The value is not to be changed.
func (tx *Tx) read(ctx context.Context, full string) (value []byte, revision int64, err error) {
	if revision, ok := tx.reads[full]; ok {
		if value, kept := tx.seen[full]; kept || revision == 0 {
			return value, revision, nil
		}
	}
	var opts []clientv3.OpOption
	if tx.rev > 0 {
		opts = append(opts, clientv3.WithRev(tx.rev), clientv3.WithSerializable())
	}
	resp, err := tx.db.get(ctx, full, opts...)
	if err != nil {
		return nil, 0, tx.db.mapErr(err)
	}
	if tx.rev == 0 {
		tx.rev = resp.Header.Revision
	}
	if len(resp.Kvs) > 0 {
		value, revision = resp.Kvs[0].Value, resp.Kvs[0].ModRevision
	}
	tx.reads[full] = revision
	if revision != 0 && len(tx.seen) < seenMax {
		tx.seen[full] = value
	}
	return value, revision, nil
}

// Has reports whether there is a record at key.
func (x TxTable[T]) Has(ctx context.Context, key string) (bool, error) {
	_, err := x.Get(ctx, key)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Require has tx commit its writes only while there is a record at key, whatever
// becomes of it else. It reads nothing at first, for there is one as a rule; if there
// was none, f runs again and gets [ErrNotFound].
func (x TxTable[T]) Require(ctx context.Context, key string) error {
	if err := checkKey(key); err != nil {
		return fmt.Errorf("%s %q: %w", x.t.name, key, err)
	}
	full := x.t.prefix + key
	_, written := x.tx.writes[full]
	if _, read := x.tx.reads[full]; x.tx.again || written || read {
		_, err := x.Get(ctx, key)
		return err
	}
	x.tx.reads[full] = present
	return nil
}

// List returns all values whose keys start with prefix, in order of keys.
func (x TxTable[T]) List(ctx context.Context, prefix string) ([]T, error) {
	entries, err := x.Entries(ctx, prefix)
	if err != nil {
		return nil, err
	}
	values := make([]T, len(entries))
	for i := range entries {
		values[i] = entries[i].Value
	}
	return values, nil
}

// Entries is List with keys and revisions, which are 0 for what tx changed.
func (x TxTable[T]) Entries(ctx context.Context, prefix string) ([]Entry[T], error) {
	entries, rev, err := x.t.scanAt(ctx, Range{Prefix: prefix}, x.tx.rev)
	if err != nil {
		return nil, err
	}
	if x.tx.rev == 0 {
		x.tx.rev = rev
	}
	full := x.t.prefix + prefix
	x.tx.ranges[full] = struct{}{}

	byKey := make(map[string]Entry[T], len(entries))
	for _, e := range entries {
		byKey[x.t.prefix+e.Key] = e
	}
	for key, w := range x.tx.writes {
		if !strings.HasPrefix(key, full) {
			continue
		}
		if w.delete {
			delete(byKey, key)
			continue
		}
		v, err := x.t.decode(key, []byte(w.value))
		if err != nil {
			return nil, err
		}
		byKey[key] = Entry[T]{Key: strings.TrimPrefix(key, x.t.prefix), Value: v}
	}
	out := make([]Entry[T], 0, len(byKey))
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		out = append(out, byKey[key])
	}
	return out, nil
}

// Create stores v at key at commit, or returns [ErrExists].
func (x TxTable[T]) Create(ctx context.Context, key string, v T) error {
	switch _, err := x.Get(ctx, key); {
	case err == nil:
		return fmt.Errorf("%s %q: %w", x.t.name, key, ErrExists)
	case !errors.Is(err, ErrNotFound):
		return err
	}
	return x.put(key, v, 0)
}

// Put stores v at key at commit. A record that a newer release wrote is not
// overwritten: [ErrNewerSchema].
func (x TxTable[T]) Put(ctx context.Context, key string, v T) error {
	if _, err := x.Get(ctx, key); err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	return x.put(key, v, 0)
}

// Set stores v at key at commit without a look at what is there: for callers
// who have looked.
func (x TxTable[T]) Set(key string, v T) error { return x.put(key, v, 0) }

// Delete removes the record at key at commit, or returns [ErrNotFound].
func (x TxTable[T]) Delete(ctx context.Context, key string) error {
	if _, err := x.Get(ctx, key); err != nil {
		return err
	}
	x.tx.writes[x.t.prefix+key] = write{delete: true}
	return nil
}

func (x TxTable[T]) put(key string, v T, lease clientv3.LeaseID) error {
	b, err := x.t.encode(key, v)
	if err != nil {
		return err
	}
	x.tx.writes[x.t.prefix+key] = write{value: b, lease: lease}
	return nil
}
