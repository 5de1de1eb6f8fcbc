package cluster

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/role/kms/objectstore"
	"strongroom/test/port"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// plain seals nothing: the CA of a test is nobody's.
type plain struct{}

func (plain) Seal(_ string, b []byte) ([]byte, error) { return b, nil }
func (plain) Open(_ string, b []byte) ([]byte, error) { return b, nil }

// bench is a KMS of several nodes in one process. They share one database, which
// is always there; each has a key ring, a disk for it, and a server for others.
type bench struct {
	t     *testing.T
	ca    *pki.CA
	db    *store.DB
	nodes []*node
}

// node is a node that can be killed: what it has then is what is on its disk.
type node struct {
	*bench
	self Member
	disk *keymem.Key // its key ring, as it was saved last
	// before and after are called around each change of the disk; an error of
	// before is one of the disk.
	before func() error
	after  func()

	ring   *keyring.Ring
	c      *Cluster // nil while it does not run
	id     *Node
	server *http.Server
	served chan error
}

func newBench(t *testing.T, nodes int) *bench {
	t.Helper()
	b := &bench{t: t}
	var err error
	if b.ca, err = pki.OpenCA(filepath.Join(t.TempDir(), "pki"), "test", plain{}); err != nil {
		t.Fatal(err)
	}
	if b.db, err = store.Open(t.Context(), store.Config{Dir: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, n := range b.nodes {
			n.kill()
			n.disk.Close()
		}
		if err := b.db.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range nodes {
		n := &node{bench: b, self: Member{
			ID: "00000000-0000-4000-8000-00000000000" + string(rune('a'+i)), Name: string(rune('a' + i)),
			// All have the one database, at the address that it says it has.
			Address: port.For(t), StoreAddress: "127.0.0.1:2380", Voter: true, Format: 1,
		}}
		if i > 0 {
			excerpt, err := b.nodes[0].ring.Excerpt()
			if err != nil {
				t.Fatal(err)
			}
			n.disk = excerpt
			if err := b.nodes[0].c.members.Create(t.Context(), n.self.ID, n.self); err != nil {
				t.Fatal(err)
			}
		}
		b.nodes = append(b.nodes, n)
		n.start()
	}
	return b
}

func (n *node) save(encoded *keymem.Key) error {
	if n.before != nil {
		if err := n.before(); err != nil {
			return err
		}
	}
	next, err := encoded.Clone()
	if err != nil {
		return err
	}
	n.disk.Close()
	n.disk = next
	if n.after != nil {
		n.after()
	}
	return nil
}

// start starts the node from its disk; a node without one makes a new ring.
func (n *node) start() {
	n.t.Helper()
	n.before, n.after = nil, nil
	var err error
	if n.disk == nil {
		n.ring, err = keyring.New(n.save)
	} else {
		var used uint64
		if used, err = objectstore.NewestEpoch(n.t.Context(), n.db); err == nil {
			n.ring, err = keyring.Load(n.disk, used, n.save)
		}
	}
	if err == nil {
		n.id, err = NewNode(n.ca, n.self.ID, []string{"127.0.0.1"})
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.c = New(Config{
		Self: n.self, Node: n.id, CA: n.ca, DB: n.db, Ring: n.ring, Log: slog.New(slog.DiscardHandler),
		Record: func(string, string, string, error) error { return nil },
	})
	if err := n.c.Start(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	server, err := n.c.Server()
	if err != nil {
		n.t.Fatal(err)
	}
	l, err := net.Listen("tcp", n.self.Address)
	if err != nil {
		n.t.Fatal(err)
	}
	n.server, n.served = server.HTTP, make(chan error, 1)
	go func() { n.served <- server.HTTP.ServeTLS(l, "", "") }()
}

// kill ends a node, if it runs.
func (n *node) kill() {
	n.t.Helper()
	if n.c == nil {
		return
	}
	n.server.Close() // and no farewell
	if err := <-n.served; !errors.Is(err, http.ErrServerClosed) {
		n.t.Error(err)
	}
	n.c.Close()
	n.ring.Close()
	n.id.Close()
	n.c = nil
}

// stored returns the epochs that are on a node's disk.
func (n *node) stored() []uint64 {
	n.t.Helper()
	ring, err := keyring.Load(n.disk, 0, func(*keymem.Key) error { return errors.New("not to be changed") })
	if err != nil {
		n.t.Fatal(err)
	}
	defer ring.Close()
	return ring.Epochs()
}

func (b *bench) states() map[uint64]objectstore.Epoch {
	b.t.Helper()
	all, err := objectstore.EpochTable(b.db).Scan(b.t.Context(), store.Range{})
	if err != nil {
		b.t.Fatal(err)
	}
	states := map[uint64]objectstore.Epoch{}
	for _, e := range all {
		n, err := objectstore.EpochNumber(e.Key)
		if err != nil {
			b.t.Fatal(err)
		}
		states[n] = e.Value
	}
	return states
}

// begin begins an epoch at a node, and returns 0 if that fails.
func (n *node) begin(ctx context.Context) uint64 {
	epoch, err := n.c.Begin(ctx)
	if err != nil {
		return 0
	}
	return epoch
}

// inLine brings all nodes in line, has every dirty epoch erased, and checks what
// must hold then: open epochs are on every node, shredded ones on none, there
// are no others, and every node begins a new one.
func (b *bench) inLine(open ...uint64) {
	b.t.Helper()
	ctx := b.t.Context()
	var dirty []uint64
	for n, e := range b.states() {
		if e.State == objectstore.EpochDirty {
			dirty = append(dirty, n)
		}
	}
	slices.Sort(dirty)
	if err := b.nodes[0].c.Erase(ctx, dirty...); err != nil {
		b.t.Fatal(err)
	}
	used := uint64(0)
	for _, n := range b.nodes {
		if err := n.c.CatchUp(ctx); err != nil {
			b.t.Fatal(err)
		}
	}
	for epoch, e := range b.states() {
		used = max(used, epoch)
		want := slices.Contains(open, epoch)
		if (e.State == objectstore.EpochOpen) != want || !want && e.State != objectstore.EpochShredded {
			b.t.Errorf("epoch %d is %s, held by %v; open should be %v", epoch, e.State, e.Holders, open)
		}
		for _, n := range b.nodes {
			if slices.Contains(n.stored(), epoch) != want {
				b.t.Errorf("epoch %d, %s, on the disk of node %s: %v", epoch, e.State, n.self.Name, !want)
			}
		}
	}
	for _, n := range b.nodes {
		epoch, err := n.c.Begin(ctx)
		if err != nil || epoch <= used {
			b.t.Errorf("node %s begins epoch %d behind %d: %v", n.self.Name, epoch, used, err)
		}
		used = epoch
	}
}

var errKilled = errors.New("killed")

// TestBeginKilled kills the node that begins an epoch, or one that is to hold
// it, at each step of bringing it to the others. Whatever was opened is on a
// majority of disks, and what was not is shredded.
func TestBeginKilled(t *testing.T) {
	t.Parallel()
	// The maker's steps: number in the database; ring saved; others have it; open.
	for _, c := range []struct {
		what  string
		arm   func(b *bench, die func())
		opens bool
	}{
		{"the maker, before its ring is saved", func(b *bench, die func()) {
			b.nodes[0].before = func() error { die(); return errKilled }
		}, false},
		{"the maker, when its ring is saved", func(b *bench, die func()) { b.nodes[0].after = die }, false},
		{"the maker, before the first other saves its ring", func(b *bench, die func()) {
			for _, n := range b.nodes[1:] {
				n.before = func() error { die(); return errKilled }
			}
		}, false},
		{"the maker, when another has saved its ring", func(b *bench, die func()) {
			for _, n := range b.nodes[1:] {
				n.after = die
			}
		}, false},
		{"one other, before its ring is saved", func(b *bench, _ func()) {
			b.nodes[1].before = func() error { return errKilled }
		}, true},
		{"one other that does not run", func(b *bench, _ func()) { b.nodes[2].kill() }, true},
		{"both others, before their rings are saved", func(b *bench, _ func()) {
			for _, n := range b.nodes[1:] {
				n.before = func() error { return errKilled }
			}
		}, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, 3)
			first := b.nodes[0].begin(t.Context())
			if first == 0 {
				t.Fatal("no first epoch")
			}
			for _, n := range b.nodes { // it may reach the third later
				if err := n.c.CatchUp(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			c.arm(b, cancel)
			epoch := b.nodes[0].begin(ctx)
			if (epoch != 0) != c.opens {
				t.Errorf("epoch %d was begun", epoch)
			}
			for _, n := range b.nodes {
				n.kill()
			}
			holders := 0
			for _, n := range b.nodes {
				if slices.Contains(n.stored(), epoch) {
					holders++
				}
			}
			if c.opens && holders < 2 {
				t.Errorf("epoch %d is open and on %d disks", epoch, holders)
			}
			for _, n := range b.nodes {
				n.start()
			}
			open := []uint64{first}
			if c.opens {
				open = append(open, epoch)
			}
			b.inLine(open...)
		})
	}
}

// TestEraseKilled kills nodes at each step of erasing a dirty epoch: until all
// have erased its KEK it is not shredded, and then it is on no disk.
func TestEraseKilled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what string
		arm  func(b *bench, die func())
	}{
		{"the one that erases, before its ring is saved", func(b *bench, die func()) {
			b.nodes[0].before = func() error { die(); return errKilled }
		}},
		{"the one that erases, when its ring is saved", func(b *bench, die func()) { b.nodes[0].after = die }},
		{"another, before its ring is saved", func(b *bench, _ func()) {
			b.nodes[1].before = func() error { return errKilled }
		}},
		{"another, when its ring is saved", func(b *bench, die func()) { b.nodes[1].after = die }},
		{"another, which does not run", func(b *bench, _ func()) { b.nodes[2].kill() }},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, 3)
			kept, gone := b.nodes[0].begin(t.Context()), b.nodes[1].begin(t.Context())
			for _, n := range b.nodes {
				if err := n.c.CatchUp(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := objectstore.EpochTable(b.db).Put(t.Context(), objectstore.EpochKey(gone), objectstore.Epoch{State: objectstore.EpochDirty}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			c.arm(b, cancel)
			b.nodes[0].c.Erase(ctx, gone) // it may fail, and is repeated
			for _, n := range b.nodes[1:] {
				if n.c != nil {
					n.c.CatchUp(ctx)
				}
			}
			for _, n := range b.nodes {
				n.kill()
			}
			e := b.states()[gone]
			for _, n := range b.nodes {
				if holds := slices.Contains(n.stored(), gone); holds && !slices.Contains(e.Holders, n.self.ID) && e.State != objectstore.EpochDirty {
					t.Errorf("node %s has the KEK, and nobody knows: %+v", n.self.Name, e)
				}
			}
			if e.State == objectstore.EpochShredded {
				t.Errorf("shredded with a node killed: %+v", e)
			}
			for _, n := range b.nodes {
				n.start()
			}
			b.inLine(kept)
		})
	}
}

// TestRemovedWhileDue removes a node that is away and has erasures due: what it
// holds is released, and it may not come back.
func TestRemovedWhileDue(t *testing.T) {
	t.Parallel()
	b := newBench(t, 3)
	gone := b.nodes[0].begin(t.Context())
	for _, n := range b.nodes {
		if err := n.c.CatchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	away := b.nodes[2]
	away.kill()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := objectstore.EpochTable(b.db).Put(ctx, objectstore.EpochKey(gone), objectstore.Epoch{State: objectstore.EpochDirty}); err != nil {
		t.Fatal(err)
	}
	if err := b.nodes[0].c.Erase(ctx, gone); err != nil {
		t.Fatal(err)
	}
	if err := b.nodes[1].c.CatchUp(ctx); err != nil {
		t.Fatal(err)
	}
	listed, err := b.nodes[0].c.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range listed {
		if due := map[string]int{"c": 1}[m.Name]; m.ErasuresDue != due {
			t.Errorf("node %s has %d erasures due, want %d", m.Name, m.ErasuresDue, due)
		}
	}
	// It has no database of its own that could be removed.
	away.self.StoreAddress = "127.0.0.1:1"
	if err := b.nodes[0].c.members.Put(ctx, away.self.ID, away.self); err != nil {
		t.Fatal(err)
	}
	if err := b.nodes[0].c.Remove(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if e := b.states()[gone]; e.State != objectstore.EpochShredded || len(e.Holders) != 0 {
		t.Errorf("the epoch is %+v", e)
	}
	if !slices.Contains(away.stored(), gone) {
		t.Error("the disk of the node that was away has been changed")
	}
	c := New(Config{Self: away.self, Node: b.nodes[0].id, CA: b.ca, DB: b.db, Ring: b.nodes[0].ring, Log: slog.New(slog.DiscardHandler)})
	if err := c.Start(ctx); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("a node that was removed starts: %v", err)
	}
}

// TestJoinAgain: a machine whose join broke off joins again, in place of what it
// left; nobody takes the place, the name or an address of another member.
func TestJoinAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t, 1)
	a := b.nodes[0]
	token, _, err := a.c.NewToken(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	join := func(m Member) (id string, err error) {
		t.Helper()
		joined, err := Join(t.Context(), a.self.Address, token.String(), m)
		if err != nil {
			return "", err
		}
		if token, _, err = a.c.NewToken(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		return joined.ID, joined.Close()
	}
	x := Member{Name: "x", Address: "127.0.0.1:7001", StoreAddress: "127.0.0.1:7002"}
	first, err := join(x)
	if err != nil {
		t.Fatal(err)
	}
	// An epoch that is erased meanwhile waits for it, and does no more afterwards.
	gone := a.begin(t.Context())
	if err := objectstore.EpochTable(b.db).Put(t.Context(), objectstore.EpochKey(gone), objectstore.Epoch{State: objectstore.EpochDirty}); err != nil {
		t.Fatal(err)
	}
	if err := a.c.Erase(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	if e := b.states()[gone]; !slices.Equal(e.Holders, []string{first}) {
		t.Errorf("the epoch is %+v", e)
	}
	second, err := join(x)
	if err != nil || second == first {
		t.Fatalf("joined again as %s: %v", second, err)
	}
	if e := b.states()[gone]; e.State != objectstore.EpochShredded {
		t.Errorf("the epoch is %+v", e)
	}
	refused := func(what string, m Member) {
		t.Helper()
		if _, err := join(m); errs.KindOf(err) != errs.Exists || errs.HintOf(err) == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
	// Who has no token is told nothing of the members.
	wrong := token
	wrong.Secret[0] ^= 1
	if _, err := Join(t.Context(), a.self.Address, wrong.String(), Member{Name: "y", Address: x.Address, StoreAddress: x.StoreAddress}); errs.KindOf(err) != errs.Denied {
		t.Errorf("without a token: %v", err)
	}
	refused("its name, elsewhere", Member{Name: "x", Address: "127.0.0.1:7003", StoreAddress: "127.0.0.1:7004"})
	refused("its address", Member{Name: "y", Address: x.Address, StoreAddress: "127.0.0.1:7004"})
	refused("its database's address", Member{Name: "y", Address: "127.0.0.1:7003", StoreAddress: x.StoreAddress})
	if _, err := a.c.members.Update(t.Context(), second, func(m *Member) error { m.Voter = true; return nil }); err != nil {
		t.Fatal(err)
	}
	refused("a full member", x)
	all, err := a.c.members.List(t.Context())
	if err != nil || len(all) != 2 {
		t.Errorf("the members are %v, %v", all, err)
	}
}
