package kms

import (
	"context"
	"errors"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/role/kms/usage"
)

// DeleteKMSGroup first removes what is left of destroyed objects, which takes as many
// transactions as there are; a crash leaves the group with fewer of them. Then it
// removes the group, in one that sees that nothing is left; and last what was counted
// of it and asked for in it. Should a crash keep that, it goes before a group of that
// name is made.
func (a *api) DeleteKMSGroup(ctx context.Context, req *connect.Request[strongroomv1.DeleteKMSGroupRequest]) (*connect.Response[strongroomv1.DeleteKMSGroupResponse], error) {
	k, name := a.k, req.Msg.GetName()
	if err := k.directory.CheckDeletable(ctx, name); err != nil {
		return nil, err
	}
	noRoles := func(ctx context.Context, tx *store.Tx) error { return k.access.CheckNone(ctx, tx, groupObject(name)) }
	err := k.db.View(ctx, func(tx *store.Tx) error { return noRoles(ctx, tx) })
	if err == nil {
		err = k.objects.Purge(ctx, name)
	}
	if err != nil {
		if errs.HintOf(err) == "" {
			var e *errs.Error
			if errors.As(err, &e) {
				err = e.WithHint("destroy its keys with an application of it first, or: strongroom kms group show %s", name)
			}
		}
		return nil, errs.Wrap(err, "cannot delete group %.100s", name)
	}
	err = k.directory.DeleteGroup(ctx, name, func(ctx context.Context, tx *store.Tx, _ directory.Group) error {
		return errors.Join(noRoles(ctx, tx), k.objects.CheckNone(ctx, tx, name))
	})
	if err != nil {
		return nil, err
	}
	if err := k.forgetGroup(ctx, name); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.DeleteKMSGroupResponse{}), nil
}

// forgetEarlier has forget drop what is left of an earlier owner of a name, whose
// deletion was broken off, if nobody has the name now, by get: as all nodes have it, for
// what this one remembers may be old.
func (k *KMS) forgetEarlier(ctx context.Context, get, forget func() error) error {
	if err := k.directory.Refresh(ctx); err != nil {
		return err
	}
	if get() == nil {
		return nil
	}
	return forget()
}

// forgetGroup drops what is kept of a group beside the directory and its objects.
func (k *KMS) forgetGroup(ctx context.Context, name string) error {
	if err := k.approvals.Forget(ctx, name, ""); err != nil {
		return err
	}
	return k.usage.Forget(ctx, usage.Group(name))
}

// checkGroup implements [objectstore.Store.RequireAccount]: the group of a request that
// is under way may have been deleted since its client was let in.
func (k *KMS) checkGroup(ctx context.Context, tx *store.Tx, group string) error {
	if group == importAccount {
		return nil
	}
	err := k.directory.RequireGroup(ctx, tx, group)
	if errs.KindOf(err) == errs.NotFound {
		return &kmipserver.Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: "your group was deleted"}
	}
	return err
}

// checkClear implements [directory.Directory.RequireClear].
func (k *KMS) checkClear(ctx context.Context, tx *store.Tx, group string) error {
	if err := k.objects.CheckNone(ctx, tx, group); err != nil {
		return err
	}
	if err := k.approvals.CheckNone(ctx, tx, group); err != nil {
		return err
	}
	return k.access.CheckNone(ctx, tx, groupObject(group))
}
