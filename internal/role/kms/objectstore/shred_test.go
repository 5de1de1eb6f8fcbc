package objectstore

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyring"
	"strongroom/internal/keys/kmip/kmipserver"
)

// history is everything that a database ever wrote and that is still there: its
// files, and snapshots.
type history struct{ files [][]byte }

func (h *history) add(t *testing.T, n *node) {
	t.Helper()
	var snapshot bytes.Buffer
	if _, err := n.db.Snapshot(t.Context(), &snapshot); err != nil {
		t.Fatal(err)
	}
	h.files = append(h.files, snapshot.Bytes())
	err := filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		h.files = append(h.files, bytes.TrimRight(b, "\x00")) // logs are longer than what is in them
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// open tries every record in h, for each identifier, with a ring, and counts
// how often one of its 32-byte keys came out, by identifier.
func (h *history) open(ring *keyring.Ring, ids []string) map[string]int {
	opened := map[string]int{}
	for _, file := range h.files {
		for at := 0; ; at++ {
			next := bytes.Index(file[at:], []byte(recordMagic))
			if next < 0 {
				break
			}
			at += next
			rest := file[at:]
			if len(rest) > recordMax {
				rest = rest[:recordMax]
			}
			clear, _, _, err := split(rest)
			if err != nil || len(clear)+keyring.Overhead+32 > len(rest) {
				continue
			}
			for _, id := range ids {
				if o, _, err := unseal(ring, account, id, rest[:len(clear)+keyring.Overhead+32]); err == nil && o.Material != nil {
					opened[id]++
					o.Material.Close()
				}
			}
		}
	}
	return opened
}

// TestDestroyIsFinal looks for destroyed keys in all that the database wrote
// before and after, with the keys that the KMS has now.
func TestDestroyIsFinal(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	secrets := map[string][]byte{}
	for range 12 {
		id, secret := n.create(t, "")
		secrets[id] = secret
	}
	ids := slices.Sorted(maps.Keys(secrets))
	for _, id := range ids { // so that there is more than one version of each
		n.change(t, id, func(o *kmipserver.Object) {
			o.Attributes[0] = kmip.Attribute{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateActive}
		})
	}
	var h history
	h.add(t, n)
	stolen, err := n.file.content.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer stolen.Close()
	doomed, kept := ids[:5], ids[5:]
	for _, id := range doomed {
		n.change(t, id, destroy)
	}
	h.add(t, n)
	if err := n.Shred(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.add(t, n)

	t.Log("with the ring from before, the history gives the keys: this test can fail")
	before, err := keyring.Load(stolen, 0, func(*keymem.Key) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	if got := h.open(before, doomed); len(got) != len(doomed) {
		t.Errorf("the stolen ring opens %d of %d keys", len(got), len(doomed))
	}
	t.Log("with the ring of now, it gives the keys that live, and no other")
	for _, ring := range []*keyring.Ring{n.ring, reload(t, n)} {
		if got := h.open(ring, doomed); len(got) != 0 {
			t.Errorf("destroyed keys open: %v", got)
		}
		if got := h.open(ring, kept); len(got) != len(kept) {
			t.Errorf("%d of %d living keys open", len(got), len(kept))
		}
	}
	for _, file := range h.files {
		for id, secret := range secrets {
			if bytes.Contains(file, secret[:16]) || bytes.Contains(file, secret[16:]) {
				t.Errorf("the key of %s is there in the clear", id)
			}
		}
	}
	n.restart(t)
	for _, id := range kept {
		n.want(t, id, secrets[id])
	}
	for _, id := range doomed {
		n.want(t, id, nil)
	}
}

func reload(t *testing.T, n *node) *keyring.Ring {
	t.Helper()
	ring, err := keyring.Load(n.file.content, 0, n.file.save)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ring.Close() })
	return ring
}

// TestShredIsResumed ends a pass after each of its steps, restarts, and lets
// another pass finish: nothing is lost, and what was destroyed is gone.
func TestShredIsResumed(t *testing.T) {
	t.Parallel()
	failed := errors.New("power lost")
	for step, run := range []func(context.Context, *node, map[uint64]bool, [][]string) error{
		func(context.Context, *node, map[uint64]bool, [][]string) error { return nil },
		func(ctx context.Context, n *node, dirty map[uint64]bool, batches [][]string) error {
			return n.move(ctx, batches[0][:2], dirty) // some moved
		},
		func(ctx context.Context, n *node, dirty map[uint64]bool, batches [][]string) error {
			return n.move(ctx, batches[0], dirty) // all moved
		},
		func(ctx context.Context, n *node, _ map[uint64]bool, _ [][]string) error {
			n.retire(1)
			n.file.fail = failed // at the new epoch's KEK
			defer func() { n.file.fail = nil }()
			if err := n.Shred(ctx); !errors.Is(err, failed) {
				return errors.New("a ring that cannot be written was not noticed")
			}
			return nil
		},
		func(ctx context.Context, n *node, dirty map[uint64]bool, batches [][]string) error {
			if err := n.move(ctx, batches[0], dirty); err != nil {
				return err
			}
			n.file.fail = failed // at the removal of the KEK
			defer func() { n.file.fail = nil }()
			if err := n.Shred(ctx); !errors.Is(err, failed) {
				return errors.New("a ring that cannot be written was not noticed")
			}
			return nil
		},
		func(ctx context.Context, n *node, dirty map[uint64]bool, batches [][]string) error {
			if err := n.move(ctx, batches[0], dirty); err != nil {
				return err
			}
			return n.ring.Shred(slices.Collect(maps.Keys(dirty))...) // gone, and not marked
		},
	} {
		n := newNode(t)
		secrets := map[string][]byte{}
		for range 6 {
			id, secret := n.create(t, "")
			secrets[id] = secret
		}
		gone := slices.Sorted(maps.Keys(secrets))[3]
		n.change(t, gone, destroy)
		secrets[gone] = nil
		dirty, err := n.dirtyEpochs(t.Context())
		if err != nil || len(dirty) != 1 {
			t.Fatalf("step %d: dirty %v, %v", step, dirty, err)
		}
		batches, err := n.survivors(t.Context(), dirty)
		if err != nil || len(batches) != 1 || len(batches[0]) != 5 {
			t.Fatalf("step %d: survivors %v, %v", step, batches, err)
		}
		for old := range dirty {
			n.retire(old)
		}
		if err := run(t.Context(), n, dirty, batches); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		n.restart(t)
		for id, secret := range secrets {
			n.want(t, id, secret)
		}
		late, lateSecret := n.create(t, "")
		secrets[late] = lateSecret
		if err := n.Shred(t.Context()); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		for id, secret := range secrets {
			n.want(t, id, secret)
		}
		for old := range dirty {
			if n.ring.Has(old) {
				t.Errorf("step %d: epoch %d is still there", step, old)
			}
		}
		if left, err := n.dirtyEpochs(t.Context()); err != nil || len(left) != 0 {
			t.Errorf("step %d: dirty afterwards: %v, %v", step, left, err)
		}
	}
}

// TestRunShreds has the background pass do it.
func TestRunShreds(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- n.Run(ctx) }()
	id, _ := n.create(t, "")
	n.change(t, id, destroy)
	for n.ring.Has(1) && t.Context().Err() == nil {
		if _, err := n.db.Revision(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestCreateRacesShred creates and destroys in many epochs at once: whatever
// was acknowledged opens.
func TestCreateRacesShred(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		for ctx.Err() == nil {
			if err := n.Shred(t.Context()); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()
	secrets := map[string][]byte{}
	for i := range 60 {
		id, secret := n.create(t, "")
		if i%3 == 0 {
			n.change(t, id, destroy)
			secret = nil
		}
		secrets[id] = secret
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for id, secret := range secrets {
		n.want(t, id, secret)
	}
}

// TestShreddedLeavesMemory destroys a key that another node has in memory: with its KEK
// the key goes there, too, although nobody asks that node for it.
func TestShreddedLeavesMemory(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	other := New(n.db, n.ring, slog.New(slog.DiscardHandler))
	defer other.Close()
	gone, _ := n.create(t, "")
	lives, secret := n.create(t, "")
	look := func(s *Store, id string) {
		t.Helper()
		if err := s.View(t.Context(), account, func(v kmipserver.Reader) error {
			_, err := v.Get(id)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	var cached []*entry
	for _, s := range []*Store{n.Store, other} {
		for _, id := range []string{gone, lives} {
			look(s, id)
			if id == gone {
				cached = append(cached, s.cache.entries[accountPrefix(account)+id].Value.(*entry))
			}
		}
	}
	n.change(t, gone, destroy)
	if err := n.Shred(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, e := range cached {
		if e.holders.Load() != 0 { // else it is wiped
			t.Errorf("node %d has the destroyed key in memory", i)
		}
	}
	look(other, lives)
	n.want(t, lives, secret)
}
