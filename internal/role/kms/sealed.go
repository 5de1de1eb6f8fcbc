package kms

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

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

// A TPM or an HSM that is away is asked again after askFirst, and then less and
// less often, down to every askMax.
const (
	askFirst = time.Second
	askMax   = 30 * time.Second
)

// sealedAPI is what a KMS serves that waits for its root key: it tells so, and
// takes the key.
type sealedAPI struct {
	strongroomv1connect.UnimplementedKMSServiceHandler
	strongroomv1connect.UnimplementedKMSApprovalServiceHandler
	strongroomv1connect.UnimplementedKMSAuditServiceHandler
	strongroomv1connect.UnimplementedKMSClusterServiceHandler
	strongroomv1connect.UnimplementedKMSRootServiceHandler
	strongroomv1connect.UnimplementedKMSBackupServiceHandler
	strongroomv1connect.UnimplementedSessionServiceHandler
	lock *rootkey.Lock
	log  *slog.Logger
	done func() // ends serving

	attempt sync.Mutex  // held through each attempt; guards what follows
	root    *keymem.Key // nil while sealed
	people  bool        // they gave it
	wrong   int

	mu      sync.Mutex
	problem error // why a TPM or an HSM does not give it; nil if people have to
}

// serveSealed serves until people gave the root key, or the TPM or HSM whose
// problem is not nil, or ctx ends.
func (u *unlocked) serveSealed(ctx context.Context, cfg Config, log *slog.Logger, problem error) error {
	var l listeners
	defer l.close()
	var err error
	if l.local, err = daemon.ListenLocal(cfg.LocalSocket); err != nil {
		return err
	}
	if cfg.MetricsListen != "" {
		if l.metrics, err = listenFor("metrics", cfg.MetricsListen); err != nil {
			return err
		}
	}
	serving, done := context.WithCancel(ctx)
	defer done()
	a := &sealedAPI{lock: u.lock, log: log, done: done, problem: problem}
	group, serving := errgroup.WithContext(serving)
	group.Go(func() error {
		s := services{kms: a, approval: a, audit: a, root: a, cluster: a, backup: a, session: a, access: strongroomv1connect.UnimplementedAccessServiceHandler{}}
		return daemon.Serve(serving, newServer(s.handler(connect.UnaryInterceptorFunc(a.only))), l.local)
	})
	if l.metrics != nil {
		group.Go(func() error { return daemon.Serve(serving, a.healthServer(), l.metrics) })
	}
	if problem != nil {
		group.Go(func() error {
			a.keepAsking(serving)
			return nil
		})
		log.LogAttrs(ctx, slog.LevelError, "the root key cannot be had", slog.Any("err", problem), slog.String("hint", errs.HintOf(problem)))
	}
	log.LogAttrs(ctx, slog.LevelWarn, "kms is sealed and serves no keys: it waits for its root key", slog.String("needs", u.lock.Sources()[0].String()),
		slog.String("socket", cfg.LocalSocket), slog.String("command", "strongroom kms unseal"))
	err = group.Wait()
	a.attempt.Lock()
	defer a.attempt.Unlock()
	u.root, u.people, u.wrong = a.root, a.people || a.wrong > 0, a.wrong
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
		return nil, apierr.To(a.errSealed())
	}
}

// BackupKMS is refused as other methods are: it is no unary call.
func (a *sealedAPI) BackupKMS(context.Context, *connect.Request[strongroomv1.BackupKMSRequest], *connect.ServerStream[strongroomv1.BackupKMSResponse]) error {
	return apierr.To(a.errSealed())
}

func (a *sealedAPI) errSealed() error {
	problem := a.why()
	if problem == nil {
		return errs.New(errs.Locked, "the KMS is %w", rootkey.ErrSealed).WithHint("strongroom kms unseal")
	}
	return errs.New(errs.Locked, "the KMS is %w: %w", rootkey.ErrSealed, problem).WithHint("%s", cmp.Or(errs.HintOf(problem), "strongroom kms root show"))
}

// why is why a TPM or an HSM does not give the root key.
func (a *sealedAPI) why() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.problem
}

// keepAsking asks a TPM or an HSM that is away again, until ctx ends. One that
// refused is not asked again by itself: a few wrong PINs lock a token.
func (a *sealedAPI) keepAsking(ctx context.Context) {
	for pause := askFirst; ; pause = min(2*pause, askMax) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		switch errs.KindOf(a.why()) {
		case errs.Unavailable, errs.NotFound:
			a.attempt.Lock()
			a.ask(ctx)
			a.attempt.Unlock()
		}
	}
}

// ask asks the TPM or HSM for the root key. a.attempt is held.
func (a *sealedAPI) ask(ctx context.Context) {
	if a.root != nil {
		return
	}
	root, err := a.lock.Open(ctx)
	if err == nil {
		a.root = root
		a.done()
	} else if err.Error() != a.why().Error() {
		a.log.LogAttrs(ctx, slog.LevelError, "the root key cannot be had", slog.Any("err", err), slog.String("hint", errs.HintOf(err)))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.problem = err
}

// seal tells how it stands.
func (a *sealedAPI) seal(sealed bool) *connect.Response[strongroomv1.KMSSeal] {
	res := sealOf(a.lock, sealed)
	if problem := a.why(); problem != nil {
		res.Msg.Problem = problem.Error()
	}
	return res
}

func (a *sealedAPI) WhoAmI(context.Context, *connect.Request[strongroomv1.WhoAmIRequest]) (*connect.Response[strongroomv1.WhoAmIResponse], error) {
	return connect.NewResponse(&strongroomv1.WhoAmIResponse{Principal: "local administrator of the KMS", ServerVersion: Version}), nil
}

func (a *sealedAPI) GetKMSSeal(context.Context, *connect.Request[strongroomv1.GetKMSSealRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	return a.seal(true), nil
}

func (a *sealedAPI) UnsealKMS(ctx context.Context, req *connect.Request[strongroomv1.UnsealKMSRequest]) (*connect.Response[strongroomv1.KMSSeal], error) {
	if len(req.Msg.GetSecret()) == 0 && a.why() != nil {
		a.attempt.Lock()
		defer a.attempt.Unlock()
		a.ask(ctx)
		if err := a.why(); err != nil {
			return nil, err
		}
		return a.seal(false), nil
	}
	secret, err := takeSecret(req.Msg.GetSecret())
	if err != nil {
		return nil, err
	}
	defer secret.Close()
	a.attempt.Lock() // one at a time: each takes memory
	defer a.attempt.Unlock()
	if a.root != nil {
		return a.seal(false), nil
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
		a.root, a.people = root, true
		a.done()
	}
	return a.seal(root == nil), nil
}

// healthServer says that keys cannot be had.
func (a *sealedAPI) healthServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "the KMS is "+rootkey.ErrSealed.Error(), http.StatusServiceUnavailable)
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: daemon.HeaderTimeout, MaxHeaderBytes: daemon.HeaderMax}
}
