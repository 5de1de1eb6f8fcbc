package directory

import (
	"context"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

// Allow is asked before a group is changed, in the transaction that changes it,
// with the group as it is; its error refuses the change. It may be called more
// than once and must have no effect but on the transaction. A nil Allow lets it be.
type Allow func(context.Context, *store.Tx, Group) error

// SetQuorum gives a group another quorum, or with the zero Quorum none, if allow
// lets it. Whether its approvers are users is allow's to check.
func (d *Directory) SetQuorum(ctx context.Context, group string, q Quorum, allow Allow) error {
	if err := checkQuorum(q); err != nil {
		return errs.Wrap(err, "cannot change group %.64s", group)
	}
	return d.changeGroupIf(ctx, group, allow, func(g *Group) { g.Quorum = q })
}

func checkQuorum(q Quorum) error {
	if !q.On() {
		if q.Needed < 0 || len(q.Approvers) > 0 || q.Destroy || q.Export || q.Expiry != 0 {
			return errs.New(errs.Invalid, "a quorum needs the approval of at least one")
		}
		return nil
	}
	sorted := slices.Sorted(slices.Values(q.Approvers))
	switch {
	case len(q.Approvers) > approverMax:
		return errs.New(errs.Invalid, "a quorum has at most %d approvers", approverMax)
	case len(slices.Compact(sorted)) != len(q.Approvers):
		return errs.New(errs.Invalid, "an approver is named twice")
	case q.Needed > len(q.Approvers):
		return errs.New(errs.Invalid, "%d approvals are needed and there are %d approvers", q.Needed, len(q.Approvers))
	case q.Expiry < ExpiryMin || q.Expiry > ExpiryMax || q.Expiry%time.Second != 0:
		return errs.New(errs.Invalid, "requests for approval expire after %v: it is whole seconds, from %v to %v", q.Expiry, ExpiryMin, ExpiryMax)
	}
	return nil
}

// QuorumIn returns a group's quorum as tx sees it, which depends on it from then
// on.
func (d *Directory) QuorumIn(ctx context.Context, tx *store.Tx, group string) (Quorum, error) {
	g, err := d.groups.In(tx).Get(ctx, group)
	if store.IsNotFound(err) {
		return Quorum{}, noGroup(group)
	}
	return g.Quorum, err
}

// CheckNoApprover refuses a user whom a quorum names. It is part of tx.
func (d *Directory) CheckNoApprover(ctx context.Context, tx *store.Tx, user string) error {
	groups, err := d.groups.In(tx).List(ctx, "")
	if err != nil {
		return err
	}
	for _, g := range groups {
		if slices.Contains(g.Quorum.Approvers, user) {
			return errs.New(errs.InvalidState, "%s is an approver of group %s", user, g.Name).
				WithHint("change the quorum first: strongroom kms group quorum %s ...", g.Name)
		}
	}
	return nil
}
