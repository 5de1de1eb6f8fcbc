package guard

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/errs"
)

const (
	sessionLife      = 12 * time.Hour
	tokenLifeDefault = 30 * 24 * time.Hour
)

// Users serves SessionService and AccessService for a role.
type Users struct {
	Access *access.Control
	// Post tells of what happened to users; one without Principal is the caller's.
	Post    func(context.Context, event.New)
	Version string // of the role, as WhoAmI tells it
}

// Sessions returns the handler of SessionService.
func (u Users) Sessions() strongroomv1connect.SessionServiceHandler { return sessions{u} }

// Accounts returns the handler of AccessService.
func (u Users) Accounts() strongroomv1connect.AccessServiceHandler { return accounts{u} }

// May returns where the caller has a privilege: what a list that was asked for on
// [Anywhere] may show.
func (u Users) May(ctx context.Context, priv access.Privilege) (access.Scope, error) {
	return u.Access.Where(ctx, CallerOf(ctx).Principal, priv)
}

// homeOf is where a principal's privileges are looked for if no object is named.
func homeOf(p access.Principal) access.Object {
	if p.Kind == access.UserPrincipal {
		return access.Home(p.Name)
	}
	return access.Root
}

type sessions struct{ Users }

func (s sessions) Login(ctx context.Context, req *connect.Request[strongroomv1.LoginRequest]) (*connect.Response[strongroomv1.LoginResponse], error) {
	user := fmt.Sprintf("%.64s", req.Msg.GetUser()) // no name is longer
	principal, err := s.Access.Login(ctx, req.Msg.GetUser(), req.Msg.GetPassword(), AddressOf(ctx))
	if err != nil {
		s.Post(ctx, event.New{Type: event.UserLoginFailed, Principal: CallerOf(ctx).Name(), Target: "user/" + user, Args: map[string]string{"address": AddressOf(ctx)}})
		return nil, err
	}
	token, issued, err := s.Access.IssueToken(ctx, principal.Name, "session", sessionLife)
	if err != nil {
		return nil, err
	}
	s.Post(ctx, event.New{Type: event.UserLoggedIn, Principal: principal.String(), Target: "user/" + user, Args: map[string]string{"address": AddressOf(ctx)}})
	return connect.NewResponse(&strongroomv1.LoginResponse{Token: token, Expires: timestamppb.New(issued.Expires)}), nil
}

func (s sessions) Logout(ctx context.Context, _ *connect.Request[strongroomv1.LogoutRequest]) (*connect.Response[strongroomv1.LogoutResponse], error) {
	if token := CallerOf(ctx).Principal.Token; token != "" {
		if err := s.Access.RevokeToken(ctx, token); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&strongroomv1.LogoutResponse{}), nil
}

func (s sessions) WhoAmI(ctx context.Context, _ *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	c := CallerOf(ctx)
	roles, err := s.Access.RolesOf(ctx, c.Principal)
	if err != nil {
		return nil, err
	}
	privileges, err := s.Access.PrivilegesOn(ctx, c.Principal, homeOf(c.Principal))
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.WhoAmIResponse{Principal: c.Name(), Roles: roles, ServerVersion: s.Version}
	for _, p := range privileges {
		res.Privileges = append(res.Privileges, string(p))
	}
	return connect.NewResponse(res), nil
}

// user returns the name of the user who calls; what says what others lack.
func user(ctx context.Context, what string) (access.Principal, error) {
	c := CallerOf(ctx)
	if c.Principal.Kind != access.UserPrincipal {
		return access.Principal{}, errs.New(errs.Invalid, what, c.Name())
	}
	return c.Principal, nil
}
