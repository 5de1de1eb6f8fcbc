package objectstore

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"strongroom/internal/control/store"
	"strongroom/internal/keys/keyring"
)

// Epoch is what the database says of an epoch (docs/spec/kms-keyring.md and
// kms-cluster.md). No record means open: a KMS of one node makes none until a key
// of the epoch is destroyed.
type Epoch struct {
	State EpochState `json:"state"`
	// Maker is the node that is bringing an epoch that forms to others.
	Maker string `json:"maker,omitempty"`
	// Holders are the nodes that have yet to erase the KEK.
	Holders []string `json:"holders,omitempty"`
}

// EpochState is where an epoch is in its life.
type EpochState string

// The states, in their order.
const (
	EpochForming  EpochState = "forming"  // no key is wrapped in it yet
	EpochOpen     EpochState = "open"     // the KEK is on a majority of nodes: keys may be wrapped in it
	EpochDirty    EpochState = "dirty"    // a key that was wrapped in it has been destroyed
	EpochErasing  EpochState = "erasing"  // no key is wrapped in it any more: the nodes erase its KEK
	EpochShredded EpochState = "shredded" // its KEK is gone
)

// Keeper is how epochs begin and end on all nodes of a KMS.
type Keeper interface {
	// Begin returns a new open epoch, whose KEK is as safe against the loss of
	// nodes as the objects in the database.
	Begin(ctx context.Context) (uint64, error)
	// CatchUp brings this node's ring in line with the database and other nodes.
	CatchUp(ctx context.Context) error
	// Erase has the KEKs of epochs erased that are dirty and under which no key
	// is wrapped. It may return before nodes that are away have done so.
	Erase(ctx context.Context, epochs ...uint64) error
}

// EpochTable returns the table of epochs, by [EpochKey].
func EpochTable(db *store.DB) *store.Table[Epoch] { return store.NewTable[Epoch](db, "kms-epoch", 1) }

// EpochKey returns the key of an epoch.
func EpochKey(n uint64) string { return fmt.Sprintf("%016x", n) }

// EpochNumber is the reverse of [EpochKey].
func EpochNumber(key string) (uint64, error) {
	n, err := strconv.ParseUint(key, 16, 64)
	if err != nil || n == keyring.Metadata || EpochKey(n) != key {
		return 0, fmt.Errorf("epoch %.64q: %w", key, store.ErrCorrupt)
	}
	return n, nil
}

// epochIn returns what a transaction sees of an epoch.
func epochIn(ctx context.Context, epochs store.TxTable[Epoch], n uint64) (Epoch, error) {
	e, err := epochs.Get(ctx, EpochKey(n))
	if store.IsNotFound(err) {
		return Epoch{State: EpochOpen}, nil
	}
	return e, err
}

// NewestEpoch returns the highest epoch that db knows to be used up, or 0: see
// [keyring.Load].
func NewestEpoch(ctx context.Context, db *store.DB) (uint64, error) {
	last, err := EpochTable(db).Scan(ctx, store.Range{Descending: true, Limit: 1})
	if err != nil || len(last) == 0 {
		return 0, err
	}
	return EpochNumber(last[0].Key)
}

// alone is the [Keeper] of a KMS of one node.
type alone struct {
	db     *store.DB
	ring   *keyring.Ring
	epochs *store.Table[Epoch]
}

func (a *alone) Begin(context.Context) (uint64, error) { return a.ring.Begin() }

func (a *alone) CatchUp(context.Context) error { return nil }

func (a *alone) Erase(ctx context.Context, epochs ...uint64) error {
	if err := a.ring.Shred(epochs...); err != nil {
		return err
	}
	for batch := range slices.Chunk(epochs, moveBatch) {
		err := a.db.Txn(ctx, func(tx *store.Tx) error {
			for _, n := range batch {
				if err := a.epochs.In(tx).Set(EpochKey(n), Epoch{State: EpochShredded}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
