package kmipclient

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/kmip/kmipwire"
)

// answerLimits bounds what a server can make us hold.
var answerLimits = kmipwire.Limits{Message: 4 << 20, Depth: 16, Values: 100000}

type conn struct {
	*tls.Conn
	used   time.Time
	reused bool // it has been idle: the server may have closed it since
	ended  bool // the context of a request over it was, and its deadline with it, now or soon
}

// dial connects within the deadlines of c.
func (c *Client) dial(ctx context.Context, s *server) (*conn, error) {
	raw, err := c.connect(ctx, s)
	if err != nil {
		return nil, err
	}
	return c.handshake(ctx, s, raw, c.config.TLS.Clone())
}

// connect opens a connection to s, through the proxy if there is one.
func (c *Client) connect(ctx context.Context, s *server) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.Connect)
	defer cancel()
	addr := s.addr
	if c.config.Proxy != "" {
		addr = c.config.Proxy
	}
	var dialer net.Dialer
	raw, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("cannot connect: %w", err)
	}
	if c.config.Proxy != "" {
		if err := throughProxy(ctx, raw, s.addr); err != nil {
			raw.Close()
			return nil, err
		}
	}
	return raw, nil
}

// handshake makes a TLS connection of raw, which it owns then.
func (c *Client) handshake(ctx context.Context, s *server, raw net.Conn, config *tls.Config) (*conn, error) {
	if config.ServerName == "" {
		config.ServerName = s.host
	}
	ctx, cancel := context.WithTimeout(ctx, c.config.Handshake)
	defer cancel()
	t := tls.Client(raw, config)
	if err := t.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("cannot agree on TLS: %w", err)
	}
	return &conn{Conn: t}, nil
}

// throughProxy asks the HTTP proxy behind raw for addr.
func throughProxy(ctx context.Context, raw net.Conn, addr string) error {
	if deadline, ok := ctx.Deadline(); ok {
		raw.SetDeadline(deadline)
	}
	if _, err := fmt.Fprintf(raw, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", addr, addr); err != nil {
		return fmt.Errorf("cannot ask the proxy: %w", err)
	}
	// Byte by byte, to leave what follows the proxy's answer to TLS.
	var head []byte
	one := make([]byte, 1)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if len(head) > 8192 {
			return errors.New("cannot ask the proxy: its answer has no end")
		}
		if _, err := raw.Read(one); err != nil {
			return fmt.Errorf("cannot ask the proxy: %w", err)
		}
		head = append(head, one[0])
	}
	r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return fmt.Errorf("cannot ask the proxy: %w", err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("the proxy refused the connection: %s", printable(r.Status, messageMax))
	}
	return raw.SetDeadline(time.Time{})
}

// take returns an idle connection of s, or a new one.
func (c *Client) take(ctx context.Context, s *server) (*conn, error) {
	s.mu.Lock()
	for len(s.idle) > 0 {
		last := s.idle[len(s.idle)-1]
		s.idle = s.idle[:len(s.idle)-1]
		if time.Since(last.used) < c.config.Idle {
			last.reused = true
			s.mu.Unlock()
			return last, nil
		}
		last.Close()
	}
	s.mu.Unlock()
	return c.dial(ctx, s)
}

func (c *Client) give(s *server, k *conn) {
	k.used = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.idle) >= idleMax {
		k.Close()
		return
	}
	s.idle = append(s.idle, k)
}

// exchange sends p to s alone. When a connection that had been idle breaks,
// that says nothing about s: what only reads is asked again over a new one. When
// a new one breaks, what s cannot have done is asked once more: there may be no
// other server to ask.
func (c *Client) exchange(ctx context.Context, s *server, p kmip.OperationPayload, key string, change bool) (kmip.OperationPayload, error) {
	for again := false; ; {
		k, err := c.take(ctx, s)
		if err != nil && !again && broke(err) && ctx.Err() == nil {
			again = true
			continue
		}
		if err != nil {
			s.blame(ctx, err)
			return nil, err
		}
		out, err := c.ask(ctx, s, k, p, key)
		var refused *KMIPError
		if err == nil || errors.As(err, &refused) {
			s.mark(nil)
			if k.ended {
				k.Close()
			} else {
				c.give(s, k)
			}
			return out, err
		}
		k.Close()
		if !k.reused {
			if again || change && errors.Is(err, errLost) || !broke(err) || ctx.Err() != nil {
				s.blame(ctx, err)
				return nil, err
			}
			again = true
			continue
		}
		s.forget()
		if change || ctx.Err() != nil {
			return nil, err
		}
	}
}

// broke reports whether a connection that had been made ended, other than by a
// deadline: who did not answer in time has cost enough of it.
func broke(err error) bool {
	var op *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &op) && (op.Op == "read" || op.Op == "write") && !op.Timeout()
}

// ask negotiates if need be, and sends p over k.
func (c *Client) ask(ctx context.Context, s *server, k *conn, p kmip.OperationPayload, key string) (kmip.OperationPayload, error) {
	version, err := c.negotiate(ctx, s, k)
	if errors.Is(err, errLost) {
		var lost *lostError
		errors.As(err, &lost)
		return nil, fmt.Errorf("cannot negotiate the KMIP version: %w", lost.cause) // p was not sent
	}
	if err != nil {
		return nil, err
	}
	return c.roundTrip(ctx, s, k, version, p, key)
}

// forget closes the idle connections of s.
func (s *server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.idle {
		k.Close()
	}
	s.idle = nil
}

// mark notes whether s works.
func (s *server) mark(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.failed = time.Time{}
		return
	}
	s.failed = time.Now()
	s.version = kmip.ProtocolVersion{} // it may come back as another
}

// blame is mark, unless the caller gave up: that says nothing about s.
func (s *server) blame(ctx context.Context, err error) {
	if !errors.Is(ctx.Err(), context.Canceled) {
		s.mark(err)
	}
}

var versions = []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1, kmip.V1_0}

// negotiate returns the version to speak with s: the highest of ours that it
// names; 1.0 if it does not know the question.
func (c *Client) negotiate(ctx context.Context, s *server, k *conn) (kmip.ProtocolVersion, error) {
	s.mu.Lock()
	version := s.version
	s.mu.Unlock()
	if version != (kmip.ProtocolVersion{}) {
		return version, nil
	}
	out, err := c.roundTrip(ctx, s, k, kmip.V1_1, &payloads.DiscoverVersionsRequestPayload{ProtocolVersion: versions}, "")
	var refused *KMIPError
	switch {
	case errors.As(err, &refused) && refused.Reason == kmip.ResultReasonAuthenticationNotSuccessful:
		return version, err
	case errors.As(err, &refused):
		version = kmip.V1_0
	case err != nil:
		return version, err
	default:
		theirs := out.(*payloads.DiscoverVersionsResponsePayload).ProtocolVersion
		for _, v := range theirs {
			for _, ours := range versions {
				if v == ours && ttlv.CompareVersions(v, version) > 0 {
					version = v
				}
			}
		}
		if version == (kmip.ProtocolVersion{}) {
			return version, fmt.Errorf("it speaks no KMIP version that we do: %v", theirs[:min(len(theirs), len(versions))])
		}
	}
	s.mu.Lock()
	s.version = version
	s.mu.Unlock()
	return version, nil
}

// passwordTag is the header of a Password field up to its length.
var passwordTag = []byte{0x42, 0x00, 0xa1, byte(ttlv.TypeTextString)}

// encode returns the request message for p. The password never is a string:
// its place is encoded with zeros and filled in afterwards.
func (c *Client) encode(version kmip.ProtocolVersion, p kmip.OperationPayload) ([]byte, error) {
	m := kmip.NewRequestMessage(version, items(p)...)
	m.Header.TimeStamp = nil
	if len(m.BatchItem) > 1 {
		m.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionContinue
		for i := range m.BatchItem {
			m.BatchItem[i].UniqueBatchItemID = []byte{byte(i)}
		}
	}
	if c.config.User == "" {
		return ttlv.MarshalTTLV(&m), nil
	}
	length := 0
	if c.password != nil {
		length = c.password.Len()
	}
	m.Header.Authentication = &kmip.Authentication{Credential: kmip.Credential{
		CredentialType:  kmip.CredentialTypeUsernameAndPassword,
		CredentialValue: kmip.CredentialValue{UserPassword: &kmip.CredentialValueUserPassword{Username: c.config.User, Password: strings.Repeat("\x00", length)}},
	}}
	message := ttlv.MarshalTTLV(&m)
	if length > 0 {
		// The user name, the only thing in front of it that is not ours, has no
		// zero byte: this is the first such tag.
		at := bytes.Index(message, passwordTag)
		if at < 0 {
			return nil, errors.New("cannot encode the credential")
		}
		copy(message[at+8:at+8+length], c.password.Bytes())
	}
	return message, nil
}

// roundTrip sends p over k. A failure after the first byte was sent is errLost.
func (c *Client) roundTrip(ctx context.Context, s *server, k *conn, version kmip.ProtocolVersion, p kmip.OperationPayload, key string) (kmip.OperationPayload, error) {
	message, err := c.encode(version, p)
	if err != nil {
		return nil, err
	}
	defer keymem.Wipe(message)
	k.SetDeadline(time.Now().Add(c.config.Request))
	stop := context.AfterFunc(ctx, func() { k.SetDeadline(time.Now()) })
	defer func() { k.ended = !stop() || k.ended }()
	if _, err := k.Write(message); err != nil {
		return nil, lose(err)
	}
	answer, err := kmipwire.Read(k, kmip.TagResponseMessage, answerLimits)
	if err != nil {
		return nil, lose(errors.Join(err, ctx.Err()))
	}
	defer keymem.Wipe(answer)
	response, err := decode(answer)
	if err != nil {
		return nil, lose(err)
	}
	many, isBatch := p.(*batch)
	if isBatch && len(response.BatchItem) == len(many.items) {
		return p, many.take(s, response.BatchItem)
	}
	if len(response.BatchItem) != 1 {
		return nil, lose(fmt.Errorf("it has %d items", len(response.BatchItem)))
	}
	item := response.BatchItem[0]
	if item.ResultStatus != kmip.ResultStatusSuccess {
		return nil, &KMIPError{Server: s.addr, Operation: p.Operation(), Key: key, Reason: item.ResultReason, Message: printable(item.ResultMessage, messageMax)}
	}
	if isBatch {
		return nil, lose(errors.New("it is for one item of many"))
	}
	return item.ResponsePayload, answers(p, item)
}

// answers refuses an item that answers something else than p.
func answers(p kmip.OperationPayload, item kmip.ResponseBatchItem) error {
	if item.Operation != p.Operation() || item.ResponsePayload == nil {
		return lose(errors.New("it is for another operation"))
	}
	if asked, got := subject(p), subject(item.ResponsePayload); asked != "" && got != "" && asked != got {
		return lose(errors.New("it is about another key"))
	}
	return nil
}

// subject returns the identifier of the key that a request or an answer is about; "" for
// others.
func subject(p kmip.OperationPayload) string {
	switch p := p.(type) {
	case *payloads.GetRequestPayload:
		return p.UniqueIdentifier
	case *payloads.GetResponsePayload:
		return p.UniqueIdentifier
	case *payloads.GetAttributesRequestPayload:
		return p.UniqueIdentifier
	case *payloads.GetAttributesResponsePayload:
		return p.UniqueIdentifier
	case *payloads.AddAttributeRequestPayload:
		return p.UniqueIdentifier
	case *payloads.AddAttributeResponsePayload:
		return p.UniqueIdentifier
	case *payloads.ActivateRequestPayload:
		return p.UniqueIdentifier
	case *payloads.ActivateResponsePayload:
		return p.UniqueIdentifier
	case *payloads.RevokeRequestPayload:
		return p.UniqueIdentifier
	case *payloads.RevokeResponsePayload:
		return p.UniqueIdentifier
	case *payloads.DestroyRequestPayload:
		return p.UniqueIdentifier
	case *payloads.DestroyResponsePayload:
		return p.UniqueIdentifier
	}
	return ""
}

const (
	messageMax = 256  // of a server's or proxy's own words, in characters
	errorMax   = 4096 // of a whole error
)

// printable returns up to limit characters of a text that others can have written,
// without what a terminal or a log would act on.
func printable(text string, limit int) string {
	runes := make([]rune, 0, min(limit, len(text)))
	for _, r := range text {
		if len(runes) == limit {
			break
		}
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			r = ' '
		}
		runes = append(runes, r)
	}
	return string(runes)
}

// decode turns the codec's panics, which some values of the wrong type cause,
// into errors.
func decode(answer []byte) (m kmip.ResponseMessage, err error) {
	defer func() {
		if p := recover(); p != nil {
			m, err = kmip.ResponseMessage{}, fmt.Errorf("it is malformed: %v", p)
		}
	}()
	err = ttlv.UnmarshalTTLV(answer, &m)
	return m, err
}
