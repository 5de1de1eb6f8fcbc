package keyprovider_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/keys/keyprovider"
)

func newSet(t testing.TB, providers ...keyprovider.Provider) *keyprovider.Set {
	t.Helper()
	s := keyprovider.NewSet()
	t.Cleanup(func() { s.Close() })
	for _, p := range providers {
		if err := s.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func wantKEK(t *testing.T, s *keyprovider.Set, ref keysafe.Ref, want *keymem.Key) {
	t.Helper()
	got, err := s.KEK(t.Context(), ref)
	if err != nil {
		t.Errorf("KEK(%s): %v", ref, err)
		return
	}
	defer got.Close()
	if !got.Equal(want) {
		t.Errorf("KEK(%s) is another key", ref)
	}
}

func newRef(t *testing.T, p keyprovider.Provider) (keysafe.Ref, *keymem.Key) {
	t.Helper()
	ref, kek, err := p.NewKEK(t.Context(), uuid.New())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return ref, kek
}

func TestSet(t *testing.T) {
	t.Parallel()
	a, b := newNative(t, "kp-a"), newNative(t, "kp-b")
	s := newSet(t, b, a)
	if diff := cmp.Diff([]string{"kp-a", "kp-b"}, s.Names()); diff != "" {
		t.Error(diff)
	}
	refA, kekA := newRef(t, a)
	refB, kekB := newRef(t, b)
	wantKEK(t, s, refA, kekA)
	wantKEK(t, s, refB, kekB)
	if p, err := s.Lookup("kp-a"); p != a || err != nil {
		t.Errorf("Lookup = %v, %v", p, err)
	}

	if err := s.Remove("kp-a"); err != nil {
		t.Error(err)
	}
	if _, err := a.KDK(); !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("a removed provider is not closed: %v", err)
	}
	for name, err := range map[string]error{
		"Remove": s.Remove("kp-a"),
		"Lookup": second(s.Lookup("kp-a")),
		"KEK":    second(s.KEK(t.Context(), refA)),
	} {
		if !errors.Is(err, keyprovider.ErrUnknownProvider) || !strings.Contains(err.Error(), "kp-a") {
			t.Errorf("%s of a removed provider: %v; want ErrUnknownProvider", name, err)
		}
	}
	wantKEK(t, s, refB, kekB)

	s.Close()
	s.Close()
	for name, err := range map[string]error{
		"Add":    s.Add(newNative(t, "kp-c")),
		"Lookup": second(s.Lookup("kp-b")),
		"KEK":    second(s.KEK(t.Context(), refB)),
		"the provider": func() error {
			_, err := b.KDK()
			return err
		}(),
	} {
		if !errors.Is(err, keyprovider.ErrClosed) {
			t.Errorf("%s after Close: %v; want ErrClosed", name, err)
		}
	}
	if err := s.Remove("kp-b"); !errors.Is(err, keyprovider.ErrUnknownProvider) {
		t.Errorf("Remove after Close: %v; want ErrUnknownProvider", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestSetAddSameName(t *testing.T) {
	t.Parallel()
	n := newNative(t, "kp-1")
	kdk := kdkOf(t, n)
	s := newSet(t, n)
	ref, kek := newRef(t, n)

	if err := s.Add(n); err != nil {
		t.Errorf("the same again: %v", err)
	}
	otherID := n.Info()
	otherID.KeyID = uuid.New()
	for name, p := range map[string]keyprovider.Provider{
		"another KDK":            restore(t, n.Info(), keymemtest.Random(t, 32)),
		"another key id":         restore(t, otherID, kdk),
		"another kind":           fakeProvider{name: "kp-1"},
		"all of it is different": newNative(t, "kp-1"),
	} {
		if err := s.Add(p); !errors.Is(err, keyprovider.ErrNameCollision) {
			t.Errorf("%s: %v; want ErrNameCollision", name, err)
		}
		if native, ok := p.(*keyprovider.Native); ok {
			if _, err := native.KDK(); err != nil {
				t.Errorf("%s: a refused provider was closed", name)
			}
		}
	}
	wantKEK(t, s, ref, kek)

	// The same keys with new constraints take the old one's place.
	info := n.Info()
	info.TPMRequired = true
	if err := s.Add(restore(t, info, kdk)); err != nil {
		t.Fatal(err)
	}
	p, err := s.Lookup("kp-1")
	if err != nil || p == keyprovider.Provider(n) || p.(*keyprovider.Native).Info() != info {
		t.Errorf("Lookup = %v, %v", p, err)
	}
	if _, err := n.KDK(); !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("the replaced provider is not closed: %v", err)
	}
	wantKEK(t, s, ref, kek)

	fakes := newSet(t, fakeProvider{name: "kp-2"})
	if err := fakes.Add(fakeProvider{name: "kp-2", other: true}); !errors.Is(err, keyprovider.ErrNameCollision) {
		t.Errorf("providers that cannot be compared: %v; want ErrNameCollision", err)
	}
}

// fakeProvider is a provider of another kind, which is closed from the start.
type fakeProvider struct {
	name  string
	other bool
}

func (p fakeProvider) Name() string           { return p.name }
func (p fakeProvider) Kind() keyprovider.Kind { return "fake" }
func (p fakeProvider) Close() error           { return nil }

func (p fakeProvider) NewKEK(context.Context, uuid.UUID) (keysafe.Ref, *keymem.Key, error) {
	return keysafe.Ref{}, nil, keyprovider.ErrClosed
}

func (p fakeProvider) KEK(context.Context, keysafe.Ref) (*keymem.Key, error) {
	return nil, keyprovider.ErrClosed
}

// A provider that closed itself does not make the set ask for ever.
func TestSetClosedProvider(t *testing.T) {
	t.Parallel()
	s := newSet(t, fakeProvider{name: "kp-1"})
	if kek, err := s.KEK(t.Context(), keysafe.Ref{Provider: "kp-1", KeyID: "k"}); kek != nil || !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("%v, %v; want ErrClosed", kek, err)
	}
}

// While a provider is replaced by itself again and again, every call for a key
// succeeds.
func TestSetConcurrent(t *testing.T) {
	t.Parallel()
	n := newNative(t, "kp-1")
	kdk := kdkOf(t, n)
	info := n.Info()
	s := newSet(t, n)
	ref, kek := newRef(t, n)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				got, err := s.KEK(t.Context(), ref)
				if err != nil {
					t.Error(err)
					return
				}
				if !got.Equal(kek) {
					t.Error("another key")
				}
				got.Close()
				s.Names()
			}
		})
	}
	for range 200 {
		if err := s.Add(restore(t, info, kdk)); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}

func TestSecretsRoundTrip(t *testing.T) {
	t.Parallel()
	a, b := newNative(t, "kp-a"), newNative(t, "kp-b")
	s := newSet(t, b, fakeProvider{name: "kp-f"}, a)
	blob, err := keyprovider.MarshalSecrets(s)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	got, err := keyprovider.UnmarshalSecrets(blob)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if diff := cmp.Diff([]string{"kp-a", "kp-b"}, got.Names()); diff != "" {
		t.Error(diff)
	}
	for _, want := range []*keyprovider.Native{a, b} {
		p, err := got.Lookup(want.Name())
		if err != nil {
			t.Fatal(err)
		}
		if n := p.(*keyprovider.Native); !n.SameKeys(want) || n.Info() != want.Info() {
			t.Errorf("%s differs", want.Name())
		}
	}

	a.Close()
	if blob, err := keyprovider.MarshalSecrets(s); blob != nil || !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("with a closed provider: %v, %v; want ErrClosed", blob, err)
	}
	s.Close()
	if blob, err := keyprovider.MarshalSecrets(s); blob != nil || !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("of a closed set: %v, %v; want ErrClosed", blob, err)
	}
}

func TestSecretsLimit(t *testing.T) {
	t.Parallel()
	s := newSet(t)
	kdk := keymemtest.Random(t, 32)
	add := func(i int) {
		info := keyprovider.NativeInfo{Name: "kp-" + hex.EncodeToString([]byte{byte(i >> 8), byte(i)}), KeyID: uuid.New(), Created: created}
		if err := s.Add(restore(t, info, kdk)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range keyprovider.NativesMax {
		add(i)
	}
	blob, err := keyprovider.MarshalSecrets(s)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	got, err := keyprovider.UnmarshalSecrets(blob)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if len(got.Names()) != keyprovider.NativesMax {
		t.Errorf("%d providers came back", len(got.Names()))
	}
	add(keyprovider.NativesMax)
	if blob, err := keyprovider.MarshalSecrets(s); blob != nil || err == nil {
		t.Errorf("one too many: %v, %v", blob, err)
	}
}

type secretsVector struct {
	Name, Blob, Expect string
	Names              []string
}

func loadSecrets(t testing.TB) []secretsVector {
	t.Helper()
	data, err := os.ReadFile("testdata/secrets.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []secretsVector
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

func TestSecretsVectors(t *testing.T) {
	t.Parallel()
	want := map[string]error{"invalid": keyprovider.ErrInvalidSecrets, "version": keyprovider.ErrSecretsVersion}
	kdk := keymemtest.Hex(t, "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	counts := map[string]int{}
	for _, v := range loadSecrets(t) {
		counts[v.Expect]++
		blob := keymemtest.Hex(t, v.Blob)
		s, err := keyprovider.UnmarshalSecrets(blob)
		if v.Expect != "ok" {
			if s != nil || want[v.Expect] == nil || !errors.Is(err, want[v.Expect]) {
				t.Errorf("%s: %v, want %q", v.Name, err, v.Expect)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		defer s.Close()
		if diff := cmp.Diff(v.Names, s.Names(), cmp.Transformer("empty", func(s []string) string { return strings.Join(s, " ") })); diff != "" {
			t.Errorf("%s: %s", v.Name, diff)
		}
		for _, name := range v.Names {
			p, err := s.Lookup(name)
			if err != nil || !kdkOf(t, p.(*keyprovider.Native)).Equal(kdk) {
				t.Errorf("%s: another KDK (%v)", v.Name, err)
			}
		}
		again, err := keyprovider.MarshalSecrets(s)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if !again.Equal(blob) {
			t.Errorf("%s: encodes to other bytes", v.Name)
		}
	}
	for _, expect := range []string{"ok", "invalid", "version"} {
		if counts[expect] == 0 {
			t.Errorf("no vector expects %q", expect)
		}
	}
}

func FuzzUnmarshalSecrets(f *testing.F) {
	for _, v := range loadSecrets(f) {
		blob, err := hex.DecodeString(v.Blob)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(blob)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > keymem.SizeMax {
			return
		}
		blob, err := keymem.New(len(data))
		if err != nil {
			t.Fatal(err)
		}
		defer blob.Close()
		copy(blob.Bytes(), data)
		s, err := keyprovider.UnmarshalSecrets(blob)
		if err != nil {
			if s != nil {
				t.Error("a set together with an error")
			}
			return
		}
		defer s.Close()
		again, err := keyprovider.MarshalSecrets(s)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if !again.Equal(blob) {
			t.Error("encodes to other bytes")
		}
	})
}

// A set of providers can be in use while it is stored.
func TestSecretsWhileInUse(t *testing.T) {
	t.Parallel()
	n := newNative(t, "kp-1")
	s := newSet(t, n)
	ref, _ := newRef(t, n)
	deadline := time.Now().Add(20 * time.Millisecond)
	var wg sync.WaitGroup
	wg.Go(func() {
		for time.Now().Before(deadline) {
			kek, err := s.KEK(t.Context(), ref)
			if err != nil {
				t.Error(err)
				return
			}
			kek.Close()
		}
	})
	for time.Now().Before(deadline) {
		blob, err := keyprovider.MarshalSecrets(s)
		if err != nil {
			t.Error(err)
			break
		}
		blob.Close()
	}
	wg.Wait()
}
