package kms

import (
	"context"
	"crypto/tls"
	"net/http"

	"connectrpc.com/connect"

	"strongroom/api/rule"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/pki"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// localAdministrator is who calls on the local socket: root, or the KMS's own
// user. The name stands in records.
const localAdministrator = "local administrator"

// services are what a server of a KMS serves. Those of a controller, and those
// that are left out, are refused with a hint.
type services struct {
	kms      strongroomv1connect.KMSServiceHandler
	approval strongroomv1connect.KMSApprovalServiceHandler
	audit    strongroomv1connect.KMSAuditServiceHandler
	root     strongroomv1connect.KMSRootServiceHandler
	cluster  strongroomv1connect.KMSClusterServiceHandler
	backup   strongroomv1connect.KMSBackupServiceHandler
	session  strongroomv1connect.SessionServiceHandler
	access   strongroomv1connect.AccessServiceHandler
}

// handler returns the services behind interceptors, the first outermost.
func (s services) handler(interceptors ...connect.Interceptor) http.Handler {
	options := []connect.HandlerOption{connect.WithInterceptors(interceptors...), connect.WithReadMaxBytes(requestMax)}
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewKMSServiceHandler(s.kms, options...))
	mux.Handle(strongroomv1connect.NewKMSApprovalServiceHandler(s.approval, options...))
	mux.Handle(strongroomv1connect.NewKMSAuditServiceHandler(s.audit, options...))
	mux.Handle(strongroomv1connect.NewKMSRootServiceHandler(s.root, options...))
	mux.Handle(strongroomv1connect.NewKMSClusterServiceHandler(s.cluster, options...))
	mux.Handle(strongroomv1connect.NewKMSBackupServiceHandler(s.backup, options...))
	mux.Handle(strongroomv1connect.NewSessionServiceHandler(s.session, options...))
	mux.Handle(strongroomv1connect.NewAccessServiceHandler(s.access, options...))
	mux.Handle(strongroomv1connect.NewProviderServiceHandler(strongroomv1connect.UnimplementedProviderServiceHandler{}, options...))
	mux.Handle(strongroomv1connect.NewVMServiceHandler(strongroomv1connect.UnimplementedVMServiceHandler{}, options...))
	mux.Handle(strongroomv1connect.NewHostServiceHandler(strongroomv1connect.UnimplementedHostServiceHandler{}, options...))
	mux.Handle(strongroomv1connect.NewClusterServiceHandler(strongroomv1connect.UnimplementedClusterServiceHandler{}, options...))
	return mux
}

// serviceRules returns the rules of all methods of [services].
func serviceRules() (rule.Rules, error) {
	return rule.Of(
		strongroomv1connect.KMSServiceName, strongroomv1connect.KMSApprovalServiceName, strongroomv1connect.KMSAuditServiceName, strongroomv1connect.KMSRootServiceName, strongroomv1connect.KMSClusterServiceName,
		strongroomv1connect.KMSBackupServiceName, strongroomv1connect.SessionServiceName, strongroomv1connect.AccessServiceName,
		strongroomv1connect.ProviderServiceName, strongroomv1connect.VMServiceName, strongroomv1connect.HostServiceName, strongroomv1connect.ClusterServiceName,
	)
}

// newServer serves a local socket.
func newServer(handler http.Handler) *http.Server {
	return &http.Server{Handler: guard.WithConnection(handler), ReadHeaderTimeout: daemon.HeaderTimeout, MaxHeaderBytes: daemon.HeaderMax}
}

// localServer serves root and the KMS's own user, who may do everything.
func (k *KMS) localServer() (*http.Server, error) {
	g, err := k.newGuard(func(context.Context, http.Header) (guard.Caller, error) {
		return guard.Caller{Principal: access.Principal{Kind: access.InternalPrincipal, Name: "local"}, Title: localAdministrator}, nil
	})
	if err != nil {
		return nil, err
	}
	a := &api{k: k}
	s := services{kms: a, approval: a, audit: a, root: a, cluster: a, backup: a, session: a, access: k.users().Accounts()}
	return newServer(s.handler(g, refuseUnknown("ask the controller: leave out --server, or name it there"))), nil
}

// apiServer serves users on the network, and applications whose interface is REST,
// with the operations of o. What gives away the keys of a whole KMS,
// its root key, its backups and a place among its nodes, stays on the local socket.
func (k *KMS) apiServer(o *kmipserver.Server) (*guard.Server, error) {
	g, err := k.newGuard(func(ctx context.Context, header http.Header) (guard.Caller, error) {
		if who, ok, err := guard.ByToken(ctx, k.access, header); ok {
			return who, err
		}
		return guard.Caller{}, guard.NotLoggedIn()
	})
	if err != nil {
		return nil, err
	}
	a := &api{k: k}
	s := services{
		kms: a, approval: a, audit: a, session: k.users().Sessions(), access: k.users().Accounts(),
		root: strongroomv1connect.UnimplementedKMSRootServiceHandler{}, cluster: strongroomv1connect.UnimplementedKMSClusterServiceHandler{},
		backup: strongroomv1connect.UnimplementedKMSBackupServiceHandler{},
	}
	path, keys, err := (&keyAPI{k: k, operations: o, imports: importKeys{store: k.objects}}).handler()
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle(path, keys)
	mux.Handle("/", s.handler(g, refuseUnknown("what concerns its root key, backups and nodes it does on its local socket only, the rest a controller does")))
	server := guard.NewServer(mux, guard.Limits{
		Connections: k.cfg.APIMaxConnections, PerAddress: k.cfg.APIMaxConnectionsPerAddress, RequestsPerSecond: k.cfg.APIMaxRequestsPerSecond,
	}, k.log)
	server.HTTP.TLSConfig = pki.ServerConfig(k.credential, k.ca.Certificate(), true, nil)
	// Users come by password and token; the certificates of applications are known by
	// themselves, whoever issued them.
	server.HTTP.TLSConfig.ClientAuth, server.HTTP.TLSConfig.ClientCAs, server.HTTP.TLSConfig.VerifyConnection = tls.RequestClientCert, nil, nil
	return server, nil
}

func (k *KMS) newGuard(identify func(context.Context, http.Header) (guard.Caller, error)) (*guard.Guard, error) {
	rules, err := serviceRules()
	if err != nil {
		return nil, err
	}
	return guard.New(guard.Config{
		Rules: rules, Access: k.access, Identify: identify, Record: k.recordGuarded, Subject: k.subject, Self: localAdministrator,
	}), nil
}

// refuseUnknown refuses, with a hint, what a server does not serve.
func refuseUnknown(hint string) connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			res, err := next(ctx, req)
			if err != nil && connect.CodeOf(err) == connect.CodeUnimplemented {
				err = errs.New(errs.InvalidState, "a KMS cannot do this").WithHint("%s", hint)
			}
			return res, err
		}
	}
}

// recordGuarded is recordCall but for a backup that was admitted: its handler
// puts it on record itself, with what is in it.
func (k *KMS) recordGuarded(e audit.Entry) error {
	if e.Action == "KMSBackupService/BackupKMS" && e.Outcome != audit.Denied {
		return nil
	}
	return k.recordCall(e)
}

// recordCall puts a call on record, durably. Strangers must not fill the disk:
// of their calls that fail so many a second are on record.
func (k *KMS) recordCall(e audit.Entry) error {
	if e.Actor == guard.Anonymous && e.Outcome != audit.Success {
		k.metrics.refused.Inc()
		if !k.metrics.note(k.now()) {
			return nil
		}
	}
	return k.audit.AppendDurably(e)
}
