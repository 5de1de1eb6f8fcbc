package kmipclient

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/kmipwire"
	"strongroom/internal/keys/kmip/testca"
)

// answering is a server that answers what reply says.
func answering(t *testing.T, ca *testca.Authority, reply func(*kmip.RequestMessage) []kmip.ResponseBatchItem) (addr string) {
	t.Helper()
	return speaking(t, ca, versions, reply)
}

// speaking is answering by a server of those versions.
func speaking(t *testing.T, ca *testca.Authority, theirs []kmip.ProtocolVersion, reply func(*kmip.RequestMessage) []kmip.ResponseBatchItem) (addr string) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{ca.Server(t)}})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for {
					var m kmip.RequestMessage
					b, err := kmipwire.Read(conn, kmip.TagRequestMessage, answerLimits)
					if err != nil || ttlv.UnmarshalTTLV(b, &m) != nil {
						return
					}
					r := kmip.ResponseMessage{Header: kmip.ResponseHeader{ProtocolVersion: m.Header.ProtocolVersion, TimeStamp: time.Unix(0, 0)}}
					if m.BatchItem[0].Operation == kmip.OperationDiscoverVersions {
						r.BatchItem = []kmip.ResponseBatchItem{{Operation: kmip.OperationDiscoverVersions, ResponsePayload: &payloads.DiscoverVersionsResponsePayload{ProtocolVersion: theirs}}}
					} else {
						r.BatchItem = reply(&m)
					}
					r.Header.BatchCount = int32(len(r.BatchItem))
					if _, err := conn.Write(ttlv.MarshalTTLV(&r)); err != nil {
						return
					}
				}
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-served
	})
	return l.Addr().String()
}

// TestHostileServer: what a server answers is held to what was asked, and to a bound.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	client := func(t *testing.T, reply func(*kmip.RequestMessage) []kmip.ResponseBatchItem) *Client {
		return newClient(t, ca, nil, answering(t, ca, reply))
	}
	attributes := []kmip.Attribute{{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateActive}}

	t.Run("one answer to many questions", func(t *testing.T) {
		t.Parallel()
		c := client(t, func(*kmip.RequestMessage) []kmip.ResponseBatchItem {
			return []kmip.ResponseBatchItem{{Operation: kmip.OperationGetAttributes, ResponsePayload: &payloads.GetAttributesResponsePayload{UniqueIdentifier: "a", Attribute: attributes}}}
		})
		got, err := c.DescribeAll(t.Context(), []string{"a", "b", "c"})
		if errs.KindOf(err) != errs.Unavailable {
			t.Errorf("got %+v, %v", got, err)
		}
	})
	t.Run("another key", func(t *testing.T) {
		t.Parallel()
		material := bytes.Repeat([]byte{1}, 32)
		c := client(t, func(m *kmip.RequestMessage) []kmip.ResponseBatchItem {
			item := kmip.ResponseBatchItem{Operation: m.BatchItem[0].Operation, UniqueBatchItemID: m.BatchItem[0].UniqueBatchItemID}
			switch item.Operation {
			case kmip.OperationGet:
				item.ResponsePayload = &payloads.GetResponsePayload{ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: "other", Object: &kmip.SymmetricKey{KeyBlock: kmip.KeyBlock{
					KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
					KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &material}}},
				}}}
			case kmip.OperationGetAttributes:
				item.ResponsePayload = &payloads.GetAttributesResponsePayload{UniqueIdentifier: "other", Attribute: attributes}
			default:
				item.ResponsePayload = &payloads.ActivateResponsePayload{UniqueIdentifier: "other"}
			}
			items := []kmip.ResponseBatchItem{item}
			for _, asked := range m.BatchItem[1:] {
				item.UniqueBatchItemID = asked.UniqueBatchItemID
				items = append(items, item)
			}
			return items
		})
		if key, err := c.Get(t.Context(), "mine"); err == nil {
			key.Close()
			t.Error("the material of another key is taken for this one's")
		}
		if state, err := c.State(t.Context(), "mine"); err == nil {
			t.Errorf("the state of another key, %v, is taken for this one's", state)
		}
		if got, err := c.DescribeAll(t.Context(), []string{"mine", "yours"}); err == nil {
			t.Errorf("other keys are taken for these: %+v", got)
		}
		if err := c.Activate(t.Context(), "mine"); err == nil {
			t.Error("another key was activated, and taken for this one")
		}
		if n := len(c.servers[0].idle); n != 0 {
			t.Errorf("%d connections are kept that are out of step", n)
		}
	})
	t.Run("message", func(t *testing.T) {
		t.Parallel()
		c := client(t, func(m *kmip.RequestMessage) []kmip.ResponseBatchItem {
			item := kmip.ResponseBatchItem{
				Operation: m.BatchItem[0].Operation, ResultStatus: kmip.ResultStatusOperationFailed, ResultReason: kmip.ResultReasonPermissionDenied,
				ResultMessage: "no\x1b[2J\r\u009b1m\xff" + strings.Repeat("!", 1<<20),
			}
			return []kmip.ResponseBatchItem{item}
		})
		_, err := c.Get(t.Context(), "mine")
		if err == nil || len(err.Error()) > 1000 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 || r == '\ufffd' }) || !strings.Contains(err.Error(), "no") {
			t.Errorf("got %.300q", err)
		}
	})
	t.Run("keys without end", func(t *testing.T) {
		t.Parallel()
		n, filler := 0, strings.Repeat("k", 1<<20)
		c := client(t, func(*kmip.RequestMessage) []kmip.ResponseBatchItem {
			n++
			p := &payloads.LocateResponsePayload{}
			for i := range 3 {
				p.UniqueIdentifier = append(p.UniqueIdentifier, fmt.Sprint(n, "-", i, filler))
			}
			return []kmip.ResponseBatchItem{{Operation: kmip.OperationLocate, ResponsePayload: p}}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if ids, err := c.Labelled(ctx, "x-owner", "me"); err == nil || ctx.Err() != nil {
			t.Errorf("%d keys, %v, %v", len(ids), err, ctx.Err())
		}
	})
}

// TestNamesAreLookedAt: a server that lists keys whatever their Name gives nobody
// another's key.
func TestNamesAreLookedAt(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	name := func(s string) []kmip.Attribute {
		return []kmip.Attribute{{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: s, NameType: kmip.NameTypeUninterpretedTextString}}}
	}
	for _, keys := range []int{3, 1000} {
		c := newClient(t, ca, nil, answering(t, ca, func(m *kmip.RequestMessage) []kmip.ResponseBatchItem {
			item := kmip.ResponseBatchItem{Operation: m.BatchItem[0].Operation, UniqueBatchItemID: m.BatchItem[0].UniqueBatchItemID}
			switch p := m.BatchItem[0].RequestPayload.(type) {
			case *payloads.LocateRequestPayload:
				found := &payloads.LocateResponsePayload{}
				for i := range keys {
					found.UniqueIdentifier = append(found.UniqueIdentifier, fmt.Sprint(i))
				}
				item.ResponsePayload = found
			case *payloads.GetAttributesRequestPayload:
				item.ResponsePayload = &payloads.GetAttributesResponsePayload{UniqueIdentifier: p.UniqueIdentifier, Attribute: name("key-" + p.UniqueIdentifier)}
			}
			return []kmip.ResponseBatchItem{item}
		}))
		found, err := c.Find(t.Context(), "key-1")
		if keys == 3 && (err != nil || len(found) != 1 || found[0] != "1") || keys > 3 && err == nil {
			t.Errorf("of %d keys: %v, %v", keys, found, err)
		}
	}
}

// TestLateChange: a change that is done late, after it was looked for and repeated, is
// no failure.
func TestLateChange(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	c := newClient(t, ca, nil, l.Addr().String())
	id, err := c.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.armed.Store(1)
	looks := 0
	if _, err := c.settle(t.Context(), &payloads.ActivateRequestPayload{UniqueIdentifier: id}, id, func() (bool, error) {
		if looks++; looks == 1 {
			return false, nil // it was not yet
		}
		state, err := c.state(t.Context(), id)
		return state == kmip.StateActive, err
	}); err != nil {
		t.Error(err)
	}
}

// TestCanceledByCaller: a caller that gives up says nothing about the server.
func TestCanceledByCaller(t *testing.T) {
	t.Parallel()
	c := newClient(t, testca.New(t), func(c *Config) { c.Retry = time.Hour }, "127.0.0.1:1", "127.0.0.1:2")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Get(ctx, "key"); errs.KindOf(err) != errs.Canceled {
		t.Error(err)
	}
	if s := c.servers[0]; !s.failed.IsZero() {
		t.Error("the server is passed over")
	}
}

// lateConn applies a deadline in the past, which ends a request that was given up, only
// when it is let.
type lateConn struct {
	net.Conn
	armed         atomic.Bool
	cancel        context.CancelFunc
	ending, apply chan struct{}
}

func (c *lateConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && c.armed.Swap(false) {
		c.cancel()
		<-c.ending
	}
	return n, err
}

func (c *lateConn) SetDeadline(at time.Time) error {
	if at.After(time.Now()) {
		return c.Conn.SetDeadline(at)
	}
	close(c.ending)
	<-c.apply
	err := c.Conn.SetDeadline(at)
	close(c.apply)
	return err
}

// TestCanceledConnectionIsNotKept: the deadline that ends a request does not end the
// next one over the same connection.
func TestCanceledConnectionIsNotKept(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	defer store.Close()
	l, stop := start(t, ca, store, "127.0.0.1:0")
	defer stop()
	c := newClient(t, ca, nil, l.Addr().String())
	id, err := c.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := c.servers[0]
	s.forget()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	late := &lateConn{Conn: raw, cancel: cancel, ending: make(chan struct{}), apply: make(chan struct{})}
	k, err := c.handshake(t.Context(), s, late, c.config.TLS.Clone())
	if err != nil {
		t.Fatal(err)
	}
	c.give(s, k)
	late.armed.Store(true)
	if _, err := c.State(ctx, id); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	s.mu.Lock()
	kept := len(s.idle)
	s.mu.Unlock()
	if kept != 0 {
		t.Error("the connection is kept, and its deadline is to come")
	}
	late.apply <- struct{}{}
	<-late.apply
}

// TestForeignWords: what a proxy, a certificate or a server says is told on one line, of
// bounded length, that no terminal acts on.
func TestForeignWords(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := proxy.Accept()
			if err != nil {
				return
			}
			http.ReadRequest(bufio.NewReader(conn))
			fmt.Fprint(conn, "HTTP/1.1 403 no\x1b[2J"+strings.Repeat("!", 7000)+"\r\n\r\n")
			conn.Close()
		}
	}()
	defer func() { proxy.Close(); <-done }()
	many := make([]kmip.ProtocolVersion, 30000)
	for i := range many {
		many[i] = kmip.ProtocolVersion{ProtocolVersionMajor: 9, ProtocolVersionMinor: int32(i)}
	}
	const asked = "server.example:5696"
	for name, c := range map[string]*Client{
		"proxy":    newClient(t, ca, func(c *Config) { c.Proxy = proxy.Addr().String() }, asked),
		"versions": newClient(t, ca, nil, speaking(t, ca, many, nil)),
	} {
		_, err := c.Get(t.Context(), "mine")
		for what, err := range map[string]error{"get": err, "check": c.Check(t.Context(), c.servers[0].addr).Err} {
			if err == nil || len(err.Error()) > 2000 || strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%s, %s: %.300q", name, what, fmt.Sprint(err))
			}
		}
	}
}
