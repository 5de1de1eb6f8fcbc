package kmipclient

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
)

// TestDescribeAll asks for many keys, of a server that takes batches, and of one that
// does not.
func TestDescribeAll(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{batchMax, 1} {
		ca := testca.New(t)
		store := kmipserver.NewMemory()
		t.Cleanup(func() { store.Close() })
		var mu sync.Mutex
		calls := map[kmip.Operation]int{}
		l, _ := start(t, ca, store, "127.0.0.1:0", func(c *kmipserver.Config) {
			c.Limits.Batch = limit
			c.Observe = func(_ context.Context, events ...kmipserver.Event) error {
				mu.Lock()
				defer mu.Unlock()
				for _, e := range events {
					calls[e.Operation]++
				}
				return nil
			}
		})
		c := newClient(t, ca, nil, l.Addr().String())
		var ids []string
		for i := range batchMax + 3 {
			if i == 5 || i == batchMax+1 {
				ids = append(ids, fmt.Sprint("no-such-key-", i))
				continue
			}
			id, err := c.CreateNamed(t.Context(), fmt.Sprint("key-", i))
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, id)
		}
		got, err := c.DescribeAll(t.Context(), ids)
		if err != nil || len(got) != len(ids) {
			t.Fatalf("%d of %d keys described, %v", len(got), len(ids), err)
		}
		for i, d := range got {
			if missing := i == 5 || i == batchMax+1; missing != (errs.KindOf(d.Err) == errs.NotFound) || missing != (d.Err != nil) {
				t.Errorf("key %d: %v", i, d.Err)
			} else if !missing && d.Name != fmt.Sprint("key-", i) {
				t.Errorf("key %d is described as %+v", i, d.Description)
			}
		}
		mu.Lock()
		if calls[kmip.OperationGetAttributes] != len(ids) {
			t.Errorf("%d keys were looked at", calls[kmip.OperationGetAttributes])
		}
		mu.Unlock()
		if got, err := c.DescribeAll(t.Context(), nil); err != nil || len(got) != 0 {
			t.Errorf("of none: %v, %v", got, err)
		}
	}
	// Nobody is there.
	c := newClient(t, testca.New(t), func(c *Config) { c.Request = 5 * time.Second }, "127.0.0.1:1")
	for _, ids := range [][]string{{"a"}, {"a", "b"}} {
		if _, err := c.DescribeAll(t.Context(), ids); errs.KindOf(err) != errs.Unavailable {
			t.Errorf("without a server: %v", err)
		}
	}
}

// TestBatchAnswers has answers that do not fit what was asked refused.
func TestBatchAnswers(t *testing.T) {
	t.Parallel()
	ask := &payloads.GetAttributesRequestPayload{}
	good := func(id byte) kmip.ResponseBatchItem {
		return kmip.ResponseBatchItem{Operation: kmip.OperationGetAttributes, UniqueBatchItemID: []byte{id}, ResponsePayload: &payloads.GetAttributesResponsePayload{}}
	}
	other, empty := good(1), good(1)
	other.Operation, empty.ResponsePayload = kmip.OperationGet, nil
	for name, test := range map[string]struct {
		second kmip.ResponseBatchItem
		ok     bool
	}{"good": {good(1), true}, "twice": {good(0), false}, "another": {good(2), false}, "operation": {other, false}, "empty": {empty, false}} {
		b := &batch{items: []kmip.OperationPayload{ask, ask}}
		if err := b.take(&server{}, []kmip.ResponseBatchItem{test.second, good(0)}); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
