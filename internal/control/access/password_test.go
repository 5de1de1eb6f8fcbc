package access_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"strongroom/internal/control/access"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestUsersAndPasswords(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := withAdmin(t)
	ann := create(t, c, "ann", access.ReadOnly, access.NoCryptoAdmin)
	wantKind(t, "same name", c.CreateUser(ctx, "ann", []byte(goodPassword), nil), errs.Exists)
	wantKind(t, "short password", c.CreateUser(ctx, "bob", []byte("short"), nil), errs.Invalid)
	wantKind(t, "long password", c.CreateUser(ctx, "bob", make([]byte, access.MaxPassword+1), nil), errs.Invalid)
	wantKind(t, "bad name", c.CreateUser(ctx, "user:bob", []byte(goodPassword), nil), errs.Invalid)
	wantKind(t, "unknown role", c.CreateUser(ctx, "bob", []byte(goodPassword), []string{"King"}), errs.NotFound)
	users, err := c.Users(ctx)
	if err != nil || len(users) != 2 || users[1].Name != "ann" || !slices.Equal(users[1].Roles, []string{access.NoCryptoAdmin, access.ReadOnly}) {
		t.Errorf("users: %+v, %v", users, err)
	}

	_, wrong := c.Login(ctx, "ann", []byte("wrong password!"), peer)
	_, unknown := c.Login(ctx, "eve", []byte("wrong password!"), peer)
	wantKind(t, "wrong password", wrong, errs.Denied)
	wantKind(t, "unknown user", unknown, errs.Denied)
	if wrong.Error() != unknown.Error() {
		t.Errorf("the errors tell who exists: %v, %v", wrong, unknown)
	}

	keep, kept, err := c.IssueToken(ctx, "ann", "session", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := c.IssueToken(ctx, "ann", "script", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	oldP, newP := []byte(goodPassword), []byte("another good password")
	if err := c.ChangePassword(ctx, "ann", oldP, newP, kept.ID, peer); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(oldP, make([]byte, len(oldP))) || !bytes.Equal(newP, make([]byte, len(newP))) {
		t.Error("passwords were not wiped")
	}
	wantKind(t, "old password", second(c.Login(ctx, "ann", []byte(goodPassword), peer)), errs.Denied)
	if _, err := c.Login(ctx, "ann", []byte("another good password"), peer); err != nil {
		t.Error(err)
	}
	if p, err := c.Authenticate(ctx, keep); err != nil || p.Name != "ann" || p.Token != kept.ID {
		t.Errorf("the kept token: %+v, %v", p, err)
	}
	wantKind(t, "the other token", second(c.Authenticate(ctx, other)), errs.Denied)
	wantKind(t, "change with wrong password", c.ChangePassword(ctx, "ann", []byte("nonsense nonsense"), []byte(goodPassword), "", peer), errs.Denied)

	if err := c.SetDisabled(ctx, "ann", true); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "disabled: login", second(c.Login(ctx, "ann", []byte("another good password"), peer)), errs.Denied)
	wantKind(t, "disabled: token", second(c.Authenticate(ctx, keep)), errs.Denied)
	wantKind(t, "disabled: check", c.Check(ctx, ann, "System.Read", access.Root), errs.Denied)
	if err := c.DeleteUser(ctx, "ann"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "second delete", c.DeleteUser(ctx, "ann"), errs.NotFound)
	// A new user of that name begins with nothing.
	ann = create(t, c, "ann")
	wantKind(t, "new user", c.Check(ctx, ann, "System.Read", access.Root), errs.Denied)
}

func TestThrottle(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, password := withAdmin(t)
	now := time.Now()
	c.SetClock(func() time.Time { return now })
	for i := range 5 {
		wantKind(t, fmt.Sprint("attempt ", i), second(c.Login(ctx, access.FirstUser, []byte("guess guess guess"), peer)), errs.Denied)
	}
	wantKind(t, "right password, too early", second(c.Login(ctx, access.FirstUser, []byte(password), peer)), errs.Unavailable)
	if _, err := c.Login(ctx, "other", []byte("guess guess guess"), peer); errs.KindOf(err) != errs.Denied {
		t.Errorf("another name has to wait, too: %v", err)
	}
	// The wait grows, to a limit.
	waited := time.Duration(0)
	for range 20 {
		if err := c.BeginAttempt(access.FirstUser, peer); err == nil {
			continue
		}
		step := time.Duration(0)
		for c.BeginAttempt(access.FirstUser, peer) != nil {
			now = now.Add(time.Second)
			step += time.Second
		}
		if step < waited || step > 5*time.Minute+time.Second {
			t.Errorf("waited %v after %v", step, waited)
		}
		waited = step
	}
	if waited < 5*time.Minute {
		t.Errorf("the wait grew to %v only", waited)
	}
	now = now.Add(5*time.Minute + time.Second)
	if _, err := c.Login(ctx, access.FirstUser, []byte(password), peer); err != nil {
		t.Errorf("after the wait: %v", err)
	}
	wantKind(t, "after success it begins anew", second(c.Login(ctx, access.FirstUser, []byte("guess guess guess"), peer)), errs.Denied)
	// What is remembered is bounded.
	for i := range access.MaxThrottled + 10 {
		now = now.Add(time.Millisecond)
		if err := c.BeginAttempt(fmt.Sprint("name", i), fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255)); err != nil {
			t.Fatal(err)
		}
		if i > access.MaxThrottled && c.Throttled() > access.MaxThrottled {
			t.Fatalf("%d counters kept", c.Throttled())
		}
	}
}

// TestStrangersLockNobodyOut: who guesses has to wait, wherever he is and whatever
// name he tries, and those whose names they are do not.
func TestStrangersLockNobodyOut(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, password := withAdmin(t)
	now := time.Now()
	c.SetClock(func() time.Time { return now })
	guess := func(name, peer string) error {
		return second(c.Login(ctx, name, []byte("guess guess guess"), peer))
	}
	own := func(what, peer string, want bool) {
		t.Helper()
		if _, err := c.Login(ctx, access.FirstUser, []byte(password), peer); (err == nil) != want {
			t.Errorf("%s: %v", what, err)
		}
	}
	own("at first", "192.0.2.7:1", true)
	for range 1000 {
		_ = guess(access.FirstUser, "192.0.2.66:1")
	}
	wantKind(t, "the guesser", guess(access.FirstUser, "192.0.2.66:2"), errs.Unavailable)
	own("from where he has never been", "192.0.2.8:1", true)

	// One address, many names.
	for i := range 20 {
		wantKind(t, "a name", guess(fmt.Sprint("name", i), "192.0.2.67:1"), errs.Denied)
	}
	wantKind(t, "one name too many", guess("another", "192.0.2.67:1"), errs.Unavailable)
	// An IPv6 network is one guesser.
	for i := range 5 {
		wantKind(t, "an address", guess(access.FirstUser, fmt.Sprintf("[2001:db8::%d]:1", i)), errs.Denied)
	}
	wantKind(t, "one address too many", guess(access.FirstUser, "[2001:db8::99]:1"), errs.Unavailable)

	// Many addresses, one name: they wait, and he does not, from where he was before.
	tried := 0
	for i := range 255 {
		if errs.KindOf(guess(access.FirstUser, fmt.Sprintf("198.51.100.%d:1", i))) == errs.Denied {
			tried++
		}
	}
	if tried > 60 {
		t.Errorf("%d addresses could try one name at once", tried)
	}
	own("while many guess", "192.0.2.7:2", true)
	own("while many guess, from elsewhere", "192.0.2.9:1", false)
	now = now.Add(2 * time.Second)
	own("when it is a stranger's turn", "192.0.2.9:1", true)

	// Whoever has a name of his own cannot begin anew with it.
	create(t, c, "eve", access.ReadOnly)
	tried = 0
	for i := range 100 {
		if _, err := c.Login(ctx, "eve", []byte(goodPassword), "192.0.2.68:1"); err == nil && errs.KindOf(guess(fmt.Sprint("victim", i), "192.0.2.68:1")) == errs.Denied {
			tried++
		}
	}
	if tried > 20 {
		t.Errorf("%d guesses between logins of one's own", tried)
	}
}

func TestHashingBounds(t *testing.T) {
	t.Parallel()
	for _, h := range []access.Hashing{
		{Time: 0, MemoryKiB: 8, Threads: 1},
		{Time: 11, MemoryKiB: 8, Threads: 1},
		{Time: 1, MemoryKiB: 7, Threads: 1},
		{Time: 1, MemoryKiB: 256<<10 + 1, Threads: 1},
		{Time: 1, MemoryKiB: 8, Threads: 17},
	} {
		if _, err := access.New(access.Config{Hashing: h}); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

// TestDefaultHashing logs in once with what production uses.
func TestDefaultHashing(t *testing.T) {
	t.Parallel()
	db, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	c, err := access.New(access.Config{DB: db})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CreateUser(t.Context(), "ann", []byte(goodPassword), nil); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := c.Login(t.Context(), "ann", []byte(goodPassword), peer); err != nil {
		t.Fatal(err)
	}
	t.Logf("a login takes %v", time.Since(start))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Login(ctx, "ann", []byte(goodPassword), peer); err == nil {
		t.Error("login with an ended context")
	}
}

func FuzzHash(f *testing.F) {
	f.Add("$argon2id$v=19$m=65536,t=3,p=4$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("$argon2id$v=19$m=4294967295,t=3,p=4$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("$argon2i$v=19$m=65536,t=3,p=4$$")
	f.Fuzz(func(t *testing.T, s string) {
		again, err := access.CanonicalHash(s)
		if err == nil && again != s {
			t.Errorf("%q became %q", s, again)
		}
	})
}
