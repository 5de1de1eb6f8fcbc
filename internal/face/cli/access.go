package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

func newUserCmd(env *Env) *cobra.Command {
	return newGroup("user", "Local users",
		"Local users log in with a password, and may do what their roles allow.",
		newUserCreateCmd(env), newUserLsCmd(env), newUserShowCmd(env), newUserGrantCmd(env), newUserRevokeCmd(env),
		newUserStateCmd(env, "disable", "Lock a user out", true), newUserStateCmd(env, "enable", "Let a user in again", false), newUserDeleteCmd(env), newUserPasswordCmd(env))
}

func newUserCreateCmd(env *Env) *cobra.Command {
	var (
		roles            []string
		passwordFile, on string
	)
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create a local user",
		Long: `Create a local user with a password and roles. See "strongroom role ls" for what
roles there are.

At a key management server a user can belong to an account, and is then called
ACCOUNT/NAME: its roles hold there, and it sees nothing else. With --on the roles
hold on one object only, and what is below it: /account/ACCOUNT or
/account/ACCOUNT/group/GROUP.

Needs the privilege Authorization.ModifyUsers.`,
		Example: `  strongroom user create alice --role NoCryptoAdmin
  strongroom user create acme/ann --role Administrator
  strongroom user create acme/bob --role ReadOnly --on /account/acme/group/vsphere`,
		Args: exactArgs("the user's name"),
		RunE: env.withClient("create the user", func(cmd *cobra.Command, c *client.Client, args []string) error {
			password, err := env.password("New password of "+args[0], passwordFile, true)
			if err != nil {
				return err
			}
			defer clear(password)
			made, err := client.Call(cmd.Context(), c.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: args[0], Password: password, Roles: roles, Object: on})
			if err != nil {
				return err
			}
			return env.printDone(made, "user %s created", made.GetName())
		}),
	}
	cmd.Flags().StringArrayVar(&roles, "role", []string{"ReadOnly"}, "a role; may be repeated")
	cmd.Flags().StringVar(&passwordFile, "password-file", "", "`file` with the password; - is standard input")
	cmd.Flags().StringVar(&on, "on", "", "the `object` on which the roles hold (default: everything, or the user's account)")
	return cmd
}

func newUserStateCmd(env *Env, verb, short string, disabled bool) *cobra.Command {
	long := short + ". The user's roles stay as they are."
	if disabled {
		long = short + ", at once: all sessions and tokens end. The user's roles stay.\nThe last administrator cannot be disabled."
	}
	return &cobra.Command{
		Use:               verb + " NAME",
		Short:             short,
		Long:              long + "\n\nNeeds the privilege Authorization.ModifyUsers.",
		Example:           "  strongroom user " + verb + " alice",
		Args:              exactArgs("the user's name"),
		ValidArgsFunction: env.completeFirst(userNames),
		RunE: env.withClient(verb+" the user", func(cmd *cobra.Command, c *client.Client, args []string) error {
			u, err := client.Call(cmd.Context(), c.Access().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: args[0], Disabled: disabled})
			if err != nil {
				return err
			}
			return env.printDone(u, "user %s %sd", u.GetName(), verb)
		}),
	}
}

func newUserLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List local users",
		Long: `List the local users that you may manage, their roles, and the objects on which
they have them.

It changes nothing. Needs the privilege Authorization.ReadUsers.`,
		Example: "  strongroom user ls",
		Args:    noArgs,
		RunE: env.withClient("list the users", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Access().ListUsers, &strongroomv1.ListUsersRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetUsers(), []column[*strongroomv1.User]{
				{"NAME", (*strongroomv1.User).GetName},
				{"ROLES", func(v *strongroomv1.User) string { return strings.Join(v.GetRoles(), ",") }},
				{"ON", func(v *strongroomv1.User) string { return strings.Join(v.GetObjects(), ",") }},
				{"DISABLED", func(v *strongroomv1.User) string { return yesNo(v.GetDisabled()) }},
				{"CREATED", func(v *strongroomv1.User) string { return env.when(v.GetCreated()) }},
			})
		}),
	}
}

func newUserShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show a local user, and its roles on each object",
		Long: `Show a local user and which roles it has on which objects. The nearest object
counts: roles on a group replace, there, those on its account.

It changes nothing. Needs the privilege Authorization.ReadUsers.`,
		Example:           "  strongroom user show acme/bob",
		Args:              exactArgs("the user's name"),
		ValidArgsFunction: env.completeFirst(userNames),
		RunE: env.withClient("show the user", func(cmd *cobra.Command, c *client.Client, args []string) error {
			u, err := client.Call(cmd.Context(), c.Access().GetUser, &strongroomv1.GetUserRequest{Name: args[0]})
			if err != nil {
				return err
			}
			fields := []field{{"Name", u.GetName()}, {"Disabled", yesNo(u.GetDisabled())}, {"Created", env.when(u.GetCreated())}}
			for _, p := range u.GetPermissions() {
				fields = append(fields, field{"On " + p.GetObject(), strings.Join(p.GetRoles(), ", ")})
			}
			return env.printOne(u, fields)
		}),
	}
}

func newUserGrantCmd(env *Env) *cobra.Command {
	req := &strongroomv1.GrantRolesRequest{}
	cmd := &cobra.Command{
		Use:   "grant NAME",
		Short: "Give a user roles on an object",
		Long: `Give a local user roles on an object, and below it, beside those that it has there.
The nearest object counts: at a key management server, roles on a group replace,
there, those on its account. A user of an account can have roles in it only.

Needs the privilege Authorization.ModifyPermissions on the user's account, and on
the object every privilege that the roles give.`,
		Example: `  strongroom user grant acme/bob --role Administrator --on /account/acme/group/test
  strongroom user grant carol --role ReadOnly --on /account/acme`,
		Args:              exactArgs("the user's name"),
		ValidArgsFunction: env.completeFirst(userNames),
		RunE: env.withClient("give the user roles", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			u, err := client.Call(cmd.Context(), c.Access().GrantRoles, req)
			if err != nil {
				return err
			}
			return env.printDone(u, "user %s was given %s%s", u.GetName(), strings.Join(req.GetRoles(), ", "), onObject(req.GetObject()))
		}),
	}
	cmd.Flags().StringArrayVar(&req.Roles, "role", nil, "a role; may be repeated")
	cmd.Flags().StringVar(&req.Object, "on", "", "the `object` on which the roles hold (default: everything, or the user's account)")
	_ = cmd.MarkFlagRequired("role")
	return cmd
}

func newUserRevokeCmd(env *Env) *cobra.Command {
	req := &strongroomv1.RevokeRolesRequest{}
	cmd := &cobra.Command{
		Use:   "revoke NAME",
		Short: "Take a user's roles on an object",
		Long: `Take roles on an object from a local user, at once, also in sessions that are open.
Without --role all that it has on exactly that object. If none are left there, the
roles on the object above hold there again. The last administrator keeps its role.

Needs the privilege Authorization.ModifyPermissions on the user's account and on
the object.`,
		Example: `  strongroom user revoke acme/bob --role Administrator --on /account/acme/group/test
  strongroom user revoke carol --on /account/acme`,
		Args:              exactArgs("the user's name"),
		ValidArgsFunction: env.completeFirst(userNames),
		RunE: env.withClient("take the user's roles", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			u, err := client.Call(cmd.Context(), c.Access().RevokeRoles, req)
			if err != nil {
				return err
			}
			what := strings.Join(req.GetRoles(), ", ")
			if what == "" {
				what = "all roles"
			}
			return env.printDone(u, "%s taken from user %s%s", what, u.GetName(), onObject(req.GetObject()))
		}),
	}
	cmd.Flags().StringArrayVar(&req.Roles, "role", nil, "a role; may be repeated (default: all)")
	cmd.Flags().StringVar(&req.Object, "on", "", "the `object` on which the roles held (default: everything, or the user's account)")
	return cmd
}

// onObject is the end of a sentence about roles.
func onObject(object string) string {
	if object == "" {
		return ""
	}
	return " on " + object
}

func newUserDeleteCmd(env *Env) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a local user",
		Long: `Delete a local user and end the user's sessions and tokens. This cannot be undone.
The last administrator cannot be deleted.

Needs the privilege Authorization.ModifyUsers.`,
		Example:           "  strongroom user delete alice --yes",
		Args:              exactArgs("the user's name"),
		ValidArgsFunction: env.completeFirst(userNames),
		RunE: env.withClient("delete the user", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete user %s and end all sessions?", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.Access().DeleteUser, &strongroomv1.DeleteUserRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(res, "user %s deleted", args[0])
		}),
	}
	addYes(cmd, &yes)
	return cmd
}

func newUserPasswordCmd(env *Env) *cobra.Command {
	var oldFile, newFile string
	cmd := &cobra.Command{
		Use:   "password",
		Short: "Change your own password",
		Long: `Change the password of the user who is logged in. Needs a session only, and the old
password.`,
		Example: "  strongroom user password",
		Args:    noArgs,
		RunE: env.withClient("change the password", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			was, err := env.password("Old password", oldFile, false)
			if err != nil {
				return err
			}
			defer clear(was)
			is, err := env.password("New password", newFile, true)
			if err != nil {
				return err
			}
			defer clear(is)
			res, err := client.Call(cmd.Context(), c.Access().ChangePassword, &strongroomv1.ChangePasswordRequest{OldPassword: was, NewPassword: is})
			if err != nil {
				return err
			}
			return env.printDone(res, "password changed")
		}),
	}
	cmd.Flags().StringVar(&oldFile, "old-password-file", "", "`file` with the old password")
	cmd.Flags().StringVar(&newFile, "password-file", "", "`file` with the new password")
	return cmd
}

func newRoleCmd(env *Env) *cobra.Command {
	return newGroup("role", "Roles: what users may do",
		`A role is a set of privileges. NoCryptoAdmin may do everything but encrypt and
manage keys.`,
		newRoleLsCmd(env))
}

func newRoleLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List roles",
		Long: `List the roles and how many privileges each has; which, with -o yaml. Your own:
"strongroom whoami".

It changes nothing. Needs the privilege System.Read.`,
		Example: "  strongroom role ls -o yaml",
		Args:    noArgs,
		RunE: env.withClient("list the roles", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Access().ListRoles, &strongroomv1.ListRolesRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetRoles(), []column[*strongroomv1.Role]{
				{"NAME", (*strongroomv1.Role).GetName},
				{"PRIVILEGES", func(v *strongroomv1.Role) string { return strconv.Itoa(len(v.GetPrivileges())) }},
				{"DESCRIPTION", (*strongroomv1.Role).GetDescription},
			})
		}),
	}
}

func newTokenCmd(env *Env) *cobra.Command {
	return newGroup("token", "API tokens",
		"An API token lets a program act as the user who made it, until it expires.",
		newTokenCreateCmd(env))
}

func newTokenCreateCmd(env *Env) *cobra.Command {
	var (
		description string
		lifetime    time.Duration
	)
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make an API token for the user who is logged in",
		Long: `Make an API token and print it, once. Programs give it in the environment as
STRONGROOM_TOKEN, or to the API as "Authorization: Bearer TOKEN". It ends with its
lifetime or its user. Needs a session only.`,
		Example: "  strongroom token create --description ci --lifetime 7d > token",
		Args:    noArgs,
		RunE: env.withClient("create an API token", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.Access().CreateToken, &strongroomv1.CreateTokenRequest{
				Description: description, LifetimeSeconds: int64(lifetime / time.Second),
			})
			if err != nil {
				return err
			}
			return env.printSecret(res, res.GetToken(), "valid until "+env.when(res.GetExpires()))
		}),
	}
	cmd.Flags().StringVar(&description, "description", "", "what it is for")
	addDuration(cmd, &lifetime, "lifetime", 30*24*time.Hour, "how long it is valid, at most 365d")
	return cmd
}
