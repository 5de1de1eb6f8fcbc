package kmiptest

import (
	"context"
	"crypto/tls"
	"reflect"
	"time"

	"github.com/ovh/kmip-go"
)

// TC-92 gives a key a Deactivation Date two minutes ahead and asks for its state
// "[REPEAT] until" it is deactivated. Here what lies ahead comes sooner.
const (
	soon     = 10 * time.Second // in place of any time ahead of a case that waits
	patience = time.Minute      // how long an answer that is waited for may take
	between  = 100 * time.Millisecond
)

// repeats reports whether the case asks request i until the answer is the one that it
// expects: it asked the same just before, and only looks.
func (c *Case) repeats(i int) bool {
	return i > 0 && c.exchanges[i].request.operation() == "GetAttributes" && reflect.DeepEqual(c.exchanges[i].request, c.exchanges[i-1].request)
}

// Waits reports whether the case waits for a time to come, which takes some 10 s.
func (c *Case) Waits() bool {
	for i := range c.exchanges {
		if c.repeats(i) {
			return true
		}
	}
	return false
}

// ahead returns the time that takes the place of value, a time as a request has it, if
// it lies ahead of when the case was recorded.
func (p *play) ahead(value string) (string, bool) {
	at, err := time.Parse(time.RFC3339, value)
	if err != nil || !p.waits {
		return "", false
	}
	recorded := p.exchanges[0].response.child(kmip.TagResponseHeader).child(kmip.TagTimeStamp)
	then, err := time.Parse(time.RFC3339, recorded.value)
	if err != nil || !at.After(then) {
		return "", false
	}
	return p.start.Add(soon).Format(time.RFC3339), true
}

// repeat asks request i until the response is as expected, and returns how the last one
// differed, or "".
func (p *play) repeat(ctx context.Context, conn *tls.Conn, i int) (differs string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		differs, _ = p.exchange(conn, i)
		if differs == "" {
			return ""
		}
		select {
		case <-ctx.Done():
			return differs
		case <-time.After(between):
		}
	}
}
