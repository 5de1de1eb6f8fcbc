package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Table is a set of records of one type, each under a key.
//
// A record is stored as {"schema":N,"data":...}. Rules of evolution:
//   - A field may be added if its zero value means what the record meant
//     before; a reader of a record without it sees the zero value.
//   - The schema number is raised when an older release must not touch the new
//     records: it would drop the new fields when it writes them back. An older
//     release then fails with [ErrNewerSchema] and changes nothing.
//   - A field may be retired: unknown fields are ignored and vanish with the
//     next update. A name is never reused with another meaning.
//
// Plain reads are linearizable. A Table holds no state of its own.
type Table[T any] struct {
	db     *DB
	name   string
	prefix string
	schema int
	codec  codec[T]
}

// codec is how a table's values are stored.
type codec[T any] struct {
	encode func(schema int, v T) ([]byte, error)
	decode func(schema int, b []byte) (T, error)
}

// NewTable returns the table called name, which must consist of a-z and '-'.
// schema is the current schema number of T, from 1. A wrong name or number is
// a bug and panics.
func NewTable[T any](db *DB, name string, schema int) *Table[T] {
	if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz-") != "" || schema < 1 {
		panic(fmt.Sprintf("store: bad table %q, schema %d", name, schema))
	}
	return &Table[T]{db: db, name: name, prefix: keyRoot + name + "/", schema: schema, codec: codec[T]{encodeJSON[T], decodeJSON[T]}}
}

// NewRawTable is [NewTable] for values that are bytes in a format of their own,
// with a version of its own. They are stored as they are.
func NewRawTable(db *DB, name string) *Table[[]byte] {
	t := NewTable[[]byte](db, name, 1)
	t.codec = codec[[]byte]{
		encode: func(_ int, v []byte) ([]byte, error) { return v, nil },
		decode: func(_ int, b []byte) ([]byte, error) { return b, nil },
	}
	return t
}

// Entry is a record with its address.
type Entry[T any] struct {
	Key      string
	Value    T
	Revision int64 // of the last change
}

// Range selects records by key, in byte order of keys.
type Range struct {
	Prefix     string // only keys that start so
	After      string // only keys behind this one (before it, if Descending)
	Limit      int    // at most so many; 0 means all
	Descending bool
}

// Get returns the record at key or [ErrNotFound].
func (t *Table[T]) Get(ctx context.Context, key string) (T, error) {
	var v T
	err := t.db.View(ctx, func(tx *Tx) error {
		var err error
		v, err = t.In(tx).Get(ctx, key)
		return err
	})
	return v, err
}

// List returns all values, in order of their keys.
func (t *Table[T]) List(ctx context.Context) ([]T, error) {
	entries, err := t.Scan(ctx, Range{})
	if err != nil {
		return nil, err
	}
	values := make([]T, len(entries))
	for i := range entries {
		values[i] = entries[i].Value
	}
	return values, nil
}

// Scan returns the records of r, all of one revision.
func (t *Table[T]) Scan(ctx context.Context, r Range) ([]Entry[T], error) {
	entries, _, err := t.scanAt(ctx, r, 0)
	return entries, err
}

// Count returns the number of records.
func (t *Table[T]) Count(ctx context.Context) (int64, error) {
	resp, err := t.db.get(ctx, t.prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return 0, t.db.mapErr(err)
	}
	return resp.Count, nil
}

// Create stores v at key, or returns [ErrExists].
func (t *Table[T]) Create(ctx context.Context, key string, v T) error {
	return t.db.Txn(ctx, func(tx *Tx) error { return t.In(tx).Create(ctx, key, v) })
}

// Put stores v at key, whether or not there is a record.
func (t *Table[T]) Put(ctx context.Context, key string, v T) error {
	return t.db.Txn(ctx, func(tx *Tx) error { return t.In(tx).Put(ctx, key, v) })
}

// PutLeased stores v at key until l ends.
func (t *Table[T]) PutLeased(ctx context.Context, key string, v T, l *Lease) error {
	return t.db.Txn(ctx, func(tx *Tx) error { return t.In(tx).put(key, v, l.id) })
}

// Update reads the record at key, has f change it, and stores the result if
// nobody changed it in between; else it starts again, so f may run more than
// once and must do nothing but change *T. It returns the stored value,
// [ErrNotFound], or f's error with nothing stored.
func (t *Table[T]) Update(ctx context.Context, key string, f func(*T) error) (T, error) {
	var out T
	err := t.db.Txn(ctx, func(tx *Tx) error {
		v, err := t.In(tx).Get(ctx, key)
		if err != nil {
			return err
		}
		if err := f(&v); err != nil {
			return err
		}
		out = v
		return t.In(tx).Put(ctx, key, v)
	})
	if err != nil {
		var zero T
		return zero, err
	}
	return out, nil
}

// Delete removes the record at key, or returns [ErrNotFound].
func (t *Table[T]) Delete(ctx context.Context, key string) error {
	return t.db.Txn(ctx, func(tx *Tx) error { return t.In(tx).Delete(ctx, key) })
}

// Prune deletes the first records in order of keys until at most keep are left,
// and returns how many went. With keys that grow with time these are the oldest.
func (t *Table[T]) Prune(ctx context.Context, keep int) (int64, error) {
	n, err := t.Count(ctx)
	if err != nil || n <= int64(keep) {
		return 0, err
	}
	resp, err := t.db.get(ctx, t.prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(),
		clientv3.WithLimit(n-int64(keep)+1))
	if err != nil {
		return 0, t.db.mapErr(err)
	}
	if len(resp.Kvs) == 0 {
		return 0, nil
	}
	end := string(resp.Kvs[len(resp.Kvs)-1].Key) // the first to stay
	if keep == 0 {
		end = clientv3.GetPrefixRangeEnd(t.prefix)
	}
	del, err := t.db.client.Delete(ctx, t.prefix, clientv3.WithRange(end))
	if err != nil {
		return 0, t.db.mapErr(err)
	}
	return del.Deleted, nil
}

// scanPage bounds one read of a scan.
const scanPage = 1000

// scanAt scans at revision rev, or the current one if it is 0, and returns the
// revision it read.
func (t *Table[T]) scanAt(ctx context.Context, r Range, rev int64) ([]Entry[T], int64, error) {
	start, end := t.prefix+r.Prefix, clientv3.GetPrefixRangeEnd(t.prefix+r.Prefix)
	order := clientv3.SortAscend
	if r.Descending {
		order = clientv3.SortDescend
	}
	after := ""
	if r.After != "" {
		after = t.prefix + r.After
	}
	var out []Entry[T]
	for {
		switch {
		case after == "":
		case r.Descending && after < end:
			end = after
		case !r.Descending && after >= start:
			start = after + "\x00"
		}
		if start >= end {
			return out, rev, nil
		}
		page := int64(scanPage)
		if r.Limit > 0 {
			page = min(page, int64(r.Limit-len(out)))
		}
		opts := []clientv3.OpOption{
			clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithSort(clientv3.SortByKey, order),
		}
		if rev > 0 {
			opts = append(opts, clientv3.WithRev(rev))
		}
		resp, err := t.db.get(ctx, start, opts...)
		if err != nil {
			return nil, 0, t.db.mapErr(err)
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, kv := range resp.Kvs {
			v, err := t.decode(string(kv.Key), kv.Value)
			if err != nil {
				return nil, 0, err
			}
			out = append(out, Entry[T]{Key: strings.TrimPrefix(string(kv.Key), t.prefix), Value: v, Revision: kv.ModRevision})
		}
		if !resp.More || r.Limit > 0 && len(out) >= r.Limit {
			return out, rev, nil
		}
		after = string(resp.Kvs[len(resp.Kvs)-1].Key)
	}
}

// envelope is the stored form of a record.
type envelope struct {
	Schema int             `json:"schema"`
	Data   json.RawMessage `json:"data"`
}

func (t *Table[T]) encode(key string, v T) (string, error) {
	if err := checkKey(key); err != nil {
		return "", fmt.Errorf("%s %q: %w", t.name, key, err)
	}
	b, err := t.codec.encode(t.schema, v)
	if err != nil {
		return "", fmt.Errorf("cannot encode %s %q: %w", t.name, key, err)
	}
	if len(b) > MaxValueBytes {
		return "", fmt.Errorf("%s %q: %w: %d bytes, limit %d", t.name, key, ErrTooLarge, len(b), MaxValueBytes)
	}
	return string(b), nil
}

// decode parses the record stored at fullKey.
func (t *Table[T]) decode(fullKey string, b []byte) (T, error) {
	key := strings.TrimPrefix(fullKey, t.prefix)
	if len(b) > MaxValueBytes {
		var zero T
		return zero, fmt.Errorf("%s %q: %w: too large", t.name, key, ErrCorrupt)
	}
	v, err := t.codec.decode(t.schema, b)
	if err != nil {
		var zero T
		return zero, fmt.Errorf("%s %q: %w", t.name, key, err)
	}
	return v, nil
}

func encodeJSON[T any](schema int, v T) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return json.Marshal(envelope{Schema: schema, Data: data})
}

func decodeJSON[T any](schema int, b []byte) (v T, err error) {
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return v, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	switch {
	case e.Schema < 1:
		return v, fmt.Errorf("%w: no schema number", ErrCorrupt)
	case e.Schema > schema:
		return v, fmt.Errorf("%w: schema %d, known up to %d", ErrNewerSchema, e.Schema, schema)
	case len(e.Data) == 0:
		return v, fmt.Errorf("%w: no data", ErrCorrupt)
	}
	if err := json.Unmarshal(e.Data, &v); err != nil {
		return v, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return v, nil
}

func checkKey(key string) error {
	if key == "" || len(key) > MaxKeyBytes || !utf8.ValidString(key) || strings.ContainsFunc(key, unicode.IsControl) {
		return ErrInvalidKey
	}
	return nil
}

// notFound names the missing record.
func (t *Table[T]) notFound(key string) error {
	return fmt.Errorf("%s %q: %w", t.name, key, ErrNotFound)
}

// IsNotFound reports whether err says that a record does not exist.
func IsNotFound(err error) bool { return errors.Is(err, ErrNotFound) }
