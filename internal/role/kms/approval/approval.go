// Package approval keeps what people must approve before a key management server
// does it (docs/spec/kms-approval.md): requests, what approvers decided, and that
// each was used.
//
// Invariants: a request counts for one operation on one object, or one change, by
// one requester with one credential; it is used at most once, in the transaction of what it was for,
// by whichever node; whether it is approved is decided in that transaction by the
// quorum that the group has then, and by what holds of its approvers then: an
// approval counts while its user is enabled and has the password of that time. An
// approver counts once, and whoever asked does not. A [Book] keeps no state of its own and is safe for concurrent use.
package approval

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Operation is what needs approval.
type Operation string

// The operations.
const (
	Destroy   Operation = "Destroy"
	Export    Operation = "Export"
	SetPolicy Operation = "SetPolicy"
	SetQuorum Operation = "SetQuorum"
)

// Want is what somebody wants to do.
type Want struct {
	Group     string `json:"group"`
	Requester string `json:"requester"` // "application:vcenter-1", "user:ann"
	// Credential is the identifier of the one that an application shows: whoever gives
	// it another does not get what was approved. "" for users: what they change is told
	// wholly.
	Credential string    `json:"credential,omitempty"`
	Operation  Operation `json:"operation"`
	// Object is the key's identifier, or the [Change.Digest] of a change.
	Object string `json:"object"`
}

// Change is what a group is to be.
type Change struct {
	Policy *directory.Policy `json:"policy,omitempty"`
	Quorum *directory.Quorum `json:"quorum,omitempty"`
}

// Digest tells changes apart.
func (c Change) Digest() (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// Request is one request for approval.
type Request struct {
	ID string `json:"id"` // 16 hex digits
	Want
	About
	Created   time.Time  `json:"created"`
	Expires   time.Time  `json:"expires"`
	Decisions []Decision `json:"decisions,omitempty"` // at most one of a user
	Used      time.Time  `json:"used,omitzero"`
}

// About is what approvers are told of a request beside what it is for.
type About struct {
	Name    string  `json:"name,omitempty"`    // of the key
	Change  *Change `json:"change,omitempty"`  // of a change
	Address string  `json:"address,omitempty"` // of whoever asked
}

// Decision is what one approver has decided.
type Decision struct {
	User     string    `json:"user"`
	Approved bool      `json:"approved"`
	Reason   string    `json:"reason,omitempty"`
	Time     time.Time `json:"time"`
	// Credential is what [Credential] told of the user then.
	Credential string `json:"credential,omitempty"`
}

// Credential returns, in tx, what tells a user's present credential from former
// ones; "" for a user who may not log in, or not approve for that group, now. It is
// no secret.
type Credential func(ctx context.Context, tx *store.Tx, group, user string) (string, error)

// State is the state of a request.
type State string

// The states.
const (
	Pending  State = "pending"
	Approved State = "approved" // and may be used once
	Denied   State = "denied"
	Used     State = "used"
	Expired  State = "expired"
)

// Approvals returns how many approvals of r count under q, and who has denied it,
// or "".
func (r *Request) Approvals(q directory.Quorum) (count int, denied string) {
	for _, d := range r.Decisions {
		switch {
		case !slices.Contains(q.Approvers, d.User) || r.Requester == userPrefix+d.User:
		case d.Approved:
			count++
		case denied == "":
			denied = d.User
		}
	}
	return count, denied
}

// StateAt returns the state of r under q.
func (r *Request) StateAt(q directory.Quorum, now time.Time) State {
	count, denied := r.Approvals(q)
	switch {
	case !r.Used.IsZero():
		return Used
	case !now.Before(r.Expires):
		return Expired
	case denied != "":
		return Denied
	case q.On() && count >= q.Needed:
		return Approved
	}
	return Pending
}

const (
	// userPrefix is in front of the name of a user who asks.
	userPrefix = "user:"
	idBytes    = 8
	// openMax bounds the requests that one requester has open.
	openMax   = 256
	reasonMax = 256
	nameMax   = 256
	// keepFor is how long a request is kept after it has expired.
	keepFor = 30 * 24 * time.Hour
	// tidyAtOnce bounds the deletions of one transaction.
	tidyAtOnce = 100
)

// ErrNotApproved says that nobody has approved what is wanted, or not enough.
var ErrNotApproved = errors.New("not approved")

// Book is the requests of a KMS. Use [Open].
type Book struct {
	db         *store.DB
	directory  *directory.Directory
	credential Credential
	requests   *store.Table[Request]
	open       *store.Table[open] // by what is wanted
	now        func() time.Time
}

// open points to the request for what is wanted that is not used.
type open struct {
	ID      string    `json:"id"`
	Expires time.Time `json:"expires"`
}

// Open returns the book in db, of groups in dir and of users as credential tells.
func Open(db *store.DB, dir *directory.Directory, credential Credential) *Book {
	return &Book{
		db: db, directory: dir, credential: credential, requests: store.NewTable[Request](db, requestsTable, 1), open: store.NewTable[open](db, openTable, 1),
		now: func() time.Time { return time.Now().UTC() },
	}
}

const (
	requestsTable = "kms-approval"
	openTable     = "kms-approval-open"
)

// Keeps reports whether a table is of this package.
func Keeps(table string) bool { return table == requestsTable || table == openTable }

func requesterPrefix(w Want) string {
	return url.PathEscape(w.Group) + "/" + url.PathEscape(w.Requester) + "/"
}

func keyOf(w Want) string {
	key := requesterPrefix(w) + string(w.Operation) + "/" + url.PathEscape(w.Object)
	if w.Credential != "" {
		key += "/" + url.PathEscape(w.Credential)
	}
	return key
}

// Use uses up the approval of w and returns its id, in tx, which must be the one
// that does what is wanted. If there is none it returns [ErrNotApproved]: then
// nothing may be done, and [Book.Ask] comes next.
func (b *Book) Use(ctx context.Context, tx *store.Tx, w Want) (id string, err error) {
	q, err := b.directory.QuorumIn(ctx, tx, w.Group)
	if err != nil {
		return "", err
	}
	at, err := b.open.In(tx).Get(ctx, keyOf(w))
	if store.IsNotFound(err) {
		return "", ErrNotApproved
	}
	if err != nil {
		return "", err
	}
	stored, r, err := b.request(ctx, tx, at.ID)
	if err != nil {
		return "", err
	}
	now := b.now()
	if r.Want != w || r.StateAt(q, now) != Approved {
		return "", ErrNotApproved
	}
	stored.Used = now
	if err := b.open.In(tx).Delete(ctx, keyOf(w)); err != nil {
		return "", err
	}
	return r.ID, b.requests.In(tx).Put(ctx, r.ID, stored)
}

// Asked is what became of [Book.Ask].
type Asked struct {
	Request
	State    State // Pending, Approved or Denied
	New      bool
	Approved int // approvals that count
	Quorum   directory.Quorum
}

// Ask returns the request for w that is open, or makes one.
func (b *Book) Ask(ctx context.Context, w Want, about About) (Asked, error) {
	about.Name = cut(about.Name, nameMax)
	var out Asked
	err := b.db.Txn(ctx, func(tx *store.Tx) error {
		now := b.now()
		q, err := b.directory.QuorumIn(ctx, tx, w.Group)
		if err != nil {
			return err
		}
		at, err := b.open.In(tx).Get(ctx, keyOf(w))
		if err != nil && !store.IsNotFound(err) {
			return err
		}
		if err == nil && now.Before(at.Expires) {
			_, r, err := b.request(ctx, tx, at.ID)
			out = Asked{Request: r, State: r.StateAt(q, now), Quorum: q}
			out.Approved, _ = r.Approvals(q)
			return err
		}
		if err := b.room(ctx, tx, w, now); err != nil {
			return err
		}
		id := make([]byte, idBytes)
		rand.Read(id)
		r := Request{ID: hex.EncodeToString(id), Want: w, About: about, Created: now, Expires: now.Add(q.Expiry)}
		out = Asked{Request: r, State: r.StateAt(q, now), New: true, Quorum: q}
		if err := b.requests.In(tx).Create(ctx, r.ID, r); err != nil {
			return err
		}
		return b.open.In(tx).Set(keyOf(w), open{ID: r.ID, Expires: r.Expires})
	})
	return out, errs.Wrap(err, "cannot ask for approval")
}

// room drops what has expired of a requester's open requests and refuses one more
// than there may be: an application must not fill the database.
func (b *Book) room(ctx context.Context, tx *store.Tx, w Want, now time.Time) error {
	all, err := b.open.In(tx).Entries(ctx, requesterPrefix(w))
	if err != nil {
		return err
	}
	count := 0
	for _, e := range all {
		if now.Before(e.Value.Expires) {
			count++
		} else if err := b.open.In(tx).Delete(ctx, e.Key); err != nil {
			return err
		}
	}
	if count >= openMax {
		return errs.New(errs.InvalidState, "%s has %d open requests, the limit", w.Requester, count).WithHint("strongroom kms approval ls")
	}
	return nil
}

// Decide notes what a user has decided on a request, in place of what the user
// decided before. It returns the request as it is then.
func (b *Book) Decide(ctx context.Context, id, user string, approve bool, reason string) (Asked, error) {
	if len(reason) > reasonMax {
		return Asked{}, errs.New(errs.Invalid, "a reason takes at most %d bytes", reasonMax)
	}
	var out Asked
	err := b.db.Txn(ctx, func(tx *store.Tx) error {
		now := b.now()
		stored, r, err := b.get(ctx, tx, id)
		if err != nil {
			return err
		}
		q, err := b.directory.QuorumIn(ctx, tx, r.Group)
		if err != nil {
			return err
		}
		switch state := r.StateAt(q, now); {
		case state == Used || state == Expired:
			return errs.New(errs.InvalidState, "it is %s", state)
		case !slices.Contains(q.Approvers, user):
			return errs.New(errs.Denied, "%s is no approver of group %s", user, r.Group)
		case r.Requester == userPrefix+user:
			return errs.New(errs.Denied, "%s has asked for it: others decide", user)
		}
		credential, err := b.credential(ctx, tx, r.Group, user)
		if err != nil {
			return err
		}
		if credential == "" {
			return errs.New(errs.Denied, "%s may not log in, or not approve for group %s, now", user, r.Group)
		}
		d := Decision{User: user, Approved: approve, Reason: reason, Time: now, Credential: credential}
		same := func(o Decision) bool { return o.User == user && o.Approved == approve }
		if slices.ContainsFunc(r.Decisions, same) {
			return errs.New(errs.Exists, "%s has decided so already", user)
		}
		stored.Decisions = append(slices.DeleteFunc(stored.Decisions, func(o Decision) bool { return o.User == user }), d)
		r.Decisions = append(slices.DeleteFunc(r.Decisions, func(o Decision) bool { return o.User == user }), d)
		out = Asked{Request: r, State: r.StateAt(q, now), Quorum: q}
		out.Approved, _ = r.Approvals(q)
		return b.requests.In(tx).Put(ctx, id, stored)
	})
	verb := "deny"
	if approve {
		verb = "approve"
	}
	return out, errs.Wrap(err, "cannot %s request %.32s", verb, id)
}

// request returns a request as it is stored, and one without the approvals that do
// not count now, because of their users' credentials. Denials stay: they harm
// nobody.
func (b *Book) request(ctx context.Context, tx *store.Tx, id string) (stored, counting Request, err error) {
	stored, err = b.requests.In(tx).Get(ctx, id)
	counting = stored
	if err != nil || !stored.Used.IsZero() {
		return stored, counting, err
	}
	counting.Decisions = nil
	for _, d := range stored.Decisions {
		if d.Approved {
			now, err := b.credential(ctx, tx, stored.Group, d.User)
			if err != nil {
				return Request{}, Request{}, err
			}
			if now == "" || now != d.Credential {
				continue
			}
		}
		counting.Decisions = append(counting.Decisions, d)
	}
	return stored, counting, nil
}

func (b *Book) get(ctx context.Context, tx *store.Tx, id string) (stored, counting Request, err error) {
	stored, counting, err = b.request(ctx, tx, id)
	if store.IsNotFound(err) || errors.Is(err, store.ErrInvalidKey) {
		return Request{}, Request{}, errs.New(errs.NotFound, "there is no request %.32q", id).WithHint("strongroom kms approval ls")
	}
	return stored, counting, err
}

// Get returns a request.
func (b *Book) Get(ctx context.Context, id string) (Asked, error) {
	var out Asked
	err := b.db.View(ctx, func(tx *store.Tx) error {
		_, r, err := b.get(ctx, tx, id)
		if err != nil {
			return err
		}
		q, err := b.directory.QuorumIn(ctx, tx, r.Group)
		out = Asked{Request: r, State: r.StateAt(q, b.now()), Quorum: q}
		out.Approved, _ = r.Approvals(q)
		return err
	})
	return out, err
}

// List returns the requests, the latest first: those that are open, or all that
// are kept.
func (b *Book) List(ctx context.Context, all bool) ([]Asked, error) {
	var out []Asked
	err := b.db.View(ctx, func(tx *store.Tx) error {
		out = nil
		quorums, now := map[string]directory.Quorum{}, b.now()
		requests, err := b.requests.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, stored := range requests {
			_, r, err := b.request(ctx, tx, stored.ID)
			if err != nil {
				return err
			}
			q, ok := quorums[r.Group]
			if !ok {
				q, err = b.directory.QuorumIn(ctx, tx, r.Group)
				if errs.KindOf(err) == errs.NotFound {
					continue // it was deleted a moment ago
				}
				if err != nil {
					return err
				}
				quorums[r.Group] = q
			}
			a := Asked{Request: r, State: r.StateAt(q, now), Quorum: q}
			a.Approved, _ = r.Approvals(q)
			if all || a.State != Used && a.State != Expired {
				out = append(out, a)
			}
		}
		return nil
	})
	slices.SortFunc(out, func(x, y Asked) int { return y.Created.Compare(x.Created) })
	return out, errs.Wrap(err, "cannot list requests for approval")
}

// Tidy forgets requests that have expired long ago. What became of them is in the
// audit log.
func (b *Book) Tidy(ctx context.Context) error {
	for {
		more := false
		err := b.db.Txn(ctx, func(tx *store.Tx) error {
			more = false
			now, dropped := b.now(), 0
			entries, err := b.open.In(tx).Entries(ctx, "")
			if err != nil {
				return err
			}
			for _, e := range entries {
				if now.Before(e.Value.Expires) || dropped == tidyAtOnce {
					continue
				}
				dropped++
				if err := b.open.In(tx).Delete(ctx, e.Key); err != nil {
					return err
				}
			}
			requests, err := b.requests.In(tx).List(ctx, "")
			if err != nil {
				return err
			}
			for _, r := range requests {
				if now.Before(r.Expires.Add(keepFor)) || dropped == tidyAtOnce {
					continue
				}
				dropped++
				if err := b.requests.In(tx).Delete(ctx, r.ID); err != nil {
					return err
				}
			}
			more = dropped == tidyAtOnce
			return nil
		})
		if err != nil || !more {
			return errs.Wrap(err, "cannot tidy up requests for approval")
		}
	}
}

// Forget drops the requests of a group that was deleted, and those that an
// application which was had open. An empty requester is any. What became of them is in
// the audit log.
func (b *Book) Forget(ctx context.Context, group, requester string) error {
	for {
		more := false
		err := b.db.Txn(ctx, func(tx *store.Tx) error {
			more = false
			dropped := 0
			prefix := url.PathEscape(group) + "/"
			if requester != "" {
				prefix = requesterPrefix(Want{Group: group, Requester: requester})
			}
			entries, err := b.open.In(tx).Entries(ctx, prefix)
			if err != nil {
				return err
			}
			for _, e := range entries[:min(len(entries), tidyAtOnce)] {
				dropped++
				if err := b.open.In(tx).Delete(ctx, e.Key); err != nil {
					return err
				}
			}
			requests, err := b.requests.In(tx).List(ctx, "")
			if err != nil {
				return err
			}
			for _, r := range requests {
				if r.Group != group || requester != "" || dropped == tidyAtOnce {
					continue
				}
				dropped++
				if err := b.requests.In(tx).Delete(ctx, r.ID); err != nil {
					return err
				}
			}
			more = dropped == tidyAtOnce
			return nil
		})
		if err != nil || !more {
			return errs.Wrap(err, "cannot drop requests for approval")
		}
	}
}

// CheckNone refuses a group that has requests, in tx.
func (b *Book) CheckNone(ctx context.Context, tx *store.Tx, group string) error {
	requests, err := b.requests.In(tx).List(ctx, "")
	if err == nil && slices.ContainsFunc(requests, func(r Request) bool { return r.Group == group }) {
		err = errs.New(errs.InvalidState, "it has requests for approval")
	}
	return err
}

// cut makes s valid UTF-8 of at most limit bytes.
func cut(s string, limit int) string {
	return strings.ToValidUTF8(s[:min(len(s), limit)], "")
}
