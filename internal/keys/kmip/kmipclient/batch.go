package kmipclient

import (
	"bytes"
	"context"
	"errors"
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// batchMax is how many items one message has. Servers need not take any number.
const batchMax = 32

// batch is the payloads of one message, of one operation that only reads. It stands
// for them where there is one payload elsewhere.
type batch struct {
	items   []kmip.OperationPayload // at least two
	answers []answer                // of each, once there is an answer
}

// answer is what came of one item.
type answer struct {
	payload kmip.OperationPayload
	err     error // a [KMIPError]
}

// Operation implements [kmip.OperationPayload].
func (b *batch) Operation() kmip.Operation { return b.items[0].Operation() }

// items returns the payloads that p stands for.
func items(p kmip.OperationPayload) []kmip.OperationPayload {
	if b, ok := p.(*batch); ok {
		return b.items
	}
	return []kmip.OperationPayload{p}
}

// take takes the answers of s: as many as there are items, in any order.
func (b *batch) take(s *server, got []kmip.ResponseBatchItem) error {
	b.answers = make([]answer, len(b.items))
	for i, p := range b.items {
		at := slices.IndexFunc(got, func(item kmip.ResponseBatchItem) bool { return bytes.Equal(item.UniqueBatchItemID, []byte{byte(i)}) })
		if at < 0 {
			return lose(errors.New("an item has no answer"))
		}
		item := got[at]
		if item.ResultStatus != kmip.ResultStatusSuccess {
			b.answers[i].err = &KMIPError{Server: s.addr, Operation: p.Operation(), Reason: item.ResultReason, Message: printable(item.ResultMessage, messageMax)}
			continue
		}
		if err := answers(p, item); err != nil {
			return err
		}
		b.answers[i].payload = item.ResponsePayload
	}
	return nil
}

// Described is what [Client.DescribeAll] tells of one key.
type Described struct {
	Description
	Err error // as of [Client.Describe], of a server that answered
}

// DescribeAll is [Client.Describe] for many keys, in their order, some to a message
// where the server takes that. Its error is that no server can be asked.
func (c *Client) DescribeAll(ctx context.Context, ids []string) ([]Described, error) {
	out := make([]Described, 0, len(ids))
	for some := range slices.Chunk(ids, batchMax) {
		found, err := c.describeSome(ctx, some)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func (c *Client) describeSome(ctx context.Context, ids []string) ([]Described, error) {
	out := make([]Described, len(ids))
	if len(ids) > 1 {
		b := &batch{}
		for _, id := range ids {
			b.items = append(b.items, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id})
		}
		_, err := c.try(ctx, b, "", false)
		var refused *KMIPError
		switch {
		case errors.As(err, &refused): // it takes no batch: it is asked for each
		case err != nil:
			return nil, c.describe("describe keys", err)
		default:
			for i, a := range b.answers {
				if a.err != nil {
					out[i].Err = c.describe("describe key "+ids[i], a.err)
					continue
				}
				out[i].Description = descriptionOf(a.payload.(*payloads.GetAttributesResponsePayload).Attribute)
			}
			return out, nil
		}
	}
	for i, id := range ids {
		d, err := c.Describe(ctx, id)
		var refused *KMIPError
		if err != nil && !errors.As(err, &refused) {
			return nil, err
		}
		out[i] = Described{Description: d, Err: err}
	}
	return out, nil
}
