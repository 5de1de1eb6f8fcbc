package kms

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// TestGroupsAreDeleted deletes a group, and then its account, each refused as long as
// something is in it, and makes both again: they have nothing of the former.
func TestGroupsAreDeleted(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	acme := b.tenant(t, "acme")
	kms, users := acme.admin.KMS(), acme.admin.Access()
	const prod = "/account/acme/group/prod"
	conn := dial(t, b.addr, tlsOf(t, dir))
	var ids []string
	for i := range 20 {
		ids = append(ids, ask(t, conn, acme.user(), newAES(fmt.Sprint("key ", i))).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier)
	}
	do(t, kms.SetKMSGroupPolicy, &strongroomv1.SetKMSGroupPolicyRequest{Name: "acme/prod", Policy: &strongroomv1.KMSPolicy{NoExport: true}})
	do(t, kms.SetKMSGroupQuota, &strongroomv1.SetKMSGroupQuotaRequest{Name: "acme/prod", Quota: &strongroomv1.KMSQuota{Operations: 1000, PeriodSeconds: 86400 * 365}})
	do(t, kms.SetKMSGroupRotation, &strongroomv1.SetKMSGroupRotationRequest{Name: "acme/prod", Rotation: &strongroomv1.KMSRotation{EveryDays: 1}})
	ann := b.person(t, "acme/ann", true, access.KeyCustodian)
	do(t, users.GrantRoles, &strongroomv1.GrantRolesRequest{Name: "acme/ann", Roles: []string{access.KeyCustodian}, Object: prod})
	quorum := &strongroomv1.KMSQuorum{Approvers: []string{"acme/ann"}, Needed: 1, Destroy: true}
	do(t, kms.SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "acme/prod", Quorum: quorum})
	destroy := func(id string) {
		t.Helper()
		p := &payloads.DestroyRequestPayload{UniqueIdentifier: id}
		ann.mustApprove(t, requestIn(t, ask(t, conn, acme.user(), p).ResultMessage), "approved")
		if item := ask(t, conn, acme.user(), p); item.Err() != nil {
			t.Fatal(item.ResultMessage)
		}
	}
	refused := func(part, hint string) {
		t.Helper()
		_, err := client.Call(ctx, kms.DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: "acme/prod"})
		if errs.KindOf(err) != errs.InvalidState || !strings.Contains(err.Error(), part) || !strings.Contains(errs.HintOf(err), hint) {
			t.Errorf("%v, hint %q; want %q, hint %q", err, errs.HintOf(err), part, hint)
		}
	}
	refused("1 applications, acme/db among them", "kms app delete acme/db")
	for _, id := range ids[1:] {
		destroy(id)
	}
	ask(t, conn, acme.user(), &payloads.DestroyRequestPayload{UniqueIdentifier: ids[0]}) // a request that is open
	do(t, kms.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: "acme/db"})
	refused("user:acme/ann has a permission", "user revoke acme/ann --on "+prod)
	do(t, users.RevokeRoles, &strongroomv1.RevokeRolesRequest{Name: "acme/ann", Object: prod})
	refused("1 keys or other objects", "kms group show acme/prod")
	_, existing := client.Call(ctx, kms.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/prod"})
	wantKind(t, "a group that is there, with keys", existing, errs.Exists)

	t.Log("an application of the same name has nothing approved, and the keys are as they were")
	do(t, kms.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "acme/db", Group: "acme/prod"})
	acme.password = string(do(t, kms.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "acme/db"}).GetPassword())
	located := func() int {
		t.Helper()
		item := ask(t, conn, acme.user(), &payloads.LocateRequestPayload{})
		if item.Err() != nil {
			t.Fatal(item.ResultMessage)
		}
		return len(item.ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier)
	}
	if n := located(); n != 1 {
		t.Errorf("after refusals %d keys are located", n)
	}
	if item := ask(t, conn, acme.user(), &payloads.GetAttributesRequestPayload{UniqueIdentifier: ids[1]}); item.Err() != nil {
		t.Errorf("a destroyed key, after refusals: %v", item.ResultMessage)
	}
	destroy(ids[0])
	do(t, kms.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: "acme/db"})
	do(t, kms.DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: "acme/prod"})
	_, err := client.Call(ctx, kms.DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: "acme/prod"})
	wantKind(t, "a group that is gone", err, errs.NotFound)
	if l := do(t, acme.admin.KMSApproval().ListKMSApprovals, &strongroomv1.ListKMSApprovalsRequest{All: true}).GetApprovals(); len(l) != 0 {
		t.Errorf("requests of a group that is gone: %v", l)
	}

	t.Log("a request that was under way makes nothing in a group that is gone")
	item := &kmipserver.Object{ID: uuid.Must(uuid.NewV7()).String(), Type: kmip.ObjectTypeSymmetricKey}
	err = b.objects.Update(ctx, "acme/prod", func(tx kmipserver.Tx) error { return tx.Put(item) })
	if refusal := (*kmipserver.Refusal)(nil); !errors.As(err, &refusal) || refusal.Reason != kmip.ResultReasonPermissionDenied {
		t.Errorf("an object in a group that is gone: %v", err)
	}

	t.Log("an object that is there all the same keeps its name from being used")
	objects, key := store.NewRawTable(b.db, "kms-object"), "acme%2Fprod/"+item.ID
	if err := b.db.Txn(ctx, func(tx *store.Tx) error { return objects.In(tx).Set(key, []byte("left over")) }); err != nil {
		t.Fatal(err)
	}
	_, err = client.Call(ctx, kms.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/prod"})
	wantKind(t, "a name with an object", err, errs.InvalidState)
	if err := b.db.Txn(ctx, func(tx *store.Tx) error { return objects.In(tx).Delete(ctx, key) }); err != nil {
		t.Fatal(err)
	}

	t.Log("again, with nothing of the former")
	g := do(t, kms.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/prod"})
	if g.GetPolicy().GetNoExport() || g.GetQuota().GetOperations() != 0 || g.GetRotation().GetEveryDays() != 0 || g.GetQuorum().GetNeeded() != 0 ||
		g.GetUsage().GetOperations() != 0 || g.GetUsage().GetKeys() != 0 || g.GetUsage().GetLastUse() != nil {
		t.Errorf("the new group has %v", g)
	}
	_, err = client.Call(ctx, ann.KMSApproval().GetKMSApproval, &strongroomv1.GetKMSApprovalRequest{Id: "0123456789abcdef"})
	wantKind(t, "approvals", err, errs.Denied)
	do(t, kms.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "acme/db", Group: "acme/prod"})
	acme.password = string(do(t, kms.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "acme/db"}).GetPassword())
	if n := located(); n != 0 {
		t.Errorf("the new group has %d objects", n)
	}
	again := ask(t, conn, acme.user(), newAES("key 1"))
	if again.Err() != nil {
		t.Fatal(again.ResultMessage)
	}
	if item := ask(t, conn, acme.user(), &payloads.GetAttributesRequestPayload{UniqueIdentifier: ids[1]}); item.ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("a destroyed key of the former: %v", item.ResultReason)
	}
	id := again.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	if item := ask(t, conn, acme.user(), &payloads.DestroyRequestPayload{UniqueIdentifier: id}); item.Err() != nil {
		t.Errorf("destroyed without a quorum: %v", item.ResultMessage)
	}

	t.Log("the account, likewise")
	local := b.local(t)
	_, err = client.Call(ctx, local.KMS().DeleteKMSAccount, &strongroomv1.DeleteKMSAccountRequest{Name: "acme"})
	if errs.KindOf(err) != errs.InvalidState || !strings.Contains(errs.HintOf(err), "kms group delete acme/prod") {
		t.Errorf("an account with a group: %v, %q", err, errs.HintOf(err))
	}
	do(t, local.KMS().SetKMSAccountQuota, &strongroomv1.SetKMSAccountQuotaRequest{Name: "acme", Quota: &strongroomv1.KMSQuota{Operations: 1000, PeriodSeconds: 86400 * 365}})
	if item := ask(t, conn, acme.user(), &payloads.LocateRequestPayload{}); item.Err() != nil {
		t.Fatal(item.ResultMessage)
	}
	do(t, kms.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: "acme/db"})
	do(t, kms.DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: "acme/prod"})
	for _, name := range []string{"acme/ann", "acme/admin"} {
		do(t, local.Access().DeleteUser, &strongroomv1.DeleteUserRequest{Name: name})
	}
	do(t, local.KMS().DeleteKMSAccount, &strongroomv1.DeleteKMSAccountRequest{Name: "acme"})
	fresh := b.tenant(t, "acme")
	a := do(t, local.KMS().SetKMSAccountQuota, &strongroomv1.SetKMSAccountQuotaRequest{Name: "acme", Quota: &strongroomv1.KMSQuota{Operations: 1000, PeriodSeconds: 86400 * 365}})
	if a.GetUsage().GetPeriodOperations() != 0 || a.GetUsage().GetOperations() != 0 {
		t.Errorf("the new account has %v", a)
	}
	for _, r := range do(t, fresh.admin.KMSAudit().ListKMSAudit, &strongroomv1.ListKMSAuditRequest{Limit: 1000}).GetRecords() {
		if strings.Contains(r.GetSubject()+r.GetObject(), "ann") || strings.Contains(r.GetOperation(), "Destroy") {
			t.Errorf("the new account's administrator sees %v", r)
		}
	}
	if len(do(t, fresh.admin.Access().ListUsers, &strongroomv1.ListUsersRequest{}).GetUsers()) != 1 {
		t.Error("the new account has users of the former")
	}
	b.stop()
	b.checkAudit(t, "user:acme/admin KMSService/DeleteKMSGroup group/acme/prod success")
}

// TestGroupDeletionBrokenOff: wherever a crash ends the deletion of a group, it can be
// repeated, or the name be used again with nothing of the former.
func TestGroupDeletionBrokenOff(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	acme := b.tenant(t, "acme")
	kms := acme.admin.KMS()
	b.person(t, "acme/ann", true, access.KeyCustodian)
	conn := dial(t, b.addr, tlsOf(t, dir))
	fill := func(keys int) {
		t.Helper()
		for range keys {
			id := ask(t, conn, acme.user(), newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
			if item := ask(t, conn, acme.user(), &payloads.DestroyRequestPayload{UniqueIdentifier: id}); item.Err() != nil {
				t.Fatal(item.ResultMessage)
			}
		}
		id := ask(t, conn, acme.user(), newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
		do(t, kms.SetKMSGroupQuorum, &strongroomv1.SetKMSGroupQuorumRequest{Name: "acme/prod", Quorum: &strongroomv1.KMSQuorum{Approvers: []string{"acme/ann"}, Needed: 1, Destroy: true}})
		requestIn(t, ask(t, conn, acme.user(), &payloads.DestroyRequestPayload{UniqueIdentifier: id}).ResultMessage)
		if err := b.objects.Update(ctx, "acme/prod", func(tx kmipserver.Tx) error { // as if it were approved
			o, err := tx.Get(id)
			if err != nil {
				return err
			}
			o.Material = nil
			o.Attributes = append(slices.DeleteFunc(slices.Clone(o.Attributes), func(a kmip.Attribute) bool { return a.AttributeName == kmip.AttributeNameState }),
				kmip.Attribute{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateDestroyed})
			return tx.Put(o)
		}); err != nil {
			t.Fatal(err)
		}
		do(t, kms.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: "acme/db"})
	}
	anew := func() {
		t.Helper()
		g := do(t, kms.CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/prod"})
		if g.GetUsage().GetOperations() != 0 || g.GetQuorum().GetNeeded() != 0 {
			t.Errorf("the new group has %v", g)
		}
		if l := do(t, acme.admin.KMSApproval().ListKMSApprovals, &strongroomv1.ListKMSApprovalsRequest{All: true}).GetApprovals(); len(l) != 0 {
			t.Errorf("the new group has requests: %v", l)
		}
		do(t, kms.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "acme/db", Group: "acme/prod"})
		acme.password = string(do(t, kms.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "acme/db"}).GetPassword())
	}
	t.Log("some of the objects are gone")
	fill(12)
	some := store.NewRawTable(b.db, "kms-object")
	if err := b.db.Txn(ctx, func(tx *store.Tx) error {
		all, err := some.In(tx).Entries(ctx, "acme%2Fprod/")
		if err != nil || len(all) != 13 {
			return fmt.Errorf("%d objects, %w", len(all), err)
		}
		for _, e := range all[:8] {
			if err := some.In(tx).Delete(ctx, e.Key); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	do(t, kms.DeleteKMSGroup, &strongroomv1.DeleteKMSGroupRequest{Name: "acme/prod"})
	anew()
	t.Log("all objects, and the group; not what was counted and asked for")
	fill(1)
	if err := b.objects.Purge(ctx, "acme/prod"); err != nil {
		t.Fatal(err)
	}
	if err := b.directory.DeleteGroup(ctx, "acme/prod", func(context.Context, *store.Tx, directory.Group) error { return nil }); err != nil {
		t.Fatal(err)
	}
	anew()
}
