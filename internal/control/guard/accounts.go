package guard

import (
	"context"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
	"strongroom/internal/control/event"
	"strongroom/internal/errs"
)

type accounts struct{ Users }

func (a accounts) CreateUser(ctx context.Context, req *connect.Request[strongroomv1.CreateUserRequest]) (*connect.Response[strongroomv1.User], error) {
	m := req.Msg
	defer clear(m.GetPassword())
	on := access.Object(m.GetObject())
	if on == "" {
		on = access.Home(m.GetName())
	}
	if err := a.mayGive(ctx, m.GetRoles(), on); err != nil {
		return nil, err
	}
	if err := a.Access.CreateUserOn(ctx, m.GetName(), m.GetPassword(), on, m.GetRoles()); err != nil {
		return nil, err
	}
	a.Post(ctx, event.New{Type: event.UserCreated, Target: "user/" + m.GetName()})
	return connect.NewResponse(&strongroomv1.User{
		Name: m.GetName(), Roles: m.GetRoles(), Objects: []string{string(on)},
		Permissions: []*strongroomv1.Permission{{Object: string(on), Roles: m.GetRoles()}}, Created: timestamppb.New(time.Now().Truncate(time.Second)),
	}), nil
}

// mayGive refuses to give a role that allows more on an object than the caller may
// there: else whoever may make users could make one that may do all.
func (a accounts) mayGive(ctx context.Context, roles []string, on access.Object) error {
	own, err := a.Access.PrivilegesOn(ctx, CallerOf(ctx).Principal, on)
	if err != nil {
		return err
	}
	all, err := a.Access.Roles(ctx)
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

func (a accounts) ListUsers(ctx context.Context, _ *connect.Request[strongroomv1.ListUsersRequest]) (*connect.Response[strongroomv1.ListUsersResponse], error) {
	users, err := a.Access.Users(ctx)
	if err != nil {
		return nil, err
	}
	seen, err := a.May(ctx, "Authorization.ReadUsers")
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListUsersResponse{}
	for _, u := range users {
		if seen.Has(access.Home(u.Name)) {
			res.Users = append(res.Users, userOf(u))
		}
	}
	return connect.NewResponse(res), nil
}

func userOf(u access.User) *strongroomv1.User {
	out := &strongroomv1.User{Name: u.Name, Roles: u.Roles, Disabled: u.Disabled, Created: timestamppb.New(u.Created)}
	for _, p := range u.Permissions {
		out.Objects = append(out.Objects, string(p.Object))
		out.Permissions = append(out.Permissions, &strongroomv1.Permission{Object: string(p.Object), Roles: p.Roles})
	}
	return out
}

func (a accounts) SetUserDisabled(ctx context.Context, req *connect.Request[strongroomv1.SetUserDisabledRequest]) (*connect.Response[strongroomv1.User], error) {
	name := req.Msg.GetName()
	if err := a.Access.SetDisabled(ctx, name, req.Msg.GetDisabled()); err != nil {
		return nil, err
	}
	what := event.UserEnabled
	if req.Msg.GetDisabled() {
		what = event.UserDisabled
	}
	a.Post(ctx, event.New{Type: what, Target: "user/" + name})
	return a.user(ctx, name)
}

// user returns one user.
func (a accounts) user(ctx context.Context, name string) (*connect.Response[strongroomv1.User], error) {
	users, err := a.Access.Users(ctx)
	if err != nil {
		return nil, err
	}
	for _, u := range users {
		if u.Name == name {
			return connect.NewResponse(userOf(u)), nil
		}
	}
	return nil, errs.New(errs.NotFound, "no user %.64s", name).WithHint("strongroom user ls")
}

func (a accounts) GetUser(ctx context.Context, req *connect.Request[strongroomv1.GetUserRequest]) (*connect.Response[strongroomv1.User], error) {
	return a.user(ctx, req.Msg.GetName())
}

func (a accounts) GrantRoles(ctx context.Context, req *connect.Request[strongroomv1.GrantRolesRequest]) (*connect.Response[strongroomv1.User], error) {
	m := req.Msg
	on, err := a.objectFor(ctx, m.GetName(), m.GetObject())
	if err != nil {
		return nil, err
	}
	if err := a.mayGive(ctx, m.GetRoles(), on); err != nil {
		return nil, err
	}
	if err := a.Access.GrantRoles(ctx, m.GetName(), m.GetRoles(), on); err != nil {
		return nil, err
	}
	a.postRoles(ctx, event.UserRolesGranted, m.GetName(), m.GetRoles(), on)
	return a.user(ctx, m.GetName())
}

func (a accounts) RevokeRoles(ctx context.Context, req *connect.Request[strongroomv1.RevokeRolesRequest]) (*connect.Response[strongroomv1.User], error) {
	m := req.Msg
	on, err := a.objectFor(ctx, m.GetName(), m.GetObject())
	if err != nil {
		return nil, err
	}
	if err := a.Access.RevokeRoles(ctx, m.GetName(), m.GetRoles(), on); err != nil {
		return nil, err
	}
	a.postRoles(ctx, event.UserRolesRevoked, m.GetName(), m.GetRoles(), on)
	return a.user(ctx, m.GetName())
}

func (a accounts) postRoles(ctx context.Context, what, name string, roles []string, on access.Object) {
	text := strings.Join(roles, ", ")
	if text == "" {
		text = "all roles"
	}
	a.Post(ctx, event.New{Type: what, Target: "user/" + name, Args: map[string]string{"roles": text, "object": string(on)}})
}

// objectFor returns the object that a change of a user's permissions is about. The
// guard has seen that the caller may change those of this user; it must be so for the
// object, too.
func (a accounts) objectFor(ctx context.Context, name, object string) (access.Object, error) {
	on := access.Object(object)
	if on == "" {
		on = access.Home(name)
	}
	where, err := a.May(ctx, "Authorization.ModifyPermissions")
	if err != nil {
		return "", err
	}
	if !where.Has(on) {
		return "", errs.New(errs.Denied, "%s lacks the privilege Authorization.ModifyPermissions on %.400s", CallerOf(ctx).Name(), on).WithReason("NoPermission")
	}
	return on, nil
}

func (a accounts) DeleteUser(ctx context.Context, req *connect.Request[strongroomv1.DeleteUserRequest]) (*connect.Response[strongroomv1.DeleteUserResponse], error) {
	if err := a.Access.DeleteUser(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	a.Post(ctx, event.New{Type: event.UserDeleted, Target: "user/" + req.Msg.GetName()})
	return connect.NewResponse(&strongroomv1.DeleteUserResponse{}), nil
}

func (a accounts) ChangePassword(ctx context.Context, req *connect.Request[strongroomv1.ChangePasswordRequest]) (*connect.Response[strongroomv1.ChangePasswordResponse], error) {
	defer clear(req.Msg.GetOldPassword())
	defer clear(req.Msg.GetNewPassword())
	p, err := user(ctx, "%s has no password")
	if err != nil {
		return nil, err
	}
	if err := a.Access.ChangePassword(ctx, p.Name, req.Msg.GetOldPassword(), req.Msg.GetNewPassword(), p.Token, AddressOf(ctx)); err != nil {
		return nil, err
	}
	a.Post(ctx, event.New{Type: event.UserPasswordChanged, Target: "user/" + p.Name})
	return connect.NewResponse(&strongroomv1.ChangePasswordResponse{}), nil
}

func (a accounts) ListRoles(ctx context.Context, _ *connect.Request[strongroomv1.ListRolesRequest]) (*connect.Response[strongroomv1.ListRolesResponse], error) {
	roles, err := a.Access.Roles(ctx)
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

func (a accounts) CreateToken(ctx context.Context, req *connect.Request[strongroomv1.CreateTokenRequest]) (*connect.Response[strongroomv1.CreateTokenResponse], error) {
	p, err := user(ctx, "tokens are for users, and %s is none")
	if err != nil {
		return nil, err
	}
	seconds := req.Msg.GetLifetimeSeconds()
	if seconds < 0 || seconds > int64(access.MaxTokenLife/time.Second) {
		return nil, errs.New(errs.Invalid, "a lifetime of %d seconds is not 0 to %d", seconds, int64(access.MaxTokenLife/time.Second))
	}
	life := time.Duration(seconds) * time.Second
	if life == 0 {
		life = tokenLifeDefault
	}
	text, t, err := a.Access.IssueToken(ctx, p.Name, req.Msg.GetDescription(), life)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.CreateTokenResponse{Token: text, Expires: timestamppb.New(t.Expires)}), nil
}
