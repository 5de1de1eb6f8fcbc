package kmiptest

import (
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// A request with the Asynchronous Indicator says that its client "is able to
// accept an asynchronous response" (KMIP 1.3 section 6.7), not that it must get
// one, and TC-32 polls "if the server returns an asynchronous response". A server
// that answers at once is therefore held to the answer that the case polls for.

// isPending reports whether a case's response tells that the answer comes later.
func isPending(response *node) bool {
	item := response.child(kmip.TagBatchItem)
	if item == nil {
		return false
	}
	status := item.child(kmip.TagResultStatus)
	return status != nil && status.value == "OperationPending"
}

// statusOf returns the Result Status of a response's first item, 0 (Success) if it
// has none.
func statusOf(response ttlv.Value) kmip.ResultStatus {
	item, _ := field(response, kmip.TagBatchItem)
	status, _ := field(item, kmip.TagResultStatus)
	value, _ := status.Value.(ttlv.Enum)
	return kmip.ResultStatus(value)
}

func field(v ttlv.Value, tag int) (ttlv.Value, bool) {
	fields, _ := v.Value.(ttlv.Struct)
	for _, f := range fields {
		if f.Tag == tag {
			return f, true
		}
	}
	return ttlv.Value{}, false
}

// operation returns the operation of a request's first item.
func (n *node) operation() string {
	if item := n.child(kmip.TagBatchItem); item != nil {
		if op := item.child(kmip.TagOperation); op != nil {
			return op.value
		}
	}
	return ""
}

// polled returns the response that the case polls for after request i, nil if it
// only cancels, and the first request behind those that poll or cancel.
func (c *Case) polled(i int) (want *node, next int) {
	for next = i + 1; next < len(c.exchanges); next++ {
		e := c.exchanges[next]
		switch e.request.operation() {
		case "Poll":
			if !isPending(e.response) {
				want = e.response
			}
		case "Cancel":
		default:
			return want, next
		}
	}
	return want, next
}
