package access_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/access"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// quick is the cheapest hashing there is: tests are about logic.
var quick = access.Hashing{Time: 1, MemoryKiB: 8, Threads: 1}

func open(t *testing.T) (*access.Control, *store.DB) {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c, err := access.New(access.Config{DB: db, Hashing: quick})
	if err != nil {
		t.Fatal(err)
	}
	return c, db
}

// withAdmin returns a control whose first administrator is there, and his
// password.
func withAdmin(t *testing.T) (*access.Control, string) {
	t.Helper()
	c, _ := open(t)
	password := ""
	if _, err := c.EnsureAdministrator(t.Context(), func(_ string, p []byte) error { password = string(p); return nil }); err != nil {
		t.Fatal(err)
	}
	return c, password
}

const goodPassword = "correct horse battery"

// peer is where tests log in from.
const peer = "192.0.2.1:1234"

func create(t *testing.T, c *access.Control, name string, roles ...string) access.Principal {
	t.Helper()
	if err := c.CreateUser(t.Context(), name, []byte(goodPassword), roles); err != nil {
		t.Fatal(err)
	}
	return access.Principal{Kind: access.UserPrincipal, Name: name}
}

func wantKind(t *testing.T, what string, err error, want errs.Kind) {
	t.Helper()
	if err == nil || errs.KindOf(err) != want {
		t.Errorf("%s: %v, want kind %v", what, err, want)
	}
}

func TestFirstAdministrator(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := open(t)
	boom := errors.New("disk full")
	var kept []byte
	if made, err := c.EnsureAdministrator(ctx, func(string, []byte) error { return boom }); made || !errors.Is(err, boom) {
		t.Fatalf("with failed delivery: %v, %v", made, err)
	}
	calls := 0
	password := ""
	deliver := func(user string, p []byte) error {
		calls++
		kept, password = p, string(p)
		if user != access.FirstUser {
			t.Errorf("user %q", user)
		}
		return nil
	}
	if made, err := c.EnsureAdministrator(ctx, deliver); !made || err != nil {
		t.Fatalf("%v, %v", made, err)
	}
	if len(password) < 26 || !bytes.Equal(kept, make([]byte, len(kept))) {
		t.Errorf("password of %d bytes, wiped after delivery: %v", len(password), bytes.Equal(kept, make([]byte, len(kept))))
	}
	if made, err := c.EnsureAdministrator(ctx, deliver); made || err != nil || calls != 1 {
		t.Errorf("second time: %v, %v, %d calls", made, err, calls)
	}
	given := []byte(password)
	p, err := c.Login(ctx, access.FirstUser, given, peer)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(given, make([]byte, len(given))) {
		t.Error("the password was not wiped")
	}
	all, _ := access.Privileges()
	for _, priv := range all {
		if err := c.Check(ctx, p, priv, "/cluster/lab/vm/web-1"); err != nil {
			t.Error(err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestTokens(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, db := open(t)
	if _, err := c.EnsureAdministrator(ctx, func(string, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC()
	c.SetClock(func() time.Time { return now })
	text, tok, err := c.IssueToken(ctx, access.FirstUser, "backup script", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := c.Authenticate(ctx, text); err != nil || p != (access.Principal{Kind: access.UserPrincipal, Name: access.FirstUser, Token: tok.ID}) {
		t.Errorf("%+v, %v", p, err)
	}
	if all, err := c.Tokens(ctx, access.FirstUser); err != nil || len(all) != 1 || all[0] != tok {
		t.Errorf("tokens: %+v, %v", all, err)
	}
	// The store must not have what it takes to come in.
	var b bytes.Buffer
	if _, err := db.Snapshot(ctx, &b); err != nil {
		t.Fatal(err)
	}
	_, secret, _ := strings.Cut(text, tok.ID+"_") // the secret may hold a '_' of its own
	if bytes.Contains(b.Bytes(), []byte(secret)) || !bytes.Contains(b.Bytes(), []byte(tok.ID)) {
		t.Error("the token's secret is in the store, or its id is not")
	}
	for i := range text {
		changed := []byte(text)
		changed[i] ^= 1
		wantKind(t, fmt.Sprintf("byte %d changed", i), second(c.Authenticate(ctx, string(changed))), errs.Denied)
	}
	for _, bad := range []string{"", "x", text + "A", text[:len(text)-1], " " + text} {
		wantKind(t, "token "+bad, second(c.Authenticate(ctx, bad)), errs.Denied)
	}
	now = now.Add(time.Hour)
	wantKind(t, "expired", second(c.Authenticate(ctx, text)), errs.Denied)
	if all, err := c.Tokens(ctx, access.FirstUser); err != nil || len(all) != 0 {
		t.Errorf("expired tokens are listed: %+v, %v", all, err)
	}
	text, tok, err = c.IssueToken(ctx, access.FirstUser, "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.RevokeToken(ctx, tok.ID); err != nil {
			t.Fatal(err)
		}
	}
	wantKind(t, "revoked", second(c.Authenticate(ctx, text)), errs.Denied)
	for _, life := range []time.Duration{0, -1, access.MaxTokenLife + 1} {
		_, _, err := c.IssueToken(ctx, access.FirstUser, "", life)
		wantKind(t, "life "+life.String(), err, errs.Invalid)
	}
	_, _, err = c.IssueToken(ctx, "nobody", "", time.Hour)
	wantKind(t, "unknown user", err, errs.NotFound)
	for i := range 101 {
		if _, _, err = c.IssueToken(ctx, access.FirstUser, "", time.Hour); err != nil {
			if i != 100 {
				t.Fatalf("token %d: %v", i, err)
			}
			wantKind(t, "too many", err, errs.InvalidState)
		}
	}
	if err == nil {
		t.Error("101 tokens were made")
	}
}

func FuzzToken(f *testing.F) {
	f.Add("strongroom_0123456789abcdef_" + strings.Repeat("A", 43))
	f.Add("strongroom_0123456789abcdef_" + strings.Repeat("A", 42) + "B")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		id, secret, ok := access.SplitToken(s)
		if ok && (len(id) != 16 || len(secret) != 32) || !ok && (id != "" || secret != nil) {
			t.Errorf("%q: %q, %x, %v", s, id, secret, ok)
		}
	})
}
