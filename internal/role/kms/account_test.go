package kms

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/errs"
)

// do makes a call that must succeed.
func do[Req, Res any](t testing.TB, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), m *Req) *Res {
	t.Helper()
	res, err := client.Call(t.Context(), method, m)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// tenant is an account of a test with a group, an application and its
// administrator.
type tenant struct {
	name     string
	password string // of the application "NAME/db"
	admin    *person
}

func (b *bench) tenant(t testing.TB, name string) tenant {
	t.Helper()
	local := b.local(t)
	do(t, local.KMS().CreateKMSAccount, &strongroomv1.CreateKMSAccountRequest{Name: name, Title: "title of " + name})
	admin := b.person(t, name+"/admin", true, access.Administrator)
	do(t, admin.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: name + "/prod", Title: "group of " + name})
	do(t, admin.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: name + "/db", Group: name + "/prod"})
	made := do(t, admin.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: name + "/db"})
	if made.GetCredential().GetUser() != name+"/db" {
		t.Errorf("user name %s", made.GetCredential().GetUser())
	}
	return tenant{name, string(made.GetPassword()), admin}
}

// user is who an application's requests come from.
func (n tenant) user() func(*kmip.RequestHeader) { return user(n.name+"/db", n.password) }

func outcomeOf(item kmip.ResponseBatchItem) error { return item.Err() }

// fill sets the fields of a request as somebody would who is about what belongs to
// an account: by names of it, and nothing else.
func fill(m protoreflect.Message, procedure, account, approval string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		var v string
		switch string(f.Name()) {
		case "name":
			switch {
			case strings.Contains(procedure, "AccessService"):
				v = account + "/admin"
			case strings.Contains(procedure, "Account"):
				v = account
			case strings.Contains(procedure, "Group"):
				v = account + "/prod"
			default:
				v = account + "/db"
			}
		case "application":
			v = account + "/db"
		case "group":
			v = account + "/prod"
		case "account":
			v = account
		case "object":
			v = "/account/" + account
		case "id":
			v = approval
		case "password":
			m.Set(f, protoreflect.ValueOfBytes([]byte("a password that is long enough")))
		case "roles":
			list := m.Mutable(f).List()
			list.Append(protoreflect.ValueOfString(access.ReadOnly))
		}
		if v != "" && f.Kind() == protoreflect.StringKind {
			m.Set(f, protoreflect.ValueOfString(v))
		}
	}
}

// TestAccountsApart has the administrator of one account call every method about
// what belongs to another: none does anything, and none tells whether what it
// names is there.
func TestAccountsApart(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	acme, evil := b.tenant(t, "acme"), b.tenant(t, "evil")
	ann := b.person(t, "acme/ann", true, access.KeyCustodian)
	do(t, acme.admin.KMS().SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "acme/prod", Quorum: &strongroomv1.KMSQuorum{Approvers: []string{"acme/ann"}, Needed: 1, Destroy: true}})
	conn := dial(t, b.addr, tlsOf(t, dir))
	key := ask(t, conn, acme.user(), newAES("key of acme")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	approval := requestIn(t, ask(t, conn, acme.user(), &payloads.DestroyRequestPayload{UniqueIdentifier: key}).ResultMessage)

	token := do(t, evil.admin.Access().CreateToken, &strongroomv1.CreateTokenRequest{}).GetToken()
	transport := &http.Transport{TLSClientConfig: tlsOf(t, dir), ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	post := func(procedure string, body []byte) (string, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+b.apiAddress.String()+procedure, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		res, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.Status, string(text)
	}
	called := 0
	rules, err := serviceRules()
	if err != nil {
		t.Fatal(err)
	}
	for procedure, r := range rules {
		service, method, _ := strings.Cut(procedure[1:], "/")
		switch service {
		case "strongroom.v1.KMSService", "strongroom.v1.KMSApprovalService", "strongroom.v1.KMSAuditService", "strongroom.v1.AccessService":
		default:
			continue // not on this port, or the caller's own session
		}
		if r.Authenticated {
			continue // about the caller alone
		}
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service + "." + method))
		if err != nil {
			t.Fatal(err)
		}
		about := func(account, approval string) (string, string) {
			m := dynamicpb.NewMessage(d.(protoreflect.MethodDescriptor).Input())
			fill(m, procedure, account, approval)
			body, err := protojson.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			return post(procedure, body)
		}
		status, text := about("acme", approval)
		called++
		for _, secret := range []string{"title of acme", "group of acme", key, "key of acme"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s tells of another account: %s", procedure, text)
			}
		}
		if strings.HasPrefix(method, "List") || method == "GetKMS" {
			if status != "200 OK" || strings.Contains(text, "acme") {
				t.Errorf("%s: %s %s", procedure, status, text)
			}
			continue
		}
		if !strings.Contains(text, `"code":"permission_denied"`) && !strings.Contains(text, `"code":"not_found"`) {
			t.Errorf("%s: %s %s", procedure, status, text)
		}
		// Of an account, and a request, that there is not.
		noStatus, noText := about("none", "0123456789abcdef")
		if norm := strings.NewReplacer("none", "acme", "0123456789abcdef", approval).Replace(noText); norm != text || noStatus != status {
			t.Errorf("%s tells what there is:\n%s\n%s", procedure, text, noText)
		}
	}
	if called < 30 {
		t.Errorf("only %d methods were called", called)
	}

	t.Log("what is one's own is listed, and nothing else")
	if l := do(t, evil.admin.KMS().ListKMSAccounts, &strongroomv1.ListKMSAccountsRequest{}).GetAccounts(); len(l) != 1 || l[0].GetName() != "evil" {
		t.Errorf("accounts: %v", l)
	}
	if l := do(t, evil.admin.KMS().ListKMSGroups, &strongroomv1.ListKMSGroupsRequest{}).GetGroups(); len(l) != 1 || l[0].GetName() != "evil/prod" || l[0].GetAccount() != "evil" {
		t.Errorf("groups: %v", l)
	}
	if l := do(t, evil.admin.KMS().ListKMSApplications, &strongroomv1.ListKMSApplicationsRequest{}).GetApplications(); len(l) != 1 || l[0].GetName() != "evil/db" {
		t.Errorf("applications: %v", l)
	}
	if l := do(t, evil.admin.Access().ListUsers, &strongroomv1.ListUsersRequest{}).GetUsers(); len(l) != 1 || l[0].GetName() != "evil/admin" || l[0].GetObjects()[0] != "/account/evil" {
		t.Errorf("users: %v", l)
	}
	if l := do(t, acme.admin.KMSApproval().ListKMSApprovals, &strongroomv1.ListKMSApprovalsRequest{}).GetApprovals(); len(l) != 1 || l[0].GetId() != approval {
		t.Errorf("approvals: %v", l)
	}

	t.Log("nor by a group, an application, a user or an approver of one's own")
	_, err = client.Call(t.Context(), evil.admin.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "evil/x", Group: "acme/prod"})
	wantKind(t, "an application in another account's group", err, errs.Denied)
	_, err = client.Call(t.Context(), evil.admin.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "acme/x", Group: "evil/prod"})
	wantKind(t, "an application of another account", err, errs.Invalid)
	for _, object := range []string{"/account/acme", "/", "/account/evil/group/none"} {
		_, err = client.Call(t.Context(), evil.admin.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "evil/x", Password: []byte("a password that is long enough"), Roles: []string{access.ReadOnly}, Object: object})
		if err == nil {
			t.Errorf("a user with a permission on %s", object)
		}
	}
	_, err = client.Call(t.Context(), b.local(t).Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "evil/x", Password: []byte("a password that is long enough"), Roles: []string{access.ReadOnly}, Object: "/account/acme"})
	wantKind(t, "root gives a user of one account a role in another", err, errs.Invalid)
	for _, approver := range []string{"acme/ann", "acme/nobody"} {
		_, err = client.Call(t.Context(), evil.admin.KMS().SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "evil/prod", Quorum: &strongroomv1.KMSQuorum{Approvers: []string{approver}, Needed: 1}})
		wantKind(t, "an approver of another account", err, errs.Denied)
	}

	t.Log("clients see keys of their own account, though groups have the same name")
	if item := ask(t, conn, evil.user(), &payloads.GetRequestPayload{UniqueIdentifier: key}); item.ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("another account's key: %v", item.ResultReason)
	}
	found := ask(t, conn, evil.user(), &payloads.LocateRequestPayload{})
	if found.Err() != nil || len(found.ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier) != 0 {
		t.Errorf("located: %+v", found)
	}

	t.Log("administrators of everything manage all, those of an account theirs")
	ann.mustApprove(t, approval, "approved")
	for _, state := range []string{"pending", "approved"} {
		disabled := state == "pending"
		do(t, acme.admin.Access().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: "acme/ann", Disabled: disabled})
		if a := do(t, acme.admin.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: approval}); a.GetState() != state {
			t.Errorf("a request whose approver is disabled (%v): %s", disabled, a.GetState())
		}
	}
	if l := do(t, b.administrator(t).KMS().ListKMSGroups, &strongroomv1.ListKMSGroupsRequest{}).GetGroups(); len(l) != 3 {
		t.Errorf("all groups: %v", l)
	}
	if l := do(t, b.administrator(t).KMS().ListKMSGroups, &strongroomv1.ListKMSGroupsRequest{Account: "acme"}).GetGroups(); len(l) != 1 {
		t.Errorf("acme's groups: %v", l)
	}
	for what, call := range map[string]func() error{
		"another account": func() error {
			_, err := client.Call(t.Context(), acme.admin.KMS().CreateKMSAccount, &strongroomv1.CreateKMSAccountRequest{Name: "more"})
			return err
		},
		"its own quota": func() error {
			_, err := client.Call(t.Context(), acme.admin.KMS().SetKMSAccountQuota, &strongroomv1.SetKMSAccountQuotaRequest{Name: "acme"})
			return err
		},
		"its own end": func() error {
			_, err := client.Call(t.Context(), acme.admin.KMS().DeleteKMSAccount, &strongroomv1.DeleteKMSAccountRequest{Name: "acme"})
			return err
		},
		"the first group": func() error {
			_, err := client.Call(t.Context(), acme.admin.KMS().GetKMSGroup, &strongroomv1.GetKMSGroupRequest{Name: FirstGroup})
			return err
		},
		"the first administrator": func() error {
			_, err := client.Call(t.Context(), acme.admin.Access().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: access.FirstUser, Disabled: true})
			return err
		},
	} {
		wantKind(t, what, call(), errs.Denied)
	}
	do(t, acme.admin.KMS().DescribeKMSAccount, &strongroomv1.DescribeKMSAccountRequest{Name: "acme", Title: "Acme"})

	t.Log("a user of one group")
	do(t, acme.admin.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/test"})
	do(t, acme.admin.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "acme/tester", Group: "acme/test"})
	do(t, acme.admin.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "acme/op", Password: []byte("a password that is long enough"), Roles: []string{access.Administrator}, Object: "/account/acme/group/test"})
	op := login(t, b.apiAddress.String(), dir, "acme/op", "a password that is long enough")
	if l := do(t, op.KMS().ListKMSApplications, &strongroomv1.ListKMSApplicationsRequest{}).GetApplications(); len(l) != 1 || l[0].GetName() != "acme/tester" {
		t.Errorf("applications: %v", l)
	}
	do(t, op.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "acme/tester"})
	_, err = client.Call(t.Context(), op.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "acme/db"})
	wantKind(t, "an application of another group", err, errs.Denied)
	do(t, acme.admin.Access().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: "acme/op", Disabled: true})
	_, err = client.Call(t.Context(), op.KMS().ListKMSGroups, &strongroomv1.ListKMSGroupsRequest{})
	wantKind(t, "a user that is disabled", err, errs.Denied)
	if u := do(t, acme.admin.Access().SetUserDisabled, &strongroomv1.SetUserDisabledRequest{Name: "acme/op"}); u.GetDisabled() {
		t.Errorf("enabled again: %v", u)
	}
	login(t, b.apiAddress.String(), dir, "acme/op", "a password that is long enough")

	b.stop()
	b.checkAudit(t, "application:acme/db kmip.Create group/acme/prod/key/"+key+" success", "user:acme/admin KMSService/CreateKMSGroup group/acme/prod success",
		"user:evil/admin KMSService/GetKMSApplication application/acme/db denied", "user:acme/admin AccessService/SetUserDisabled user/acme/op success")
}

// TestAccountLife disables an account, bounds it, has it outlive a restart and a
// backup, and deletes another.
func TestAccountLife(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	acme := b.tenant(t, "acme")
	local := b.local(t).KMS()
	conn, others := dial(t, b.addr, tlsOf(t, dir)), dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	id := ask(t, conn, acme.user(), newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	get := &payloads.GetRequestPayload{UniqueIdentifier: id}

	t.Log("disabled: at once, on the connection that is open")
	do(t, local.SetKMSAccountDisabled, &strongroomv1.SetKMSAccountDisabledRequest{Name: "acme", Disabled: true})
	if item := ask(t, conn, acme.user(), get); item.ResultReason != kmip.ResultReasonPermissionDenied || item.ResultMessage != "your account is disabled" {
		t.Errorf("a disabled account's key: %v, %q", item.ResultReason, item.ResultMessage)
	}
	if item := ask(t, conn, user("acme/db", "wrong"), get); item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("a stranger learns of a disabled account: %v", item.ResultReason)
	}
	if err := outcomeOf(ask(t, others, nil, newAES(""))); err != nil {
		t.Errorf("the account default: %v", err)
	}
	do(t, local.SetKMSAccountDisabled, &strongroomv1.SetKMSAccountDisabledRequest{Name: "acme"})
	if err := outcomeOf(ask(t, conn, acme.user(), get)); err != nil {
		t.Errorf("enabled again: %v", err)
	}

	t.Log("a quota of all its groups together")
	do(t, local.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/test"})
	do(t, local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "acme/tester", Group: "acme/test"})
	made := do(t, local.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "acme/tester"})
	tester := user("acme/tester", string(made.GetPassword()))
	do(t, local.SetKMSAccountQuota, &strongroomv1.SetKMSAccountQuotaRequest{Name: "acme", Quota: &strongroomv1.KMSQuota{Keys: 2, Operations: 5, PeriodSeconds: 365 * 24 * 3600}})
	if err := outcomeOf(ask(t, conn, tester, newAES(""))); err != nil {
		t.Error(err)
	}
	if item := ask(t, conn, acme.user(), newAES("")); item.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(item.ResultMessage, "quota of account/acme is reached: 2 keys") {
		t.Errorf("a key beyond the account's quota: %v, %q", item.ResultReason, item.ResultMessage)
	}
	for range 4 {
		if err := outcomeOf(ask(t, conn, acme.user(), get)); err != nil {
			t.Error(err)
		}
	}
	if item := ask(t, conn, tester, &payloads.LocateRequestPayload{}); !strings.Contains(item.ResultMessage, "quota of account/acme is reached: 5 operations until ") {
		t.Errorf("an operation beyond the account's quota: %v, %q", item.ResultReason, item.ResultMessage)
	}
	a := do(t, local.GetKMSAccount, &strongroomv1.GetKMSAccountRequest{Name: "acme"})
	if u := a.GetUsage(); a.GetGroups() != 2 || a.GetApplications() != 2 || u.GetKeys() != 2 || u.GetOperations() != 7 || u.GetPeriodOperations() != 5 || u.GetRefused() != 2 {
		t.Errorf("account: %v", a)
	}
	b.wantMetrics(t, `strongroom_kms_account_keys{account="acme"} 2`, `strongroom_kms_account_keys_limit{account="acme"} 2`, `strongroom_kms_account_keys{account="default"} 1`,
		`strongroom_kms_group_keys{account="acme",group="test"} 1`, `strongroom_kms_application_operations_total{account="acme",application="tester",group="test"} 1`)

	t.Log("deleted only if nothing is in it")
	remove := func(name string) error {
		_, err := client.Call(t.Context(), local.DeleteKMSAccount, &strongroomv1.DeleteKMSAccountRequest{Name: name})
		return err
	}
	wantKind(t, "the account default", remove("default"), errs.InvalidState)
	wantKind(t, "with groups", remove("acme"), errs.InvalidState)
	wantKind(t, "none", remove("none"), errs.NotFound)
	do(t, local.CreateKMSAccount, &strongroomv1.CreateKMSAccountRequest{Name: "brief"})
	boss := b.person(t, "brief/boss", false, access.Administrator)
	wantKind(t, "with a user", remove("brief"), errs.InvalidState)
	do(t, boss.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "brief/idle", Password: []byte("a password that is long enough")})
	local2 := b.local(t).Access()
	do(t, local2.DeleteUser, &strongroomv1.DeleteUserRequest{Name: "brief/boss"})
	wantKind(t, "with a user without roles", remove("brief"), errs.InvalidState)
	do(t, local2.DeleteUser, &strongroomv1.DeleteUserRequest{Name: "brief/idle"})
	if err := remove("brief"); err != nil {
		t.Error(err)
	}
	_, err := client.Call(t.Context(), local2.CreateUser, &strongroomv1.CreateUserRequest{Name: "brief/x", Password: []byte("a password that is long enough")})
	wantKind(t, "a user of an account that is gone", err, errs.NotFound)
	_, err = client.Call(t.Context(), local.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "brief/g"})
	wantKind(t, "a group of an account that is gone", err, errs.NotFound)

	t.Log("kept: by a restart and by a backup")
	do(t, local.SetKMSAccountDisabled, &strongroomv1.SetKMSAccountDisabledRequest{Name: "acme", Disabled: true})
	req, opens := newRecipient(t)
	file, done := takeBackup(t, backupClient(t, b.cfg.LocalSocket), req)
	drilled, err := Drill(t.Context(), file, opens, t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil || done.GetKeys() != 3 {
		t.Errorf("drill: %+v, %v", drilled, err)
	}
	b.stop()
	b.checkAudit(t, "application:acme/db kmip.connect group/acme/prod denied", "local administrator KMSService/SetKMSAccountDisabled account/acme success")
	b = start(t, dir)
	conn = dial(t, b.addr, tlsOf(t, dir))
	if item := ask(t, conn, acme.user(), get); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("disabled, after a restart: %v", item.ResultReason)
	}
	kept := do(t, b.local(t).KMS().GetKMSAccount, &strongroomv1.GetKMSAccountRequest{Name: "acme"})
	if !proto.Equal(kept.GetQuota(), a.GetQuota()) || kept.GetTitle() != "title of acme" {
		t.Errorf("after a restart: %v", kept)
	}
}
