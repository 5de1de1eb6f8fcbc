package controller

import (
	"context"
	"net"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

const (
	heartbeatEvery = 2 * time.Second
	// heartbeatLife is how long a host counts as connected without a heartbeat.
	heartbeatLife = 10 * time.Second
	vmsMax        = 4096 // in one heartbeat
)

// enroll serves hosts.
type enroll struct{ *Controller }

func (c enroll) Join(ctx context.Context, req *connect.Request[strongroomv1.JoinRequest]) (*connect.Response[strongroomv1.JoinResponse], error) {
	m := req.Msg
	token, err := pki.ParseJoinToken(m.GetToken())
	if err != nil {
		return nil, err
	}
	if err := inventory.CheckName("host", m.GetName()); err != nil {
		return nil, err
	}
	if len(m.GetParcelPublicKey()) != parcel.PublicKeySize {
		return nil, errs.New(errs.Invalid, "the host's parcel key has %d bytes, not %d", len(m.GetParcelPublicKey()), parcel.PublicKeySize)
	}
	address, _, err := net.SplitHostPort(m.GetAddress())
	if err != nil {
		return nil, errs.New(errs.Invalid, "the host's address %.128q is not host:port", m.GetAddress())
	}
	if _, err := c.inv.Host(ctx, m.GetName()); err == nil {
		return nil, errs.New(errs.Exists, "there is a host %s already", m.GetName()).WithHint("strongroom host remove %s, or choose another name", m.GetName())
	}
	clusterID, err := c.joins.Redeem(ctx, token)
	if err != nil {
		return nil, err
	}
	cluster, err := c.inv.ClusterByID(ctx, clusterID)
	if err != nil {
		return nil, err
	}
	id := uuid.NewString()
	cert, err := c.ca.IssueFromCSR(m.GetCsr(), pki.Identity{Cluster: clusterID, Role: pki.Host, Name: id}, []string{address})
	if err != nil {
		return nil, err
	}
	_, err = c.inv.AddHost(ctx, inventory.Host{
		ID: id, Name: m.GetName(), Address: m.GetAddress(), ClusterID: clusterID, Version: m.GetVersion(),
		Capabilities: m.GetCapabilities(), ParcelPublicKey: m.GetParcelPublicKey(), CryptoState: inventory.HostPrepared,
	})
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.HostJoined, Target: "host/" + m.GetName(), Args: map[string]string{"cluster": cluster.Name}})
	return connect.NewResponse(&strongroomv1.JoinResponse{
		HostId: id, ClusterId: clusterID, Cluster: cluster.Name, Certificate: cert.Raw, CaCertificate: c.ca.Certificate().Raw,
	}), nil
}

func (c enroll) Heartbeat(ctx context.Context, req *connect.Request[strongroomv1.HeartbeatRequest]) (*connect.Response[strongroomv1.HeartbeatResponse], error) {
	m, id := req.Msg, callerOf(ctx).host
	if len(m.GetVms()) > vmsMax {
		return nil, errs.New(errs.Invalid, "%d VMs are more than %d", len(m.GetVms()), vmsMax)
	}
	before, err := c.inv.HostByID(ctx, id)
	if err != nil {
		return nil, err
	}
	var held []inventory.HeldKey
	for _, p := range m.GetProviders() {
		held = append(held, inventory.HeldKey{Provider: p.GetName(), KeyID: p.GetKeyId()})
	}
	stale := before.State != inventory.Connected || before.Address != m.GetAddress() || before.BootID != m.GetBootId() || !sameHeld(before.Held, held)
	if stale {
		_, err := c.inv.UpdateHost(ctx, id, func(h *inventory.Host) error {
			h.Address, h.Version, h.BootID, h.Capabilities, h.Held = m.GetAddress(), m.GetVersion(), m.GetBootId(), m.GetCapabilities(), held
			h.CryptoState = inventory.HostPrepared
			if len(held) > 0 {
				h.CryptoState = inventory.HostSafe
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if err := c.inv.Beat(ctx, id, heartbeatLife); err != nil {
		return nil, err
	}
	for _, vm := range m.GetVms() {
		if err := c.noteVM(ctx, id, vm); err != nil {
			return nil, err
		}
	}
	if stale {
		c.poke()
	}
	return connect.NewResponse(&strongroomv1.HeartbeatResponse{IntervalMs: uint32(heartbeatEvery.Milliseconds())}), nil
}

func sameHeld(a, b []inventory.HeldKey) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func (c enroll) RenewCertificate(ctx context.Context, req *connect.Request[strongroomv1.RenewCertificateRequest]) (*connect.Response[strongroomv1.RenewCertificateResponse], error) {
	h, err := c.inv.HostByID(ctx, callerOf(ctx).host)
	if err != nil {
		return nil, err
	}
	address, _, err := net.SplitHostPort(h.Address)
	if err != nil {
		return nil, apierr.To(err)
	}
	cert, err := c.ca.IssueFromCSR(req.Msg.GetCsr(), pki.Identity{Cluster: h.ClusterID, Role: pki.Host, Name: h.ID}, []string{address})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.RenewCertificateResponse{Certificate: cert.Raw}), nil
}
