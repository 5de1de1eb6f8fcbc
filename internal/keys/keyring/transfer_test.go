package keyring

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// copyRing is another node's ring, which has the metadata epoch of r alone.
func copyRing(t *testing.T, r *Ring, save Save) *Ring {
	t.Helper()
	excerpt, err := r.Excerpt()
	if err != nil {
		t.Fatal(err)
	}
	defer excerpt.Close()
	other, err := Load(excerpt, 0, save)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	return other
}

func always(uint64) bool { return true }

// TestMerge takes epochs over from another node: what one sealed the other
// opens, and what is not wanted stays away.
func TestMerge(t *testing.T) {
	t.Parallel()
	saved := 0
	count := func(*keymem.Key) error { saved++; return nil }
	a, err := New(count)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for _, n := range []uint64{3, 7, 9} {
		if err := a.BeginAt(n); err != nil {
			t.Fatal(err)
		}
	}
	before := saved
	if err := a.BeginAt(7); err != nil || saved != before {
		t.Fatalf("an epoch that is there: %v, %d saves", err, saved-before)
	}
	if n, err := a.Begin(); err != nil || n != 10 {
		t.Fatalf("Begin after epoch 9: %d, %v", n, err)
	}
	b := copyRing(t, a, count)
	excerpt, err := a.Excerpt(3, 7, 9, 99)
	if err != nil {
		t.Fatal(err)
	}
	defer excerpt.Close()
	before = saved
	for range 2 { // the second time there is nothing new
		if err := b.Merge(excerpt, func(n uint64) bool { return n != 7 }); err != nil {
			t.Fatal(err)
		}
	}
	if saved != before+1 {
		t.Errorf("merging the same twice wrote the ring %d times", saved-before)
	}
	if got := slices.Sorted(slices.Values(b.Epochs())); !slices.Equal(got, []uint64{3, 9}) {
		t.Fatalf("epochs after the merge: %d", got)
	}
	secret, err := keymem.Random(16)
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	sealed, err := a.Seal(9, []byte("aad"), secret)
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.Unseal(9, []byte("aad"), sealed)
	if err != nil || !bytes.Equal(got.Bytes(), secret.Bytes()) {
		t.Fatalf("the other node does not open it: %v", err)
	}
	got.Close()
	if n, err := b.Begin(); err != nil || n != 10 {
		t.Errorf("a new epoch on the other node: %d, %v", n, err)
	}
	b.UsedUpTo(40)
	if n, err := b.Begin(); err != nil || n != 41 {
		t.Errorf("a new epoch after 40 was used elsewhere: %d, %v", n, err)
	}
}

// TestMergeRefused tells another KMS's ring, and leaves the ring as it was when
// it cannot be written.
func TestMergeRefused(t *testing.T) {
	t.Parallel()
	broken := errors.New("disk")
	var fault error
	save := func(*keymem.Key) error { return fault }
	a, err := New(save)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := a.BeginAt(1); err != nil {
		t.Fatal(err)
	}
	excerpt, err := a.Excerpt(1)
	if err != nil {
		t.Fatal(err)
	}
	defer excerpt.Close()
	stranger, err := New(save)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if err := stranger.Merge(excerpt, always); errs.KindOf(err) != errs.Denied || stranger.Has(1) {
		t.Errorf("another KMS's ring: %v", err)
	}
	b := copyRing(t, a, save)
	fault = broken
	if err := b.Merge(excerpt, always); !errors.Is(err, broken) || b.Has(1) {
		t.Errorf("with a disk that is broken: %v", err)
	}
	if err := b.BeginAt(2); !errors.Is(err, broken) || b.Has(2) {
		t.Errorf("an epoch with a disk that is broken: %v", err)
	}
	fault = nil
	if err := b.Merge(excerpt, always); err != nil || !b.Has(1) {
		t.Errorf("with the disk whole again: %v", err)
	}
	if _, err := a.Excerpt(make([]uint64, ExcerptMax+1)...); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a large excerpt: %v", err)
	}
	damaged, err := keymem.New(40)
	if err != nil {
		t.Fatal(err)
	}
	defer damaged.Close()
	if err := b.Merge(damaged, always); !errors.Is(err, ErrCorrupt) {
		t.Errorf("bytes that are no ring: %v", err)
	}
}
