package controller

import (
	"context"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/errs"
)

const (
	sessionLife      = 12 * time.Hour
	tokenLifeDefault = 30 * 24 * time.Hour
)

// sessions serves SessionService.
type sessions struct{ *Controller }

func (c sessions) Login(ctx context.Context, req *connect.Request[strongroomv1.LoginRequest]) (*connect.Response[strongroomv1.LoginResponse], error) {
	user := fmt.Sprintf("%.64s", req.Msg.GetUser()) // no name is longer
	principal, err := c.access.Login(ctx, req.Msg.GetUser(), req.Msg.GetPassword())
	if err != nil {
		c.post(ctx, event.New{Type: event.UserLoginFailed, Principal: callerOf(ctx).name(), Target: "user/" + user, Args: map[string]string{"address": addressOf(ctx)}})
		return nil, err
	}
	token, issued, err := c.access.IssueToken(ctx, principal.Name, "session", sessionLife)
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.UserLoggedIn, Principal: principal.String(), Target: "user/" + user, Args: map[string]string{"address": addressOf(ctx)}})
	return connect.NewResponse(&strongroomv1.LoginResponse{Token: token, Expires: stamp(issued.Expires)}), nil
}

func (c sessions) Logout(ctx context.Context, _ *connect.Request[strongroomv1.LogoutRequest]) (*connect.Response[strongroomv1.LogoutResponse], error) {
	if token := callerOf(ctx).principal.Token; token != "" {
		if err := c.access.RevokeToken(ctx, token); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&strongroomv1.LogoutResponse{}), nil
}

func (c sessions) WhoAmI(ctx context.Context, _ *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	p := callerOf(ctx).principal
	roles, err := c.access.RolesOf(ctx, p)
	if err != nil {
		return nil, err
	}
	privileges, err := c.access.PrivilegesOn(ctx, p, access.Root)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.WhoAmIResponse{Principal: p.String(), Roles: roles, ServerVersion: Version}
	for _, priv := range privileges {
		res.Privileges = append(res.Privileges, string(priv))
	}
	return connect.NewResponse(res), nil
}

// accounts serves AccessService.
type accounts struct{ *Controller }

func (c accounts) CreateUser(ctx context.Context, req *connect.Request[strongroomv1.CreateUserRequest]) (*connect.Response[strongroomv1.User], error) {
	m := req.Msg
	defer clear(m.GetPassword())
	if err := c.mayGive(ctx, m.GetRoles()); err != nil {
		return nil, err
	}
	if err := c.access.CreateUser(ctx, m.GetName(), m.GetPassword(), m.GetRoles()); err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.UserCreated, Target: "user/" + m.GetName()})
	return connect.NewResponse(&strongroomv1.User{Name: m.GetName(), Roles: m.GetRoles(), Created: stamp(time.Now().Truncate(time.Second))}), nil
}

// mayGive refuses to give a role that allows more than the caller may: else
// whoever may make users could make one that may do all.
func (c *Controller) mayGive(ctx context.Context, roles []string) error {
	own, err := c.access.PrivilegesOn(ctx, callerOf(ctx).principal, access.Root)
	if err != nil {
		return err
	}
	all, err := c.access.Roles(ctx)
	if err != nil {
		return err
	}
	for _, role := range all {
		if !slices.Contains(roles, role.Name) {
			continue
		}
		for _, priv := range role.Privileges {
			if !slices.Contains(own, priv) {
				return errs.New(errs.Denied, "role %s allows %s, which you may not give because you do not have it", role.Name, priv)
			}
		}
	}
	return nil
}

func (c accounts) ListUsers(ctx context.Context, _ *connect.Request[strongroomv1.ListUsersRequest]) (*connect.Response[strongroomv1.ListUsersResponse], error) {
	users, err := c.access.Users(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListUsersResponse{}
	for _, u := range users {
		res.Users = append(res.Users, &strongroomv1.User{Name: u.Name, Roles: u.Roles, Created: stamp(u.Created)})
	}
	return connect.NewResponse(res), nil
}

func (c accounts) DeleteUser(ctx context.Context, req *connect.Request[strongroomv1.DeleteUserRequest]) (*connect.Response[strongroomv1.DeleteUserResponse], error) {
	if err := c.access.DeleteUser(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.UserDeleted, Target: "user/" + req.Msg.GetName()})
	return connect.NewResponse(&strongroomv1.DeleteUserResponse{}), nil
}

func (c accounts) ChangePassword(ctx context.Context, req *connect.Request[strongroomv1.ChangePasswordRequest]) (*connect.Response[strongroomv1.ChangePasswordResponse], error) {
	defer clear(req.Msg.GetOldPassword())
	defer clear(req.Msg.GetNewPassword())
	p := callerOf(ctx).principal
	if p.Kind != access.UserPrincipal {
		return nil, errs.New(errs.Invalid, "%s has no password", p)
	}
	if err := c.access.ChangePassword(ctx, p.Name, req.Msg.GetOldPassword(), req.Msg.GetNewPassword(), p.Token); err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.UserPasswordChanged, Target: "user/" + p.Name})
	return connect.NewResponse(&strongroomv1.ChangePasswordResponse{}), nil
}

func (c accounts) ListRoles(ctx context.Context, _ *connect.Request[strongroomv1.ListRolesRequest]) (*connect.Response[strongroomv1.ListRolesResponse], error) {
	roles, err := c.access.Roles(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListRolesResponse{}
	for _, r := range roles {
		out := &strongroomv1.Role{Name: r.Name, Description: r.Description}
		for _, p := range r.Privileges {
			out.Privileges = append(out.Privileges, string(p))
		}
		res.Roles = append(res.Roles, out)
	}
	return connect.NewResponse(res), nil
}

func (c accounts) CreateToken(ctx context.Context, req *connect.Request[strongroomv1.CreateTokenRequest]) (*connect.Response[strongroomv1.CreateTokenResponse], error) {
	p := callerOf(ctx).principal
	if p.Kind != access.UserPrincipal {
		return nil, errs.New(errs.Invalid, "tokens are for users, and %s is none", p)
	}
	life := seconds(req.Msg.GetLifetimeSeconds())
	if life == 0 {
		life = tokenLifeDefault
	}
	text, t, err := c.access.IssueToken(ctx, p.Name, req.Msg.GetDescription(), life)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.CreateTokenResponse{Token: text, Expires: stamp(t.Expires)}), nil
}
