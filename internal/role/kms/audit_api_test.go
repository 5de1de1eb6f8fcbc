package kms

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go/payloads"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/errs"
)

// TestAuditOverTheAPI lists the log as administrators of everything, of an account
// and of a group, by pages and filters, and verifies it.
func TestAuditOverTheAPI(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	acme, evil := b.tenant(t, "acme"), b.tenant(t, "evil")
	conn := dial(t, b.addr, tlsOf(t, dir))
	key := ask(t, conn, acme.user(), newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	ask(t, conn, evil.user(), newAES(""))
	_, _ = client.Call(ctx, evil.admin.KMS().GetKMSGroup, &strongroomv1.GetKMSGroupRequest{Name: "acme/prod"})
	do(t, acme.admin.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "acme/test"})
	do(t, acme.admin.Access().CreateUser, &strongroomv1.CreateUserRequest{Name: "acme/op", Password: []byte("a password that is long enough"), Roles: []string{access.Auditor}, Object: "/account/acme/group/test"})
	op := login(t, b.apiAddress.String(), dir, "acme/op", "a password that is long enough")
	auditor := b.person(t, "auditor", false, access.Auditor)
	reader := b.person(t, "reader", false, access.ReadOnly)

	list := func(by *client.Client, m *strongroomv1.ListKMSAuditRequest) []*strongroomv1.KMSAuditRecord {
		t.Helper()
		return do(t, by.KMSAudit().ListKMSAudit, m).GetRecords()
	}
	textOf := func(records []*strongroomv1.KMSAuditRecord) string {
		var text strings.Builder
		for _, r := range records {
			text.WriteString(strings.Join([]string{r.GetSubject(), r.GetOperation(), r.GetObject(), r.GetOutcome()}, " ") + "\n")
		}
		return text.String()
	}
	wants := func(what, text string, has bool, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if strings.Contains(text, part) != has {
				t.Errorf("%s: %q (%v) in\n%s", what, part, has, text)
			}
		}
	}
	ofAcme := []string{
		"application:acme/db kmip.Create group/acme/prod/key/" + key + " success", "user:acme/admin KMSService/CreateKMSGroup group/acme/test success",
		stranger + " KMSService/GetKMSGroup group/acme/prod denied", "local administrator KMSService/CreateKMSAccount account/acme success",
		"anonymous SessionService/Login user/acme/op success",
	}
	all := textOf(list(auditor.Client, &strongroomv1.ListKMSAuditRequest{Limit: 1000}))
	wants("the auditor", all, true, ofAcme[0], "application:evil/db kmip.Create", "user:evil/admin KMSService/GetKMSGroup group/acme/prod denied", "auditor")
	own := textOf(list(acme.admin.Client, &strongroomv1.ListKMSAuditRequest{Limit: 1000}))
	wants("an account's administrator", own, true, ofAcme...)
	wants("an account's administrator", own, false, "evil", "auditor", "kms.")
	group := textOf(list(op.Client, &strongroomv1.ListKMSAuditRequest{}))
	wants("who may see a group", group, true, "CreateKMSGroup group/acme/test success")
	wants("who may see a group", group, false, "acme/prod", "account/acme", "user/")
	// Users whose names name no account are of the whole KMS, not of the account default.
	do(t, b.local(t).KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: "own"})
	dora := b.person(t, "dora", true)
	do(t, b.local(t).Access().GrantRoles, &strongroomv1.GrantRolesRequest{Name: "dora", Roles: []string{access.Auditor}, Object: "/account/default"})
	byDefault := textOf(list(dora.Client, &strongroomv1.ListKMSAuditRequest{Limit: 1000}))
	wants("an auditor of the account default", byDefault, true, "KMSService/CreateKMSGroup group/own success")
	wants("an auditor of the account default", byDefault, false, "user/", "acme", "evil")
	for _, by := range []*client.Client{acme.admin.Client, evil.admin.Client} {
		if text := textOf(list(by, &strongroomv1.ListKMSAuditRequest{Account: "none"})); text != "" {
			t.Errorf("an account that there is not: %s", text)
		}
	}
	if text := textOf(list(evil.admin.Client, &strongroomv1.ListKMSAuditRequest{Account: "acme"})); text != "" {
		t.Errorf("another account: %s", text)
	}
	_, err := client.Call(ctx, reader.KMSAudit().ListKMSAudit, &strongroomv1.ListKMSAuditRequest{})
	wantKind(t, "without the privilege", err, errs.Denied)

	t.Log("filters and pages")
	for what, c := range map[string]struct {
		m    *strongroomv1.ListKMSAuditRequest
		want int
	}{
		"object":    {&strongroomv1.ListKMSAuditRequest{Object: key}, 1},
		"subject":   {&strongroomv1.ListKMSAuditRequest{Subject: "application:acme/db", Operation: "kmip.Create"}, 1},
		"outcome":   {&strongroomv1.ListKMSAuditRequest{Account: "acme", Outcome: "denied"}, 1},
		"past":      {&strongroomv1.ListKMSAuditRequest{Until: timestamppb.New(time.Now().Add(-time.Hour))}, 0},
		"future":    {&strongroomv1.ListKMSAuditRequest{Since: timestamppb.New(time.Now().Add(2 * time.Hour))}, 0},
		"time":      {&strongroomv1.ListKMSAuditRequest{Object: key, Since: timestamppb.New(time.Now().Add(-time.Hour)), Until: timestamppb.New(time.Now())}, 1},
		"both":      {&strongroomv1.ListKMSAuditRequest{Object: key, Account: "evil"}, 0},
		"operation": {&strongroomv1.ListKMSAuditRequest{Operation: "kmip.Create", Account: "evil"}, 1},
	} {
		if records := list(auditor.Client, c.m); len(records) != c.want {
			t.Errorf("%s: %d records, want %d:\n%s", what, len(records), c.want, textOf(records))
		}
	}
	var paged []*strongroomv1.KMSAuditRecord
	for before := uint64(0); ; {
		page := do(t, acme.admin.KMSAudit().ListKMSAudit, &strongroomv1.ListKMSAuditRequest{Limit: 2, Before: before, Until: timestamppb.New(list(acme.admin.Client, &strongroomv1.ListKMSAuditRequest{Object: "group/acme/test", Limit: 1})[0].GetTime().AsTime().Add(time.Nanosecond))})
		paged = append(paged, page.GetRecords()...)
		if len(page.GetRecords()) > 2 {
			t.Fatalf("a page of %d", len(page.GetRecords()))
		}
		if before = page.GetNext(); before == 0 {
			break
		}
	}
	wants("by pages", textOf(paged), true, ofAcme[0], ofAcme[2], ofAcme[3])
	for i := range paged[1:] {
		if paged[i].GetSeq() <= paged[i+1].GetSeq() {
			t.Errorf("record %d, then %d", paged[i].GetSeq(), paged[i+1].GetSeq())
		}
	}
	for _, m := range []*strongroomv1.ListKMSAuditRequest{{Limit: -1}, {Limit: 1001}, {Object: strings.Repeat("x", 257)}} {
		_, err := client.Call(ctx, auditor.KMSAudit().ListKMSAudit, m)
		wantKind(t, "a request out of bounds", err, errs.Invalid)
	}

	t.Log("verified, and broken")
	rep := do(t, auditor.KMSAudit().VerifyKMSAudit, &strongroomv1.VerifyKMSAuditRequest{})
	if rep.GetFirst() != 1 || rep.GetLast() < 20 {
		t.Errorf("report: %v", rep)
	}
	do(t, auditor.KMSAudit().VerifyKMSAudit, &strongroomv1.VerifyKMSAuditRequest{Head: rep.GetHead()})
	_, err = client.Call(ctx, acme.admin.KMSAudit().VerifyKMSAudit, &strongroomv1.VerifyKMSAuditRequest{})
	wantKind(t, "the whole log, by an account's administrator", err, errs.Denied)
	_, err = client.Call(ctx, auditor.KMSAudit().VerifyKMSAudit, &strongroomv1.VerifyKMSAuditRequest{Head: "5:" + strings.Repeat("0", 64)})
	wantKind(t, "a head that was another", err, errs.Corrupt)
	_, err = client.Call(ctx, auditor.KMSAudit().VerifyKMSAudit, &strongroomv1.VerifyKMSAuditRequest{Head: "5"})
	wantKind(t, "no head", err, errs.Invalid)
	names, err := filepath.Glob(filepath.Join(dir, auditName, "*.jsonl"))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	intact, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(intact), "\n")
	cut := strings.Join(append(append([]string{}, lines[:8]...), lines[9:]...), "") // a record is gone
	if err := os.WriteFile(names[0], []byte(cut), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = client.Call(ctx, auditor.KMSAudit().VerifyKMSAudit, &strongroomv1.VerifyKMSAuditRequest{})
	if errs.KindOf(err) != errs.Corrupt || !strings.Contains(err.Error(), filepath.Base(names[0])+", after record ") {
		t.Errorf("a record is missing: %v", err)
	}
}
