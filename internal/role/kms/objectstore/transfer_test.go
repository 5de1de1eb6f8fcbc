package objectstore

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyring"
)

// TestRewrapWhileShredding reads old records whose KEK was erased since, as a backup
// does that is made while keys are destroyed.
func TestRewrapWhileShredding(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	kept, want := n.create(t, "kept")
	gone, _ := n.create(t, "gone")
	ids := []string{kept, gone}
	old := map[string][]byte{}
	for _, id := range ids {
		record, err := n.objects.Get(t.Context(), accountPrefix(account)+id)
		if err != nil {
			t.Fatal(err)
		}
		old[id] = record
	}
	n.change(t, gone, destroy)
	if err := n.Shred(t.Context()); err != nil {
		t.Fatal(err)
	}
	ring, err := keyring.New(func(*keymem.Key) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	if _, err := ring.Begin(); err != nil {
		t.Fatal(err)
	}
	out := sha256.New()
	for i, id := range ids {
		record, material, err := n.Rewrap(t.Context(), accountPrefix(account)+id, old[id], ring, 1, out)
		if err != nil || material != (i == 0) {
			t.Fatalf("%d: material %v, %v", i, material, err)
		}
		if _, _, err := unseal(n.ring, account, id, record); err == nil {
			t.Errorf("%d: it opens with the ring that it was wrapped under before", i)
		}
		stored, had, has, err := Unpack(ring, accountPrefix(account)+id, record, time.Time{}, sha256.New())
		if err != nil || had != material || has != material || len(stored) != 2 || !strings.HasPrefix(stored[1].Name, "kms-name/"+accountPrefix(account)) {
			t.Errorf("%d: %d records, %v, %v, %v", i, len(stored), had, has, err)
		}
		o, _, err := unseal(ring, account, id, record)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 && !bytes.Equal(o.Material.Bytes(), want) {
			t.Error("another key")
		}
		o.Material.Close()
		// As destroyed.
		at := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
		stored, had, has, err = Unpack(ring, accountPrefix(account)+id, record, at, sha256.New())
		if err != nil || had != material || has {
			t.Fatalf("%d: %v, %v, %v", i, had, has, err)
		}
		if o, epoch, err := unseal(ring, account, id, stored[0].Value); err != nil || epoch != keyring.Metadata || o.Material != nil || i == 0 && stateOf(o.Attributes) != kmip.StateDestroyed {
			t.Errorf("%d: destroyed: %+v in epoch %d, %v", i, o, epoch, err)
		}
	}
	now := sha256.New()
	if objects, keys, err := n.Digest(t.Context(), now); err != nil || objects != 2 || keys != 1 {
		t.Errorf("%d objects, %d keys, %v", objects, keys, err)
	}
	if !bytes.Equal(now.Sum(nil), out.Sum(nil)) {
		t.Error("what was rewrapped is not what there is")
	}
	for _, bad := range []string{"", "a", "a/b", "/" + ids[0], "%zz/" + ids[0], accountPrefix(account) + strings.ToUpper(ids[0])} {
		if _, _, err := n.Rewrap(t.Context(), bad, old[ids[0]], ring, 1, out); !errors.Is(err, errCorrupt) {
			t.Errorf("%q: %v", bad, err)
		}
		if _, _, _, err := Unpack(ring, bad, old[ids[0]], time.Time{}, out); !errors.Is(err, errCorrupt) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func stateOf(list []kmip.Attribute) kmip.State {
	for _, a := range list {
		if a.AttributeName == kmip.AttributeNameState {
			return a.AttributeValue.(kmip.State)
		}
	}
	return 0
}
