package objectstore

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"strongroom/internal/keys/kmip/kmipserver"
)

func (n *node) wantKeys(t *testing.T, account string, want int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if got, err := n.Keys(ctx, account); err != nil || got != want {
		t.Errorf("%d keys (%v), want %d", got, err, want)
	}
}

func TestKeysAreCounted(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	waiting, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := n.Keys(waiting, account); err == nil {
		t.Errorf("%d keys before any was counted", got)
	}
	if err := n.Count(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.wantKeys(t, account, 0)
	first, _ := n.create(t, "first")
	second, _ := n.create(t, "")
	n.wantKeys(t, account, 2)
	n.wantKeys(t, "another", 0)
	n.change(t, first, func(o *kmipserver.Object) { o.Archived = true })
	template := &kmipserver.Object{ID: uuid.Must(uuid.NewV7()).String(), Type: kmip.ObjectTypeTemplate}
	if err := n.Update(t.Context(), account, func(tx kmipserver.Tx) error { return tx.Put(template) }); err != nil {
		t.Fatal(err)
	}
	n.wantKeys(t, account, 2)
	n.change(t, second, destroy)
	n.wantKeys(t, account, 1)
	refused := newKey(t, "refused")
	defer refused.Material.Close()
	if err := n.Update(t.Context(), account, func(tx kmipserver.Tx) error {
		if err := tx.Put(refused); err != nil {
			return err
		}
		return context.Canceled
	}); err == nil {
		t.Fatal("an update that failed has no error")
	}
	n.wantKeys(t, account, 1)
	if err := n.Shred(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.wantKeys(t, account, 1)
	n.restart(t)
	if err := n.Count(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.wantKeys(t, account, 1)
}

// TestCountRacesChanges counts again and again while keys come and go: at the
// end every count is right.
func TestCountRacesChanges(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	var writers, counter sync.WaitGroup
	done := make(chan struct{})
	counter.Go(func() {
		for {
			if err := n.Count(context.Background()); err != nil {
				t.Error(err)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	const perWriter = 30
	for range 4 {
		writers.Go(func() {
			for i := range perWriter {
				id, _ := n.create(t, "")
				if i%3 == 0 {
					n.change(t, id, destroy)
				}
			}
		})
	}
	writers.Wait()
	close(done)
	counter.Wait()
	n.wantKeys(t, account, 4*perWriter*2/3)
}
