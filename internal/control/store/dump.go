package store

import (
	"context"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"strongroom/internal/errs"
)

// Dump is the records of all tables at one revision, without history, and
// without those that are bound to a lease: those tell who is alive. It can be read
// while the history that is kept reaches back to it: some 30 minutes.
type Dump struct {
	db       *DB
	Revision int64
}

// Dump returns the records as they are now.
func (db *DB) Dump(ctx context.Context) (Dump, error) {
	rev, err := db.Revision(ctx)
	return Dump{db: db, Revision: rev}, err
}

// Count returns the number of records in a table.
func (d Dump) Count(ctx context.Context, table string) (int64, error) {
	resp, err := d.db.get(ctx, keyRoot+table+"/", clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithRev(d.Revision))
	if err != nil {
		return 0, d.db.mapErr(err)
	}
	return resp.Count, nil
}

// Each calls f with every record, in byte order of "TABLE/KEY", its name. The value
// is f's.
func (d Dump) Each(ctx context.Context, f func(name string, value []byte) error) error {
	var bad error // an error that ends a stream comes back as another
	each := func(r *etcdserverpb.RangeResponse) error {
		for _, kv := range r.Kvs {
			if kv.Lease != 0 {
				continue
			}
			if bad = f(strings.TrimPrefix(string(kv.Key), keyRoot), kv.Value); bad != nil {
				return errEnough
			}
		}
		return nil
	}
	defer unmap(d.db.file)
	err := d.db.kv.RangeStream(&etcdserverpb.RangeRequest{
		Key: []byte(keyRoot), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(keyRoot)), Revision: d.Revision, Serializable: true,
	}, &stream{ctx: ctx, each: each})
	switch {
	case bad != nil:
		return bad
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return errs.Wrap(d.db.mapErr(rpctypes.Error(err)), "cannot read the database at revision %d", d.Revision)
}

// Record is a record of any table as it is stored.
type Record struct {
	Name  string // "TABLE/KEY"
	Value []byte
}

// Load stores records of a [Dump], all or none. At most 4096, and 4 MiB with their
// names, can be stored together.
func (db *DB) Load(ctx context.Context, records []Record) error {
	for _, r := range records {
		table, key, ok := strings.Cut(r.Name, "/")
		err := checkKey(key)
		switch {
		case !ok || table == "" || strings.Trim(table, "abcdefghijklmnopqrstuvwxyz-") != "":
			err = ErrInvalidKey
		case err == nil && len(r.Value) > MaxValueBytes:
			err = ErrTooLarge
		}
		if err != nil {
			return fmt.Errorf("record %.128q: %w", r.Name, err)
		}
	}
	return db.Txn(ctx, func(tx *Tx) error {
		for _, r := range records {
			tx.writes[keyRoot+r.Name] = write{value: string(r.Value)}
		}
		return nil
	})
}
