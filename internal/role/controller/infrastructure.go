package controller

import (
	"context"
	"log/slog"
	"path/filepath"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

// clusters serves ClusterService.
type clusters struct{ *Controller }

func (c clusters) toAPI(ctx context.Context, cl inventory.Cluster) (*strongroomv1.Cluster, error) {
	out := &strongroomv1.Cluster{Id: cl.ID, Name: cl.Name, Created: stamp(cl.Created)}
	members, err := c.inv.Hosts(ctx, cl.ID)
	if err != nil {
		return nil, err
	}
	for _, h := range members {
		out.Hosts = append(out.Hosts, h.Name)
	}
	return out, nil
}

func (c clusters) CreateCluster(ctx context.Context, req *connect.Request[strongroomv1.CreateClusterRequest]) (*connect.Response[strongroomv1.Cluster], error) {
	cl, err := c.inv.CreateCluster(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.ClusterCreated, Target: "cluster/" + cl.Name})
	return connect.NewResponse(&strongroomv1.Cluster{Id: cl.ID, Name: cl.Name, Created: stamp(cl.Created)}), nil
}

func (c clusters) ListClusters(ctx context.Context, _ *connect.Request[strongroomv1.ListClustersRequest]) (*connect.Response[strongroomv1.ListClustersResponse], error) {
	all, err := c.inv.Clusters(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListClustersResponse{}
	for _, cl := range all {
		out, err := c.toAPI(ctx, cl)
		if err != nil {
			return nil, err
		}
		res.Clusters = append(res.Clusters, out)
	}
	return connect.NewResponse(res), nil
}

func (c clusters) GetCluster(ctx context.Context, req *connect.Request[strongroomv1.GetClusterRequest]) (*connect.Response[strongroomv1.Cluster], error) {
	cl, err := c.inv.Cluster(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	out, err := c.toAPI(ctx, cl)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// hosts serves HostService.
type hosts struct{ *Controller }

func (c hosts) CreateJoinToken(ctx context.Context, req *connect.Request[strongroomv1.CreateJoinTokenRequest]) (*connect.Response[strongroomv1.CreateJoinTokenResponse], error) {
	cl, err := c.inv.Cluster(ctx, req.Msg.GetCluster())
	if err != nil {
		return nil, err
	}
	token, expires, err := c.joins.Create(ctx, cl.ID, seconds(req.Msg.GetLifetimeSeconds()), pki.FingerprintOf(c.ca.Certificate()))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.CreateJoinTokenResponse{Token: token.String(), Expires: stamp(expires)}), nil
}

func (c hosts) ListHosts(ctx context.Context, _ *connect.Request[strongroomv1.ListHostsRequest]) (*connect.Response[strongroomv1.ListHostsResponse], error) {
	all, err := c.inv.Hosts(ctx, "")
	if err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListHostsResponse{}
	for _, h := range all {
		res.Hosts = append(res.Hosts, hostToAPI(h, n))
	}
	return connect.NewResponse(res), nil
}

func (c hosts) GetHost(ctx context.Context, req *connect.Request[strongroomv1.GetHostRequest]) (*connect.Response[strongroomv1.Host], error) {
	h, err := c.inv.Host(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(hostToAPI(h, n)), nil
}

func (c hosts) RemoveHost(ctx context.Context, req *connect.Request[strongroomv1.RemoveHostRequest]) (*connect.Response[strongroomv1.RemoveHostResponse], error) {
	h, err := c.inv.Host(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	if err := c.inv.DeleteHost(ctx, h.Name); err != nil {
		return nil, err
	}
	if err := c.retire(ctx, h); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "removed host not told to forget its keys", slog.String("host", h.Name), slog.Any("err", err))
	}
	c.post(ctx, event.New{Type: event.HostRemoved, Target: "host/" + req.Msg.GetName()})
	if err := c.refresh(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.RemoveHostResponse{}), nil
}

// datastores serves DatastoreService.
type datastores struct{ *Controller }

func (c datastores) CreateDatastore(ctx context.Context, req *connect.Request[strongroomv1.CreateDatastoreRequest]) (*connect.Response[strongroomv1.Datastore], error) {
	m := req.Msg
	if m.GetType() != "" && m.GetType() != "dir" {
		return nil, errs.New(errs.Invalid, "datastore type %.32q is not known; the one known is dir", m.GetType())
	}
	if !filepath.IsAbs(m.GetPath()) || filepath.Clean(m.GetPath()) != m.GetPath() {
		return nil, errs.New(errs.Invalid, "path %.128q is not an absolute path in its shortest form", m.GetPath())
	}
	cl, err := c.onlyCluster(ctx, m.GetCluster())
	if err != nil {
		return nil, err
	}
	d, err := c.inv.CreateDatastore(ctx, inventory.Datastore{Name: m.GetName(), Type: "dir", ClusterID: cl.ID, Path: m.GetPath()})
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.DatastoreCreated, Target: "datastore/" + d.Name})
	if err := c.remediateOnce(ctx); err != nil {
		return nil, err
	}
	return c.GetDatastore(ctx, connect.NewRequest(&strongroomv1.GetDatastoreRequest{Name: d.Name}))
}

// onlyCluster returns the cluster of that name, or the only one there is if the
// name is empty.
func (c *Controller) onlyCluster(ctx context.Context, name string) (inventory.Cluster, error) {
	if name != "" {
		return c.inv.Cluster(ctx, name)
	}
	all, err := c.inv.Clusters(ctx)
	if err != nil {
		return inventory.Cluster{}, err
	}
	switch len(all) {
	case 0:
		return inventory.Cluster{}, errs.New(errs.NotFound, "there is no cluster").WithHint("strongroom cluster create NAME")
	case 1:
		return all[0], nil
	}
	return inventory.Cluster{}, errs.New(errs.Invalid, "there are %d clusters: say which", len(all)).WithHint("add --cluster NAME; strongroom cluster ls")
}

func (c datastores) ListDatastores(ctx context.Context, _ *connect.Request[strongroomv1.ListDatastoresRequest]) (*connect.Response[strongroomv1.ListDatastoresResponse], error) {
	all, err := c.inv.Datastores(ctx)
	if err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListDatastoresResponse{}
	for _, d := range all {
		res.Datastores = append(res.Datastores, datastoreToAPI(d, n))
	}
	return connect.NewResponse(res), nil
}

func (c datastores) GetDatastore(ctx context.Context, req *connect.Request[strongroomv1.GetDatastoreRequest]) (*connect.Response[strongroomv1.Datastore], error) {
	d, err := c.inv.Datastore(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(datastoreToAPI(d, n)), nil
}
