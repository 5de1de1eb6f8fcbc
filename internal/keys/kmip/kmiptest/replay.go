package kmiptest

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// Result is the outcome of a case.
type Result struct {
	Name   string
	Reason string // how the first response differed; empty if the case passed
	// NotClient is true for a case in which the server speaks first, which
	// cannot be replayed against it.
	NotClient bool
	// AtOnce is true if the server answered at once where the case takes the
	// answer later: its Poll and Cancel requests were left out.
	AtOnce bool
}

// Passed reports whether the server did as the case expects.
func (r Result) Passed() bool { return r.Reason == "" && !r.NotClient }

// Files returns the cases below folder, sorted.
func Files(folder string) ([]string, error) {
	direct, err := filepath.Glob(filepath.Join(folder, "*.xml"))
	if err != nil {
		return nil, err
	}
	below, err := filepath.Glob(filepath.Join(folder, "*", "*.xml"))
	files := append(direct, below...)
	slices.Sort(files)
	return files, err
}

const (
	answerTimeout = time.Minute
	answerMax     = 4 << 20
)

// Replay plays the case in file over a new connection from dial. A case stops
// at the first response that differs. The error is for a file that cannot be
// read and a server that cannot be reached.
func Replay(ctx context.Context, file string, dial func(context.Context) (*tls.Conn, error)) (Result, error) {
	c, err := Load(file)
	result := Result{Name: filepath.Base(filepath.Dir(file)) + "/" + strings.TrimSuffix(filepath.Base(file), ".xml")}
	if errors.Is(err, errNotClient) {
		result.NotClient = true
		return result, nil
	}
	if err != nil {
		return result, err
	}
	conn, err := dial(ctx)
	if err != nil {
		return result, err
	}
	defer conn.Close()
	p := &play{Case: c, start: time.Now().Truncate(time.Second), references: map[string]string{}, last: map[int]string{}, waits: c.Waits()}
	for _, e := range c.exchanges {
		e.request.walk(func(n *node) { p.randomIV = p.randomIV || n.tag == kmip.TagRandomIV && n.value == "true" })
	}
	if err := p.prepare(conn); err != nil {
		result.Reason = err.Error()
		return result, nil
	}
	for i := 0; i < len(c.exchanges); {
		reason, next := "", i+1
		if c.repeats(i) {
			reason = p.repeat(ctx, conn, i)
		} else {
			reason, next = p.exchange(conn, i)
		}
		if reason != "" {
			result.Reason = fmt.Sprintf("message %d: %s", i, reason)
			return result, nil
		}
		result.AtOnce = result.AtOnce || next > i+1
		i = next
	}
	return result, nil
}

// exchange sends request i of the case and returns how the response differs, or "",
// and which request is next.
func (p *play) exchange(conn *tls.Conn, i int) (differs string, next int) {
	want, next := p.exchanges[i].response, i+1
	response, err := p.ask(conn, p.exchanges[i].request)
	if err != nil {
		return err.Error(), next
	}
	if isPending(want) && statusOf(response) != kmip.ResultStatusOperationPending {
		if want, next = p.polled(i); want == nil {
			if status := statusOf(response); status != kmip.ResultStatusSuccess {
				return fmt.Sprintf("want Success at once or an answer to come, got %v", status), next
			}
			return "", next
		}
	}
	p.differs = nil
	p.compare("", want, response)
	return strings.Join(p.differs, "; "), next
}

// ask sends a request and returns the response.
func (p *play) ask(conn *tls.Conn, r *node) (ttlv.Value, error) {
	request, err := r.encode(p.resolve)
	if err != nil {
		return ttlv.Value{}, fmt.Errorf("cannot build the request: %w", err)
	}
	p.named = len(asking(r)) > 0
	p.made = false
	r.walk(func(n *node) {
		p.made = p.made || n.tag == kmip.TagOperation && n.value == "Encrypt"
	})
	return send(conn, request)
}

// send sends a message and returns the answer.
func send(conn *tls.Conn, message []byte) (ttlv.Value, error) {
	conn.SetDeadline(time.Now().Add(answerTimeout))
	if _, err := conn.Write(message); err != nil {
		return ttlv.Value{}, fmt.Errorf("cannot send the request: %w", err)
	}
	response, err := readAnswer(conn)
	if err != nil {
		return ttlv.Value{}, fmt.Errorf("no response: %w", err)
	}
	return response, nil
}

// asking returns the attribute names by which a Get Attributes asks.
func asking(request *node) []*node {
	var names []*node
	request.walk(func(n *node) {
		if n.tag == kmip.TagRequestPayload {
			for _, c := range n.children {
				if c.tag == kmip.TagAttributeName {
					names = append(names, c)
				}
			}
		}
	})
	return names
}

func readAnswer(r io.Reader) (ttlv.Value, error) {
	header := make([]byte, 8)
	if _, err := io.ReadFull(r, header); err != nil {
		return ttlv.Value{}, err
	}
	length := binary.BigEndian.Uint32(header[4:])
	if length > answerMax {
		return ttlv.Value{}, fmt.Errorf("it would have %d bytes", length)
	}
	message := append(header, make([]byte, length)...)
	if _, err := io.ReadFull(r, message[8:]); err != nil {
		return ttlv.Value{}, err
	}
	d, err := ttlv.NewTTLVDecoder(message)
	if err != nil {
		return ttlv.Value{}, err
	}
	var v ttlv.Value
	err = v.DecodeTTLV(&d)
	return v, err
}
