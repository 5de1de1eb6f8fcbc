package kms

import (
	"path/filepath"
	"testing"

	"github.com/ovh/kmip-go"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/errs"
)

// TestRestoreRevokesAgain: what the audit log says was revoked after a backup is so in
// the KMS that is restored from it, and nobody is logged in.
func TestRestoreRevokesAgain(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	local := b.local(t).KMS()
	passwords := map[string][]string{}
	var stolen string
	for _, app := range []string{"kept", "gone", "again"} {
		do(t, local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: app, Group: FirstGroup})
		for range 2 {
			made := do(t, local.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: app})
			passwords[app] = append(passwords[app], string(made.GetPassword()))
			if app == "kept" && stolen == "" {
				stolen = made.GetCredential().GetId()
			}
		}
		if app == "again" { // that it was deleted once, before the backup, is nothing to its successor
			do(t, local.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: app})
			do(t, local.CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: app, Group: FirstGroup})
			passwords[app] = []string{string(do(t, local.CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: app}).GetPassword())}
		}
	}
	ann := b.person(t, "ann", true)
	token := do(t, ann.Access().CreateToken, &strongroomv1.CreateTokenRequest{}).GetToken()
	req, key := newRecipient(t)
	file, _ := takeBackup(t, backupClient(t, b.cfg.LocalSocket), req)
	do(t, local.RevokeKMSCredential, &strongroomv1.RevokeKMSCredentialRequest{Application: "kept", Id: stolen})
	do(t, local.DeleteKMSApplication, &strongroomv1.DeleteKMSApplicationRequest{Name: "gone"})
	b.stop()

	restored := filepath.Join(t.TempDir(), "kms")
	r, err := Restore(ctx, configOf(t, restored), file, key, Since{AuditLogs: []string{filepath.Join(dir, auditName)}})
	if err != nil || len(r.Revoked) != 2 {
		t.Fatalf("revoked: %q, %v", r.Revoked, err)
	}
	b = start(t, restored)
	conn := dial(t, b.addr, tlsOf(t, restored))
	for _, c := range []struct {
		app  string
		at   int
		want kmip.ResultReason
	}{
		{"kept", 0, kmip.ResultReasonAuthenticationNotSuccessful},
		{"kept", 1, 0},
		{"gone", 0, kmip.ResultReasonAuthenticationNotSuccessful},
		{"again", 0, 0},
	} {
		if item := ask(t, conn, user(c.app, passwords[c.app][c.at]), newAES("")); item.ResultReason != c.want {
			t.Errorf("password %d of application %s: reason %v, want %v", c.at, c.app, item.ResultReason, c.want)
		}
	}
	api, err := client.New(client.Config{Server: "https://" + b.apiAddress.String(), CA: caOf(t, restored), Token: token})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	_, err = client.Call(ctx, api.Session().WhoAmI, &strongroomv1.WhoAmIRequest{})
	wantKind(t, "a token from before", err, errs.Denied)
	login(t, b.apiAddress.String(), restored, "ann", ann.password)
	b.stop()
	b.checkAudit(t, "local administrator kms.revokeAgain application/kept success", "local administrator kms.revokeAgain application/gone success")
}
