package directory

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
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
		who, err := b.Authenticate(Proof{User: "a", Password: password})
		if want && (err != nil || who.Application.Name != "a" || who.Group.Name != "g" || (who.Credential == old.ID) != bytes.Equal(password, oldPassword)) {
			t.Errorf("%s: %+v, %v", what, who, err)
		}
		if !want {
			b.wantKind(what, err, errs.Denied)
		}
	}
	works("old", oldPassword, true)
	works("new, at the same time", newPassword, true)
	works("empty", []byte{}, false)
	works("cut", oldPassword[1:], false)
	_, err = b.Authenticate(Proof{User: "b", Password: oldPassword})
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
	_, err := b.Authenticate(Proof{Certificate: cert})
	b.wantKind("not known", err, errs.Denied)
	added, err := b.AddCertificate(t.Context(), "a", cert)
	b.check(err)
	_, err = b.AddCertificate(t.Context(), "a", cert)
	b.wantKind("twice", err, errs.Exists)
	_, err = b.AddCertificate(t.Context(), "b", cert)
	b.wantKind("for two", err, errs.Exists)
	if who, err := b.Authenticate(Proof{Certificate: cert}); err != nil || who.Application.Name != "a" || who.Credential != added.ID {
		t.Errorf("known: %+v, %v", who, err)
	}
	_, password, err := b.AddPassword(t.Context(), "b", 0)
	b.check(err)
	_, err = b.Authenticate(Proof{Certificate: cert, User: "b", Password: password})
	b.wantKind("certificate of one, password of another", err, errs.Denied)
	if who, err := b.Authenticate(Proof{Certificate: b.certificate(time.Hour), User: "b", Password: password}); err != nil || who.Application.Name != "b" {
		t.Errorf("a password over a certificate that is not known: %+v, %v", who, err)
	}
	b.check(b.SetDisabled(t.Context(), "a", true))
	_, err = b.Authenticate(Proof{Certificate: cert})
	b.wantKind("disabled", err, errs.Denied)
	b.check(b.SetDisabled(t.Context(), "a", false))
	b.now = b.now.Add(2 * time.Hour)
	_, err = b.Authenticate(Proof{Certificate: cert})
	b.wantKind("expired", err, errs.Denied)
	_, err = b.AddCertificate(t.Context(), "b", cert)
	b.wantKind("expired, added", err, errs.Invalid)
	b.now = b.now.Add(-2 * time.Hour)
	b.check(b.DeleteApplication(t.Context(), "a"))
	_, err = b.Authenticate(Proof{Certificate: cert})
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

// newREST adds an application whose interface is REST.
func (b *bench) newREST(name string) {
	b.t.Helper()
	b.check(b.CreateApplication(b.t.Context(), Application{Name: name, Group: "g", Interface: REST}))
}

func TestAPIKeys(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.newREST("r")
	ctx := t.Context()
	old, oldKey, err := b.AddAPIKey(ctx, "r", 0)
	b.check(err)
	_, newKey, err := b.AddAPIKey(ctx, "r", time.Hour)
	b.check(err)
	if form := regexp.MustCompile(`^srk_[0-9a-f]{12}_[0-9a-f]{64}$`); bytes.Equal(oldKey, newKey) || !form.Match(oldKey) || !form.Match(newKey) {
		t.Fatal("API keys are not as docs/spec/kms-directory.md has them")
	}
	works := func(what string, key []byte, want bool) {
		t.Helper()
		who, err := b.Authenticate(Proof{Interface: REST, Key: key})
		if want && (err != nil || who.Application.Name != "r" || who.Group.Name != "g" || who.Credential != string(key[4:16])) {
			t.Errorf("%s: %+v, %v", what, who, err)
		}
		if !want {
			b.wantKind(what, err, errs.Denied)
		}
	}
	works("old", oldKey, true)
	works("new, at the same time", newKey, true)
	works("empty", []byte{}, false)
	works("cut", oldKey[:len(oldKey)-1], false)
	works("capitals", bytes.ToUpper(oldKey), false)
	works("the id of one, the secret of another", append(bytes.Clone(oldKey[:17]), newKey[17:]...), false)
	_, err = b.Authenticate(Proof{Interface: KMIP, Key: oldKey})
	b.wantKind("by KMIP", err, errs.Denied)
	_, _, err = b.AddAPIKey(ctx, "a", 0)
	b.wantKind("for an application with KMIP", err, errs.Invalid)
	_, _, err = b.AddAPIKey(ctx, "none", 0)
	b.wantKind("for none", err, errs.NotFound)
	b.check(b.Revoke(ctx, "r", old.ID))
	works("revoked", oldKey, false)
	works("new", newKey, true)
	b.now = b.now.Add(time.Hour)
	works("expired", newKey, false)
	b.now = b.now.Add(-time.Minute)
	b.open(b.db) // after a restart
	works("revoked, after a restart", oldKey, false)
	works("new, after a restart", newKey, true)
	b.check(b.SetDisabled(ctx, "r", true))
	works("disabled", newKey, false)
	app, err := b.Application("r")
	b.check(err)
	if text := fmt.Sprintf("%+v", app); bytes.Contains([]byte(text), newKey[17:]) {
		t.Error("an API key is kept")
	}
}

// TestAPIKeyVector is the test vector of docs/spec/kms-directory.md.
func TestAPIKeyVector(t *testing.T) {
	t.Parallel()
	spec, err := os.ReadFile("../../../docs/spec/kms-directory.md")
	if err != nil {
		t.Fatal(err)
	}
	key := regexp.MustCompile(`(?m)^    (srk_[0-9a-f_]+)\n    SHA-256: ([0-9a-f]{64})$`).FindSubmatch(spec)
	if key == nil {
		t.Fatal("the specification has no vector")
	}
	b := newBench(t)
	b.newREST("r")
	id, ok := apiKeyID(key[1])
	if !ok || id != "0123456789ab" {
		t.Fatalf("id %q, %v", id, ok)
	}
	b.check(b.changeApplication(t.Context(), "r", func(a *Application) error {
		a.Credentials = []Credential{{ID: id, Kind: APIKey, Hash: string(key[2])}}
		return nil
	}))
	if who, err := b.Authenticate(Proof{Interface: REST, Key: key[1]}); err != nil || who.Application.Name != "r" {
		t.Errorf("%+v, %v", who, err)
	}
}

// TestInterfaces: a credential is good for its application's interface alone,
// whatever its kind; and releases that know no interfaces get to see no others.
func TestInterfaces(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	b.wantKind("no such interface", b.CreateApplication(ctx, Application{Name: "x", Group: "g", Interface: "soap"}), errs.Invalid)
	before := store.NewTable[Application](b.db, "kms-application", 1) // as an older release reads it
	b.check(b.SetDisabled(ctx, "a", false))
	if all, err := before.List(ctx); err != nil || len(all) != 2 {
		t.Errorf("applications with KMIP, read by an older release: %v, %v", len(all), err)
	}
	b.newREST("r")
	b.wantKind("twice", b.CreateApplication(ctx, Application{Name: "r", Group: "g"}), errs.Exists)
	b.wantKind("twice, of the other interface", b.CreateApplication(ctx, Application{Name: "a", Group: "g", Interface: REST}), errs.Exists)
	if _, err := before.Get(ctx, "r"); !errors.Is(err, store.ErrNewerSchema) {
		t.Errorf("one with REST, read by an older release: %v", err)
	}
	for app, is := range map[string]Interface{"a": KMIP, "r": REST} {
		_, password, err := b.AddPassword(ctx, app, 0)
		b.check(err)
		cert := b.certificate(time.Hour)
		_, err = b.AddCertificate(ctx, app, cert)
		b.check(err)
		for _, by := range []Interface{KMIP, REST} {
			for what, p := range map[string]Proof{"password": {User: app, Password: password}, "certificate": {Certificate: cert}} {
				p.Interface = by
				got, err := b.Authenticate(p)
				if by == is && (err != nil || got.Application.Name != app) {
					t.Errorf("%s of %s by %v: %v", what, app, by, err)
				}
				if by != is {
					b.wantKind(what+" of "+app+" by "+by.String(), err, errs.Denied)
				}
			}
		}
	}
	_, key, err := b.AddAPIKey(ctx, "r", 0)
	b.check(err)
	cert := b.certificate(time.Hour)
	b.newREST("s")
	_, err = b.AddCertificate(ctx, "s", cert)
	b.check(err)
	_, err = b.Authenticate(Proof{Interface: REST, Certificate: cert, Key: key})
	b.wantKind("the certificate of one, the API key of another", err, errs.Denied)
	b.check(b.DeleteApplication(ctx, "r"))
	_, err = b.Authenticate(Proof{Interface: REST, Key: key})
	b.wantKind("deleted", err, errs.Denied)
}

// FuzzAPIKey: whatever is presented as an API key opens nothing, and does not
// break anything.
func FuzzAPIKey(f *testing.F) {
	f.Add([]byte("srk_0123456789ab_202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"))
	f.Add([]byte("srk_"))
	d := &Directory{now: time.Now, index: index{
		apps: map[string]Application{"r": {Name: "r", Interface: REST, Credentials: []Credential{{ID: "0123456789ab", Kind: APIKey, Hash: "00"}}}},
		keys: map[string]string{"0123456789ab": "r"},
	}}
	f.Fuzz(func(t *testing.T, key []byte) {
		if id, ok := apiKeyID(key); ok && (len(key) != apiKeySize || !bytes.HasPrefix(key, []byte(APIKeyPrefix+id+"_"))) {
			t.Errorf("id %q of %q", id, key)
		}
		if _, err := d.Authenticate(Proof{Interface: REST, Key: key}); err == nil {
			t.Errorf("%q is known", key)
		}
	})
}
