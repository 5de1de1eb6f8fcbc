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
	"sync/atomic"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/errs"
)

// ledger is what an observer saw.
type ledger struct {
	mu     sync.Mutex
	events []Event
	calls  int
	fail   error
}

func (l *ledger) observe(_ context.Context, events ...Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, events...)
	l.calls++
	return l.fail
}

func (l *ledger) failing(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = err
}

// last returns the newest event and forgets all.
func (l *ledger) last(t *testing.T, want int) Event {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	defer func() { l.events = nil }()
	if len(l.events) != want {
		t.Fatalf("%d events, want %d: %+v", len(l.events), want, l.events)
	}
	return l.events[want-1]
}

func TestPolicyAndEvents(t *testing.T) {
	t.Parallel()
	saw := &ledger{}
	policies := map[string]*Policy{
		"all":      nil,
		"reader":   {Operations: []kmip.Operation{kmip.OperationGet}},
		"captive":  {NoExport: true},
		"aes-256":  {KeyTypes: []KeyType{{Algorithm: kmip.CryptographicAlgorithmAES, Bits: 256}}},
		"any-hmac": {KeyTypes: []KeyType{{Algorithm: kmip.CryptographicAlgorithmHMACSHA256}}},
	}
	authenticate := func(_ context.Context, state tls.ConnectionState, _ []kmip.Credential) (Client, error) {
		name := state.PeerCertificates[0].Subject.CommonName
		p, ok := policies[name]
		if !ok {
			return Client{}, errors.New("unknown client")
		}
		return Client{Account: "one", Name: "application:" + name, Policy: p}, nil
	}
	b := newBench(t, Limits{}, func(s *Server) {
		s.observe, s.authenticate = saw.observe, authenticate
		s.log = slog.New(slog.DiscardHandler) // it tells of what cannot be recorded
	})
	ask := func(name string, p kmip.OperationPayload) kmip.ResponseBatchItem {
		t.Helper()
		m := kmip.NewRequestMessage(kmip.V1_4, p)
		return b.dial(t, name).send(&m).BatchItem[0]
	}
	created := ask("all", newKey()).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	if e := saw.last(t, 1); e.Client.Name != "application:all" || e.Operation != kmip.OperationCreate || e.Object != created || e.Reason != 0 || e.Peer == "" || e.Duration <= 0 {
		t.Errorf("event of a Create: %+v", e)
	}
	get := &payloads.GetRequestPayload{UniqueIdentifier: created}
	for _, c := range []struct {
		client  string
		payload kmip.OperationPayload
		want    kmip.ResultReason
	}{
		{"reader", get, 0},
		{"reader", newKey(), kmip.ResultReasonPermissionDenied},
		{"reader", &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}}, 0},
		{"captive", newKey(), 0},
		{"captive", get, kmip.ResultReasonPermissionDenied},
		{"aes-256", newKey(), 0},
		{"any-hmac", newKey(), kmip.ResultReasonPermissionDenied},
		{"any-hmac", get, 0},
		{"stranger", get, kmip.ResultReasonAuthenticationNotSuccessful},
	} {
		if got := ask(c.client, c.payload); got.ResultReason != c.want {
			t.Errorf("%s, %T: reason %v, want %v", c.client, c.payload, got.ResultReason, c.want)
		}
		e := saw.last(t, 1)
		if e.Reason != c.want || c.client != "stranger" && e.Client.Name != "application:"+c.client {
			t.Errorf("%s, %T: event %+v", c.client, c.payload, e)
		}
	}

	t.Log("what cannot be recorded is not answered")
	saw.failing(errors.New("disk full"))
	m := kmip.NewRequestMessage(kmip.V1_4, get)
	if got := b.dial(t, "all").send(&m).BatchItem[0]; got.ResultReason != kmip.ResultReasonGeneralFailure || got.ResponsePayload != nil {
		t.Errorf("an answer without a record: %+v", got)
	}
}

// TestAdmit has a client's operations admitted one by one.
func TestAdmit(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var log []string
	note := func(s string) {
		mu.Lock()
		defer mu.Unlock()
		log = append(log, s)
	}
	saw := &ledger{}
	b := newBench(t, Limits{}, func(s *Server) {
		s.observe = saw.observe
		s.authenticate = func(context.Context, tls.ConnectionState, []kmip.Credential) (Client, error) {
			return Client{Account: "one", Policy: &Policy{Operations: []kmip.Operation{kmip.OperationCreate, kmip.OperationGet}}, Admit: func(_ context.Context, op kmip.Operation, _ int) (func(error), error) {
				note("begin " + ttlv.EnumStr(op))
				if op == kmip.OperationGet {
					return nil, &Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: "enough", Cause: "quota"}
				}
				return func(err error) { note(fmt.Sprint("end ", err)) }, nil
			}}, nil
		}
	})
	short := newKey()
	short.TemplateAttribute.Attribute = short.TemplateAttribute.Attribute[:1]
	m := kmip.NewRequestMessage(kmip.V1_4, newKey(), short, &payloads.GetRequestPayload{}, &payloads.DestroyRequestPayload{})
	m.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
	items := b.dial(t, "any").send(&m).BatchItem
	var reasons []kmip.ResultReason
	for _, item := range items {
		reasons = append(reasons, item.ResultReason)
	}
	if want := []kmip.ResultReason{0, kmip.ResultReasonInvalidField, kmip.ResultReasonPermissionDenied, kmip.ResultReasonPermissionDenied}; !slices.Equal(reasons, want) {
		t.Errorf("reasons %v, want %v", reasons, want)
	}
	if items[2].ResultMessage != "enough" {
		t.Errorf("message %q", items[2].ResultMessage)
	}
	want := []string{"begin Create", "begin Create", "end <nil>", "end Cryptographic Usage Mask is missing", "begin Get"}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(log, want) {
		t.Errorf("admitted %q, want %q", log, want)
	}
	saw.mu.Lock()
	defer saw.mu.Unlock()
	if len(saw.events) != 4 || saw.events[2].Cause != "quota" || saw.events[3].Cause != "" {
		t.Errorf("events %+v", saw.events)
	}
}

// TestUnavailable closes the connection, without an answer, when the server
// cannot know who a client is or what it asks for: an answer would keep the
// client from its next server. The refusal is not put on record as the client's.
func TestUnavailable(t *testing.T) {
	t.Parallel()
	down := errs.New(errs.Unavailable, "no majority")
	for name, change := range map[string]func(*Server){
		"client": func(s *Server) {
			s.authenticate = func(context.Context, tls.ConnectionState, []kmip.Credential) (Client, error) {
				return Client{}, fmt.Errorf("directory: %w", down)
			}
		},
		"operation": func(s *Server) { s.store = downStore{down} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var refused atomic.Bool
			b := newBench(t, Limits{}, change, func(s *Server) {
				s.log = slog.New(slog.DiscardHandler)
				s.observe = func(_ context.Context, events ...Event) error {
					if events[0].Operation == 0 {
						refused.Store(true)
					}
					return nil
				}
			})
			s := b.dial(t, "a")
			m := kmip.NewRequestMessage(kmip.V1_4, &payloads.GetRequestPayload{UniqueIdentifier: "x"})
			if _, err := s.Write(ttlv.MarshalTTLV(&m)); err != nil {
				t.Fatal(err)
			}
			if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("read %d bytes, %v", n, err)
			}
			if refused.Load() {
				t.Error("the client was put on record as refused")
			}
		})
	}
}

// downStore is a store that cannot be reached.
type downStore struct{ err error }

func (d downStore) View(context.Context, string, func(Reader) error) error { return d.err }
func (d downStore) Update(context.Context, string, func(Tx) error) error   { return d.err }
