package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"context"
	"errors"
	"slices"

	"github.com/ovh/kmip-go"
)

// Approvals has people approve operations before they are carried out: Destroy,
// and Get where it gives out key material.
type Approvals interface {
	// Needed reports whether op needs approval.
	Needed(op kmip.Operation) bool
	// Use uses up an approval of op on o and returns its identifier, in the
	// transaction that carries op out: if that does not commit, it was not used. o
	// is as it was before. It returns [ErrNotApproved] if there is none.
	Use(ctx context.Context, tx Tx, op kmip.Operation, o *Object) (string, error)
	// Ask asks for an approval of op on o, for which there was none, and returns
	// the error that the client is to see; nil if it is approved by now.
	Ask(ctx context.Context, op kmip.Operation, o *Object) error
}

// ErrNotApproved says that there is no approval of an operation.
var ErrNotApproved = errors.New("not approved")

// approvalTries bounds how often an operation meets an approval that comes, or
// is used by another, meanwhile.
const approvalTries = 3

// ApprovableOperations returns the operations that can need approval.
func ApprovableOperations() []kmip.Operation {
	return []kmip.Operation{kmip.OperationGet, kmip.OperationDestroy}
}

// needsApproval reports whether op, on an object that it guards, needs approval.
func (r *request) needsApproval(op kmip.Operation) bool {
	return r.client.Approvals != nil && slices.Contains(ApprovableOperations(), op) && r.client.Approvals.Needed(op)
}

// guardsExport tells the objects whose material must not get out without
// approval: not templates, which have none, nor public keys, nor what a client registered wrapped
// and gets back as it was. Material that the server wraps is guarded, for the
// client may know the wrapping key.
func guardsExport(o *Object) bool {
	return o.Type != kmip.ObjectTypeTemplate && !o.isPublic() && o.Layout.Wrapping == nil
}

// approved has do carry out op on an object with an approval, if it needs one. do
// gets the object's identifier, and must call use in its transaction, after
// everything that can refuse the operation.
func (r *request) approved(op kmip.Operation, given string, do func(id string, use func(Tx, *Object) error) error) error {
	id, err := r.id(given)
	if err != nil {
		return err
	}
	if !r.needsApproval(op) {
		return do(id, func(Tx, *Object) error { return nil })
	}
	var o *Object
	for range approvalTries {
		used := ""
		err = do(id, func(tx Tx, before *Object) (err error) {
			c := *before
			c.Material = nil // it is the transaction's
			o = &c
			used, err = r.client.Approvals.Use(r.ctx, tx, op, before)
			return err
		})
		if err == nil {
			r.approval = used
		}
		if !errors.Is(err, ErrNotApproved) {
			return err
		}
		if err := r.client.Approvals.Ask(r.ctx, op, o); err != nil {
			return err
		}
	}
	return err
}
