package objectstore

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/kmip/kmipserver"
)

const account = "group/1 ä" // not as it can stand in a key

// newKey returns a pre-active AES key with a name, or none for "".
func newKey(t testing.TB, name string) *kmipserver.Object {
	t.Helper()
	material, err := keymem.Random(32)
	if err != nil {
		t.Fatal(err)
	}
	o := &kmipserver.Object{
		ID: uuid.Must(uuid.NewV7()).String(), Type: kmip.ObjectTypeSymmetricKey, Material: material,
		Layout: kmipserver.Layout{Format: kmip.KeyFormatTypeRaw, Algorithm: kmip.CryptographicAlgorithmAES, Length: 256},
		Attributes: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StatePreActive},
			{AttributeName: kmip.AttributeNameInitialDate, AttributeValue: time.Unix(1_700_000_000, 0).UTC()},
		},
	}
	if name != "" {
		o.Attributes = append(o.Attributes, kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}})
	}
	return o
}

// create stores a new key and returns its identifier and a copy of its bytes.
func (n *node) create(t testing.TB, name string) (string, []byte) {
	t.Helper()
	o := newKey(t, name)
	id, secret := o.ID, bytes.Clone(o.Material.Bytes())
	if err := n.Update(context.Background(), account, func(tx kmipserver.Tx) error { return tx.Put(o) }); err != nil {
		t.Fatal(err)
	}
	return id, secret
}

// change has f change an object.
func (n *node) change(t testing.TB, id string, f func(*kmipserver.Object)) {
	t.Helper()
	err := n.Update(context.Background(), account, func(tx kmipserver.Tx) error {
		o, err := tx.Get(id)
		if err != nil {
			return err
		}
		f(o)
		return tx.Put(o)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func destroy(o *kmipserver.Object) { o.Material = nil }

// want asserts the material of an object; nil for one that has none.
func (n *node) want(t testing.TB, id string, secret []byte) {
	t.Helper()
	err := n.View(context.Background(), account, func(r kmipserver.Reader) error {
		o, err := r.Get(id)
		if err != nil {
			return err
		}
		if (o.Material == nil) != (secret == nil) || secret != nil && !bytes.Equal(o.Material.Bytes(), secret) {
			t.Errorf("object %s has not the material that it was given", id)
		}
		return nil
	})
	if err != nil {
		t.Errorf("object %s: %v", id, err)
	}
}

func (n *node) find(t testing.TB, account, name string) (ids []string) {
	t.Helper()
	err := n.View(context.Background(), account, func(r kmipserver.Reader) error {
		ids = nil
		for o, err := range r.Find(kmipserver.Query{Name: name}) {
			if err != nil {
				return err
			}
			if o.Material != nil {
				t.Error("Find gives out material")
			}
			ids = append(ids, o.ID)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func TestObjectsSurviveRestart(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	template := &kmipserver.Object{
		ID: uuid.Must(uuid.NewV7()).String(), Type: kmip.ObjectTypeTemplate, Archived: true,
		Template: []kmip.Attribute{{AttributeName: kmip.AttributeNameObjectGroup, AttributeValue: "g"}},
	}
	if err := n.Update(t.Context(), account, func(tx kmipserver.Tx) error { return tx.Put(template) }); err != nil {
		t.Fatal(err)
	}
	first, firstKey := n.create(t, "disk")
	second, secondKey := n.create(t, "")
	n.change(t, second, func(o *kmipserver.Object) {
		o.Attributes = append(o.Attributes, kmip.Attribute{AttributeName: "x-Identifier", AttributeValue: "vm-7"})
	})
	third, _ := n.create(t, "gone")
	n.change(t, third, destroy)

	for range 2 {
		n.want(t, first, firstKey)
		n.want(t, second, secondKey)
		n.want(t, third, nil)
		if got := n.find(t, account, ""); !slices.Equal(got, []string{template.ID, first, second, third}) {
			t.Errorf("found %v", got)
		}
		if got := n.find(t, account, "disk"); !slices.Equal(got, []string{first}) {
			t.Errorf("by name: %v", got)
		}
		if got := append(n.find(t, "group", ""), n.find(t, "other", "disk")...); len(got) != 0 {
			t.Errorf("other accounts see %v", got)
		}
		err := n.View(t.Context(), account, func(r kmipserver.Reader) error {
			o, err := r.Get(template.ID)
			if err != nil {
				return err
			}
			if !o.Archived || len(o.Template) != 1 || o.Template[0].AttributeValue != "g" || o.Type != kmip.ObjectTypeTemplate {
				t.Errorf("template: %+v", o)
			}
			for _, id := range []string{"", "no-such", uuid.NewString(), template.ID + "/", "../" + first} {
				if _, err := r.Get(id); !errors.Is(err, kmipserver.ErrNoObject) {
					t.Errorf("%q: %v", id, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		n.restart(t)
	}
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id, secret := n.create(t, "a")
	refused := errors.New("refused")
	o := newKey(t, "b")
	defer o.Material.Close()
	err := n.Update(t.Context(), account, func(tx kmipserver.Tx) error {
		if err := tx.Put(o); err != nil {
			return err
		}
		old, err := tx.Get(id)
		if err != nil {
			return err
		}
		old.Material = nil
		if err := tx.Put(old); err != nil {
			return err
		}
		// A transaction sees itself.
		if again, err := tx.Get(id); err != nil || again.Material != nil {
			t.Errorf("inside: %+v, %v", again, err)
		}
		return refused
	})
	if !errors.Is(err, refused) {
		t.Fatal(err)
	}
	n.want(t, id, secret)
	if got := n.find(t, account, ""); len(got) != 1 {
		t.Errorf("found %v", got)
	}
	if err := n.Update(t.Context(), "", func(kmipserver.Tx) error { return nil }); err == nil {
		t.Error("an account without a name")
	}
}

// TestNamesMove changes the name of an object in one transaction with another
// that takes it, as Re-key does.
func TestNamesMove(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	old, _ := n.create(t, "vm")
	o := newKey(t, "vm")
	err := n.Update(t.Context(), account, func(tx kmipserver.Tx) error {
		was, err := tx.Get(old)
		if err != nil {
			return err
		}
		was.Attributes = slices.DeleteFunc(was.Attributes, func(a kmip.Attribute) bool { return a.AttributeName == kmip.AttributeNameName })
		if err := tx.Put(o); err != nil {
			return err
		}
		return tx.Put(was)
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := n.find(t, account, "vm"); !slices.Equal(got, []string{o.ID}) {
		t.Errorf("found %v, want %v", got, o.ID)
	}
}

// TestOneNameOnce has many claim one name at once: the name is looked up and
// taken in one transaction, so one gets it.
func TestOneNameOnce(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	taken := errors.New("taken")
	var group sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for range 16 {
		group.Go(func() {
			o := newKey(t, "unique")
			err := n.Update(t.Context(), account, func(tx kmipserver.Tx) error {
				for _, err := range tx.Find(kmipserver.Query{Name: "unique"}) {
					if err != nil {
						return err
					}
					return taken
				}
				return tx.Put(o)
			})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case errors.Is(err, taken):
				o.Material.Close()
			default:
				t.Error(err)
			}
		})
	}
	group.Wait()
	if won != 1 || len(n.find(t, account, "unique")) != 1 {
		t.Errorf("%d got the name", won)
	}
}

// TestAlteredRecords writes records where they do not belong: they are errors.
func TestAlteredRecords(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id, _ := n.create(t, "")
	other, _ := n.create(t, "")
	gone, _ := n.create(t, "")
	n.change(t, gone, destroy)
	key := func(id string) string { return accountPrefix(account) + id }
	good, err := n.objects.Get(t.Context(), key(id))
	if err != nil {
		t.Fatal(err)
	}
	destroyed, err := n.objects.Get(t.Context(), key(gone))
	if err != nil {
		t.Fatal(err)
	}
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	for name, record := range map[string][]byte{
		"another object's":     good,
		"attribute altered":    flip(good, recordHeader+8),
		"state of a tombstone": flip(destroyed, recordHeader+8),
		"cut":                  good[:len(good)-1],
		"empty":                {},
		"epoch":                flip(good, 15),
		"newer":                flip(good, 7),
		"lengths":              flip(good, 50),
	} {
		if err := n.objects.Put(t.Context(), key(other), record); err != nil {
			t.Fatal(err)
		}
		err := n.View(t.Context(), account, func(r kmipserver.Reader) error { _, err := r.Get(other); return err })
		if err == nil || errors.Is(err, kmipserver.ErrNoObject) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestReadersAndWriters reads keys while they are changed, dropped from the
// cache and destroyed; with the race detector it finds material that is wiped
// in use.
func TestReadersAndWriters(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.cache.limit = 2
	ids, secrets := make([]string, 6), make([][]byte, 6)
	for i := range ids {
		ids[i], secrets[i] = n.create(t, "")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var writers, readers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			for i := range 60 {
				n.change(t, ids[(i+w)%3], func(o *kmipserver.Object) {
					o.Attributes = append(o.Attributes[:2:2], kmip.Attribute{AttributeName: "x-Round", AttributeValue: fmt.Sprint(i)})
				})
				if i == 30 && w == 0 {
					n.change(t, ids[5], destroy)
					if err := n.Shred(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 4 {
		readers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				n.want(t, ids[i%5], secrets[i%5])
			}
		})
	}
	writers.Wait()
	cancel()
	readers.Wait()
	n.want(t, ids[5], nil)
}

// TestOrder looks through objects in both orders, from the ends and from within,
// of which some were made together and some years apart.
func TestOrder(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	ctx := t.Context()
	var ids []string // oldest first
	now := time.Now().UnixMilli()
	at := func(ms int64, times int) {
		for i := range times {
			ids = append(ids, fmt.Sprintf("%s-7%03x-8000-%012x", firstID(ms), i>>8, i))
		}
	}
	at(0, 2)
	at(1, 1)
	at(now-20*365*86400_000, 3)
	at(now-3600_000, 2*windowMax) // within one millisecond
	for i := range int64(windowMax + 3) {
		at(now-3000_000+i, 1)
	}
	at(now-1, 1)
	at(now+86400_000, 1) // of a node whose clock is wrong
	at(1<<48-1, 1)
	for some := range slices.Chunk(ids, 500) {
		err := n.Update(ctx, account, func(tx kmipserver.Tx) error {
			for _, id := range some {
				o := newKey(t, "")
				o.ID = id
				if err := tx.Put(o); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	look := func(q kmipserver.Query, most int) (found []string) {
		t.Helper()
		err := n.View(ctx, account, func(r kmipserver.Reader) error {
			found = nil
			for o, err := range r.Find(q) {
				if err != nil {
					return err
				}
				if found = append(found, o.ID); len(found) == most {
					break
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	newest := slices.Clone(ids)
	slices.Reverse(newest)
	for _, c := range []struct {
		q    kmipserver.Query
		from []string
	}{{kmipserver.Query{}, ids}, {kmipserver.Query{Newest: true}, newest}} {
		if found := look(c.q, 0); !slices.Equal(found, c.from) {
			t.Errorf("%+v: %d of %d objects, or in another order", c.q, len(found), len(c.from))
		}
		for at := 0; at < len(c.from); at += 331 {
			c.q.After = c.from[at]
			want := c.from[at+1:]
			want = want[:min(10, len(want))]
			if found := look(c.q, 10); !slices.Equal(found, want) {
				t.Errorf("%+v: %v, want %v", c.q, found, want)
			}
		}
		c.q.After = c.from[len(c.from)-1]
		if found := look(c.q, 0); len(found) != 0 {
			t.Errorf("behind the last: %v", found)
		}
	}
}
