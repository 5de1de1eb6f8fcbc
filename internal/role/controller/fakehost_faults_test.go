package controller

import (
	"context"
	"net/http"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	"strongroom/api/strongroom/v1/strongroomv1connect"
)

// fault is how a call to a fake host ends.
type fault struct {
	refuse error           // not done, and this is the answer
	lost   bool            // done, but the answer is lost with the connection
	vanish bool            // not done, and the connection breaks
	hang   <-chan struct{} // not done before this is closed
}

// failing has the calls of one method end so, from the first now on; after n
// calls all is well again.
func (h *fakeHost) failing(method string, n int, f fault) {
	h.change(func() {
		first := h.calls[method]
		h.fault = func(m string, call int) fault {
			if m == method && call-first < n {
				return f
			}
			return fault{}
		}
	})
}

// faults counts calls and lets them end as the test says.
type faults struct{ h *fakeHost }

func (f faults) before(ctx context.Context, procedure string) (fault, error) {
	method := procedure[len("/"+strongroomv1connect.AgentServiceName+"/"):]
	f.h.mu.Lock()
	call := f.h.calls[method]
	f.h.calls[method]++
	var out fault
	if f.h.fault != nil {
		out = f.h.fault(method, call)
	}
	f.h.mu.Unlock()
	if out.vanish {
		panic(http.ErrAbortHandler)
	}
	if out.hang != nil {
		select {
		case <-out.hang:
		case <-ctx.Done():
			return out, ctx.Err()
		}
	}
	return out, out.refuse
}

func (f faults) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		out, err := f.before(ctx, req.Spec().Procedure)
		var res connect.AnyResponse
		if err == nil {
			res, err = next(ctx, req)
		}
		if out.lost {
			panic(http.ErrAbortHandler)
		}
		if err != nil {
			return nil, apierr.To(err)
		}
		return res, nil
	}
}

func (f faults) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		out, err := f.before(ctx, conn.Spec().Procedure)
		if err == nil {
			if out.lost {
				conn = muted{conn}
			}
			err = next(ctx, conn)
		}
		if out.lost {
			panic(http.ErrAbortHandler)
		}
		if err != nil {
			return apierr.To(err)
		}
		return nil
	}
}

func (f faults) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// muted is a stream whose answers do not arrive.
type muted struct{ connect.StreamingHandlerConn }

func (muted) Send(any) error { return nil }
