package kmipserver

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// counting counts the objects that a store gives out in searches.
type counting struct {
	Store
	seen *atomic.Int64
}

func (c counting) View(ctx context.Context, account string, f func(Reader) error) error {
	return c.Store.View(ctx, account, func(r Reader) error { return f(countingReader{r, c.seen}) })
}

type countingReader struct {
	Reader
	seen *atomic.Int64
}

func (c countingReader) Find(q Query) iter.Seq2[*Object, error] {
	return func(yield func(*Object, error) bool) {
		for o, err := range c.Reader.Find(q) {
			c.seen.Add(1)
			if !yield(o, err) {
				return
			}
		}
	}
}

// TestLocatePages reads what is found page by page: in the same order as at
// once, newest first, whoever else asks, and without a look at what earlier
// pages had.
func TestLocatePages(t *testing.T) {
	t.Parallel()
	var seen atomic.Int64
	b := newBench(t, Limits{}, func(s *Server) { s.store = counting{s.store, &seen} })
	one, other := b.dial(t, "one"), b.dial(t, "one")
	const keys, size = 57, 10
	var made []string // newest first
	for i := range keys {
		made = slices.Insert(made, 0, do[payloads.CreateResponsePayload](one, newKey()).UniqueIdentifier)
		if i%5 == 0 {
			do[payloads.CreateResponsePayload](b.dial(t, "two"), newKey())
		}
	}
	keysOnly := []kmip.Attribute{{AttributeName: kmip.AttributeNameObjectType, AttributeValue: kmip.ObjectTypeSymmetricKey}}
	ask := func(s *session, offset, most int32, by ...kmip.Attribute) *payloads.LocateResponsePayload {
		m := kmip.NewRequestMessage(kmip.V1_3, &payloads.LocateRequestPayload{OffsetItems: offset, MaximumItems: most, Attribute: by})
		r := s.send(&m)
		if err := r.BatchItem[0].Err(); err != nil {
			t.Fatal(err)
		}
		return r.BatchItem[0].ResponsePayload.(*payloads.LocateResponsePayload)
	}
	if found := ask(one, 0, 0, keysOnly...).UniqueIdentifier; !slices.Equal(found, made) {
		t.Fatalf("all: %v, want %v", found, made)
	}
	pages := func(s *session, between func()) (all []string) {
		for {
			before := seen.Load()
			page := ask(s, int32(len(all)), size, keysOnly...)
			if looked := seen.Load() - before; looked > size {
				t.Errorf("the page at %d took a look at %d objects", len(all), looked)
			}
			all = append(all, page.UniqueIdentifier...)
			if len(page.UniqueIdentifier) < size {
				if page.LocatedItems == nil || *page.LocatedItems != int32(len(all)) {
					t.Errorf("the last page tells %v objects, want %d", page.LocatedItems, len(all))
				}
				if len(page.UniqueIdentifier) == 0 { // which clients ask for
					return all
				}
			}
			between()
		}
	}
	if found := pages(one, func() {}); !slices.Equal(found, made) {
		t.Errorf("in pages: %v, want %v", found, made)
	}
	// What another connection asks for, and an object that comes or goes, move no
	// page.
	gone := made[3]
	if found := pages(one, func() {
		ask(other, 0, 3, keysOnly...)
		if gone != "" {
			do[payloads.DestroyResponsePayload](other, &payloads.DestroyRequestPayload{UniqueIdentifier: gone})
			do[payloads.CreateResponsePayload](other, newKey())
			gone = ""
		}
	}); !slices.Equal(found, made) {
		t.Errorf("in pages, while others work: %v, want %v", found, made)
	}
	left := ask(one, 0, 0, keysOnly...).UniqueIdentifier
	// A page out of turn, or of another query, is found from the start.
	for _, c := range []struct {
		offset, most int32
		by           []kmip.Attribute
	}{{20, 5, keysOnly}, {20, 5, keysOnly}, {25, 7, nil}, {32, 7, keysOnly}, {3, 1, keysOnly}, {56, 5, keysOnly}, {100, 5, keysOnly}} {
		from := min(int(c.offset), len(left))
		want := left[from:min(from+int(c.most), len(left))]
		page := ask(one, c.offset, c.most, c.by...)
		if !slices.Equal(page.UniqueIdentifier, want) {
			t.Errorf("page of %d at %d: %v, want %v", c.most, c.offset, page.UniqueIdentifier, want)
		}
		told := "none"
		if page.LocatedItems != nil {
			told = fmt.Sprint(*page.LocatedItems)
		}
		wantTold := "none"
		if len(want) < int(c.most) {
			wantTold = fmt.Sprint(len(left))
		}
		if told != wantTold {
			t.Errorf("page of %d at %d tells %s objects, want %s", c.most, c.offset, told, wantTold)
		}
	}
}
