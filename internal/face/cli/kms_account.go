package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// defaultAccount is the account of names that name none.
const defaultAccount = "default"

// addAccount adds the flag that [inAccount] reads.
func addAccount(cmd *cobra.Command, account *string) {
	cmd.Flags().StringVar(account, "account", "", "the account; NAME is then in it, as ACCOUNT/NAME is (default: "+defaultAccount+")")
}

// inAccount returns the whole name of what is called name in an account.
func inAccount(account, name string) (string, error) {
	switch {
	case account == "":
		return name, nil
	case strings.Contains(name, "/"):
		return "", errs.New(errs.Invalid, "%s names an account, and so does --account %s: give one of them", name, account)
	case account == defaultAccount:
		return name, nil
	}
	return account + "/" + name, nil
}

func newKMSAccountCmd(env *Env) *cobra.Command {
	return newGroup("account", "Accounts: tenants, each with groups, applications and users of its own",
		`An account is a tenant of a key management server. Its groups, applications and
users are called ACCOUNT/NAME; who belongs to one account sees nothing of another.
What is called NAME is in the account default, which there always is.

An administrator of an account is a user ACCOUNT/NAME with the role Administrator:
"strongroom user create acme/ann --role Administrator". That user manages the
account's groups, applications and users, and not its quota.`,
		newKMSAccountCreateCmd(env), newKMSAccountLsCmd(env), newKMSAccountShowCmd(env), newKMSAccountSetCmd(env), newKMSAccountQuotaCmd(env),
		newKMSAccountStateCmd(env, "disable", "Have all applications of an account refused", true), newKMSAccountStateCmd(env, "enable", "Accept an account's applications again", false),
		newKMSAccountDeleteCmd(env))
}

func newKMSAccountCreateCmd(env *Env) *cobra.Command {
	req := &strongroomv1.CreateKMSAccountRequest{}
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create an account",
		Long: `Create an account. Its name cannot be changed: it is in the names of all that it
will have. Give it an administrator next.

Needs the privilege Cryptographer.ManageKeyServers on everything.`,
		Example: `  strongroom kms account create acme --title Acme
  strongroom user create acme/ann --role Administrator`,
		Args: exactArgs("the account's name"),
		RunE: env.withClient("create the account", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			a, err := client.Call(cmd.Context(), c.KMS().CreateKMSAccount, req)
			if err != nil {
				return err
			}
			return env.printDone(a, "account %s created", a.GetName())
		}),
	}
	cmd.Flags().StringVar(&req.Title, "title", "", "a title for people")
	cmd.Flags().StringVar(&req.Description, "description", "", "what it is for")
	return cmd
}

func newKMSAccountLsCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List accounts",
		Long: `List the accounts that you may see, and what is in them.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example: "  strongroom kms account ls",
		Args:    noArgs,
		RunE: env.withClient("list the accounts", func(cmd *cobra.Command, c *client.Client, _ []string) error {
			res, err := client.Call(cmd.Context(), c.KMS().ListKMSAccounts, &strongroomv1.ListKMSAccountsRequest{})
			if err != nil {
				return err
			}
			return printList(env, res, res.GetAccounts(), []column[*strongroomv1.KMSAccount]{
				{"NAME", (*strongroomv1.KMSAccount).GetName},
				{"TITLE", (*strongroomv1.KMSAccount).GetTitle},
				{"DISABLED", func(a *strongroomv1.KMSAccount) string { return yesNo(a.GetDisabled()) }},
				{"GROUPS", func(a *strongroomv1.KMSAccount) string { return fmt.Sprint(a.GetGroups()) }},
				{"APPLICATIONS", func(a *strongroomv1.KMSAccount) string { return fmt.Sprint(a.GetApplications()) }},
				{"KEYS", func(a *strongroomv1.KMSAccount) string { return fmt.Sprint(a.GetUsage().GetKeys()) }},
			})
		}),
	}
}

func newKMSAccountShowCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show an account and its usage",
		Long: `Show an account, and what all its groups did together. After a crash of the server
the operations of its last 10 seconds are missing.

It changes nothing. Needs the privilege Cryptographer.ReadKeyServersInfo.`,
		Example: "  strongroom kms account show acme",
		Args:    exactArgs("the account's name"),
		RunE: env.withClient("show the account", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMS().GetKMSAccount, &strongroomv1.GetKMSAccountRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printOne(a, append([]field{
				{"Name", a.GetName()},
				{"Title", a.GetTitle()},
				{"Description", a.GetDescription()},
				{"Disabled", yesNo(a.GetDisabled())},
				{"Created", env.when(a.GetCreated())},
				{"Groups", fmt.Sprint(a.GetGroups())},
				{"Applications", fmt.Sprint(a.GetApplications())},
			}, env.usageFields(a.GetUsage(), a.GetQuota(), "Keys")...))
		}),
	}
}

func newKMSAccountSetCmd(env *Env) *cobra.Command {
	var title, description string
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Change an account's title and description",
		Long: `Change an account's title, its description, or both. What is not given stays.

Needs the privilege Cryptographer.ManageKeyServers on the account.`,
		Example: "  strongroom kms account set acme --title Acme",
		Args:    exactArgs("the account's name"),
		RunE: env.withClient("change the account", func(cmd *cobra.Command, c *client.Client, args []string) error {
			was, err := client.Call(cmd.Context(), c.KMS().GetKMSAccount, &strongroomv1.GetKMSAccountRequest{Name: args[0]})
			if err != nil {
				return err
			}
			req := &strongroomv1.DescribeKMSAccountRequest{Name: args[0], Title: was.GetTitle(), Description: was.GetDescription()}
			if cmd.Flags().Changed("title") {
				req.Title = title
			}
			if cmd.Flags().Changed("description") {
				req.Description = description
			}
			a, err := client.Call(cmd.Context(), c.KMS().DescribeKMSAccount, req)
			if err != nil {
				return err
			}
			return env.printDone(a, "account %s changed", a.GetName())
		}),
	}
	cmd.Flags().StringVar(&title, "title", "", "a title for people")
	cmd.Flags().StringVar(&description, "description", "", "what it is for")
	cmd.MarkFlagsOneRequired("title", "description")
	return cmd
}

func newKMSAccountQuotaCmd(env *Env) *cobra.Command {
	req := &strongroomv1.SetKMSAccountQuotaRequest{Quota: &strongroomv1.KMSQuota{}}
	var period time.Duration
	cmd := &cobra.Command{
		Use:   "quota NAME",
		Short: "Replace an account's quota",
		Long: `Replace how many keys all groups of an account may have together, and how many
operations its applications may do together in a period, from their next operation
on. Quotas of its groups and applications hold as well. What is not given is not
bounded: without flags there is no quota.

Needs the privilege Cryptographer.ManageKeyServers on everything: an account does
not change its own quota.`,
		Example: "  strongroom kms account quota acme --keys 10000 --operations 1000000 --period 24h",
		Args:    exactArgs("the account's name"),
		RunE: env.withClient("change the account", func(cmd *cobra.Command, c *client.Client, args []string) error {
			req.Name = args[0]
			setPeriod(req.Quota, period)
			a, err := client.Call(cmd.Context(), c.KMS().SetKMSAccountQuota, req)
			if err != nil {
				return err
			}
			return env.printDone(a, "quota of account %s changed", a.GetName())
		}),
	}
	cmd.Flags().Int64Var(&req.Quota.Keys, "keys", 0, "how many keys (default: any number)")
	addOperations(cmd, req.Quota, &period)
	return cmd
}

func newKMSAccountStateCmd(env *Env, verb, short string, disabled bool) *cobra.Command {
	return &cobra.Command{
		Use:   verb + " NAME",
		Short: short,
		Long: short + `, from their next request on, also on
connections that are open. Its keys stay, and its users can still log in.

Needs the privilege Cryptographer.ManageKeyServers on everything.`,
		Example: "  strongroom kms account " + verb + " acme",
		Args:    exactArgs("the account's name"),
		RunE: env.withClient(verb+" the account", func(cmd *cobra.Command, c *client.Client, args []string) error {
			a, err := client.Call(cmd.Context(), c.KMS().SetKMSAccountDisabled, &strongroomv1.SetKMSAccountDisabledRequest{Name: args[0], Disabled: disabled})
			if err != nil {
				return err
			}
			return env.printDone(a, "account %s %sd", a.GetName(), verb)
		}),
	}
}

func newKMSAccountDeleteCmd(env *Env) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete an account that has nothing in it",
		Long: `Delete an account that has no groups and no users. Groups are deleted with
"strongroom kms group delete", once their keys are destroyed; until then an account
can be disabled. The name can be used again; nothing of this account comes back
with it.

Needs the privilege Cryptographer.ManageKeyServers on everything.`,
		Example: "  strongroom kms account delete acme",
		Args:    exactArgs("the account's name"),
		RunE: env.withClient("delete the account", func(cmd *cobra.Command, c *client.Client, args []string) error {
			if err := env.confirm(yes, "Delete account %s?", args[0]); err != nil {
				return err
			}
			res, err := client.Call(cmd.Context(), c.KMS().DeleteKMSAccount, &strongroomv1.DeleteKMSAccountRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return env.printDone(res, "account %s deleted", args[0])
		}),
	}
	addYes(cmd, &yes)
	return cmd
}
