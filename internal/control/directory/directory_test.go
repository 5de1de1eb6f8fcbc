package directory

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/store"
	"strongroom/internal/crypto/clientcert"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type bench struct {
	*Directory
	t   *testing.T
	now time.Time
}

func newBench(t *testing.T) *bench {
	t.Helper()
	db, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(t.TempDir(), "db"), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	b := &bench{t: t, now: time.Now()}
	b.open(db)
	b.check(b.CreateGroup(t.Context(), Group{Name: "g"}))
	for _, app := range []string{"a", "b"} {
		b.check(b.CreateApplication(t.Context(), Application{Name: app, Group: "g"}))
	}
	return b
}

func (b *bench) open(db *store.DB) {
	b.t.Helper()
	var err error
	if b.Directory, err = Open(b.t.Context(), db); err != nil {
		b.t.Fatal(err)
	}
	b.Directory.now = func() time.Time { return b.now }
}

func (b *bench) check(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) wantKind(what string, err error, kind errs.Kind) {
	b.t.Helper()
	if errs.KindOf(err) != kind {
		b.t.Errorf("%s: %v, want kind %v", what, err, kind)
	}
}

func (b *bench) certificate(life time.Duration) *x509.Certificate {
	b.t.Helper()
	der, _, _, err := clientcert.New("x", life)
	b.check(err)
	cert, err := x509.ParseCertificate(der)
	b.check(err)
	return cert
}

func TestPasswords(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	old, oldPassword, err := b.AddPassword(t.Context(), "a", 0)
	b.check(err)
	_, newPassword, err := b.AddPassword(t.Context(), "a", time.Hour)
	b.check(err)
	if bytes.Equal(oldPassword, newPassword) || len(oldPassword) < 43 {
		t.Fatal("passwords are not random")
	}
	works := func(what string, password []byte, want bool) {
		t.Helper()
		app, group, err := b.Authenticate(Proof{User: "a", Password: password})
		if want && (err != nil || app.Name != "a" || group.Name != "g") {
			t.Errorf("%s: %v, %v, %v", what, app.Name, group.Name, err)
		}
		if !want {
			b.wantKind(what, err, errs.Denied)
		}
	}
	works("old", oldPassword, true)
	works("new, at the same time", newPassword, true)
	works("empty", []byte{}, false)
	works("cut", oldPassword[1:], false)
	_, _, err = b.Authenticate(Proof{User: "b", Password: oldPassword})
	b.wantKind("another's", err, errs.Denied)
	b.check(b.Revoke(t.Context(), "a", old.ID))
	works("revoked", oldPassword, false)
	b.wantKind("revoked twice", b.Revoke(t.Context(), "a", old.ID), errs.NotFound)
	works("new", newPassword, true)
	b.now = b.now.Add(time.Hour)
	works("expired", newPassword, false)

	b.open(b.db) // after a restart
	works("revoked, after a restart", oldPassword, false)
	app, err := b.Application("a")
	b.check(err)
	if text := fmt.Sprintf("%+v", app); bytes.Contains([]byte(text), newPassword) {
		t.Error("a password is kept")
	}
}

func TestCertificates(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	cert := b.certificate(time.Hour)
	_, _, err := b.Authenticate(Proof{Certificate: cert})
	b.wantKind("not known", err, errs.Denied)
	_, err = b.AddCertificate(t.Context(), "a", cert)
	b.check(err)
	_, err = b.AddCertificate(t.Context(), "a", cert)
	b.wantKind("twice", err, errs.Exists)
	_, err = b.AddCertificate(t.Context(), "b", cert)
	b.wantKind("for two", err, errs.Exists)
	if app, _, err := b.Authenticate(Proof{Certificate: cert}); err != nil || app.Name != "a" {
		t.Errorf("known: %v, %v", app.Name, err)
	}
	_, password, err := b.AddPassword(t.Context(), "b", 0)
	b.check(err)
	_, _, err = b.Authenticate(Proof{Certificate: cert, User: "b", Password: password})
	b.wantKind("certificate of one, password of another", err, errs.Denied)
	if app, _, err := b.Authenticate(Proof{Certificate: b.certificate(time.Hour), User: "b", Password: password}); err != nil || app.Name != "b" {
		t.Errorf("a password over a certificate that is not known: %v, %v", app.Name, err)
	}
	b.check(b.SetDisabled(t.Context(), "a", true))
	_, _, err = b.Authenticate(Proof{Certificate: cert})
	b.wantKind("disabled", err, errs.Denied)
	b.check(b.SetDisabled(t.Context(), "a", false))
	b.now = b.now.Add(2 * time.Hour)
	_, _, err = b.Authenticate(Proof{Certificate: cert})
	b.wantKind("expired", err, errs.Denied)
	_, err = b.AddCertificate(t.Context(), "b", cert)
	b.wantKind("expired, added", err, errs.Invalid)
	b.now = b.now.Add(-2 * time.Hour)
	b.check(b.DeleteApplication(t.Context(), "a"))
	_, _, err = b.Authenticate(Proof{Certificate: cert})
	b.wantKind("deleted", err, errs.Denied)
	_, err = b.AddCertificate(t.Context(), "b", cert)
	b.check(err)
}

func TestRefused(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx, long := t.Context(), string(bytes.Repeat([]byte{'x'}, nameMax+1))
	for _, name := range []string{"", long, "a/", "/b", "a/b/c", "default/b", "a b/c", string(bytes.Repeat([]byte{'x'}, accountNameMax+1)) + "/b", "a b", "ä"} {
		b.wantKind("group", b.CreateGroup(ctx, Group{Name: name}), errs.Invalid)
		b.wantKind("application", b.CreateApplication(ctx, Application{Name: name, Group: "g"}), errs.Invalid)
	}
	b.wantKind("group twice", b.CreateGroup(ctx, Group{Name: "g"}), errs.Exists)
	b.wantKind("application twice", b.CreateApplication(ctx, Application{Name: "a", Group: "g"}), errs.Exists)
	b.wantKind("no group", b.CreateApplication(ctx, Application{Name: "c", Group: "none"}), errs.NotFound)
	b.wantKind("title", b.CreateGroup(ctx, Group{Name: "h", Title: string(bytes.Repeat([]byte{'x'}, titleMax+1))}), errs.Invalid)
	b.wantKind("policy", b.SetPolicy(ctx, "g", Policy{Operations: make([]string, listMax+1)}, nil), errs.Invalid)
	b.wantKind("policy of none", b.SetPolicy(ctx, "none", Policy{}, nil), errs.NotFound)
	for _, q := range []Quota{{Keys: -1}, {Operations: -1, Period: time.Hour}, {Period: time.Hour}, {Operations: 1}, {Operations: 1, Period: time.Second}, {Operations: 1, Period: time.Minute + 1}, {Operations: 1, Period: 2 * periodMax}} {
		b.wantKind("group's quota", b.SetGroupQuota(ctx, "g", q), errs.Invalid)
		b.wantKind("application's quota", b.SetApplicationQuota(ctx, "a", q), errs.Invalid)
	}
	b.wantKind("keys of an application", b.SetApplicationQuota(ctx, "a", Quota{Keys: 1}), errs.Invalid)
	b.wantKind("quota of no group", b.SetGroupQuota(ctx, "none", Quota{Keys: 1}), errs.NotFound)
	b.wantKind("quota of no application", b.SetApplicationQuota(ctx, "none", Quota{}), errs.NotFound)
	for _, r := range []Rotation{{EveryDays: -1}, {DeactivateAfterDays: -1, EveryDays: 1}, {EveryDays: rotationMax + 1}, {DeactivateAfterDays: rotationMax + 1}} {
		b.wantKind("rotation", b.SetRotation(ctx, "g", r), errs.Invalid)
	}
	b.wantKind("rotation of no group", b.SetRotation(ctx, "none", Rotation{}), errs.NotFound)
	_, _, err := b.AddPassword(ctx, "none", 0)
	b.wantKind("password of none", err, errs.NotFound)
	b.wantKind("delete none", b.DeleteApplication(ctx, "none"), errs.NotFound)
	for range credentialMax {
		_, _, err := b.AddPassword(ctx, "a", 0)
		b.check(err)
	}
	_, _, err = b.AddPassword(ctx, "a", 0)
	b.wantKind("one credential too many", err, errs.InvalidState)
	b.check(b.SetPolicy(ctx, "g", Policy{NoExport: true}, nil))
	if g := b.Groups(); len(g) != 1 || !g[0].Policy.NoExport || len(b.Applications()) != 2 {
		t.Errorf("groups %+v", g)
	}
}
