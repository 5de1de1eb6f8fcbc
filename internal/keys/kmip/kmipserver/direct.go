package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"context"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/errs"
)

// Operations that do not come as KMIP messages: another front end asks for them.
// They are the same operations under the same rules: the client's policy,
// admission, approvals and record. What they mean is what they mean in KMIP 1.4.
// Refusals are errors that are a [Refusal].

// Caller is a client of another front end, which has authenticated it.
type Caller struct {
	Client Client
	Peer   string // network address, for the record
}

// Do carries out one operation. use gets what it returns, which holds secrets
// until use ends; of p what is secret is wiped.
func (s *Server) Do(ctx context.Context, c Caller, p kmip.OperationPayload, use func(kmip.OperationPayload) error) error {
	op, ok := s.operations[p.Operation()]
	if !ok {
		return errs.New(errs.Invalid, "there is no operation %s here", ttlv.EnumStr(p.Operation()))
	}
	return s.direct(ctx, c, &item{operation: p.Operation(), payload: p}, func(r *request) error {
		r.concealPayload(p)
		out, err := op.run(r, p)
		if err != nil {
			return err
		}
		return use(out)
	})
}

// Export carries out Get for somebody whom seal protects the material for. seal
// gets the object with its material, both until it returns; it may be called again
// if what it made is of no use. What can be had wrapped by another key only, and
// what a client registered wrapped, is refused.
func (s *Server) Export(ctx context.Context, c Caller, id string, seal func(*Object) error) error {
	return s.direct(ctx, c, &item{operation: kmip.OperationGet}, func(r *request) error {
		return r.giveOut(id, func(_ Reader, o *Object) error {
			switch {
			case o.Type == kmip.ObjectTypeTemplate:
				return refuse(kmip.ResultReasonInvalidField, "a template has no key material")
			case o.Layout.Wrapping != nil:
				return refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "the object is wrapped and can be had by KMIP, as it was registered, only")
			}
			if err := r.checkExport(o, false); err != nil {
				return err
			}
			return seal(o)
		})
	})
}

// Import carries out Register of what open returns, which is asked once the operation
// is allowed and admitted; what is secret of it is wiped. It returns the identifier of
// the object.
func (s *Server) Import(ctx context.Context, c Caller, open func() (*payloads.RegisterRequestPayload, error)) (id string, err error) {
	it := &item{operation: kmip.OperationRegister, payload: &payloads.RegisterRequestPayload{}}
	err = s.direct(ctx, c, it, func(r *request) error {
		p, err := open()
		if err != nil {
			return err
		}
		r.concealPayload(p)
		out, err := r.register(p)
		if err != nil {
			return err
		}
		id = out.(*payloads.RegisterResponsePayload).UniqueIdentifier
		return nil
	})
	return id, err
}

// Found is an object that was found.
type Found struct {
	ID string
	// Attributes are all that Get Attributes would return; nil if the client's policy
	// does not allow that.
	Attributes []kmip.Attribute
}

// List carries out Locate: it returns up to limit objects, newest first, that have
// all attributes, behind the one called after ("": from the newest on). Destroyed
// ones are found by who asks for their State only.
func (s *Server) List(ctx context.Context, c Caller, attributes []kmip.Attribute, after string, limit int) (found []Found, err error) {
	p := &payloads.LocateRequestPayload{Attribute: attributes}
	err = s.direct(ctx, c, &item{operation: kmip.OperationLocate}, func(r *request) error {
		query, err := r.queryOf(p)
		if err != nil {
			return err
		}
		query.After = after
		told := r.client.Policy.allows(kmip.OperationGetAttributes)
		found, _, err = search(r, p, query, 0, min(limit, locateMax), func(o *Object) Found {
			f := Found{ID: o.ID}
			if told {
				f.Attributes = r.visible(o)
			}
			return f
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// direct runs one operation and puts it on record. It never panics.
func (s *Server) direct(ctx context.Context, c Caller, it *item, run func(*request) error) (err error) {
	op := it.operation
	ctx, cancel := context.WithTimeout(ctx, s.limits.Request)
	defer cancel()
	r := &request{ctx: ctx, server: s, client: c.Client, conn: &connection{peer: c.Peer}, version: kmip.V1_4, now: s.now().Truncate(time.Second).UTC()}
	began := time.Now()
	defer func() {
		if p := recover(); p != nil {
			s.log.LogAttrs(ctx, slog.LevelError, "operation panicked", slog.String("op", ttlv.EnumStr(op)), slog.Any("err", p), slog.String("stack", string(debug.Stack())))
			err = errPanicked
		}
		err = r.record(err, r.event(op, time.Since(began), err))
		r.clean()
	}()
	if err := r.allowed(op); err != nil {
		return err
	}
	return r.admitted(it, func() error { return run(r) })
}
