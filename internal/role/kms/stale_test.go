package kms

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"golang.org/x/time/rate"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// TestStaleDirectory has another node, which is a second directory in the same
// database, change what this one remembers: whom a call is about, what is listed, and
// which keys are rotated is as it is now.
func TestStaleDirectory(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	b := start(t, filepath.Join(t.TempDir(), "kms"))
	local := b.local(t)
	other, err := directory.Open(ctx, b.db)
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, group := range []string{"left", "right"} {
		do(t, local.KMS().CreateKMSGroup, &strongroomv1.CreateKMSGroupRequest{Name: group})
	}
	do(t, local.KMS().CreateKMSApplication, &strongroomv1.CreateKMSApplicationRequest{Name: "db", Group: "left"})
	operator := b.person(t, "operator", true)
	do(t, local.Access().GrantRoles, &strongroomv1.GrantRolesRequest{Name: "operator", Roles: []string{access.Administrator}, Object: "/account/default/group/left"})
	do(t, operator.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "db"})

	must(other.DeleteApplication(ctx, "db"))
	must(other.CreateApplication(ctx, directory.Application{Name: "db", Group: "right"}))
	_, err = client.Call(ctx, operator.KMS().CreateKMSPassword, &strongroomv1.CreateKMSPasswordRequest{Application: "db"})
	wantKind(t, "a credential of an application that has become another group's", err, errs.Denied)
	if app, err := other.Application("db"); err != nil || len(app.Credentials) != 0 {
		t.Errorf("it has %d credentials, %v", len(app.Credentials), err)
	}

	must(other.SetDisabled(ctx, "db", true))
	if !do(t, local.KMS().GetKMSApplication, &strongroomv1.GetKMSApplicationRequest{Name: "db"}).GetDisabled() {
		t.Error("an application that was disabled is shown as it was")
	}

	t.Log("rotation that was switched off")
	conn := dial(t, b.addr, tlsOf(t, b.cfg.DataDir, first(t, b.cfg.DataDir)))
	id := ask(t, conn, nil, newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	must(b.objects.Update(ctx, FirstGroup, func(tx kmipserver.Tx) error {
		o, err := tx.Get(id)
		if err != nil {
			return err
		}
		for i, a := range o.Attributes {
			if a.AttributeName == kmip.AttributeNameState {
				o.Attributes[i].AttributeValue = kmip.StateActive
			}
		}
		o.Attributes = append(o.Attributes, attributeOf(kmip.AttributeNameActivationDate, b.now().AddDate(0, 0, -2)))
		return tx.Put(o)
	}))
	server, err := kmipserver.New(kmipserver.Config{Store: b.objects, Authenticate: b.authenticate, TLS: b.tlsConfig(), Log: b.log, Observe: b.observe})
	must(err)
	must(b.directory.SetRotation(ctx, FirstGroup, directory.Rotation{EveryDays: 1}))
	must(other.SetRotation(ctx, FirstGroup, directory.Rotation{}))
	must(b.keepDatesOnce(ctx, server))
	if n := keysOf(t, b, FirstGroup); n != 1 {
		t.Errorf("%d keys: it was rotated", n)
	}
	must(other.SetRotation(ctx, FirstGroup, directory.Rotation{EveryDays: 1}))
	must(b.keepDatesOnce(ctx, server))
	if n := keysOf(t, b, FirstGroup); n != 2 {
		t.Errorf("%d keys: it was not rotated", n)
	}
}

func keysOf(t *testing.T, b *bench, group string) (n int) {
	t.Helper()
	if err := b.objects.View(t.Context(), group, func(v kmipserver.Reader) error {
		n = 0
		for _, err := range v.Find(kmipserver.Query{}) {
			if err != nil {
				return err
			}
			n++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestRevokedWhileWaiting revokes a credential while a request that came with it is
// made to wait: it is refused.
func TestRevokedWhileWaiting(t *testing.T) {
	t.Parallel()
	b := start(t, filepath.Join(t.TempDir(), "kms"))
	c, password, err := b.directory.AddPassword(t.Context(), FirstApplication, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Its next request is due in some seconds.
	limiter := rate.NewLimiter(rate.Every(3*time.Second), 1)
	limiter.Allow()
	k := &KMS{directory: b.directory, objects: b.objects, usage: b.usage, cfg: Config{MaxRequestsPerSecond: 1}}
	k.pace.limiters = map[string]*rate.Limiter{FirstApplication: limiter}
	answer := make(chan error)
	go func() {
		_, err := k.clientOf(t.Context(), directory.Proof{User: FirstApplication, Password: password})
		answer <- err
	}()
	eventually(t, "the request waits", func() bool { return limiter.Tokens() < 0 })
	if err := b.directory.Revoke(t.Context(), FirstApplication, c.ID); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "a request whose credential was revoked while it waited", <-answer, errs.Denied)
}
