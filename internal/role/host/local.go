package host

import (
	"context"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
)

// local serves the part of the user API that a host can answer alone, on its
// local socket. Tasks are done when they are returned.
type local struct {
	strongroomv1connect.UnimplementedVMServiceHandler
	strongroomv1connect.UnimplementedSessionServiceHandler
	host *Host
}

func (h *Host) localServer() *http.Server {
	mux := http.NewServeMux()
	options := connect.WithInterceptors(connect.UnaryInterceptorFunc(explainUnary))
	mux.Handle(strongroomv1connect.NewVMServiceHandler(&local{host: h}, options, connect.WithReadMaxBytes(requestMax)))
	mux.Handle(strongroomv1connect.NewSessionServiceHandler(&local{host: h}, options, connect.WithReadMaxBytes(requestMax)))
	return &http.Server{Handler: mux, ReadHeaderTimeout: daemon.HeaderTimeout, MaxHeaderBytes: daemon.HeaderMax}
}

// requestMax bounds one request, in bytes: a sync of all providers and
// datastores is the largest.
const requestMax = 8 << 20

// explainUnary gives errors their kind, reason and hint on the wire.
func explainUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if err == nil {
			return res, nil
		}
		if connect.CodeOf(err) == connect.CodeUnimplemented {
			err = errs.New(errs.InvalidState, "a host alone cannot do this").WithHint("ask the controller: leave out --server, or name it there")
		}
		return nil, apierr.To(explain(err))
	}
}

func (l *local) WhoAmI(context.Context, *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	return connect.NewResponse(&strongroomv1.WhoAmIResponse{Principal: "local administrator of " + l.host.secrets.identity.Name, ServerVersion: Version}), nil
}

func (l *local) ListVMs(ctx context.Context, _ *connect.Request[strongroomv1.ListVMsRequest]) (*connect.Response[strongroomv1.ListVMsResponse], error) {
	return connect.NewResponse(&strongroomv1.ListVMsResponse{Vms: l.host.describeAll(ctx)}), nil
}

func (l *local) GetVM(ctx context.Context, req *connect.Request[strongroomv1.GetVMRequest]) (*connect.Response[strongroomv1.VM], error) {
	m, err := l.host.machine(req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	vm, err := l.host.describe(ctx, m)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(vm), nil
}

func (l *local) ListSnapshots(ctx context.Context, req *connect.Request[strongroomv1.ListSnapshotsRequest]) (*connect.Response[strongroomv1.ListSnapshotsResponse], error) {
	m, err := l.host.machine(req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	vm, err := l.host.describe(ctx, m)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.ListSnapshotsResponse{
		Snapshots: vm.GetSnapshots(), CurrentSnapshot: vm.GetCurrentSnapshot(), ConsolidationNeeded: vm.GetConsolidationNeeded(),
	}), nil
}

func (l *local) PowerOnVM(ctx context.Context, req *connect.Request[strongroomv1.PowerOnVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	return l.task("vm.power-on", req.Msg.GetName(), func() error { return l.host.powerOn(ctx, req.Msg.GetName()) })
}

func (l *local) PowerOffVM(ctx context.Context, req *connect.Request[strongroomv1.PowerOffVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	return l.task("vm.power-off", req.Msg.GetName(), func() error {
		return l.host.powerOff(ctx, req.Msg.GetName(), req.Msg.GetHard(), guestTimeout(req.Msg.GetTimeoutSeconds()))
	})
}

func (l *local) ExportDiskKey(ctx context.Context, req *connect.Request[strongroomv1.ExportDiskKeyRequest]) (*connect.Response[strongroomv1.ExportDiskKeyResponse], error) {
	res, err := l.host.exportDiskKey(ctx, req.Msg.GetName(), req.Msg.GetDisk(), req.Msg.GetRecipientPublicKey())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// task does the work and returns a task that has ended.
func (l *local) task(kind, name string, work func() error) (*connect.Response[strongroomv1.Task], error) {
	begin := timestamppb.Now()
	if err := work(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.Task{
		Id: uuid.NewString(), Kind: kind, Target: "vm/" + name, Principal: "local", State: "success",
		Created: begin, Started: begin, Ended: timestamppb.Now(),
	}), nil
}

// guestTimeout is how long a guest has to shut down.
func guestTimeout(seconds uint32) time.Duration {
	if seconds == 0 {
		return 2 * time.Minute
	}
	return time.Duration(min(seconds, 3600)) * time.Second
}
