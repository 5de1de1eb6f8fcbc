package kms

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/keys/rootkey"
)

// wrongMax is how many failed attempts to unseal are put on record once that can
// be done; all are logged.
const wrongMax = 1000

// sealedAPI is what a KMS serves that waits for its root key: it tells so, and
// takes the key.
type sealedAPI struct {
	strongroomv1connect.UnimplementedKMSServiceHandler
	strongroomv1connect.UnimplementedKMSApprovalServiceHandler
	strongroomv1connect.UnimplementedKMSClusterServiceHandler
	strongroomv1connect.UnimplementedKMSRootServiceHandler
	strongroomv1connect.UnimplementedKMSBackupServiceHandler
	strongroomv1connect.UnimplementedSessionServiceHandler
	lock *rootkey.Lock
	log  *slog.Logger
	done func() // ends serving

	mu    sync.Mutex
	root  *keymem.Key // nil while sealed
	wrong int
}

// serveSealed serves until people gave the root key, or ctx ends.
func (u *unlocked) serveSealed(ctx context.Context, cfg Config, log *slog.Logger) error {
	var l listeners
	defer l.close()
	var err error
	if l.local, err = daemon.ListenLocal(cfg.LocalSocket); err != nil {
		return err
	}
	if cfg.MetricsListen != "" {
		if l.metrics, err = net.Listen("tcp", cfg.MetricsListen); err != nil {
			return errs.New(errs.Unavailable, "cannot listen for metrics: %w", err)
		}
	}
	serving, done := context.WithCancel(ctx)
	defer done()
	a := &sealedAPI{lock: u.lock, log: log, done: done}
	group, serving := errgroup.WithContext(serving)
	group.Go(func() error {
		s := services{kms: a, approval: a, root: a, cluster: a, backup: a, session: a, access: strongroomv1connect.UnimplementedAccessServiceHandler{}}
		return daemon.Serve(serving, newServer(s.handler(connect.UnaryInterceptorFunc(a.only))), l.local)
	})
	if l.metrics != nil {
		group.Go(func() error { return daemon.Serve(serving, a.healthServer(), l.metrics) })
	}
	log.LogAttrs(ctx, slog.LevelWarn, "kms is sealed and serves no keys: it waits for its root key", slog.String("needs", u.lock.Sources()[0].String()),
		slog.String("socket", cfg.LocalSocket), slog.String("command", "strongroom kms unseal"))
	err = group.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	u.root, u.people, u.wrong = a.root, true, a.wrong
	switch {
	case a.root == nil && err == nil:
		err = context.Cause(ctx)
	case err != nil:
		a.root.Close()
	}
	return err
}

// only refuses what a sealed KMS does not do.
func (a *sealedAPI) only(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		switch req.Spec().Procedure {
		case strongroomv1connect.KMSRootServiceGetKMSSealProcedure, strongroomv1connect.KMSRootServiceUnsealKMSProcedure, strongroomv1connect.SessionServiceWhoAmIProcedure:
			res, err := next(ctx, req)
			if err != nil {
				return nil, apierr.To(err)
			}
			return res, nil
		}
		return nil, apierr.To(errSealed())
	}
}

// BackupKMS is refused as other methods are: it is no unary call.
func (a *sealedAPI) BackupKMS(context.Context, *connect.Request[strongroomv1.BackupKMSRequest], *connect.ServerStream[strongroomv1.BackupKMSResponse]) error {
	return apierr.To(errSealed())
}

func errSealed() error {
	return errs.New(errs.Locked, "the KMS is %w", rootkey.ErrSealed).WithHint("strongroom kms unseal")
}

func (a *sealedAPI) WhoAmI(context.Context, *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	return connect.NewResponse(&strongroomv1.WhoAmIResponse{Principal: "local administrator of the KMS", ServerVersion: Version}), nil
}

func (a *sealedAPI) GetKMSSeal(context.Context, *connect.Request[strongroomv1.GetKMSSealRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	return sealOf(a.lock, true), nil
}

func (a *sealedAPI) UnsealKMS(ctx context.Context, req *connect.Request[strongroomv1.UnsealKMSRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	secret, err := takeSecret(req.Msg.GetSecret())
	if err != nil {
		return nil, err
	}
	defer secret.Close()
	a.mu.Lock() // one attempt at a time: each takes memory
	defer a.mu.Unlock()
	if a.root != nil {
		return sealOf(a.lock, false), nil
	}
	root, err := a.lock.Give(ctx, secret)
	if err != nil {
		if errs.KindOf(err) == errs.Denied {
			a.wrong++
		}
		a.log.WarnContext(ctx, "an attempt to unseal failed", slog.Any("err", err))
		return nil, err
	}
	if root != nil {
		a.root = root
		a.done()
	}
	return sealOf(a.lock, root == nil), nil
}

// healthServer says that keys cannot be had.
func (a *sealedAPI) healthServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "the KMS is "+rootkey.ErrSealed.Error(), http.StatusServiceUnavailable)
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: daemon.HeaderTimeout, MaxHeaderBytes: daemon.HeaderMax}
}
