package approval

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bench is a book of a group g with the approvers ann, bob and eve, of whom two
// are needed.
type bench struct {
	*Book
	t     *testing.T
	now   time.Time
	users map[string]string // their credentials; those who are not in it have one, too
}

var two = directory.Quorum{Approvers: []string{"ann", "bob", "eve"}, Needed: 2, Destroy: true, Expiry: time.Hour}

func newBench(t *testing.T) *bench {
	t.Helper()
	db, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(t.TempDir(), "db"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	dir, err := directory.Open(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, now: time.Now().UTC(), users: map[string]string{}}
	b.Book = Open(db, dir, func(_ context.Context, _ *store.Tx, _, user string) (string, error) {
		if c, ok := b.users[user]; ok {
			return c, nil
		}
		return "first", nil
	})
	b.Book.now = func() time.Time { return b.now }
	b.must(dir.CreateGroup(t.Context(), directory.Group{Name: "g"}))
	b.quorum(two)
	return b
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) quorum(q directory.Quorum) {
	b.t.Helper()
	b.must(b.directory.SetQuorum(b.t.Context(), "g", q, nil))
}

func (b *bench) wantKind(what string, err error, kind errs.Kind) {
	b.t.Helper()
	if errs.KindOf(err) != kind {
		b.t.Errorf("%s: %v, want kind %v", what, err, kind)
	}
}

// use uses w's approval up in a transaction of its own.
func (b *bench) use(w Want) error {
	return b.db.Txn(b.t.Context(), func(tx *store.Tx) error {
		_, err := b.Use(b.t.Context(), tx, w)
		return err
	})
}

func (b *bench) ask(w Want) Asked {
	b.t.Helper()
	a, err := b.Ask(b.t.Context(), w, About{})
	b.must(err)
	return a
}

func (b *bench) decide(id, user string, approve bool, want State) {
	b.t.Helper()
	a, err := b.Decide(b.t.Context(), id, user, approve, "")
	b.must(err)
	if a.State != want {
		b.t.Errorf("after %s: %s, want %s", user, a.State, want)
	}
}

func (b *bench) notApproved(what string, w Want) {
	b.t.Helper()
	if err := b.use(w); !errors.Is(err, ErrNotApproved) {
		b.t.Errorf("%s: %v", what, err)
	}
}

func want(object string) Want {
	return Want{Group: "g", Requester: "application:a", Operation: Destroy, Object: object}
}

// TestLife is the life of a request: asked for again and again, approved by one
// and another, used once.
func TestLife(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := want("k")
	b.notApproved("before it was asked for", w)
	first := b.ask(w)
	if again := b.ask(w); !first.New || again.New || again.ID != first.ID || again.State != Pending {
		t.Errorf("asked twice: %+v, %+v", first, again)
	}
	b.decide(first.ID, "ann", true, Pending)
	_, err := b.Decide(t.Context(), first.ID, "ann", true, "")
	b.wantKind("approved twice by one", err, errs.Exists)
	_, err = b.Decide(t.Context(), first.ID, "mallory", true, "")
	b.wantKind("approved by a stranger", err, errs.Denied)
	b.notApproved("with one of two", w)
	b.decide(first.ID, "bob", true, Approved)
	for what, other := range map[string]Want{
		"another key":         {Group: "g", Requester: w.Requester, Operation: Destroy, Object: "l"},
		"another operation":   {Group: "g", Requester: w.Requester, Operation: Export, Object: "k"},
		"another application": {Group: "g", Requester: "application:b", Operation: Destroy, Object: "k"},
	} {
		b.notApproved(what, other)
	}
	b.must(b.use(w))
	b.notApproved("used twice", w)
	_, err = b.Decide(t.Context(), first.ID, "eve", true, "")
	b.wantKind("approved when it is used", err, errs.InvalidState)
	if next := b.ask(w); !next.New || next.ID == first.ID {
		t.Error("what was used is asked for under the same request")
	}
	open, err := b.List(t.Context(), false)
	b.must(err)
	all, err := b.List(t.Context(), true)
	b.must(err)
	if len(open) != 1 || len(all) != 2 {
		t.Errorf("%d requests are open of %d", len(open), len(all))
	}
	_, err = b.Get(t.Context(), "nonsense")
	b.wantKind("no such request", err, errs.NotFound)
	_, err = b.Decide(t.Context(), first.ID, "ann", false, strings.Repeat("x", reasonMax+1))
	b.wantKind("a long reason", err, errs.Invalid)
}

// TestTransactionThatFails keeps the approval.
func TestTransactionThatFails(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w, broken := want("k"), errors.New("broken")
	id := b.ask(w).ID
	b.decide(id, "ann", true, Pending)
	b.decide(id, "eve", true, Approved)
	err := b.db.Txn(t.Context(), func(tx *store.Tx) error {
		if _, err := b.Use(t.Context(), tx, w); err != nil {
			return err
		}
		return broken
	})
	if !errors.Is(err, broken) {
		t.Fatal(err)
	}
	b.must(b.use(w))
}

// TestDenied: one denial stands against any number of approvals, until it is
// taken back.
func TestDenied(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := want("k")
	id := b.ask(w).ID
	b.decide(id, "ann", true, Pending)
	b.decide(id, "bob", true, Approved)
	b.decide(id, "eve", false, Denied)
	b.notApproved("denied", w)
	if a := b.ask(w); a.New || a.State != Denied {
		t.Errorf("asked for what was denied: %+v", a)
	}
	b.decide(id, "eve", true, Approved)
	b.decide(id, "ann", false, Denied) // taken back
	b.decide(id, "ann", true, Approved)
	b.must(b.use(w))
}

// TestOwnApproval: whoever asks does not count.
func TestOwnApproval(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	change := Change{Quorum: &directory.Quorum{}}
	digest, err := change.Digest()
	b.must(err)
	w := Want{Group: "g", Requester: "user:ann", Operation: SetQuorum, Object: digest}
	id := b.ask(w).ID
	_, err = b.Decide(t.Context(), id, "ann", true, "")
	b.wantKind("one's own request", err, errs.Denied)
	b.decide(id, "bob", true, Pending)
	b.notApproved("one other", w)
	b.decide(id, "eve", true, Approved)
	b.must(b.use(w))
}

// TestQuorumOfTheMoment: what counts is the quorum at the time of use.
func TestQuorumOfTheMoment(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := want("k")
	id := b.ask(w).ID
	b.decide(id, "ann", true, Pending)
	b.decide(id, "bob", true, Approved)
	three := two
	three.Needed = 3
	b.quorum(three)
	b.notApproved("more are needed now", w)
	others := two
	others.Approvers = []string{"ann", "eve", "zoe"}
	b.quorum(others)
	b.notApproved("one is no approver any more", w)
	b.decide(id, "zoe", true, Approved)
	b.must(b.use(w))
	id = b.ask(w).ID
	b.quorum(directory.Quorum{})
	_, err := b.Decide(t.Context(), id, "ann", true, "")
	b.wantKind("there is no quorum", err, errs.Denied)
	b.notApproved("there is no quorum", w)
}

func TestExpiry(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := want("k")
	id := b.ask(w).ID
	b.decide(id, "ann", true, Pending)
	b.decide(id, "bob", true, Approved)
	b.now = b.now.Add(two.Expiry)
	b.notApproved("expired", w)
	_, err := b.Decide(t.Context(), id, "eve", true, "")
	b.wantKind("expired", err, errs.InvalidState)
	if next := b.ask(w); !next.New || next.State != Pending {
		t.Errorf("asked after it has expired: %+v", next)
	}
	// Forgotten later, what is younger is not.
	b.now = b.now.Add(keepFor - time.Second)
	b.must(b.Tidy(t.Context()))
	if _, err := b.Get(t.Context(), id); err != nil {
		t.Error(err)
	}
	b.now = b.now.Add(time.Second)
	b.must(b.Tidy(t.Context()))
	_, err = b.Get(t.Context(), id)
	b.wantKind("expired long ago", err, errs.NotFound)
	all, err := b.List(t.Context(), true)
	b.must(err)
	if len(all) != 1 || all[0].State != Expired {
		t.Errorf("left: %+v", all)
	}
}

// TestMany: one requester does not fill the database, nor keep others from
// asking.
func TestMany(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for i := range openMax {
		b.ask(want(fmt.Sprint(i)))
	}
	_, err := b.Ask(t.Context(), want("one more"), About{})
	b.wantKind("one more", err, errs.InvalidState)
	other := want("one more")
	other.Requester = "application:b"
	b.ask(other)
	b.ask(want("0")) // is there already
	b.now = b.now.Add(two.Expiry)
	b.ask(want("one more")) // the others have expired
	b.now = b.now.Add(2 * keepFor)
	b.must(b.Tidy(t.Context()))
	all, err := b.List(t.Context(), true)
	b.must(err)
	if len(all) != 0 {
		t.Errorf("%d requests are left", len(all))
	}
}

// TestUsedOnce has an approval used at many places at once.
func TestUsedOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := want("k")
	id := b.ask(w).ID
	b.decide(id, "ann", true, Pending)
	b.decide(id, "bob", true, Approved)
	other := Open(b.db, b.directory, b.credential) // as of another node
	var used atomic.Int32
	var all sync.WaitGroup
	for i := range 16 {
		book := b.Book
		if i%2 == 0 {
			book = other
		}
		all.Go(func() {
			err := book.db.Txn(context.Background(), func(tx *store.Tx) error {
				_, err := book.Use(context.Background(), tx, w)
				return err
			})
			if err == nil {
				used.Add(1)
			} else if !errors.Is(err, ErrNotApproved) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if used.Load() != 1 {
		t.Errorf("used %d times", used.Load())
	}
}

// TestAskedOnce has many ask at once: there is one request.
func TestAskedOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var made atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			a, err := b.Ask(context.Background(), want("k"), About{})
			if err != nil {
				t.Error(err)
			} else if a.New {
				made.Add(1)
			}
		})
	}
	all.Wait()
	if made.Load() != 1 {
		t.Errorf("%d requests were made", made.Load())
	}
}

// TestCredentials: an approval counts while its user is enabled and has the
// password with which it was given; a denial stays.
func TestCredentials(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := Want{Group: "g", Requester: "application:a", Operation: Destroy, Object: "1"}
	asked, err := b.Ask(t.Context(), w, About{})
	b.must(err)
	decide := func(user string, approve bool) {
		t.Helper()
		_, err := b.Decide(t.Context(), asked.ID, user, approve, "")
		b.must(err)
	}
	want := func(what string, state State, approved int) {
		t.Helper()
		got, err := b.Get(t.Context(), asked.ID)
		if err != nil || got.State != state || got.Approved != approved {
			t.Errorf("%s: %s, %d approvals, %v; want %s, %d", what, got.State, got.Approved, err, state, approved)
		}
		list, err := b.List(t.Context(), false)
		if err != nil || len(list) != 1 || list[0].State != state {
			t.Errorf("%s: listed: %+v, %v", what, list, err)
		}
		again, err := b.Ask(t.Context(), w, About{})
		if err != nil || again.ID != asked.ID || again.State != state {
			t.Errorf("%s: asked again: %+v, %v", what, again, err)
		}
	}
	decide("ann", true)
	decide("bob", true)
	want("both", Approved, 2)
	b.users["ann"] = "second"
	want("ann has another password", Pending, 1)
	if err := b.use(w); !errors.Is(err, ErrNotApproved) {
		t.Errorf("used: %v", err)
	}
	b.users["bob"] = ""
	want("bob is disabled", Pending, 0)
	_, err = b.Decide(t.Context(), asked.ID, "bob", true, "")
	b.wantKind("bob approves", err, errs.Denied)
	decide("ann", true) // again
	b.users["bob"] = "first"
	want("bob is enabled again", Approved, 2)
	decide("eve", false)
	b.users["eve"] = ""
	want("eve denied it, and is disabled", Denied, 2)
	b.users["eve"] = "second"
	decide("eve", true)
	want("eve approves", Approved, 3)
	b.must(b.use(w))
	b.users["ann"] = "third"
	used, err := b.Get(t.Context(), asked.ID)
	if err != nil || used.State != Used || len(used.Decisions) != 3 {
		t.Errorf("used: %+v, %v", used, err)
	}
}
