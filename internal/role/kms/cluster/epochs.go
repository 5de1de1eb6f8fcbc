package cluster

import (
	"context"
	"errors"
	"log/slog"
	"slices"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/role/kms/objectstore"
)

// Begin implements [objectstore.Keeper]: a new epoch is open when a majority of
// the members has its KEK in their vaults.
func (c *Cluster) Begin(ctx context.Context) (uint64, error) {
	c.begin.Lock()
	defer c.begin.Unlock()
	n, err := c.allocate(ctx)
	if err != nil {
		return 0, errs.Wrap(err, "cannot begin an epoch")
	}
	if err := c.Ring.BeginAt(n); err != nil {
		return 0, err
	}
	if err := c.spread(ctx, n); err != nil {
		return 0, errs.Wrap(err, "cannot bring epoch %d to the other nodes", n)
	}
	c.forming = 0 // whatever comes now, it is not tried again
	_, err = c.epochs.Update(ctx, objectstore.EpochKey(n), func(e *objectstore.Epoch) error {
		if e.State != objectstore.EpochForming {
			return errs.New(errs.InvalidState, "epoch %d is %s already", n, e.State)
		}
		*e = objectstore.Epoch{State: objectstore.EpochOpen}
		return nil
	})
	return n, errs.Wrap(err, "cannot open epoch %d", n)
}

// allocate takes a number that was never used, or the one whose epoch could not
// be brought to the others.
func (c *Cluster) allocate(ctx context.Context) (uint64, error) {
	if c.forming != 0 {
		return c.forming, nil
	}
	last, err := objectstore.NewestEpoch(ctx, c.DB)
	if err != nil {
		return 0, err
	}
	for n := last + 1; ; n++ {
		err := c.DB.Txn(ctx, func(tx *store.Tx) error {
			return c.epochs.In(tx).Create(ctx, objectstore.EpochKey(n), objectstore.Epoch{State: objectstore.EpochForming, Maker: c.Self.ID})
		})
		if errors.Is(err, store.ErrExists) { // another node's
			continue
		}
		if err == nil {
			c.forming = n
		}
		return n, err
	}
}

// spread has other members fetch the KEK and returns when, with this one, a
// majority has it. The rest gets it, too, if it is there.
func (c *Cluster) spread(ctx context.Context, n uint64) error {
	others, err := c.others(ctx)
	if err != nil {
		return err
	}
	others = slices.DeleteFunc(others, func(m Member) bool { return !m.Voter })
	missing := (len(others) + 1) / 2 // for a majority, with this node
	answers := make(chan error, len(others))
	for _, m := range others {
		c.calls.Go(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
			defer cancel()
			answers <- c.peers.hold(ctx, m, n)
		})
	}
	var failed error
	for range others {
		if missing == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-answers:
			if err == nil {
				missing--
			}
			failed = errors.Join(failed, err)
		}
	}
	if missing > 0 {
		return errs.New(errs.Unavailable, "too few other nodes took it: %w", failed)
	}
	return nil
}

// abandon has the epochs that a member left half-way shredded: no key is wrapped
// in them.
func (c *Cluster) abandon(ctx context.Context, maker string) error {
	return c.change(ctx, func(e objectstore.Epoch) bool {
		return e.State == objectstore.EpochForming && e.Maker == maker
	}, func(e *objectstore.Epoch) { *e = objectstore.Epoch{State: objectstore.EpochDirty} })
}

// change changes all epochs that match.
func (c *Cluster) change(ctx context.Context, match func(objectstore.Epoch) bool, f func(*objectstore.Epoch)) error {
	all, err := c.epochs.Scan(ctx, store.Range{})
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(e store.Entry[objectstore.Epoch]) bool { return !match(e.Value) })
	for some := range slices.Chunk(all, batch) {
		err := c.DB.Txn(ctx, func(tx *store.Tx) error {
			for _, at := range some {
				e, err := c.epochs.In(tx).Get(ctx, at.Key)
				if err != nil {
					return err
				}
				if !match(e) {
					continue
				}
				f(&e)
				if err := c.epochs.In(tx).Set(at.Key, e); err != nil {
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

// Erase implements [objectstore.Keeper]: every member erases the KEKs in its own
// time, and the last one marks them shredded.
func (c *Cluster) Erase(ctx context.Context, epochs ...uint64) error {
	for some := range slices.Chunk(epochs, batch) {
		err := c.DB.Txn(ctx, func(tx *store.Tx) error {
			holders, err := c.holders(ctx, tx)
			if err != nil {
				return err
			}
			for _, n := range some {
				e, err := c.epochs.In(tx).Get(ctx, objectstore.EpochKey(n))
				if err != nil {
					return err
				}
				if e.State != objectstore.EpochDirty { // another node was quicker
					continue
				}
				if err := c.epochs.In(tx).Set(objectstore.EpochKey(n), objectstore.Epoch{State: objectstore.EpochErasing, Holders: holders}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return c.CatchUp(ctx)
}

// holders returns the ids of all members, and has the transaction fail if one is
// removed, or comes, meanwhile.
func (c *Cluster) holders(ctx context.Context, tx *store.Tx) ([]string, error) {
	all, err := c.members.In(tx).List(ctx, "")
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, m := range all {
		// A scan does not notice a removal; a look at the very record does.
		if _, err := c.members.In(tx).Get(ctx, m.ID); err != nil {
			return nil, err
		}
		ids = append(ids, m.ID)
	}
	return ids, nil
}

// due reports whether this node has to erase an epoch or to fetch it.
func (c *Cluster) due(n uint64, e objectstore.Epoch) bool {
	switch e.State {
	case objectstore.EpochErasing, objectstore.EpochShredded:
		return c.Ring.Has(n) || slices.Contains(e.Holders, c.Self.ID)
	case objectstore.EpochOpen, objectstore.EpochDirty:
		return !c.Ring.Has(n)
	}
	return false
}

// CatchUp implements [objectstore.Keeper]: it erases what is to be erased, and
// fetches what other members have. KEKs that nobody who answers has are told to
// the log: they may come later.
func (c *Cluster) CatchUp(ctx context.Context) error {
	missing, err := c.settle(ctx)
	if err != nil || len(missing) == 0 {
		return err
	}
	others, err := c.others(ctx)
	if err != nil {
		return err
	}
	for _, m := range others {
		for some := range slices.Chunk(missing, keyring.ExcerptMax) {
			if err := c.fetch(ctx, m, some); err != nil {
				c.Log.LogAttrs(ctx, slog.LevelWarn, "epochs not fetched", slog.String("member", m.Name), slog.Any("err", err))
				break
			}
		}
		missing = slices.DeleteFunc(missing, c.Ring.Has)
		if len(missing) == 0 {
			return nil
		}
	}
	c.Log.LogAttrs(ctx, slog.LevelError, "no node that answers has the KEKs of epochs", slog.Int("epochs", len(missing)), slog.Uint64("first", missing[0]))
	return nil
}

// settle erases what is to be erased and returns the epochs to fetch.
func (c *Cluster) settle(ctx context.Context) (missing []uint64, err error) {
	c.ring.Lock()
	defer c.ring.Unlock()
	all, err := c.epochs.Scan(ctx, store.Range{})
	if err != nil {
		return nil, err
	}
	var gone, held []uint64
	for _, at := range all {
		n, err := objectstore.EpochNumber(at.Key)
		if err != nil {
			return nil, err
		}
		switch {
		case !c.due(n, at.Value):
		case at.Value.State == objectstore.EpochErasing || at.Value.State == objectstore.EpochShredded:
			gone = append(gone, n)
			if slices.Contains(at.Value.Holders, c.Self.ID) {
				held = append(held, n)
			}
		default:
			missing = append(missing, n)
		}
	}
	if err := c.Ring.Shred(gone...); err != nil {
		return nil, err
	}
	if len(held) > 0 {
		err = c.erased(ctx, c.Self.ID, held)
	}
	return missing, err
}

// erased takes a member off the holders of epochs, or of all if there are none
// given. Whose last holder goes is shredded.
func (c *Cluster) erased(ctx context.Context, member string, epochs []uint64) error {
	if epochs == nil {
		return c.change(ctx, func(e objectstore.Epoch) bool { return slices.Contains(e.Holders, member) }, func(e *objectstore.Epoch) { release(e, member) })
	}
	for some := range slices.Chunk(epochs, batch) {
		err := c.DB.Txn(ctx, func(tx *store.Tx) error {
			for _, n := range some {
				e, err := c.epochs.In(tx).Get(ctx, objectstore.EpochKey(n))
				if err != nil {
					return err
				}
				release(&e, member)
				if err := c.epochs.In(tx).Set(objectstore.EpochKey(n), e); err != nil {
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

func release(e *objectstore.Epoch, member string) {
	e.Holders = slices.DeleteFunc(e.Holders, func(id string) bool { return id == member })
	if len(e.Holders) == 0 {
		*e = objectstore.Epoch{State: objectstore.EpochShredded}
	}
}

// fetch takes the KEKs of epochs over from a member, as far as it has them.
func (c *Cluster) fetch(ctx context.Context, from Member, epochs []uint64) error {
	excerpt, err := c.peers.fetch(ctx, from, c.Self.ID, epochs)
	if err != nil {
		return err
	}
	defer excerpt.Close()
	return c.admit(ctx, excerpt, epochs)
}

// admit takes those epochs of an excerpt over that may be on a ring now.
func (c *Cluster) admit(ctx context.Context, excerpt *keymem.Key, epochs []uint64) error {
	c.ring.Lock()
	defer c.ring.Unlock()
	alive := map[uint64]bool{}
	err := c.DB.View(ctx, func(tx *store.Tx) error {
		clear(alive)
		for _, n := range epochs {
			e, err := c.epochs.In(tx).Get(ctx, objectstore.EpochKey(n))
			if err != nil && !store.IsNotFound(err) {
				return err
			}
			switch e.State {
			case objectstore.EpochForming, objectstore.EpochOpen, objectstore.EpochDirty:
				alive[n] = true
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.Ring.Merge(excerpt, func(n uint64) bool { return alive[n] })
}
