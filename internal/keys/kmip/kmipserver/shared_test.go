package kmipserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// commits is a store that counts transactions with changes, runs each twice, as
// after a conflict, and fails commits.
type commits struct {
	*Memory

	mu     sync.Mutex
	n      int
	fail   error
	first  []*keymem.Key // material of attempts that were given up
	errors []error       // of what was to be committed
}

func (c *commits) Update(ctx context.Context, account string, f func(Tx) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	conflict := errors.New("conflict")
	err := c.Memory.Update(ctx, account, func(tx Tx) error {
		err := f(tx)
		for _, o := range tx.(*memoryTx).changed {
			c.first = append(c.first, o.Material)
		}
		return errors.Join(conflict, err)
	})
	if !errors.Is(err, conflict) {
		return err
	}
	err = c.Memory.Update(ctx, account, func(tx Tx) error {
		err := f(tx)
		if err == nil {
			err = c.fail
		}
		return err
	})
	c.errors = append(c.errors, err)
	if err == nil {
		c.n++
	}
	return err
}

// TestSharedTransaction has items of a batch share a transaction, and answered as
// if each had its own.
func TestSharedTransaction(t *testing.T) {
	t.Parallel()
	name := func(s string) kmip.Attribute {
		return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: s, NameType: kmip.NameTypeUninterpretedTextString}}
	}
	create, activate := newKey(), &payloads.ActivateRequestPayload{}
	label := &payloads.AddAttributeRequestPayload{Attribute: kmip.Attribute{AttributeName: "x-vm", AttributeValue: "web"}}
	twice := &payloads.AddAttributeRequestPayload{Attribute: name("a")}
	const ok, permission, field, missing = kmip.ResultReason(0), kmip.ResultReasonPermissionDenied, kmip.ResultReasonInvalidField, kmip.ResultReasonItemNotFound
	for title, test := range map[string]struct {
		items   []kmip.OperationPayload
		goOn    bool
		want    []kmip.ResultReason
		commits int
		observe int // calls
	}{
		"all":              {items: []kmip.OperationPayload{create, activate, label}, want: []kmip.ResultReason{ok, ok, ok}, commits: 1, observe: 1},
		"many":             {items: []kmip.OperationPayload{newKey(name("a")), newKey(name("b")), activate}, want: []kmip.ResultReason{ok, ok, ok}, commits: 1, observe: 1},
		"last fails":       {items: []kmip.OperationPayload{create, activate, activate}, want: []kmip.ResultReason{ok, ok, permission}, commits: 2, observe: 3},
		"stops":            {items: []kmip.OperationPayload{create, activate, activate, label}, want: []kmip.ResultReason{ok, ok, permission}, commits: 2, observe: 3},
		"goes on":          {items: []kmip.OperationPayload{create, activate, activate, label}, goOn: true, want: []kmip.ResultReason{ok, ok, permission, ok}, commits: 3, observe: 4},
		"first fails":      {items: []kmip.OperationPayload{activate, create}, goOn: true, want: []kmip.ResultReason{missing, ok}, commits: 1, observe: 2},
		"name twice":       {items: []kmip.OperationPayload{newKey(name("a")), newKey(name("a"))}, want: []kmip.ResultReason{ok, field}, commits: 1, observe: 2},
		"name given away":  {items: []kmip.OperationPayload{create, twice, newKey(name("a"))}, want: []kmip.ResultReason{ok, ok, field}, commits: 2, observe: 3},
		"around another":   {items: []kmip.OperationPayload{create, activate, &payloads.GetAttributesRequestPayload{}, label, label}, want: []kmip.ResultReason{ok, ok, ok, ok, ok}, commits: 2, observe: 3},
		"one is forbidden": {items: []kmip.OperationPayload{create, &payloads.RevokeRequestPayload{}, activate}, goOn: true, want: []kmip.ResultReason{ok, permission, ok}, commits: 2, observe: 3},
	} {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			store, saw := &commits{Memory: NewMemory()}, &ledger{}
			defer store.Close()
			var mu sync.Mutex
			begun, ended := 0, 0
			b := newBench(t, Limits{}, func(s *Server) {
				s.store, s.observe = store, saw.observe
				s.authenticate = func(context.Context, tls.ConnectionState, []kmip.Credential) (Client, error) {
					allowed := slices.DeleteFunc(Operations(), func(op kmip.Operation) bool { return op == kmip.OperationRevoke })
					return Client{Account: "one", Policy: &Policy{Operations: allowed}, Admit: func(context.Context, kmip.Operation, int) (func(error), error) {
						mu.Lock()
						defer mu.Unlock()
						begun++
						return func(error) {
							mu.Lock()
							defer mu.Unlock()
							ended++
						}, nil
					}}, nil
				}
			})
			m := kmip.NewRequestMessage(kmip.V1_4, test.items...)
			if test.goOn {
				m.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
			}
			var got []kmip.ResultReason
			for _, item := range b.dial(t, "one").send(&m).BatchItem {
				got = append(got, item.ResultReason)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("reasons %v, want %v", got, test.want)
			}
			if store.n != test.commits {
				t.Errorf("%d commits, want %d: %v", store.n, test.commits, store.errors)
			}
			if saw.calls != test.observe || len(saw.events) != len(test.want) {
				t.Errorf("%d events in %d calls, want %d in %d", len(saw.events), saw.calls, len(test.want), test.observe)
			}
			for i, e := range saw.events {
				if e.Reason != test.want[i] || e.Reason == 0 && e.Object == "" {
					t.Errorf("event %d: %+v", i, e)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if begun != ended || begun < len(test.want)-1 {
				t.Errorf("%d items admitted, %d ended", begun, ended)
			}
			if test.commits == 1 && test.observe == 1 { // what was made in vain is wiped
				for i, m := range store.first {
					if m != nil && m.Len() > 0 && !closed(m) {
						t.Errorf("material %d of the first attempt is there", i)
					}
				}
			}
		})
	}
}

// closed reports whether a key was wiped.
func closed(k *keymem.Key) (gone bool) {
	defer func() { gone = gone || recover() != nil }()
	return len(k.Bytes()) == 0
}

// TestSharedCommitFails has a commit fail of which nobody knows what became: it is
// not tried again.
func TestSharedCommitFails(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		fail    error
		updates int
		want    []kmip.ResultReason // nil: no answer
	}{
		{errors.New("disk"), 1, []kmip.ResultReason{kmip.ResultReasonGeneralFailure}},
		{errs.New(errs.Unavailable, "no majority"), 1, nil},
		{errs.New(errs.Invalid, "too large"), 2, []kmip.ResultReason{kmip.ResultReasonGeneralFailure}}, // each by itself: the first stops the batch
	} {
		t.Run(fmt.Sprint(test.fail), func(t *testing.T) {
			t.Parallel()
			store := &commits{Memory: NewMemory(), fail: test.fail}
			defer store.Close()
			b := newBench(t, Limits{}, func(s *Server) { s.store, s.log = store, slog.New(slog.DiscardHandler) })
			s := b.dial(t, "one")
			m := kmip.NewRequestMessage(kmip.V1_4, newKey(), &payloads.ActivateRequestPayload{})
			if test.want == nil {
				if _, err := s.Write(ttlv.MarshalTTLV(&m)); err != nil {
					t.Fatal(err)
				}
				if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
					t.Errorf("read %d bytes, %v", n, err)
				}
			} else {
				var got []kmip.ResultReason
				for _, item := range s.send(&m).BatchItem {
					got = append(got, item.ResultReason)
				}
				if !slices.Equal(got, test.want) {
					t.Errorf("reasons %v, want %v", got, test.want)
				}
			}
			store.mu.Lock()
			defer store.mu.Unlock()
			if len(store.errors) != test.updates {
				t.Errorf("%d commits were tried: %v", len(store.errors), store.errors)
			}
		})
	}
}
