package store

import (
	"context"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// groupMax is how many transactions are committed together at most, and
	// groupBytes how many bytes of values they write, unless one writes more.
	groupMax   = 64
	groupBytes = 1 << 20
	// groupOps is how many comparisons or writes one of them has at most: what the
	// database refuses for having too many must not take others along.
	groupOps = 256
)

// pending is a transaction that waits to be committed with others.
type pending struct {
	tx   *Tx
	cmps []clientv3.Cmp
	ops  []clientv3.Op
	size int  // bytes
	in   bool // the writes are in; else they were overtaken
	err  error
}

// together reports whether next can be committed in one step with group. The
// database compares all before it writes any: so that is right only where none
// writes what another has read or writes.
func together(group []*pending, next *pending) bool {
	size := next.size
	for _, p := range group {
		size += p.size
	}
	if len(group) == groupMax || size > groupBytes {
		return false
	}
	if next.large() {
		return false
	}
	for _, p := range group {
		if p.large() || p.tx.leased() || next.tx.leased() || p.tx.disturbs(next.tx) || next.tx.disturbs(p.tx) {
			return false
		}
	}
	return true
}

func (p *pending) large() bool { return len(p.cmps) > groupOps || len(p.ops) > groupOps }

// leased reports whether tx binds a key to a lease: if that has run out, the
// whole of what is committed with it fails.
func (tx *Tx) leased() bool {
	for _, w := range tx.writes {
		if w.lease != 0 {
			return true
		}
	}
	return false
}

// disturbs reports whether tx writes what other has read or writes.
func (tx *Tx) disturbs(other *Tx) bool {
	for key := range tx.writes {
		if _, ok := other.writes[key]; ok {
			return true
		}
		if _, ok := other.reads[key]; ok {
			return true
		}
		for prefix := range other.ranges {
			if strings.HasPrefix(key, prefix) {
				return true
			}
		}
	}
	return false
}

// commitGroup commits transactions in one step of the database's log.
func (db *DB) commitGroup(group []*pending) {
	if len(group) == 1 {
		p := group[0]
		resp, err := db.client.Txn(db.life).If(p.cmps...).Then(p.ops...).Commit()
		if p.err = err; err == nil {
			p.in = resp.Succeeded
		}
		return
	}
	var ops []clientv3.Op
	for _, p := range group {
		ops = append(ops, clientv3.OpTxn(p.cmps, p.ops, nil))
	}
	resp, err := db.client.Txn(db.life).Then(ops...).Commit()
	for i, p := range group {
		if p.err = err; err == nil {
			p.in = resp.Responses[i].GetResponseTxn().Succeeded
		}
	}
}

// commit commits tx and reports whether its writes are in. Transactions of a
// single member that come at the same time share a sync of its log. Members of
// a cluster send theirs at once: one that waits for a leader that died must not
// hold up others.
func (db *DB) commit(ctx context.Context, tx *Tx, cmps []clientv3.Cmp, ops []clientv3.Op) (bool, error) {
	if db.clustered {
		return db.commitToCluster(ctx, cmps, ops)
	}
	p := &pending{tx: tx, cmps: cmps, ops: ops}
	for key, w := range tx.writes {
		p.size += len(key) + len(w.value)
	}
	if err := db.commits.Do(ctx, p); err != nil {
		return false, db.mapErr(err)
	}
	return p.in, db.mapErr(p.err)
}
