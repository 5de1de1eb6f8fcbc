package keysafe

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keymem/keymemtest"
	"strongroom/internal/crypto/leaktest"
)

const testOwner = "disk:7f3c1d52-0a77-4a7e-9c1e-2f5d3c9b8a10"

var testRef = Ref{Provider: "kp-1", KeyID: "key-1"}

func mustWrap(t testing.TB, kek, dek *keymem.Key) *Safe {
	t.Helper()
	s, err := Wrap(kek, dek, testRef, testOwner, 1)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWrapUnwrap(t *testing.T) {
	t.Parallel()
	for _, size := range []int{DEKSize, DEKSizeFile} {
		kek, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, size)
		s := mustWrap(t, kek, dek)
		if s.DEKLen() != size {
			t.Errorf("DEKLen = %d, want %d", s.DEKLen(), size)
		}
		parsed, err := Parse(s.Encode())
		if err != nil {
			t.Fatal(err)
		}
		got, err := parsed.Unwrap(kek, testOwner)
		if err != nil {
			t.Fatal(err)
		}
		defer got.Close()
		if !got.Equal(dek) {
			t.Errorf("unwrapped DEK of %d bytes differs", size)
		}
	}
}

func TestUnwrapRefuses(t *testing.T) {
	t.Parallel()
	kek, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, DEKSize)
	s := mustWrap(t, kek, dek)

	if k, err := s.Unwrap(kek, "disk:other"); k != nil || !errors.Is(err, ErrWrongOwner) {
		t.Errorf("another owner: got %v, %v; want ErrWrongOwner", k, err)
	}
	if k, err := s.Unwrap(keymemtest.Random(t, KEKSize), testOwner); k != nil || !errors.Is(err, ErrDoesNotOpen) {
		t.Errorf("another KEK: got %v, %v; want ErrDoesNotOpen", k, err)
	}
	if k, err := s.Unwrap(keymemtest.Random(t, 16), testOwner); k != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("short KEK: got %v, %v; want ErrInvalid", k, err)
	}
	if k, err := new(Safe).Unwrap(kek, ""); k != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("zero Safe: got %v, %v; want ErrInvalid", k, err)
	}
}

// Every clear field and every bit of nonce and ciphertext is authenticated.
func TestAlteredDoesNotOpen(t *testing.T) {
	t.Parallel()
	kek, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, DEKSize)
	s := mustWrap(t, kek, dek)

	alter := map[string]func(*Safe){
		"provider":   func(s *Safe) { s.KEK.Provider = "kp-2" },
		"key id":     func(s *Safe) { s.KEK.KeyID = "key-2" },
		"owner":      func(s *Safe) { s.Owner = "disk:other" },
		"generation": func(s *Safe) { s.Generation++ },
		// The same bytes in a row, with a border moved.
		"border": func(s *Safe) { s.KEK = Ref{Provider: "kp-1k", KeyID: "ey-1"} },
	}
	for bit := range nonceSize * 8 {
		alter[fmt.Sprintf("nonce bit %d", bit)] = func(s *Safe) { s.nonce[bit/8] ^= 1 << (bit % 8) }
	}
	for bit := range (DEKSize + tagSize) * 8 {
		alter[fmt.Sprintf("wrapped bit %d", bit)] = func(s *Safe) { s.wrapped[bit/8] ^= 1 << (bit % 8) }
	}
	for name, f := range alter {
		altered := *s
		altered.wrapped = append([]byte(nil), s.wrapped...)
		f(&altered)
		if k, err := altered.Unwrap(kek, altered.Owner); k != nil || !errors.Is(err, ErrDoesNotOpen) {
			t.Errorf("%s altered: got %v, %v; want ErrDoesNotOpen", name, k, err)
		}
	}
}

func TestWrapLimits(t *testing.T) {
	t.Parallel()
	kek, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, DEKSize)
	longest := Ref{Provider: strings.Repeat("p", ProviderMax), KeyID: strings.Repeat(`"`, KeyIDMax)}
	tests := []struct {
		name       string
		kek, dek   *keymem.Key
		ref        Ref
		owner      string
		generation uint64
		ok         bool
	}{
		{"shortest", kek, dek, Ref{"p", "k"}, "o", 1, true},
		{"longest", kek, dek, longest, strings.Repeat(`\`, OwnerMax), GenerationMax, true},
		{"no provider", kek, dek, Ref{"", "k"}, "o", 1, false},
		{"long provider", kek, dek, Ref{strings.Repeat("p", ProviderMax+1), "k"}, "o", 1, false},
		{"upper-case provider", kek, dek, Ref{"Kp", "k"}, "o", 1, false},
		{"provider begins with hyphen", kek, dek, Ref{"-kp", "k"}, "o", 1, false},
		{"slash in provider", kek, dek, Ref{"k/p", "k"}, "o", 1, false},
		{"no key id", kek, dek, Ref{"p", ""}, "o", 1, false},
		{"long key id", kek, dek, Ref{"p", strings.Repeat("k", KeyIDMax+1)}, "o", 1, false},
		{"key id not ASCII", kek, dek, Ref{"p", "schlüssel"}, "o", 1, false},
		{"newline in key id", kek, dek, Ref{"p", "k\n"}, "o", 1, false},
		{"no owner", kek, dek, testRef, "", 1, false},
		{"long owner", kek, dek, testRef, strings.Repeat("o", OwnerMax+1), 1, false},
		{"generation 0", kek, dek, testRef, "o", 0, false},
		{"generation too large", kek, dek, testRef, "o", GenerationMax + 1, false},
		{"long KEK", keymemtest.Random(t, 64), dek, testRef, "o", 1, false},
		{"DEK of 16 bytes", kek, keymemtest.Random(t, 16), testRef, "o", 1, false},
		{"DEK of 33 bytes", kek, keymemtest.Random(t, 33), testRef, "o", 1, false},
	}
	for _, tt := range tests {
		s, err := Wrap(tt.kek, tt.dek, tt.ref, tt.owner, tt.generation)
		if !tt.ok {
			if s != nil || !errors.Is(err, ErrInvalid) {
				t.Errorf("%s: got %v, %v; want ErrInvalid", tt.name, s, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		encoded := s.Encode()
		if len(encoded) > EncodedMax {
			t.Errorf("%s: encoded in %d bytes, more than EncodedMax", tt.name, len(encoded))
		}
		if _, err := Parse(encoded); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestRewrap(t *testing.T) {
	t.Parallel()
	oldKEK, newKEK, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, KEKSize), keymemtest.Random(t, DEKSize)
	s := mustWrap(t, oldKEK, dek)
	before := string(s.Encode())

	next, err := s.Rewrap(oldKEK, newKEK, Ref{Provider: "kp-2", KeyID: "key-2"})
	if err != nil {
		t.Fatal(err)
	}
	if next.Generation != 2 || next.Owner != testOwner || next.KEK.String() != "kp-2/key-2" {
		t.Errorf("rewrapped safe is %+v", next)
	}
	got, err := next.Unwrap(newKEK, testOwner)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(dek) {
		t.Error("rewrapped DEK differs")
	}
	if k, err := next.Unwrap(oldKEK, testOwner); k != nil || !errors.Is(err, ErrDoesNotOpen) {
		t.Errorf("old KEK on the new safe: got %v, %v; want ErrDoesNotOpen", k, err)
	}
	if string(s.Encode()) != before {
		t.Error("Rewrap changed the old safe")
	}
	if r, err := s.Rewrap(newKEK, newKEK, testRef); r != nil || !errors.Is(err, ErrDoesNotOpen) {
		t.Errorf("wrong old KEK: got %v, %v; want ErrDoesNotOpen", r, err)
	}
	last := mustWrapGeneration(t, oldKEK, dek, GenerationMax)
	if r, err := last.Rewrap(oldKEK, newKEK, testRef); r != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("after the last generation: got %v, %v; want ErrInvalid", r, err)
	}
}

func mustWrapGeneration(t *testing.T, kek, dek *keymem.Key, generation uint64) *Safe {
	t.Helper()
	s, err := Wrap(kek, dek, testRef, testOwner, generation)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A safe inside a document survives programs that indent it, sort its members
// or escape more than we do.
func TestEmbedded(t *testing.T) {
	t.Parallel()
	kek, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, DEKSize)
	ref := Ref{Provider: "kp-1", KeyID: `a<b>&"c"\d/e`}
	s, err := Wrap(kek, dek, ref, testOwner, 3)
	if err != nil {
		t.Fatal(err)
	}
	type document struct {
		Safe *Safe `json:"safe"`
	}
	indented, err := json.MarshalIndent(document{s}, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	var anything map[string]any
	if err := json.Unmarshal(indented, &anything); err != nil {
		t.Fatal(err)
	}
	sorted, err := json.Marshal(anything)
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{indented, sorted} {
		var got document
		if err := json.Unmarshal(data, &got); err != nil {
			t.Fatalf("%v in %s", err, data)
		}
		if diff := cmp.Diff(string(s.Encode()), string(got.Safe.Encode())); diff != "" {
			t.Error(diff)
		}
	}
	if _, err := json.Marshal(Safe{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("marshal of the zero Safe: %v; want ErrInvalid", err)
	}
}

func TestRef(t *testing.T) {
	t.Parallel()
	ref := Ref{Provider: "kp-1", KeyID: "a/b"}
	if got := ref.String(); got != "kp-1/a/b" {
		t.Errorf("String: %q", got)
	}
	if !(Ref{}).IsZero() || ref.IsZero() {
		t.Error("IsZero is wrong")
	}
	for _, r := range []Ref{{}, {KeyID: "key"}, {Provider: "kp-1"}, {Provider: "KP", KeyID: "key"}} {
		if err := r.Validate(); !errors.Is(err, ErrInvalidRef) {
			t.Errorf("Validate of %q: %v; want ErrInvalidRef", r, err)
		}
	}
}

func TestNoKeyIsPrinted(t *testing.T) {
	t.Parallel()
	kek, dek := keymemtest.Random(t, KEKSize), keymemtest.Random(t, DEKSize)
	s := mustWrap(t, kek, dek)
	_, owner := s.Unwrap(kek, "disk:other")
	_, opens := s.Unwrap(keymemtest.Random(t, KEKSize), testOwner)
	_, rewrap := s.Rewrap(kek, dek, testRef) // the DEK is too long for a KEK
	_, parse := Parse(append(s.Encode(), dek.Bytes()...))
	if owner == nil || opens == nil || rewrap == nil || parse == nil {
		t.Fatal("an error is missing")
	}
	leaktest.Refute(t, leaktest.Print(s, *s, s.Encode(), kek, dek, owner, opens, rewrap, parse), kek, dek)
}

// vector is one case of testdata/vectors.json, which gen.py makes without this
// package.
type vector struct {
	Name   string
	Safe   string
	KEK    string
	Owner  string
	DEK    string
	Expect string
}

func loadVectors(t testing.TB) []vector {
	t.Helper()
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

func TestVectors(t *testing.T) {
	t.Parallel()
	want := map[string]error{
		"invalid": ErrInvalid, "version": ErrVersion,
		"wrong owner": ErrWrongOwner, "does not open": ErrDoesNotOpen,
	}
	counts := map[string]int{}
	for _, v := range loadVectors(t) {
		counts[v.Expect]++
		s, err := Parse([]byte(v.Safe))
		var dek *keymem.Key
		if err == nil {
			dek, err = s.Unwrap(keymemtest.Hex(t, v.KEK), v.Owner)
		}
		if v.Expect != "ok" {
			if dek != nil || !errors.Is(err, want[v.Expect]) || want[v.Expect] == nil {
				t.Errorf("%s: got %v, want error %q", v.Name, err, v.Expect)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		if !dek.Equal(keymemtest.Hex(t, v.DEK)) {
			t.Errorf("%s: wrong DEK", v.Name)
		}
		dek.Close()
	}
	for _, expect := range []string{"ok", "invalid", "version", "wrong owner", "does not open"} {
		if counts[expect] == 0 {
			t.Errorf("no vector expects %q", expect)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add([]byte(v.Safe))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse(data)
		if err != nil {
			if s != nil {
				t.Error("a safe together with an error")
			}
			return
		}
		if string(s.Encode()) != string(data) {
			t.Errorf("parsed %q, encoded %q", data, s.Encode())
		}
	})
}

// FuzzUnmarshalJSON checks that what the lenient reader takes is the same safe
// in canonical form.
func FuzzUnmarshalJSON(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add([]byte(v.Safe))
	}
	f.Add([]byte(`{"version": [1]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s Safe
		if err := s.UnmarshalJSON(data); err != nil {
			if diff := cmp.Diff(Safe{}, s, cmp.AllowUnexported(Safe{})); diff != "" {
				t.Errorf("not zero after an error: %s", diff)
			}
			return
		}
		again, err := Parse(s.Encode())
		if err != nil {
			t.Fatalf("canonical form of %q does not parse: %v", data, err)
		}
		if diff := cmp.Diff(&s, again, cmp.AllowUnexported(Safe{})); diff != "" {
			t.Error(diff)
		}
	})
}
