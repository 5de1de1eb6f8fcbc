package controller

import (
	"net/http"

	"connectrpc.com/connect"

	"strongroom/api/rule"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// requestMax bounds one request, in bytes: a heartbeat with thousands of VMs is
// the largest.
const requestMax = 16 << 20

// apiServer returns the server of users and hosts. It does not come to be if a
// method does not declare who may call it.
func (c *Controller) apiServer() (*guard.Server, error) {
	rules, err := rule.Of(
		strongroomv1connect.SessionServiceName, strongroomv1connect.AccessServiceName, strongroomv1connect.ClusterServiceName,
		strongroomv1connect.HostServiceName, strongroomv1connect.DatastoreServiceName, strongroomv1connect.ProviderServiceName,
		strongroomv1connect.VMServiceName, strongroomv1connect.TaskServiceName, strongroomv1connect.EventServiceName,
		strongroomv1connect.EnrollServiceName,
	)
	if err != nil {
		return nil, err
	}
	options := []connect.HandlerOption{connect.WithInterceptors(c.newGuard(rules)), connect.WithReadMaxBytes(requestMax)}
	users := guard.Users{Access: c.access, Post: c.post, Version: Version}
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewSessionServiceHandler(users.Sessions(), options...))
	mux.Handle(strongroomv1connect.NewAccessServiceHandler(users.Accounts(), options...))
	mux.Handle(strongroomv1connect.NewClusterServiceHandler(clusters{c}, options...))
	mux.Handle(strongroomv1connect.NewHostServiceHandler(hosts{c}, options...))
	mux.Handle(strongroomv1connect.NewDatastoreServiceHandler(datastores{c}, options...))
	mux.Handle(strongroomv1connect.NewProviderServiceHandler(providers{c}, options...))
	mux.Handle(strongroomv1connect.NewVMServiceHandler(vms{c}, options...))
	mux.Handle(strongroomv1connect.NewTaskServiceHandler(tasks{c}, options...))
	mux.Handle(strongroomv1connect.NewEventServiceHandler(events{c}, options...))
	mux.Handle(strongroomv1connect.NewEnrollServiceHandler(enroll{c}, options...))

	accept := func(id pki.Identity) error {
		if id.Role != pki.Host && id.Role != pki.Client {
			return errs.New(errs.Denied, "%s may not use the API", id)
		}
		return nil
	}
	server := guard.NewServer(mux, guard.Limits{
		Connections: c.cfg.MaxConnections, PerAddress: c.cfg.MaxConnectionsPerAddress, RequestsPerSecond: c.cfg.MaxRequestsPerSecond,
	}, c.log)
	server.HTTP.TLSConfig = pki.ServerConfig(c.credential, c.ca.Certificate(), true, accept)
	return server, nil
}
