package kmipserver

import (
	"errors"
	"slices"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/errs"
)

// Items of a batch that follow one another and change objects share a transaction:
// a Create and the Activate of what it made are durable at the cost of one. A client
// sees no difference. Nothing of a batch is answered before all of it has ended, so
// a batch that a crash cuts off may have been carried out up to any item; and where
// one item fails, nothing is committed, and all are run again, each in a transaction
// of its own.

// sharing are the operations that can share a transaction. It is read only.
var sharing = []kmip.Operation{
	kmip.OperationCreate, kmip.OperationRegister, kmip.OperationActivate,
	kmip.OperationAddAttribute, kmip.OperationModifyAttribute, kmip.OperationDeleteAttribute,
}

// sharingMax is how many items share a transaction at most. Others save little, and
// the more there are the more likely is it that somebody else changes what one of
// them depends on.
const sharingMax = 8

// shared returns how many of the first items can share a transaction.
func (r *request) shared(items []item) int {
	items = items[:min(len(items), sharingMax)]
	if r.ctx.Err() != nil {
		return 0 // the first is refused
	}
	n := slices.IndexFunc(items, func(it item) bool {
		op, known := r.server.operations[it.operation]
		critical := it.extension != nil && it.extension.CriticalityIndicator
		return !slices.Contains(sharing, it.operation) || !known || !r.atLeast(op.since) || !r.client.Policy.allows(it.operation) || critical || it.err != nil
	})
	if n < 0 {
		return len(items)
	}
	return n
}

// errItem ends a transaction one of whose items failed.
var errItem = errors.New("an item of the batch failed")

// runShared answers items in one transaction. It returns nil if nothing was done
// and each is to be run by itself.
func (r *request) runShared(items []item) []kmip.ResponseBatchItem {
	for i := range items {
		if r.admit(&items[i]) != nil {
			if items = items[:i]; len(items) < 2 {
				return nil
			}
			break
		}
	}
	began := time.Now()
	placeholder := r.placeholder
	out := make([]kmip.ResponseBatchItem, len(items))
	events := make([]Event, len(items))
	err := r.inTransaction(func() error {
		r.placeholder = placeholder
		for i, it := range items {
			r.object, r.approval = "", ""
			payload, err := r.server.operations[it.operation].run(r, it.payload)
			if err != nil {
				return errItem
			}
			out[i] = kmip.ResponseBatchItem{Operation: it.operation, UniqueBatchItemID: it.id, ResponsePayload: payload}
			events[i] = r.event(it.operation, 0, nil)
		}
		return nil
	})
	if err != nil && (errors.Is(err, errItem) || errs.KindOf(err) == errs.Invalid) { // too much for one transaction
		r.placeholder = placeholder
		return nil
	}
	for i := range items {
		items[i].end(err)
		events[i].Duration = time.Since(began)
		if err != nil {
			events[i] = Event{Client: r.client, Peer: r.conn.peer, Operation: items[i].operation, Duration: time.Since(began)}
			events[i].Reason, events[i].Cause = reasonFor(err)
		}
	}
	if err = r.record(err, events...); err != nil {
		// It is not known, or not on record, what became of them.
		for i, it := range items {
			out[i] = kmip.ResponseBatchItem{Operation: it.operation, UniqueBatchItemID: it.id}
			r.failed(it.operation, &out[i], err)
		}
	}
	return out
}

// inTransaction has what f does to objects be in one transaction. A panic of f is
// the failure of an item.
func (r *request) inTransaction(f func() error) error {
	defer func() {
		r.tx = nil
		for _, m := range r.made { // of a transaction that failed
			m.Close()
		}
		r.made = nil
	}()
	err := r.server.store.Update(r.ctx, r.client.Account, func(tx Tx) (err error) {
		for _, m := range r.made { // of an earlier attempt
			m.Close()
		}
		r.tx, r.made = tx, nil
		defer func() {
			r.tx = nil
			if recover() != nil {
				err = errItem
			}
		}()
		return f()
	})
	if err == nil {
		r.made = nil // the store has them
	}
	return err
}

// change has f change objects in a transaction: the one that it shares, or one of
// its own.
func (r *request) change(f func(Tx) error) error {
	if r.tx != nil {
		return f(r.tx)
	}
	return r.server.store.Update(r.ctx, r.client.Account, f)
}
