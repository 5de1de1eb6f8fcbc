package kms

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/guard"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/approval"
)

const (
	// expiryDefault is when a request for approval expires.
	expiryDefault = 24 * time.Hour
	// approvalsMax bounds how many requests are listed.
	approvalsMax = 1000
)

func (a *api) SetKMSGroupPolicy(ctx context.Context, req *connect.Request[strongroomv1.SetKMSGroupPolicyRequest]) (*connect.Response[strongroomv1.KMSGroup], error) {
	name := req.Msg.GetName()
	policy, err := checkPolicy(req.Msg.GetPolicy())
	if err != nil {
		return nil, errs.Wrap(err, "cannot change group %.64s", name)
	}
	err = a.k.changeGroup(ctx, name, approval.SetPolicy, approval.Change{Policy: &policy}, func(allow directory.Allow) error {
		return a.k.directory.SetPolicy(ctx, name, policy, allow)
	})
	if err != nil {
		return nil, err
	}
	return a.group(ctx, name)
}

func (a *api) SetKMSGroupQuorum(ctx context.Context, req *connect.Request[strongroomv1.SetKMSGroupQuorumRequest]) (*connect.Response[strongroomv1.KMSGroup], error) {
	name := req.Msg.GetName()
	quorum, err := readQuorum(req.Msg.GetQuorum())
	if err == nil {
		err = a.k.checkApprovers(ctx, name, quorum.Approvers)
	}
	if err != nil {
		return nil, errs.Wrap(err, "cannot change group %.64s", name)
	}
	err = a.k.changeGroup(ctx, name, approval.SetQuorum, approval.Change{Quorum: &quorum}, func(allow directory.Allow) error {
		return a.k.directory.SetQuorum(ctx, name, quorum, allow)
	})
	if err != nil {
		return nil, err
	}
	return a.group(ctx, name)
}

// readQuorum reads a quorum off the wire; what it may be the directory checks.
func readQuorum(q *strongroomv1.KMSQuorum) (directory.Quorum, error) {
	seconds := q.GetExpirySeconds()
	if seconds < 0 || seconds > int64(directory.ExpiryMax/time.Second) {
		return directory.Quorum{}, errs.New(errs.Invalid, "an expiry of %d seconds is not 0 to %d", seconds, int64(directory.ExpiryMax/time.Second))
	}
	out := directory.Quorum{
		Approvers: q.GetApprovers(), Needed: int(q.GetNeeded()), Destroy: q.GetDestroy(), Export: q.GetExport(), Expiry: time.Duration(seconds) * time.Second,
	}
	if out.On() && seconds == 0 {
		out.Expiry = expiryDefault
	}
	return out, nil
}

// quorumOf is the reverse of readQuorum; nil for no quorum.
func quorumOf(q directory.Quorum) *strongroomv1.KMSQuorum {
	if !q.On() {
		return nil
	}
	return &strongroomv1.KMSQuorum{Approvers: q.Approvers, Needed: int32(q.Needed), Destroy: q.Destroy, Export: q.Export, ExpirySeconds: int64(q.Expiry / time.Second)}
}

func policyToAPI(p directory.Policy) *strongroomv1.KMSPolicy {
	return &strongroomv1.KMSPolicy{Operations: p.Operations, NoExport: p.NoExport, KeyTypes: p.KeyTypes}
}

func (a *api) ListKMSApprovals(ctx context.Context, req *connect.Request[strongroomv1.ListKMSApprovalsRequest]) (*connect.Response[strongroomv1.ListKMSApprovalsResponse], error) {
	all, err := a.k.approvals.List(ctx, req.Msg.GetAll())
	if err != nil {
		return nil, err
	}
	seen, err := a.seen(ctx)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.ListKMSApprovalsResponse{}
	for _, asked := range all {
		if seen.Has(groupObject(asked.Group)) && len(out.Approvals) < approvalsMax {
			out.Approvals = append(out.Approvals, approvalOf(asked))
		}
	}
	return connect.NewResponse(out), nil
}

func (a *api) GetKMSApproval(ctx context.Context, req *connect.Request[strongroomv1.GetKMSApprovalRequest]) (*connect.Response[strongroomv1.KMSApproval], error) {
	asked, err := a.k.approvals.Get(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(approvalOf(asked)), nil
}

func (a *api) ApproveKMSRequest(ctx context.Context, req *connect.Request[strongroomv1.ApproveKMSRequestRequest]) (*connect.Response[strongroomv1.KMSApproval], error) {
	return a.decide(ctx, req.Msg.GetId(), true, "")
}

func (a *api) DenyKMSRequest(ctx context.Context, req *connect.Request[strongroomv1.DenyKMSRequestRequest]) (*connect.Response[strongroomv1.KMSApproval], error) {
	return a.decide(ctx, req.Msg.GetId(), false, req.Msg.GetReason())
}

func (a *api) decide(ctx context.Context, id string, approve bool, reason string) (*connect.Response[strongroomv1.KMSApproval], error) {
	who := guard.CallerOf(ctx)
	if who.Principal.Kind != access.UserPrincipal {
		return nil, errs.New(errs.Denied, "the %s is not one person: approvers log in as users", who.Name()).WithHint("strongroom login --server https://HOST:PORT")
	}
	asked, err := a.k.approvals.Decide(ctx, id, who.Principal.Name, approve, reason)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(approvalOf(asked)), nil
}

func approvalOf(asked approval.Asked) *strongroomv1.KMSApproval {
	out := &strongroomv1.KMSApproval{
		Id: asked.ID, Group: asked.Group, Operation: string(asked.Operation), ObjectName: asked.Name, Requester: asked.Requester, Credential: asked.Credential, Address: asked.Address,
		Created: timestamppb.New(asked.Created), Expires: timestamppb.New(asked.Expires), State: string(asked.State),
		Approved: int32(asked.Approved), Needed: int32(asked.Quorum.Needed),
	}
	if c := asked.Change; c == nil {
		out.Object = asked.Object
	} else if c.Policy != nil {
		out.Policy = policyToAPI(*c.Policy)
	} else if c.Quorum != nil {
		if out.Quorum = quorumOf(*c.Quorum); out.Quorum == nil {
			out.Quorum = &strongroomv1.KMSQuorum{} // none is wanted
		}
	}
	for _, d := range asked.Decisions {
		out.Decisions = append(out.Decisions, &strongroomv1.KMSDecision{User: d.User, Approved: d.Approved, Reason: d.Reason, Time: timestamppb.New(d.Time)})
	}
	if !asked.Used.IsZero() {
		out.Used = timestamppb.New(asked.Used)
	}
	return out
}
