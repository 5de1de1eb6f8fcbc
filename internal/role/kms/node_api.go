package kms

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

func (a *api) clustered() error {
	if a.k.cluster == nil {
		return errs.New(errs.InvalidState, "this KMS is of one node").WithHint("put [cluster] into its configuration and restart it; see docs/how-to/run-three-kms-nodes.md")
	}
	return nil
}

func (a *api) CreateKMSJoinToken(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSJoinTokenRequest]) (*connect.Response[strongroomv1.CreateKMSJoinTokenResponse], error) {
	if err := a.clustered(); err != nil {
		return nil, err
	}
	seconds := req.Msg.GetLifetimeSeconds()
	if seconds < 0 || seconds > int64(pki.MaxJoinLife/time.Second) {
		return nil, errs.New(errs.Invalid, "a lifetime of %d seconds is not 0 to %d", seconds, int64(pki.MaxJoinLife/time.Second))
	}
	token, expires, err := a.k.cluster.NewToken(ctx, time.Duration(seconds)*time.Second)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.CreateKMSJoinTokenResponse{
		Token: token.String(), Expires: timestamppb.New(expires), Address: a.k.cfg.Cluster.Advertise,
	}), nil
}

func (a *api) ListKMSMembers(ctx context.Context, _ *connect.Request[strongroomv1.ListKMSMembersRequest]) (*connect.Response[strongroomv1.ListKMSMembersResponse], error) {
	if err := a.clustered(); err != nil {
		return nil, err
	}
	all, err := a.k.cluster.List(ctx)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.ListKMSMembersResponse{}
	for _, m := range all {
		out.Members = append(out.Members, &strongroomv1.KMSMember{
			Name: m.Name, Id: m.ID, Address: m.Address, StoreAddress: m.StoreAddress, State: m.State, Joined: timestamppb.New(m.Joined),
			ErasuresDue: int64(m.ErasuresDue), Self: m.Self, Release: m.Release,
		})
	}
	return connect.NewResponse(out), nil
}

func (a *api) RemoveKMSMember(ctx context.Context, req *connect.Request[strongroomv1.RemoveKMSMemberRequest]) (*connect.Response[strongroomv1.RemoveKMSMemberResponse], error) {
	if err := a.clustered(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.RemoveKMSMemberResponse{}), a.k.cluster.Remove(ctx, req.Msg.GetName())
}
