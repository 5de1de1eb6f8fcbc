package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/control/audit"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/role/kms/approval"
	"strongroom/internal/role/kms/objectstore"
)

// tidyApprovalsEvery is the time between two looks for requests for approval that
// have expired long ago.
const tidyApprovalsEvery = time.Hour

// approvals are the [kmipserver.Approvals] of an application.
type approvals struct {
	k   *KMS
	who directory.Proven // as it was when the request came
}

// approvalsOf returns nil if nobody must approve what an application asks for.
func (k *KMS) approvalsOf(who directory.Proven) kmipserver.Approvals {
	if !who.Group.Quorum.On() {
		return nil
	}
	return &approvals{k: k, who: who}
}

// Needed implements [kmipserver.Approvals].
func (a *approvals) Needed(op kmip.Operation) bool {
	switch op {
	case kmip.OperationDestroy:
		return a.who.Group.Quorum.Destroy
	case kmip.OperationGet:
		return a.who.Group.Quorum.Export
	}
	return false
}

func (a *approvals) want(op kmip.Operation, o *kmipserver.Object) approval.Want {
	w := approval.Want{
		Group: a.who.Group.Name, Requester: "application:" + a.who.Application.Name, Credential: a.who.Credential, Operation: approval.Export, Object: o.ID,
	}
	if op == kmip.OperationDestroy {
		w.Operation = approval.Destroy
	}
	return w
}

// Use implements [kmipserver.Approvals].
func (a *approvals) Use(ctx context.Context, tx kmipserver.Tx, op kmip.Operation, o *kmipserver.Object) (string, error) {
	id, err := a.k.approvals.Use(ctx, objectstore.TxOf(tx), a.want(op, o))
	if errors.Is(err, approval.ErrNotApproved) {
		err = kmipserver.ErrNotApproved
	}
	return id, err
}

// Ask implements [kmipserver.Approvals]. KMIP 1.4 has no reason of its own for
// what waits for people: it is Permission Denied, with a message.
func (a *approvals) Ask(ctx context.Context, op kmip.Operation, o *kmipserver.Object) error {
	asked, err := a.k.ask(ctx, a.want(op, o), approval.About{Name: nameOf(o)})
	if told := (*errs.Error)(nil); errors.As(err, &told) && told.Kind == errs.InvalidState {
		return &kmipserver.Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: err.Error(), Cause: causeApproval + "too many requests"}
	}
	if err != nil || asked.State == approval.Approved {
		return err
	}
	return &kmipserver.Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: refusal(asked), Cause: causeApproval + asked.ID}
}

// nameOf returns the first Name of an object, for people.
func nameOf(o *kmipserver.Object) string {
	for _, a := range o.Attributes {
		if name, ok := a.AttributeValue.(kmip.Name); ok && a.AttributeName == kmip.AttributeNameName {
			return name.NameValue
		}
	}
	return ""
}

// refusal tells whoever asked what there is to wait for.
func refusal(asked approval.Asked) string {
	until := asked.Expires.UTC().Format(time.RFC3339)
	if asked.State == approval.Denied {
		_, who := asked.Approvals(asked.Quorum)
		return fmt.Sprintf("%s has denied approval: request %s, until %s", who, asked.ID, until)
	}
	return fmt.Sprintf("this needs the approval of %d of %d people: request %s has %d, and until %s; ask again when it is approved",
		asked.Quorum.Needed, len(asked.Quorum.Approvers), asked.ID, asked.Approved, until)
}

// ask asks for approval. A new request is put on record.
func (k *KMS) ask(ctx context.Context, w approval.Want, about approval.About) (approval.Asked, error) {
	asked, err := k.approvals.Ask(ctx, w, about)
	if err != nil || !asked.New {
		return asked, err
	}
	k.log.LogAttrs(ctx, slog.LevelInfo, "approval is asked for", slog.String("request", asked.ID), slog.String("group", w.Group), slog.String("op", string(w.Operation)))
	return asked, k.recordApproval("approval.Ask", asked.ID, w)
}

func (k *KMS) recordApproval(action, id string, w approval.Want) error {
	return k.recordCall(audit.Entry{
		Actor: w.Requester, Action: action, Object: "group/" + w.Group + "/approval/" + id, Outcome: audit.Success,
		Details: map[string]string{"account": directory.AccountOf(w.Group), "operation": string(w.Operation), "object": w.Object},
	})
}

// changeGroup has set change a group, if its quorum, where there is one, has
// approved the change. The change is done by whoever asked for it, again, once it
// is approved; that uses the approval up in the transaction of the change.
func (k *KMS) changeGroup(ctx context.Context, group string, op approval.Operation, change approval.Change, set func(directory.Allow) error) error {
	digest, err := change.Digest()
	if err != nil {
		return err
	}
	w := approval.Want{Group: group, Requester: guard.CallerOf(ctx).Name(), Operation: op, Object: digest}
	for {
		used := ""
		err := set(func(ctx context.Context, tx *store.Tx, was directory.Group) (err error) {
			used = ""
			if change.Quorum != nil {
				for _, name := range change.Quorum.Approvers {
					if err := k.access.CheckOwnPassword(ctx, tx, name); err != nil {
						return errs.Wrap(err, "%.64s cannot be an approver", name)
					}
				}
			}
			if was.Quorum.On() {
				used, err = k.approvals.Use(ctx, tx, w)
			}
			return err
		})
		if err == nil && used != "" {
			return k.recordApproval("approval.Use", used, w)
		}
		if !errors.Is(err, approval.ErrNotApproved) {
			return err
		}
		asked, err := k.ask(ctx, w, approval.About{Change: &change, Address: guard.AddressOf(ctx)})
		if err != nil {
			return err
		}
		if asked.State != approval.Approved {
			return errs.New(errs.Denied, "cannot change group %s: %s", group, refusal(asked)).WithReason("NotApproved").WithHint("strongroom kms approval show %s", asked.ID)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// keepApprovals forgets old requests for approval until ctx ends.
func (k *KMS) keepApprovals(ctx context.Context) error {
	for {
		if err := k.approvals.Tidy(ctx); err != nil && ctx.Err() == nil {
			k.log.LogAttrs(ctx, slog.LevelError, "old requests for approval not forgotten", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(tidyApprovalsEvery):
		}
	}
}
