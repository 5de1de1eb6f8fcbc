package kms

import (
	"context"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/usage"
)

// The objects on which users have permissions: "/account/A" and, below it,
// "/account/A/group/G". What belongs to a group has that group's.
const (
	accountFolder = "/account/"
	groupFolder   = "/group/"
)

func accountObject(account string) access.Object { return access.Object(accountFolder + account) }

// groupObject is the object of a group, by its name with its account.
func groupObject(group string) access.Object {
	account, own := directory.SplitName(group)
	return access.Object(accountFolder + account + groupFolder + own)
}

// applicationObject is the object of an application: its group's. One that there
// is not belongs to its account alone.
func (k *KMS) applicationObject(name string) access.Object {
	app, err := k.directory.Application(name)
	if err != nil {
		return accountObject(directory.AccountOf(name))
	}
	return groupObject(app.Group)
}

// checkObject implements [access.Config.CheckObject].
func (k *KMS) checkObject(ctx context.Context, tx *store.Tx, on access.Object) error {
	rest, ok := strings.CutPrefix(string(on), accountFolder)
	account, group, ofGroup := strings.Cut(rest, groupFolder)
	switch {
	case !ok || account == "" || strings.Contains(account, "/") || ofGroup && (group == "" || strings.Contains(group, "/")):
		return errs.New(errs.Invalid, "%.200q is no object here: it is /, /account/ACCOUNT or /account/ACCOUNT/group/GROUP", on)
	case ofGroup:
		return k.directory.CheckGroup(ctx, tx, directory.FullName(account, group))
	}
	return k.directory.CheckAccount(ctx, tx, account)
}

// seen returns where the caller may see what there is, and has this node know what
// there is.
func (a *api) seen(ctx context.Context) (access.Scope, error) {
	if err := a.k.directory.Refresh(ctx); err != nil {
		return access.Scope{}, err
	}
	return a.k.users().May(ctx, "Cryptographer.ReadKeyServersInfo")
}

// groupsOf returns the groups of an account.
func (k *KMS) groupsOf(account string) (groups []directory.Group) {
	for _, g := range k.directory.Groups() {
		if directory.AccountOf(g.Name) == account {
			groups = append(groups, g)
		}
	}
	return groups
}

func (k *KMS) groupNamesOf(account string) (names []string) {
	for _, g := range k.groupsOf(account) {
		names = append(names, g.Name)
	}
	return names
}

// keysOf returns how many keys an account has; false if they have not been counted.
func (k *KMS) keysOf(account string) (sum int64, counted bool) {
	for _, name := range k.groupNamesOf(account) {
		n, ok := k.objects.Counted(name)
		if !ok {
			return 0, false
		}
		sum += n
	}
	return sum, true
}

func (a *api) accountOf(ctx context.Context, account directory.Account) (*strongroomv1.KMSAccount, error) {
	out := &strongroomv1.KMSAccount{
		Name: account.Name, Title: account.Title, Description: account.Description, Disabled: account.Disabled, Quota: quotaOf(account.Quota),
	}
	if !account.Created.IsZero() {
		out.Created = timestamppb.New(account.Created)
	}
	var sum usage.Counters
	var keys int64
	for _, g := range a.k.groupsOf(account.Name) {
		out.Groups++
		sum = usage.Sum(sum, a.k.usage.Of(usage.Group(g.Name)))
		n, err := a.k.objects.Keys(ctx, g.Name)
		if err != nil {
			return nil, err
		}
		keys += n
	}
	sum.Window = a.k.usage.Of(usage.Account(account.Name)).Window
	out.Usage = usageOf(sum, account.Quota)
	out.Usage.Keys = keys
	for _, app := range a.k.directory.Applications() {
		if directory.AccountOf(app.Name) == account.Name {
			out.Applications++
		}
	}
	return out, nil
}

func (a *api) account(ctx context.Context, name string) (*connect.Response[strongroomv1.KMSAccount], error) {
	account, err := a.k.directory.Account(name)
	if err != nil {
		return nil, err
	}
	out, err := a.accountOf(ctx, account)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

func (a *api) CreateKMSAccount(ctx context.Context, req *connect.Request[strongroomv1.CreateKMSAccountRequest]) (*connect.Response[strongroomv1.KMSAccount], error) {
	m := req.Msg
	err := a.k.forgetEarlier(ctx, func() error {
		_, err := a.k.directory.Account(m.GetName())
		return err
	}, func() error { return a.k.usage.Forget(ctx, usage.Account(short(m.GetName()))) })
	if err != nil {
		return nil, err
	}
	if err := a.k.directory.CreateAccount(ctx, directory.Account{Name: m.GetName(), Title: m.GetTitle(), Description: m.GetDescription()}); err != nil {
		return nil, err
	}
	return a.account(ctx, m.GetName())
}

func (a *api) GetKMSAccount(ctx context.Context, req *connect.Request[strongroomv1.GetKMSAccountRequest]) (*connect.Response[strongroomv1.KMSAccount], error) {
	if err := a.k.directory.Refresh(ctx); err != nil {
		return nil, err
	}
	return a.account(ctx, req.Msg.GetName())
}

func (a *api) ListKMSAccounts(ctx context.Context, _ *connect.Request[strongroomv1.ListKMSAccountsRequest]) (*connect.Response[strongroomv1.ListKMSAccountsResponse], error) {
	seen, err := a.seen(ctx)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.ListKMSAccountsResponse{}
	for _, account := range a.k.directory.Accounts() {
		if !seen.Has(accountObject(account.Name)) {
			continue
		}
		one, err := a.accountOf(ctx, account)
		if err != nil {
			return nil, err
		}
		out.Accounts = append(out.Accounts, one)
	}
	return connect.NewResponse(out), nil
}

func (a *api) DescribeKMSAccount(ctx context.Context, req *connect.Request[strongroomv1.DescribeKMSAccountRequest]) (*connect.Response[strongroomv1.KMSAccount], error) {
	if err := a.k.directory.Describe(ctx, req.Msg.GetName(), req.Msg.GetTitle(), req.Msg.GetDescription()); err != nil {
		return nil, err
	}
	return a.account(ctx, req.Msg.GetName())
}

func (a *api) SetKMSAccountQuota(ctx context.Context, req *connect.Request[strongroomv1.SetKMSAccountQuotaRequest]) (*connect.Response[strongroomv1.KMSAccount], error) {
	q, err := readQuota(req.Msg.GetQuota())
	if err == nil {
		err = a.k.directory.SetAccountQuota(ctx, req.Msg.GetName(), q)
	}
	if err != nil {
		return nil, err
	}
	return a.account(ctx, req.Msg.GetName())
}

func (a *api) SetKMSAccountDisabled(ctx context.Context, req *connect.Request[strongroomv1.SetKMSAccountDisabledRequest]) (*connect.Response[strongroomv1.KMSAccount], error) {
	if err := a.k.directory.SetAccountDisabled(ctx, req.Msg.GetName(), req.Msg.GetDisabled()); err != nil {
		return nil, err
	}
	return a.account(ctx, req.Msg.GetName())
}

func (a *api) DeleteKMSAccount(ctx context.Context, req *connect.Request[strongroomv1.DeleteKMSAccountRequest]) (*connect.Response[strongroomv1.DeleteKMSAccountResponse], error) {
	name := req.Msg.GetName()
	err := a.k.directory.DeleteAccount(ctx, name, func(ctx context.Context, tx *store.Tx) error {
		return a.k.access.CheckNone(ctx, tx, accountObject(name))
	})
	if err != nil {
		return nil, err
	}
	if err := a.k.usage.Forget(ctx, usage.Account(name)); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.DeleteKMSAccountResponse{}), nil
}
