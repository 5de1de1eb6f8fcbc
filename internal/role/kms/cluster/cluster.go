// Package cluster makes one KMS of several nodes: who is a member, and how the
// KEKs of epochs come to all of them and go from all of them
// (docs/spec/kms-cluster.md, docs/adr/0013-kms-nodes.md).
//
// The nodes' databases are one etcd. It never has a KEK: those are in each node's
// sealed vault, and travel between nodes in key parcels over mutual TLS, sealed
// to a key that is made for the one call.
//
// Invariants: an epoch is open only when a majority of the members has its KEK,
// durably; an epoch is shredded only when every member has erased its KEK; a node
// that was away erases, before it serves, what it should have erased. A [Cluster]
// is safe for concurrent use.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/role/kms/objectstore"
)

const (
	// callTimeout bounds one call to another member.
	callTimeout = 5 * time.Second
	// promoteEvery is how often a new member asks for its say.
	promoteEvery = 100 * time.Millisecond
	// lookEvery is how often a node looks whether something was left undone.
	lookEvery = 5 * time.Second
	// batch is how many epochs one transaction changes.
	batch = 64
)

// Member is a node as the database knows it.
type Member struct {
	ID           string    `json:"id"`
	Name         string    `json:"name"`
	Address      string    `json:"address"`      // of its [Cluster.Server], "host:port"
	StoreAddress string    `json:"storeAddress"` // of its database
	Voter        bool      `json:"voter"`        // its database has a say
	Joined       time.Time `json:"joined"`
	// Release is what it runs, and Format the newest format of the database that
	// this knows; both are zero until it has started once.
	Release string `json:"release,omitempty"`
	Format  int    `json:"format,omitempty"`
}

// Config is what a node needs to be one of several.
type Config struct {
	Self Member // ID, Name, addresses, Release and Format
	Node *Node
	CA   *pki.CA
	DB   *store.DB
	Ring *keyring.Ring
	Log  *slog.Logger
	// Record puts what members did on record, durably, and what [guard.Anonymous] was
	// refused, so far as that fills no disk. Objects are members.
	Record func(actor, action, object string, err error) error
}

// Cluster is a node's part in a KMS of several. It must be closed.
type Cluster struct {
	Config
	members *store.Table[Member]
	epochs  *store.Table[objectstore.Epoch]
	joins   *pki.Joins
	peers   peers
	calls   sync.WaitGroup // calls that outlive who began them

	begin   sync.Mutex // guards forming: one epoch is brought to others at a time
	forming uint64     // begun here and not open yet; 0: none

	// ring serialises what enters and leaves the ring with what the database says
	// of it, so that an epoch that was erased does not come back.
	ring sync.Mutex
}

var _ objectstore.Keeper = (*Cluster)(nil)

// New returns the node's part. [Cluster.Start] comes next.
func New(cfg Config) *Cluster {
	return &Cluster{
		Config: cfg, members: store.NewTable[Member](cfg.DB, "kms-member", 1), epochs: objectstore.EpochTable(cfg.DB),
		joins: pki.NewJoins(cfg.DB), peers: peers{node: cfg.Node},
	}
}

// Close waits for calls that are under way.
func (c *Cluster) Close() error {
	c.calls.Wait()
	c.peers.close()
	return nil
}

// Start makes the node a member, if it is not, and brings its key ring in line
// with the database. Only then may the node serve.
func (c *Cluster) Start(ctx context.Context) error {
	if err := c.promote(ctx); err != nil {
		return errs.Wrap(err, "cannot become a full member")
	}
	c.Log.LogAttrs(ctx, slog.LevelInfo, "the node's database has its say")
	if err := c.found(ctx); err != nil {
		return errs.Wrap(err, "cannot make the first member")
	}
	if err := c.register(ctx); err != nil {
		return err
	}
	if err := c.raise(ctx); err != nil {
		return err
	}
	c.Log.LogAttrs(ctx, slog.LevelInfo, "the other nodes know this one as a member")
	if err := c.abandon(ctx, c.Self.ID); err != nil {
		return err
	}
	return errs.Wrap(c.CatchUp(ctx), "cannot bring the key ring in line")
}

// promote waits until a new member has all data and its say.
func (c *Cluster) promote(ctx context.Context) error {
	for c.DB.Learns() {
		if err := c.DB.Promote(ctx); err != nil {
			c.Log.LogAttrs(ctx, slog.LevelDebug, "not a full member yet", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(promoteEvery):
		}
	}
	return nil
}

// found makes the first node of a KMS its first member. From then on the
// database knows every epoch.
func (c *Cluster) found(ctx context.Context) error {
	all, err := c.members.Scan(ctx, store.Range{Limit: 1})
	if err != nil || len(all) > 0 {
		return err
	}
	for some := range slices.Chunk(c.Ring.Epochs(), batch) {
		err := c.DB.Txn(ctx, func(tx *store.Tx) error {
			for _, n := range some {
				err := c.epochs.In(tx).Create(ctx, objectstore.EpochKey(n), objectstore.Epoch{State: objectstore.EpochOpen})
				if err != nil && !errors.Is(err, store.ErrExists) {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	self := c.Self
	self.Joined = time.Now().UTC()
	err = c.members.Put(ctx, self.ID, self)
	return err
}

// register tells the others where this node is now.
func (c *Cluster) register(ctx context.Context) error {
	var before Member
	err := c.DB.Txn(ctx, func(tx *store.Tx) (err error) {
		if err := tx.Admit(ctx, c.Self.Format); err != nil {
			return err
		}
		if before, err = c.members.In(tx).Get(ctx, c.Self.ID); err != nil {
			return err
		}
		now := before
		now.Name, now.Address, now.StoreAddress, now.Voter = c.Self.Name, c.Self.Address, c.Self.StoreAddress, true
		now.Release, now.Format = c.Self.Release, c.Self.Format
		if now == before {
			return nil
		}
		all, err := c.members.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		if err := free(all, now); err != nil {
			return err
		}
		return c.members.In(tx).Put(ctx, now.ID, now)
	})
	if store.IsNotFound(err) {
		return errs.New(errs.InvalidState, "this node was removed from the KMS").
			WithHint("erase its data folder; to have it back: strongroom kms join")
	}
	if err != nil {
		return errs.Wrap(err, "cannot register this node")
	}
	members, err := c.DB.Members(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(members, func(m store.Member) bool { return m.Address == c.Self.StoreAddress }) {
		return nil
	}
	return errs.Wrap(c.DB.MoveTo(ctx, c.Self.StoreAddress), "cannot register the database's address")
}

// raise raises the database's format to the newest that all members know. One that
// starts with an older release meanwhile has told so before, or is not admitted.
func (c *Cluster) raise(ctx context.Context) error {
	err := c.DB.Txn(ctx, func(tx *store.Tx) error {
		ids, err := c.holders(ctx, tx)
		if err != nil {
			return err
		}
		format := c.Self.Format
		for _, id := range ids {
			m, err := c.members.In(tx).Get(ctx, id)
			if err != nil {
				return err
			}
			format = min(format, max(m.Format, 1))
		}
		return tx.Raise(ctx, store.Format{Version: format, Release: c.Self.Release})
	})
	return errs.Wrap(err, "cannot raise the database's format")
}

// free returns an error unless m can be a member beside all: what the database and
// people know a node by is its own.
func free(all []Member, m Member) error {
	for _, o := range all {
		switch {
		case o.ID == m.ID:
		case o.Name == m.Name:
			return errs.New(errs.Exists, "there is a node %s already", m.Name).WithHint("strongroom kms member rm %s, or choose another name", m.Name)
		case o.Address == m.Address:
			return errs.New(errs.Exists, "node %s has the address %s", o.Name, m.Address).WithHint("give this node an advertise of its own in [cluster]")
		case o.StoreAddress == m.StoreAddress:
			return errs.New(errs.Exists, "node %s has the address %s", o.Name, m.StoreAddress).WithHint("give this node a store_advertise of its own in [cluster]")
		}
	}
	return nil
}

// leftBy reports whether m began to join before, and left it at that: o never had
// a say, nor an epoch's KEK.
func (o Member) leftBy(m Member) bool {
	return !o.Voter && o.Name == m.Name && o.Address == m.Address && o.StoreAddress == m.StoreAddress
}

// Run keeps the key ring in line until ctx ends. shred has epochs shredded that
// another node should have.
func (c *Cluster) Run(ctx context.Context, shred func()) error {
	pending := make(chan struct{}, 1)
	poke := func() {
		select {
		case pending <- struct{}{}:
		default:
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { c.watch(ctx, poke) })
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var late overdue
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.DB.Stopped():
			return errs.New(errs.InvalidState, "the node's database ended: the other nodes have removed this member").
				WithHint("erase its data folder; to have it back: strongroom kms join")
		case <-pending:
		case <-tick.C:
			if c.DB.Leads() {
				shred()
				c.warn(ctx, &late)
				if err := c.raise(ctx); err != nil && ctx.Err() == nil { // an older node may have been removed
					c.Log.LogAttrs(ctx, slog.LevelWarn, "format not raised", slog.Any("err", err))
				}
			}
		}
		if err := c.CatchUp(ctx); err != nil && ctx.Err() == nil {
			c.Log.LogAttrs(ctx, slog.LevelWarn, "key ring not brought in line", slog.Any("err", err))
		}
	}
}

// watch calls poke when there is something to erase or to fetch.
func (c *Cluster) watch(ctx context.Context, poke func()) {
	for ctx.Err() == nil {
		err := c.epochs.Watch(ctx, "", 0, func(change store.Change[objectstore.Epoch]) error {
			if change.Op != store.Put {
				return nil
			}
			n, err := objectstore.EpochNumber(change.Key)
			if err == nil && c.due(n, change.Value) {
				poke()
			}
			return err
		})
		if ctx.Err() == nil {
			c.Log.LogAttrs(ctx, slog.LevelWarn, "epochs not watched", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// Listed is a member with what it is doing.
type Listed struct {
	Member
	State       string // "leader", "member" or "joining"
	ErasuresDue int    // KEKs that it has yet to erase
	Self        bool
}

// List returns the members, by name.
func (c *Cluster) List(ctx context.Context) ([]Listed, error) {
	var out []Listed
	err := c.DB.View(ctx, func(tx *store.Tx) error {
		out = nil
		all, err := c.members.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		due := map[string]int{}
		err = c.epochs.In(tx).Scan(ctx, "", func(e store.Entry[objectstore.Epoch]) bool {
			for _, id := range e.Value.Holders {
				due[id]++
			}
			return true
		})
		for _, m := range all {
			out = append(out, Listed{Member: m, State: "joining", ErasuresDue: due[m.ID], Self: m.ID == c.Self.ID})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	databases, err := c.DB.Members(ctx)
	if err != nil {
		return nil, err
	}
	for i, m := range out {
		for _, d := range databases {
			if d.Address == m.StoreAddress && !d.Learner && m.Voter {
				out[i].State = "member"
				if d.Leader {
					out[i].State = "leader"
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b Listed) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Remove removes the node of that name for good. It counts for nothing from then
// on; what is on its disk is its administrator's to erase. Repeating it after an
// error is safe.
func (c *Cluster) Remove(ctx context.Context, name string) error {
	all, err := c.members.Scan(ctx, store.Range{})
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(e store.Entry[Member]) bool { return e.Value.Name == name })
	if at < 0 {
		return errs.New(errs.NotFound, "there is no node %.64q", name).WithHint("strongroom kms member ls")
	}
	m := all[at].Value
	if m.ID == c.Self.ID {
		return errs.New(errs.InvalidState, "a node does not remove itself").WithHint("run this on another node of the KMS")
	}
	return c.remove(ctx, m)
}

func (c *Cluster) remove(ctx context.Context, m Member) error {
	if err := c.DB.RemoveMember(ctx, m.StoreAddress); err != nil {
		return errs.Wrap(err, "cannot remove node %s", m.Name)
	}
	if err := c.abandon(ctx, m.ID); err != nil {
		return err
	}
	if err := c.members.Delete(ctx, m.ID); err != nil && !store.IsNotFound(err) {
		return err
	}
	// Nobody can name it a holder any more: see Erase.
	return errs.Wrap(c.erased(ctx, m.ID, nil), "cannot release what node %s had to erase", m.Name)
}

// byID returns a member or a NotFound error.
func (c *Cluster) byID(ctx context.Context, id string) (Member, error) {
	m, err := c.members.Get(ctx, id)
	if store.IsNotFound(err) {
		return Member{}, errs.New(errs.NotFound, "there is no node with id %.64q", id)
	}
	return m, err
}

// others returns all members but this one.
func (c *Cluster) others(ctx context.Context) ([]Member, error) {
	all, err := c.members.Scan(ctx, store.Range{})
	if err != nil {
		return nil, err
	}
	var out []Member
	for _, e := range all {
		if e.Value.ID != c.Self.ID {
			out = append(out, e.Value)
		}
	}
	return out, nil
}

// NewToken makes a token with which one machine can become a node within life.
func (c *Cluster) NewToken(ctx context.Context, life time.Duration) (pki.JoinToken, time.Time, error) {
	return c.joins.Create(ctx, c.Node.cluster, life, pki.FingerprintOf(c.CA.Certificate()))
}

// String names a member in messages.
func (m Member) String() string { return fmt.Sprintf("%s (%s)", m.Name, m.Address) }
