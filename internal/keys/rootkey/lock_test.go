package rootkey

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/sealed"
	"strongroom/internal/crypto/shamir"
	"strongroom/internal/errs"
	"strongroom/internal/keys/hsm"
	"strongroom/test/softhsm"
	"strongroom/test/swtpm"
)

func TestMain(m *testing.M) { os.Exit(softhsm.Main(m)) }

// tokens are made one after another: each takes the first free slot.
var tokens sync.Mutex

// cheap is Argon2id as tests can pay it.
var cheap = Cost{Time: 1, MemoryKiB: 64, Threads: 1}

func secret(t testing.TB, text string) *keymem.Key {
	t.Helper()
	k, err := keymem.Take([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// safe is a vault of a test: a sealed file under a root key.
type safe struct {
	t    testing.TB
	dir  string
	lock *Lock
}

const safeContext = "test"

func (s *safe) vault() string { return filepath.Join(s.dir, "vault") }

func (s *safe) opens(root *keymem.Key) error {
	content, err := sealed.ReadFile(s.vault(), root, safeContext)
	if err == nil {
		content.Close()
	}
	return err
}

func (s *safe) reseal(root *keymem.Key) error {
	return sealed.WriteFile(s.vault(), root, safeContext, secret(s.t, "what is in the vault"))
}

// load is what a start does.
func (s *safe) load() {
	s.t.Helper()
	if s.lock != nil {
		s.lock.Close()
	}
	lock, err := Load(filepath.Join(s.dir, "root"), Source{KeyFile: &KeyFile{filepath.Join(s.dir, "key")}}, s.opens)
	if err != nil {
		s.t.Fatal(err)
	}
	s.lock = lock
	s.t.Cleanup(func() { lock.Close() })
}

// newSafe makes a vault under a key file.
func newSafe(t testing.TB) *safe {
	t.Helper()
	s := &safe{t: t, dir: t.TempDir()}
	root, err := keyfile.Create(filepath.Join(s.dir, "key"), Size)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := s.reseal(root); err != nil {
		t.Fatal(err)
	}
	s.load()
	return s
}

// way is a source as the tests use it.
type way struct {
	name  string
	make  func(root *keymem.Key) (Source, []shamir.Share, error)
	gives func(shares []shamir.Share) []*keymem.Key // what people give
}

func ways(s *safe) []way {
	nothing := func([]shamir.Share) []*keymem.Key { return nil }
	return []way{
		{"key file", func(root *keymem.Key) (Source, []shamir.Share, error) {
			src, err := NewKeyFile(filepath.Join(s.dir, "key2"), root)
			return src, nil, err
		}, nothing},
		{"passphrase", func(root *keymem.Key) (Source, []shamir.Share, error) {
			src, err := NewPassphrase(secret(s.t, "correct horse battery"), root, cheap)
			return src, nil, err
		}, func([]shamir.Share) []*keymem.Key { return []*keymem.Key{secret(s.t, "correct horse battery")} }},
		{"shares", func(root *keymem.Key) (Source, []shamir.Share, error) { return NewShares(2, 3, root) }, func(shares []shamir.Share) []*keymem.Key {
			var texts []*keymem.Key
			for _, share := range shares[1:] {
				text, err := share.Text()
				if err != nil {
					s.t.Fatal(err)
				}
				s.t.Cleanup(func() { text.Close() })
				texts = append(texts, text)
			}
			return texts
		}},
		{"TPM", func(root *keymem.Key) (Source, []shamir.Share, error) {
			src, err := NewTPM(context.Background(), "unix:"+swtpm.Start(s.t).Socket(), []int{7}, root)
			return src, nil, err
		}, nothing},
		{"HSM", func(root *keymem.Key) (Source, []shamir.Share, error) {
			tokens.Lock()
			label, pinFile := softhsm.Token(s.t)
			tokens.Unlock()
			src, err := NewHSM(context.Background(), hsm.Key{Module: softhsm.Module(s.t), Token: label, Label: "root", PINFile: pinFile}, root)
			return src, nil, err
		}, nothing},
	}
}

// open opens the vault with what people give, and reports whether it opened.
func (s *safe) open(secrets []*keymem.Key) error {
	root, err := s.lock.Open(context.Background())
	for _, given := range secrets {
		if root != nil || !errors.Is(err, ErrSealed) {
			break
		}
		var giveErr error
		if root, giveErr = s.lock.Give(context.Background(), given); giveErr != nil {
			return giveErr
		}
	}
	if root == nil {
		return err
	}
	defer root.Close()
	return s.opens(root)
}

// TestChange changes to every source, opens the vault with it after a start, and
// not by the source from before.
func TestChange(t *testing.T) {
	t.Parallel()
	for i := range ways(nil) {
		s := newSafe(t)
		w := ways(s)[i]
		t.Run(w.name, func(t *testing.T) {
			former, err := s.lock.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer former.Close()
			shares, err := s.lock.Begin(w.make)
			if err != nil {
				t.Fatal(err)
			}
			defer shamir.Close(shares)
			if err := s.opens(former); err != nil {
				t.Errorf("before it was confirmed: %v", err)
			}
			if err := s.lock.Confirm(t.Context(), w.gives(shares), s.reseal); err != nil {
				t.Fatal(err)
			}
			if err := s.opens(former); !errors.Is(err, sealed.ErrWrongKey) {
				t.Errorf("the old root key still opens the vault: %v", err)
			}
			if _, err := os.Lstat(filepath.Join(s.dir, "key")); !os.IsNotExist(err) {
				t.Errorf("the old key file is still there: %v", err)
			}
			s.load()
			if n := len(s.lock.Sources()); n != 1 {
				t.Errorf("%d sources", n)
			}
			if err := s.open(w.gives(shares)); err != nil {
				t.Errorf("after a start: %v", err)
			}
			for _, name := range []string{"root", "vault"} {
				text, err := os.ReadFile(filepath.Join(s.dir, name))
				if err != nil {
					t.Fatal(err)
				}
				for _, given := range w.gives(shares) {
					if bytes.Contains(text, given.Bytes()) {
						t.Errorf("%s shows what people gave", name)
					}
				}
			}
		})
	}
}

// TestInterrupted ends a change at every step, as a crash does, and opens the
// vault after it by one of the two sources.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	crash := errors.New("crashed")
	for i := range ways(nil) {
		for _, step := range []string{"begun", "resealing", "resealed", "retired"} {
			s := newSafe(t)
			w := ways(s)[i]
			t.Run(w.name+"/"+step, func(t *testing.T) {
				shares, err := s.lock.Begin(w.make)
				if err != nil {
					t.Fatal(err)
				}
				defer shamir.Close(shares)
				before, err := os.ReadFile(filepath.Join(s.dir, "root"))
				if err != nil {
					t.Fatal(err)
				}
				var want error
				switch step {
				case "resealing":
					want = s.lock.Confirm(t.Context(), w.gives(shares), func(*keymem.Key) error { return crash })
				case "resealed":
					want = s.lock.Confirm(t.Context(), w.gives(shares), func(root *keymem.Key) error {
						return errors.Join(s.reseal(root), crash)
					})
				case "retired":
					if err := s.lock.Confirm(t.Context(), w.gives(shares), s.reseal); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(filepath.Join(s.dir, "root"), before, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if step[:4] == "rese" && !errors.Is(want, crash) {
					t.Fatalf("error %v", want)
				}
				s.load()
				if n := len(s.lock.Sources()); n != 2 {
					t.Errorf("%d sources after the crash", n)
				}
				if err := s.open(w.gives(shares)); err != nil {
					t.Fatalf("after the crash: %v", err)
				}
				if n := len(s.lock.Sources()); n != 1 {
					t.Errorf("%d sources after the vault was opened", n)
				}
				s.load()
				if err := s.open(w.gives(shares)); err != nil {
					t.Errorf("at the start after that: %v", err)
				}
			})
		}
	}
}

// TestDrop begins a change twice: the first is forgotten, and with it its file;
// what was sealed anew is kept.
func TestDrop(t *testing.T) {
	t.Parallel()
	s := newSafe(t)
	file, pass := ways(s)[0], ways(s)[1]
	for range 2 {
		if _, err := s.lock.Begin(file.make); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.lock.Begin(pass.make); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(s.dir, "key2")); !os.IsNotExist(err) {
		t.Errorf("the key file of the change that was dropped is still there: %v", err)
	}
	if err := s.lock.Confirm(t.Context(), []*keymem.Key{secret(t, "another passphrase")}, s.reseal); errs.KindOf(err) != errs.Denied {
		t.Errorf("confirmed with a wrong passphrase: %v", err)
	}
	// The vault is sealed anew, and then something fails.
	failed := errors.New("failed")
	err := s.lock.Confirm(t.Context(), pass.gives(nil), func(root *keymem.Key) error { return errors.Join(s.reseal(root), failed) })
	if !errors.Is(err, failed) {
		t.Fatal(err)
	}
	if _, err := s.lock.Begin(file.make); err != nil {
		t.Fatal(err)
	}
	if got := s.lock.Sources()[0]; got.Passphrase == nil {
		t.Errorf("%s is in force", got)
	}
	s.load()
	if err := s.open(pass.gives(nil)); err != nil {
		t.Error(err)
	}
}

// TestGive gives wrong things, and each is refused for its reason.
func TestGive(t *testing.T) {
	t.Parallel()
	s := newSafe(t)
	w := ways(s)[2]
	shares, err := s.lock.Begin(w.make)
	if err != nil {
		t.Fatal(err)
	}
	defer shamir.Close(shares)
	texts := w.gives(shares)
	if err := s.lock.Confirm(t.Context(), texts[:1], s.reseal); !errors.Is(err, shamir.ErrMismatch) {
		t.Errorf("confirmed with one share of two: %v", err)
	}
	if err := s.lock.Confirm(t.Context(), texts, s.reseal); err != nil {
		t.Fatal(err)
	}
	s.load()
	if _, err := s.lock.Open(t.Context()); !errors.Is(err, ErrSealed) || errs.KindOf(err) != errs.Locked {
		t.Errorf("without shares: %v", err)
	}
	give := func(what string, text *keymem.Key, want errs.Kind) {
		t.Helper()
		if root, err := s.lock.Give(t.Context(), text); errs.KindOf(err) != want || root != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	give("no share", secret(t, "something"), errs.Invalid)
	if root, err := s.lock.Give(t.Context(), texts[0]); root != nil || err != nil {
		t.Fatalf("one share: %v, %v", root, err)
	}
	give("the same again", texts[0], errs.Exists)
	_, others, err := NewShares(2, 2, secret(t, strings.Repeat("k", Size)))
	if err != nil {
		t.Fatal(err)
	}
	defer shamir.Close(others)
	text, err := others[0].Text()
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	give("of another set", text, errs.Invalid)
	forged := shares[2]
	forged.Value, err = keymem.Random(Size)
	if err != nil {
		t.Fatal(err)
	}
	defer forged.Value.Close()
	if text, err = forged.Text(); err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	give("forged", text, errs.Denied)
	if n := s.lock.Given(); n != 0 {
		t.Errorf("%d shares are kept after the wrong ones", n)
	}
	if err := s.open(texts); err != nil {
		t.Errorf("the right shares: %v", err)
	}
}

func TestPassphrase(t *testing.T) {
	t.Parallel()
	root := secret(t, strings.Repeat("r", Size))
	if _, err := NewPassphrase(secret(t, "too short"), root, cheap); errs.KindOf(err) != errs.Invalid {
		t.Errorf("short: %v", err)
	}
	if err := DefaultCost().check(); err != nil {
		t.Error(err)
	}
	s, err := NewPassphrase(secret(t, "long enough it is"), root, cheap)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), Given{Passphrase: secret(t, "long enough it was")}); errs.KindOf(err) != errs.Denied {
		t.Errorf("wrong: %v", err)
	}
	if _, err := s.Open(t.Context(), Given{}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("none: %v", err)
	}
	got, err := s.Open(t.Context(), Given{Passphrase: secret(t, "long enough it is")})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(root) {
		t.Error("it gives another root key")
	}
}

// The vector of docs/spec/root-key.md.
const vectorFile = `{
  "version": 1,
  "sources": [
    {
      "passphrase": {
        "argon2id": {
          "time": 1,
          "memoryKiB": 64,
          "threads": 1
        },
        "salt": "r1CzuuDUU1ugw5Wz2RIHt4cJ/KNBqLt4NFBazazNS/o=",
        "wrapped": "U1JzZWFsZWQAAAABAAEAAFeZF4/FZsZNDtDp5bhB7WCThSFxRDgBiFf7zCJ4TWiccAQiwJetdWn2GkVx+rUtEO8f/JNKR69tBzoYboSCvy1KoyK6qBjuWKr9sedcU6u78olqLSu0XPFxB6IJKNdBJX+B99o7oQXFVdz/6M/ZIVI="
      }
    }
  ]
}
`

// TestVector opens the root file of the specification.
func TestVector(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "root")
	if err := os.WriteFile(path, []byte(vectorFile), 0o600); err != nil {
		t.Fatal(err)
	}
	sources, err := readFile(path)
	if err != nil {
		t.Fatal(err)
	}
	root, err := sources[0].Open(t.Context(), Given{Passphrase: secret(t, "correct horse battery staple")})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for i, b := range root.Bytes() {
		if int(b) != i {
			t.Fatalf("byte %d is %02x", i, b)
		}
	}
}

// TestLostTPM: a vault whose TPM is gone does not open, and the reason is told.
func TestLostTPM(t *testing.T) {
	t.Parallel()
	s, emulator := newSafe(t), swtpm.Start(t)
	if _, err := s.lock.Begin(func(root *keymem.Key) (Source, []shamir.Share, error) {
		src, err := NewTPM(t.Context(), "unix:"+emulator.Socket(), []int{7}, root)
		return src, nil, err
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.lock.Confirm(t.Context(), nil, s.reseal); err != nil {
		t.Fatal(err)
	}
	emulator.Reboot()
	s.load()
	if err := s.open(nil); err != nil {
		t.Errorf("after a boot: %v", err)
	}
	emulator.Stop()
	s.load()
	if err := s.open(nil); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("without its TPM: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(vectorFile))
	f.Add([]byte(`{"version":1,"sources":[{"keyFile":{"path":"/k"}},{"shares":{"set":"00000000","threshold":2,"count":3,"wrapped":"AA=="}}]}`))
	f.Add([]byte(`{"version":1,"sources":[{"tpm":{"device":"/dev/tpmrm0","sealed":{"pcrs":[7],"parent":"AA==","public":"AA==","private":"AA=="},"wrapped":"AA=="}}]}`))
	f.Add([]byte(`{"version":1,"sources":[{"hsm":{"module":"/m.so","token":"t","label":"k","pinFile":"/p","wrappedKey":"AA==","wrapped":"AA=="}}]}`))
	f.Add([]byte(`{"version":1,"sources":[{}]}`))
	f.Add([]byte(`{"version":1,"sources":[{"keyFile":{"path":"/k"}}]}x`))
	f.Fuzz(func(t *testing.T, text []byte) {
		sources, err := decode(text)
		if err != nil {
			return
		}
		again, err := encode(sources)
		if err != nil {
			t.Fatalf("cannot encode what was decoded: %v", err)
		}
		same, err := decode(again)
		if err != nil || len(same) != len(sources) {
			t.Fatalf("%v", err)
		}
		for i, s := range same {
			if s.String() != sources[i].String() || s.People() != sources[i].People() {
				t.Errorf("%s became %s", sources[i], s)
			}
		}
	})
}
