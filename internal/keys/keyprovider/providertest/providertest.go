// Package providertest verifies that a key provider keeps the contract of
// keyprovider.Provider.
package providertest

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/leaktest"
	"strongroom/internal/keys/keyprovider"
)

// Fixture is a provider under test and keys that it must refuse.
type Fixture struct {
	Provider keyprovider.Provider

	// Missing are references with the provider's name to keys that it does
	// not have, at least one.
	Missing []keysafe.Ref

	// Reopen returns a second provider with the same keys, as after a
	// restart of the process.
	Reopen func(t *testing.T) keyprovider.Provider
}

// Run runs the suite. newFixture makes a new provider for each test, which
// closes it.
func Run(t *testing.T, newFixture func(t *testing.T) Fixture) {
	tests := []struct {
		name string
		run  func(t *testing.T, f Fixture)
	}{
		{"Name", testName},
		{"NewKEK", testNewKEK},
		{"NewKEKAgain", testNewKEKAgain},
		{"KEKsDiffer", testKEKsDiffer},
		{"Reopen", testReopen},
		{"WrongProvider", testWrongProvider},
		{"NotFound", testNotFound},
		{"ContextDone", testContextDone},
		{"KeysOutliveProvider", testKeysOutliveProvider},
		{"Closed", testClosed},
		{"Concurrent", testConcurrent},
		{"NoKeyIsPrinted", testNoKeyIsPrinted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			t.Cleanup(func() { f.Provider.Close() })
			tt.run(t, f)
		})
	}
}

func newKEK(t *testing.T, p keyprovider.Provider) (keysafe.Ref, *keymem.Key) {
	t.Helper()
	ref, kek, err := p.NewKEK(t.Context(), uuid.New())
	if err != nil {
		t.Fatalf("NewKEK: %v", err)
	}
	t.Cleanup(func() { kek.Close() })
	return ref, kek
}

func wantKEK(t *testing.T, p keyprovider.Provider, ref keysafe.Ref, want *keymem.Key) {
	t.Helper()
	got, err := p.KEK(t.Context(), ref)
	if err != nil {
		t.Errorf("KEK(%s): %v", ref, err)
		return
	}
	defer got.Close()
	if !got.Equal(want) {
		t.Errorf("KEK(%s) returned another key", ref)
	}
}

func wantError(t *testing.T, p keyprovider.Provider, ref keysafe.Ref, want error) {
	t.Helper()
	kek, err := p.KEK(t.Context(), ref)
	if kek != nil || !errors.Is(err, want) {
		t.Errorf("KEK(%s) returned %v, %v; want %v", ref, kek, err, want)
	}
}

func testName(t *testing.T, f Fixture) {
	if err := keysafe.ValidateProvider(f.Provider.Name()); err != nil {
		t.Error(err)
	}
	if f.Provider.Kind() == "" {
		t.Error("no kind")
	}
}

func testNewKEK(t *testing.T, f Fixture) {
	ref, kek := newKEK(t, f.Provider)
	if err := ref.Validate(); err != nil {
		t.Error(err)
	}
	if ref.Provider != f.Provider.Name() {
		t.Errorf("reference %s does not name the provider %s", ref, f.Provider.Name())
	}
	if kek.Len() != keyprovider.KEKSize {
		t.Errorf("KEK has %d bytes, want %d", kek.Len(), keyprovider.KEKSize)
	}
	wantKEK(t, f.Provider, ref, kek)
	wantKEK(t, f.Provider, ref, kek) // again: asking does not use it up
}

// testNewKEKAgain repeats a call as one does whose first answer was lost.
func testNewKEKAgain(t *testing.T, f Fixture) {
	id := uuid.New()
	ref, kek, err := f.Provider.NewKEK(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	again, same, err := f.Provider.NewKEK(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	if again != ref || !same.Equal(kek) {
		t.Errorf("the same object id gave %s and %s", ref, again)
	}
}

func testKEKsDiffer(t *testing.T, f Fixture) {
	refA, a := newKEK(t, f.Provider)
	refB, b := newKEK(t, f.Provider)
	if refA == refB || a.Equal(b) {
		t.Errorf("two objects share a KEK: %s, %s", refA, refB)
	}
	wantKEK(t, f.Provider, refA, a)
	wantKEK(t, f.Provider, refB, b)
}

func testReopen(t *testing.T, f Fixture) {
	ref, kek := newKEK(t, f.Provider)
	p := f.Reopen(t)
	defer p.Close()
	wantKEK(t, p, ref, kek)
}

func testWrongProvider(t *testing.T, f Fixture) {
	ref, _ := newKEK(t, f.Provider)
	ref.Provider += "x"
	wantError(t, f.Provider, ref, keyprovider.ErrWrongProvider)
	wantError(t, f.Provider, keysafe.Ref{}, keyprovider.ErrWrongProvider)
}

func testNotFound(t *testing.T, f Fixture) {
	if len(f.Missing) == 0 {
		t.Fatal("the fixture names no missing keys")
	}
	for _, ref := range f.Missing {
		wantError(t, f.Provider, ref, keyprovider.ErrNotFound)
	}
}

func testContextDone(t *testing.T, f Fixture) {
	ref, _ := newKEK(t, f.Provider)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if kek, err := f.Provider.KEK(ctx, ref); kek != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("KEK returned %v, %v; want context.Canceled", kek, err)
	}
	ref, kek, err := f.Provider.NewKEK(ctx, uuid.New())
	if !ref.IsZero() || kek != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("NewKEK returned %s, %v, %v; want context.Canceled", ref, kek, err)
	}
}

func testKeysOutliveProvider(t *testing.T, f Fixture) {
	ref, kek := newKEK(t, f.Provider)
	first, err := f.Provider.KEK(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	first.Close() // must not take other copies with it
	wantKEK(t, f.Provider, ref, kek)
	before, err := kek.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	f.Provider.Close()
	if !kek.Equal(before) {
		t.Error("closing the provider changed a KEK that it had handed out")
	}
}

func testClosed(t *testing.T, f Fixture) {
	ref, _ := newKEK(t, f.Provider)
	for range 2 {
		if err := f.Provider.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	wantError(t, f.Provider, ref, keyprovider.ErrClosed)
	ref, kek, err := f.Provider.NewKEK(t.Context(), uuid.New())
	if !ref.IsZero() || kek != nil || !errors.Is(err, keyprovider.ErrClosed) {
		t.Errorf("NewKEK returned %s, %v, %v; want ErrClosed", ref, kek, err)
	}
	if f.Provider.Name() == "" {
		t.Error("a closed provider has no name")
	}
}

func testConcurrent(t *testing.T, f Fixture) {
	ref, kek := newKEK(t, f.Provider)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 16 {
				got, err := f.Provider.KEK(t.Context(), ref)
				if errors.Is(err, keyprovider.ErrClosed) {
					return
				}
				if err != nil {
					t.Errorf("KEK: %v", err)
					return
				}
				if !got.Equal(kek) {
					t.Error("KEK returned another key")
				}
				got.Close()
			}
		})
	}
	wg.Go(func() { f.Provider.Close() })
	wg.Wait()
}

// testNoKeyIsPrinted looks for a KEK in what a provider prints as, and in its
// errors.
func testNoKeyIsPrinted(t *testing.T, f Fixture) {
	ref, kek := newKEK(t, f.Provider)
	printed := leaktest.Print(f.Provider, ref, kek)
	for _, missing := range f.Missing {
		_, err := f.Provider.KEK(t.Context(), missing)
		printed += leaktest.Print(err)
	}
	f.Provider.Close()
	_, err := f.Provider.KEK(t.Context(), ref)
	leaktest.Refute(t, printed+leaktest.Print(err), kek)
}
