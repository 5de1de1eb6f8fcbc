package store

import (
	"context"
	"errors"
	"strings"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Scan calls f with the records whose keys start with prefix, in order of keys,
// until f returns false. It sees neither tx's own writes nor, at commit, changes
// by others: it is for answers, not for decisions about what to write.
func (x TxTable[T]) Scan(ctx context.Context, prefix string, f func(Entry[T]) bool) error {
	return x.scan(ctx, x.t.prefix+prefix, clientv3.GetPrefixRangeEnd(x.t.prefix+prefix), f)
}

// ScanBetween is [TxTable.Scan] for the keys from one, included, to another,
// which is not.
func (x TxTable[T]) ScanBetween(ctx context.Context, from, to string, f func(Entry[T]) bool) error {
	return x.scan(ctx, x.t.prefix+from, x.t.prefix+to, f)
}

// scan reads as a stream: a range that is asked for in pages has all its keys
// counted for each of them.
func (x TxTable[T]) scan(ctx context.Context, from, to string, f func(Entry[T]) bool) error {
	if from >= to {
		return nil
	}
	if x.tx.rev == 0 { // what follows reads this revision, wherever it is known
		rev, err := x.tx.db.Revision(ctx)
		if err != nil {
			return err
		}
		x.tx.rev = rev
	}
	// An error that ends a stream comes back as another.
	var bad error
	ended := false
	read := int64(0) // bytes
	defer func() { x.tx.db.scannedMore(read) }()
	each := func(r *etcdserverpb.RangeResponse) error {
		for _, kv := range r.Kvs {
			read += int64(len(kv.Key) + len(kv.Value))
			v, err := x.t.decode(string(kv.Key), kv.Value)
			if err != nil {
				bad = err
				return errEnough
			}
			if !f(Entry[T]{Key: strings.TrimPrefix(string(kv.Key), x.t.prefix), Value: v, Revision: kv.ModRevision}) {
				ended = true
				return errEnough
			}
		}
		return nil
	}
	err := x.tx.db.kv.RangeStream(&etcdserverpb.RangeRequest{
		Key: []byte(from), RangeEnd: []byte(to), Revision: x.tx.rev, Serializable: true,
	}, &stream{ctx: ctx, each: each})
	switch {
	case bad != nil || ended:
		return bad
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return x.tx.db.mapErr(rpctypes.Error(err))
}

// errEnough ends a stream.
var errEnough = errors.New("enough")

// stream takes what the server sends, in the caller's goroutine.
type stream struct {
	etcdserverpb.KV_RangeStreamServer // nil: the server uses no more than the two below

	ctx  context.Context
	each func(*etcdserverpb.RangeResponse) error
}

func (s *stream) Context() context.Context { return s.ctx }

func (s *stream) Send(r *etcdserverpb.RangeStreamResponse) error { return s.each(r.RangeResponse) }
