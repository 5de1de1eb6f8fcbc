package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
)

// Client is who sends a request.
type Client struct {
	Account string // whose objects it sees, and no others
	Name    string // what it is called in records
	// Interface is how it asks, for records: "" is KMIP.
	Interface string
	Policy    *Policy
	// Admit is asked before an operation that the policy allows is carried out, which
	// makes so many objects if it succeeds; its error refuses the operation. done is
	// called once, when it has ended: with nil if it succeeded. Nil admits everything.
	Admit func(ctx context.Context, op kmip.Operation, makes int) (done func(error), err error)
	// Approvals are those of the people who must approve what the client asks for.
	// Nil: nobody must.
	Approvals Approvals
}

// Policy narrows what a client may do. Nil allows everything.
type Policy struct {
	// Operations are those allowed; nil means all. Discover Versions and Query
	// are always allowed: they tell what the server is.
	Operations []kmip.Operation
	// NoExport keeps key material in the server: it is used there and does not
	// leave, not even wrapped, for the client may know the wrapping key. What
	// a client registered wrapped it gets back; public keys and certificates are
	// public.
	NoExport bool
	// KeyTypes are the keys that may be made or registered; nil means all.
	KeyTypes []KeyType
}

// KeyType is a kind of symmetric key.
type KeyType struct {
	Algorithm kmip.CryptographicAlgorithm
	Bits      int32 // 0: any length
}

// Possible tells whether there are keys of the type here.
func (t KeyType) Possible() bool {
	if t.Bits == 0 {
		return true
	}
	_, err := keySize(t.Algorithm, t.Bits)
	return err == nil
}

func (p *Policy) allows(op kmip.Operation) bool {
	return p == nil || p.Operations == nil || op == kmip.OperationDiscoverVersions || op == kmip.OperationQuery || slices.Contains(p.Operations, op)
}

// checkType refuses a new object of a type that the policy does not allow.
func (p *Policy) checkType(o *Object) error {
	if p == nil || p.KeyTypes == nil || o.Type == kmip.ObjectTypeTemplate {
		return nil
	}
	for _, t := range p.KeyTypes {
		if o.Type == kmip.ObjectTypeSymmetricKey && t.Algorithm == o.Layout.Algorithm && (t.Bits == 0 || t.Bits == o.Layout.Length) {
			return nil
		}
	}
	return refuse(kmip.ResultReasonPermissionDenied, "keys of this type are not allowed to you")
}

// checkExport refuses to give out material.
func (p *Policy) checkExport(o *Object) error {
	if p == nil || !p.NoExport || o.Type == kmip.ObjectTypeTemplate || o.isPublic() || o.Layout.Wrapping != nil {
		return nil
	}
	return refuse(kmip.ResultReasonPermissionDenied, "key material is not given out to you")
}

// Event is an operation that was answered, or, without Operation, a request
// whose client was refused. It holds no secret.
type Event struct {
	Client    Client // zero for a client that is not known
	Peer      string // network address
	Operation kmip.Operation
	Object    string            // its identifier as the client gave it or the server made it; "" for none
	Reason    kmip.ResultReason // 0: success
	Cause     string            // of a [Refusal]
	Approval  string            // that was used up, by its identifier; "" for none
	Duration  time.Duration
}

// event is what came of an operation, for the observer.
func (r *request) event(op kmip.Operation, took time.Duration, err error) Event {
	e := Event{Client: r.client, Peer: r.conn.peer, Operation: op, Object: r.object, Approval: r.approval, Duration: took}
	e.Reason, e.Cause = reasonFor(err)
	return e
}

// reasonFor is what an event says of an error.
func reasonFor(err error) (kmip.ResultReason, string) {
	if err == nil {
		return 0, ""
	}
	if told := (*Refusal)(nil); errors.As(err, &told) {
		return told.Reason, told.Cause
	}
	return kmip.ResultReasonGeneralFailure, ""
}

// record tells the observer what came of operations and returns the error that
// the client is to see.
func (r *request) record(err error, events ...Event) error {
	// The record is made even if the request has been given up by now.
	if recordErr := r.server.observe(context.WithoutCancel(r.ctx), events...); err == nil {
		err = recordErr
	}
	return err
}
