package kmipserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"go.uber.org/goleak"
	"strongroom/internal/crypto/keymem"

	"strongroom/internal/keys/kmip/testca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bench is a server with a clock of its own on an in-memory store.
type bench struct {
	server *Server
	ca     *testca.Authority
	addr   string
	clock  atomic.Int64 // seconds since 1970
}

func byCommonName(_ context.Context, state tls.ConnectionState, _ []kmip.Credential) (Client, error) {
	if len(state.PeerCertificates) == 0 {
		return Client{}, errors.New("no client certificate")
	}
	return Client{Account: state.PeerCertificates[0].Subject.CommonName}, nil
}

// newBench starts a server, after change was made to it.
func newBench(t testing.TB, limits Limits, change ...func(*Server)) *bench {
	t.Helper()
	b := &bench{ca: testca.New(t)}
	b.clock.Store(time.Now().Unix())
	store := NewMemory()
	var err error
	b.server, err = New(Config{
		Store: store, Authenticate: byCommonName, Limits: limits,
		TLS: TLSConfig(b.ca.Server(t), b.ca.Pool(), false),
		Log: slog.New(noErrors{t}),
		Now: func() time.Time { return time.Unix(b.clock.Load(), 0) },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(b.server)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- b.server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		store.Close()
	})
	return b
}

// patience bounds the wait for each answer, and for the end of a connection.
const patience = time.Minute

// session is a connection of a client.
type session struct {
	t testing.TB
	*tls.Conn
}

func (b *bench) dial(t testing.TB, name string) *session {
	t.Helper()
	conn, err := tls.Dial("tcp", b.addr, &tls.Config{RootCAs: b.ca.Pool(), Certificates: []tls.Certificate{b.ca.Client(t, name)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &session{t: t, Conn: conn}
}

func (s *session) send(m *kmip.RequestMessage) *kmip.ResponseMessage {
	s.t.Helper()
	s.SetDeadline(time.Now().Add(patience))
	if _, err := s.Write(ttlv.MarshalTTLV(m)); err != nil {
		s.t.Fatal(err)
	}
	return s.receive()
}

func (s *session) receive() *kmip.ResponseMessage {
	s.t.Helper()
	s.SetDeadline(time.Now().Add(patience))
	header := make([]byte, 8)
	if _, err := io.ReadFull(s, header); err != nil {
		s.t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint32(header[4:]))
	if _, err := io.ReadFull(s, body); err != nil {
		s.t.Fatal(err)
	}
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(append(header, body...), &m); err != nil {
		s.t.Fatal(err)
	}
	return &m
}

// do sends one operation, which must succeed.
func do[Out any](s *session, p kmip.OperationPayload) *Out {
	s.t.Helper()
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	r := s.send(&m)
	if err := r.BatchItem[0].Err(); err != nil {
		s.t.Fatal(err)
	}
	return r.BatchItem[0].ResponsePayload.(any).(*Out)
}

func newKey(attributes ...kmip.Attribute) *payloads.CreateRequestPayload {
	return &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: append([]kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
	}, attributes...)}}
}

func TestBatchRules(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	batch := func(edit func(*kmip.RequestHeader), items ...kmip.OperationPayload) *kmip.ResponseMessage {
		m := kmip.NewRequestMessage(kmip.V1_4, items...)
		edit(&m.Header)
		return s.send(&m)
	}
	keep := func(*kmip.RequestHeader) {}
	missing := &payloads.GetRequestPayload{UniqueIdentifier: "no-such-key"}

	t.Log("the placeholder goes from item to item, in order, ids are echoed")
	r := batch(keep, newKey(), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{})
	if len(r.BatchItem) != 3 || r.Header.BatchCount != 3 {
		t.Fatalf("got %d items, want 3", len(r.BatchItem))
	}
	for i, item := range r.BatchItem {
		if err := item.Err(); err != nil {
			t.Error(err)
		}
		if got := binary.BigEndian.Uint64(item.UniqueBatchItemID); got != uint64(i) {
			t.Errorf("item %d has id %d", i, got)
		}
	}
	created := r.BatchItem[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	if got := r.BatchItem[2].ResponsePayload.(*payloads.GetResponsePayload).UniqueIdentifier; got != created {
		t.Errorf("the placeholder led to %s, want %s", got, created)
	}

	t.Log("a failed item stops the batch unless it shall continue")
	if r := batch(keep, missing, newKey()); len(r.BatchItem) != 1 || r.BatchItem[0].ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("got %d items, reason %v; want 1 item, not found", len(r.BatchItem), r.BatchItem[0].ResultReason)
	}
	r = batch(func(h *kmip.RequestHeader) {
		h.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
	}, missing, newKey())
	if len(r.BatchItem) != 2 || r.BatchItem[1].Err() != nil {
		t.Errorf("got %d items; want the second to succeed", len(r.BatchItem))
	}
	r = batch(func(h *kmip.RequestHeader) { h.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionUndo }, newKey(), missing)
	if len(r.BatchItem) != 1 || r.BatchItem[0].ResultReason != kmip.ResultReasonFeatureNotSupported {
		t.Errorf("undo: got %d items, reason %v", len(r.BatchItem), r.BatchItem[0].ResultReason)
	}

	t.Log("headers that cannot be right are refused")
	for name, edit := range map[string]func(*kmip.RequestHeader){
		"batch count":  func(h *kmip.RequestHeader) { h.BatchCount = 2 },
		"version":      func(h *kmip.RequestHeader) { h.ProtocolVersion = kmip.V2_0 },
		"response":     func(h *kmip.RequestHeader) { h.MaximumResponseSize = -1 },
		"continuation": func(h *kmip.RequestHeader) { h.BatchErrorContinuationOption = 9 },
	} {
		if r := batch(edit, newKey()); len(r.BatchItem) != 1 || r.BatchItem[0].ResultStatus != kmip.ResultStatusOperationFailed || r.BatchItem[0].ResponsePayload != nil {
			t.Errorf("%s: not refused", name)
		}
	}
	r = batch(func(h *kmip.RequestHeader) { h.MaximumResponseSize = 200 }, &payloads.GetAttributesRequestPayload{UniqueIdentifier: created})
	if r.BatchItem[0].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("a response of over 200 bytes: reason %v", r.BatchItem[0].ResultReason)
	}
}

func TestVersionGates(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	id := do[payloads.CreateResponsePayload](s, newKey()).UniqueIdentifier
	for _, c := range []struct {
		version kmip.ProtocolVersion
		name    kmip.AttributeName
		want    int
	}{
		{kmip.V1_0, kmip.AttributeNameFresh, 0},
		{kmip.V1_1, kmip.AttributeNameFresh, 1},
		{kmip.V1_1, kmip.AttributeNameOriginalCreationDate, 0},
		{kmip.V1_2, kmip.AttributeNameOriginalCreationDate, 1},
	} {
		m := kmip.NewRequestMessage(c.version, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{c.name}})
		r := s.send(&m)
		if r.Header.ProtocolVersion != c.version {
			t.Errorf("asked in %v, answered in %v", c.version, r.Header.ProtocolVersion)
		}
		if got := len(r.BatchItem[0].ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute); got != c.want {
			t.Errorf("%v %s: got %d values, want %d", c.version, c.name, got, c.want)
		}
	}
	m := kmip.NewRequestMessage(kmip.V1_1, &payloads.EncryptRequestPayload{UniqueIdentifier: id})
	if r := s.send(&m); r.BatchItem[0].ResultReason != kmip.ResultReasonOperationNotSupported {
		t.Errorf("Encrypt in KMIP 1.1: reason %v", r.BatchItem[0].ResultReason)
	}
}

// TestAsynchronous has an answer at once for a client that would take a later one, as
// KMIP 1.4 section 6.7 lets a server, so that there is nothing to poll for or to cancel.
func TestAsynchronous(t *testing.T) {
	t.Parallel()
	s := newBench(t, Limits{}).dial(t, "one")
	later := true
	m := kmip.NewRequestMessage(kmip.V1_4, newKey(), newKey())
	m.Header.AsynchronousIndicator = &later
	for i, item := range s.send(&m).BatchItem {
		if item.ResultStatus != kmip.ResultStatusSuccess || len(item.AsynchronousCorrelationValue) > 0 {
			t.Errorf("item %d: %v, to be polled for by %x", i, item.ResultStatus, item.AsynchronousCorrelationValue)
		}
	}
	for _, op := range []kmip.Operation{kmip.OperationPoll, kmip.OperationCancel} {
		m := kmip.NewRequestMessage(kmip.V1_4, kmip.NewUnknownPayload(op, ttlv.Value{Tag: kmip.TagAsynchronousCorrelationValue, Value: []byte("made up")}))
		if item := s.send(&m).BatchItem[0]; item.ResultStatus != kmip.ResultStatusOperationFailed || item.ResultReason != kmip.ResultReasonOperationNotSupported {
			t.Errorf("%s: %v, reason %v", ttlv.EnumStr(op), item.ResultStatus, item.ResultReason)
		}
	}
	do[payloads.CreateResponsePayload](s, newKey()) // the connection is still of use
}

func TestAccountsAreApart(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	id := do[payloads.CreateResponsePayload](b.dial(t, "one"), newKey()).UniqueIdentifier
	m := kmip.NewRequestMessage(kmip.V1_4, &payloads.GetRequestPayload{UniqueIdentifier: id})
	if r := b.dial(t, "two").send(&m); r.BatchItem[0].ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("another account's key: reason %v", r.BatchItem[0].ResultReason)
	}
}

func TestRekeyOfExpiredKey(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{})
	s := b.dial(t, "one")
	start := time.Unix(b.clock.Load(), 0)
	id := do[payloads.CreateResponsePayload](s, newKey(
		kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "vm", NameType: kmip.NameTypeUninterpretedTextString}},
		kmip.Attribute{AttributeName: kmip.AttributeNameActivationDate, AttributeValue: start},
		kmip.Attribute{AttributeName: kmip.AttributeNameDeactivationDate, AttributeValue: start.Add(2 * time.Minute)},
	)).UniqueIdentifier
	read := func(id string, name kmip.AttributeName) any {
		t.Helper()
		list := do[payloads.GetAttributesResponsePayload](s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{name}}).Attribute
		if len(list) != 1 {
			t.Fatalf("%s: got %d values", name, len(list))
		}
		return list[0].AttributeValue
	}
	if got := read(id, kmip.AttributeNameState); got != kmip.StateActive {
		t.Errorf("state %v, want active", got)
	}
	b.clock.Add(121)
	if got := read(id, kmip.AttributeNameState); got != kmip.StateDeactivated {
		t.Errorf("state after the deactivation date %v, want deactivated", got)
	}
	offset := time.Duration(0)
	replacement := do[payloads.RekeyResponsePayload](s, &payloads.RekeyRequestPayload{UniqueIdentifier: id, Offset: &offset}).UniqueIdentifier
	if got := read(replacement, kmip.AttributeNameState); got != kmip.StateActive {
		t.Errorf("state of the replacement %v, want active", got)
	}
	if got := read(replacement, kmip.AttributeNameDeactivationDate).(time.Time); !got.Equal(start.Add(241 * time.Second)) {
		t.Errorf("the replacement expires at %v, want two minutes after it was made", got)
	}
	if got := read(id, kmip.AttributeNameLink).(kmip.Link); got.LinkedObjectIdentifier != replacement {
		t.Errorf("the old key links to %s, want %s", got.LinkedObjectIdentifier, replacement)
	}
	if got := read(replacement, kmip.AttributeNameName).(kmip.Name); got.NameValue != "vm" {
		t.Errorf("the name did not move: %v", got)
	}
}

// wantClosed waits until the server closes a connection, on which nothing is sent.
func wantClosed(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	if n, err := io.Copy(io.Discard, c); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection was not closed: %d bytes, %v", n, err)
	}
}

func TestDeadlinesAndConnectionLimit(t *testing.T) {
	t.Parallel()

	t.Log("a peer that never starts its handshake")
	raw, err := net.Dial("tcp", newBench(t, Limits{Handshake: 200 * time.Millisecond}).addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	wantClosed(t, raw)
	t.Log("a client that asks nothing, and one that never ends its request")
	b := newBench(t, Limits{Idle: 300 * time.Millisecond, Request: 200 * time.Millisecond})
	wantClosed(t, b.dial(t, "idle"))
	slow := b.dial(t, "slow")
	slow.Write([]byte{0x42, 0x00, 0x78})
	wantClosed(t, slow)

	t.Log("a client that nobody knows, whatever it asks, and one that is known")
	b = newBench(t, Limits{Request: time.Second}, func(s *Server) {
		s.authenticate = func(ctx context.Context, state tls.ConnectionState, credentials []kmip.Credential) (Client, error) {
			if state.PeerCertificates[0].Subject.CommonName == "stranger" {
				return Client{}, errors.New("unknown")
			}
			return byCommonName(ctx, state, credentials)
		}
	})
	known, stranger := b.dial(t, "known"), b.dial(t, "stranger")
	do[payloads.CreateResponsePayload](known, newKey())
	m := kmip.NewRequestMessage(kmip.V1_4, newKey())
	if item := stranger.send(&m).BatchItem[0]; item.ResultReason != kmip.ResultReasonAuthenticationNotSuccessful {
		t.Errorf("a stranger: %v", item.Err())
	}
	wantClosed(t, b.dial(t, "silent"))
	wantClosed(t, stranger)
	do[payloads.CreateResponsePayload](known, newKey())

	t.Log("a third connection")
	b = newBench(t, Limits{Connections: 2})
	one, two := b.dial(t, "one"), b.dial(t, "two")
	over, err := net.Dial("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	wantClosed(t, over)
	one.Close()
	two.Close()
}

func TestConnectionsPerAddress(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{PerAddress: 1})
	first := b.dial(t, "one")
	over, err := net.Dial("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	wantClosed(t, over)
	do[payloads.CreateResponsePayload](first, newKey())
}

func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{Message: 4096, Values: 100, Depth: 5})
	m := kmip.NewRequestMessage(kmip.V1_4, newKey())
	good := ttlv.MarshalTTLV(&m)
	nested := []byte{}
	for range 40 {
		nested = append([]byte{0x42, 0, 0x78, 1, 0, 0, 0, byte(len(nested))}, nested...)
		if len(nested) > 200 {
			break
		}
	}
	edit := func(f func([]byte)) []byte {
		c := bytes.Clone(good)
		f(c)
		return c
	}
	for name, message := range map[string][]byte{
		"not a request": edit(func(b []byte) { b[2] = 0x7b }),
		"huge":          edit(func(b []byte) { b[4] = 0x7f }),
		"length":        edit(func(b []byte) { b[15]++ }),
		"type":          edit(func(b []byte) { b[11] = 0x0c }),
		"deep":          nested,
		"empty integer": {0x42, 0, 0x78, 1, 0, 0, 0, 8, 0x42, 0, 0x6a, 2, 0, 0, 0, 0},
		"noise":         bytes.Repeat([]byte{0xff}, 64),
	} {
		s := b.dial(t, "one")
		s.Write(message)
		r := s.receive()
		if len(r.BatchItem) != 1 || r.BatchItem[0].ResultReason != kmip.ResultReasonInvalidMessage {
			t.Errorf("%s: want one item, invalid message; got %+v", name, r.BatchItem)
		}
	}
	s := b.dial(t, "one")
	if r := s.send(&m); r.BatchItem[0].Err() != nil {
		t.Errorf("after all that, a good message: %v", r.BatchItem[0].Err())
	}
}

func TestKeyWrapVectors(t *testing.T) {
	t.Parallel()
	for _, v := range wrapVectors {
		kek, clear := v.key(t), v.clear
		defer kek.Close()
		wrapped, err := wrapAES(kek, keyWrapIV, clear)
		if err != nil || !bytes.Equal(wrapped, v.wrapped) {
			t.Errorf("wrap: got %x, %v; want %x", wrapped, err, v.wrapped)
		}
	}
	// RFC 5649 section 6.
	for clear, want := range map[string]string{
		"c37b7e6492584340bed12207808941155068f738": "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a",
		"466f7250617369": "afbeb0f07dfbf5419200f2ccb50bb24f",
	} {
		kek, err := keymem.Take(unhex("5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8"))
		if err != nil {
			t.Fatal(err)
		}
		wrapped, err := wrapPadded(kek, unhex(clear))
		kek.Close()
		if err != nil || !bytes.Equal(wrapped, unhex(want)) {
			t.Errorf("wrap with padding: got %x, %v; want %s", wrapped, err, want)
		}
	}
}
