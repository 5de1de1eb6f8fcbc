package kms

import (
	"path/filepath"
	"testing"

	"github.com/ovh/kmip-go/payloads"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/errs"
)

// TestRolesOnSeveralObjects gives a user of an account roles on two groups and takes
// them: at once, with what the user has approved by them.
func TestRolesOnSeveralObjects(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	acme, evil := b.tenant(t, "acme"), b.tenant(t, "evil")
	const prod, test = "/account/acme/group/prod", "/account/acme/group/test"
	do(t, acme.admin.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/test"})
	do(t, acme.admin.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "acme/op", Password: []byte("a password that is long enough"), Roles: []string{access.ReadOnly}, Object: test})
	op := login(t, b.apiAddress.String(), dir, "acme/op", "a password that is long enough")
	op.change(t, "a password that nobody else has")
	sees := func(group string) error {
		_, err := client.Call(ctx, op.KMS().GetKMSGroup, &strongroomv1.GetKMSGroupRequest{Name: group})
		return err
	}
	changes := func(group string) error {
		_, err := client.Call(ctx, op.KMS().SetKMSGroupQuota, &strongroomv1.SetKMSGroupQuotaRequest{Name: group})
		return err
	}
	wantKind(t, "a group without a role", sees("acme/prod"), errs.Denied)
	wantKind(t, "a change with a role to read", changes("acme/test"), errs.Denied)

	u := do(t, acme.admin.Access().GrantRoles, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.Administrator}, Object: test})
	if p := u.GetPermissions(); len(p) != 1 || len(p[0].GetRoles()) != 2 {
		t.Errorf("permissions: %v", p)
	}
	do(t, acme.admin.Access().GrantRoles, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.KeyCustodian}, Object: prod})
	for what, err := range map[string]error{"a change": changes("acme/test"), "a look": sees("acme/prod")} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	wantKind(t, "a change of the other group", changes("acme/prod"), errs.Denied)

	t.Log("what may not be given")
	for what, c := range map[string]struct {
		by   *client.Client
		m    *strongroomv1.GrantRolesRequest
		want errs.Kind
	}{
		"on everything":               {acme.admin.Client, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.ReadOnly}, Object: "/"}, errs.Denied},
		"in another account":          {acme.admin.Client, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.ReadOnly}, Object: "/account/evil"}, errs.Denied},
		"to a user of another":        {evil.admin.Client, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.ReadOnly}, Object: "/account/evil"}, errs.Denied},
		"to somebody of none":         {acme.admin.Client, &strongroomv1.GrantRolesRequest{Name: access.FirstUser, Roles: []string{access.ReadOnly}, Object: prod}, errs.Denied},
		"by who manages a group only": {op.Client, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.Administrator}, Object: "/account/acme"}, errs.Denied},
		"in another account, by root": {b.local(t), &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.ReadOnly}, Object: "/account/evil"}, errs.Invalid},
		"on a group that is not":      {acme.admin.Client, &strongroomv1.GrantRolesRequest{Name: "acme/op", Roles: []string{access.ReadOnly}, Object: "/account/acme/group/none"}, errs.NotFound},
	} {
		_, err := client.Call(ctx, c.by.Access().GrantRoles, c.m)
		wantKind(t, what, err, c.want)
	}

	t.Log("a custodian approves, and loses the role before it is used")
	do(t, acme.admin.KMS().SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "acme/prod", Quorum: &strongroomv1.KMSQuorum{Approvers: []string{"acme/op"}, Needed: 1, Destroy: true}})
	conn := dial(t, b.addr, tlsOf(t, dir))
	key := ask(t, conn, acme.user(), newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	destroy := &payloads.DestroyRequestPayload{UniqueIdentifier: key}
	approval := requestIn(t, ask(t, conn, acme.user(), destroy).ResultMessage)
	op.mustApprove(t, approval, "approved")
	do(t, acme.admin.Access().RevokeRoles, &strongroomv1.RevokeRolesRequest{Name: "acme/op", Object: prod})
	wantKind(t, "a group whose role was taken", sees("acme/prod"), errs.Denied)
	if a := do(t, acme.admin.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: approval}); a.GetState() != "pending" {
		t.Errorf("an approval of who may approve no more: %s", a.GetState())
	}
	if item := ask(t, conn, acme.user(), destroy); item.Err() == nil {
		t.Error("it was used")
	}
	do(t, acme.admin.Access().RevokeRoles, &strongroomv1.RevokeRolesRequest{Name: "acme/op", Roles: []string{access.Administrator}, Object: test})
	wantKind(t, "a role of two that was taken", changes("acme/test"), errs.Denied)
	if err := sees("acme/test"); err != nil {
		t.Errorf("the other role: %v", err)
	}
	_, err := client.Call(ctx, b.local(t).Access().RevokeRoles, &strongroomv1.RevokeRolesRequest{Name: access.FirstUser})
	wantKind(t, "the last administrator", err, errs.InvalidState)

	t.Log("the same after a restart")
	b.stop()
	b = start(t, dir)
	op = login(t, b.apiAddress.String(), dir, "acme/op", op.password)
	if err := sees("acme/test"); err != nil {
		t.Error(err)
	}
	if u := do(t, b.local(t).Access().GetUser, &strongroomv1.GetUserRequest{Name: "acme/op"}); len(u.GetPermissions()) != 1 || u.GetPermissions()[0].GetObject() != test {
		t.Errorf("after a restart: %v", u)
	}
	b.stop()
	b.checkAudit(t, "user:acme/admin AccessService/GrantRoles user/acme/op success", "user:acme/admin AccessService/RevokeRoles user/acme/op success",
		"user:evil/admin AccessService/GrantRoles user/acme/op denied", "local administrator AccessService/RevokeRoles user/administrator error")
}
