package controller

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/event"
	"strongroom/internal/control/guard"
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
	digestMax     = 32   // bytes
	// capabilitiesMax and factMax bound what a host says of itself.
	capabilitiesMax = 64
	factMax         = 256 // bytes
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
	address, err := checkFacts(m)
	if err != nil {
		return nil, err
	}
	if _, err := c.joins.Check(ctx, token); err != nil { // who has none is not told which hosts there are
		return nil, err
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

// facts are what a host says of itself, in a join and in each heartbeat.
type facts interface {
	GetAddress() string
	GetVersion() string
	GetCapabilities() map[string]bool
}

// checkFacts bounds them and returns the address without the port.
func checkFacts(f facts) (host string, err error) {
	host, port, err := net.SplitHostPort(f.GetAddress())
	if err != nil || host == "" || port == "" || len(f.GetAddress()) > factMax {
		return "", errs.New(errs.Invalid, "the host's address %.128q is not host:port", f.GetAddress())
	}
	if len(f.GetVersion()) > factMax || len(f.GetCapabilities()) > capabilitiesMax {
		return "", errs.New(errs.Invalid, "the host's version or capabilities are too long")
	}
	for name := range f.GetCapabilities() {
		if len(name) > factMax {
			return "", errs.New(errs.Invalid, "the host's capability %.64q is too long", name)
		}
	}
	return host, nil
}

func (c enroll) Heartbeat(ctx context.Context, req *connect.Request[strongroomv1.HeartbeatRequest]) (*connect.Response[strongroomv1.HeartbeatResponse], error) {
	m, id := req.Msg, guard.CallerOf(ctx).Host
	if n := max(len(m.GetVms()), len(m.GetDigests())); n > vmsMax {
		return nil, errs.New(errs.Invalid, "%d VMs are more than %d", n, vmsMax)
	}
	for _, d := range m.GetDigests() {
		if len(d.GetId()) > factMax || len(d.GetDigest()) > digestMax {
			return nil, errs.New(errs.Invalid, "the digest or the id of VM %.64q is too long", d.GetId())
		}
	}
	if len(m.GetProviders()) > inventory.MaxProviders || len(m.GetBootId()) > factMax || len(m.GetInstance()) > factMax {
		return nil, errs.New(errs.Invalid, "the host's providers or boot id are too long")
	}
	if _, err := checkFacts(m); err != nil {
		return nil, err
	}
	answer := connect.NewResponse(&strongroomv1.HeartbeatResponse{IntervalMs: uint32(heartbeatEvery.Milliseconds())})
	now := &strongroomv1.Description{Instance: m.GetInstance(), Sequence: m.GetSequence()}
	last, done, err := c.heard.turn(ctx, id, "")
	if err != nil {
		return nil, err
	}
	defer done()
	if last.stale(now) {
		return answer, nil
	}
	before, err := c.inv.HostByID(ctx, id)
	if err != nil {
		return nil, err
	}
	held := heldFromAPI(m.GetProviders())
	stale := before.State != inventory.Connected || before.Address != m.GetAddress() || before.BootID != m.GetBootId() || before.Instance != m.GetInstance() ||
		before.Version != m.GetVersion() || !maps.Equal(before.Capabilities, m.GetCapabilities()) || !slices.Equal(before.Held, held)
	if stale {
		_, err := c.inv.UpdateHost(ctx, id, func(h *inventory.Host) error {
			h.Address, h.Version, h.BootID, h.Capabilities, h.Held = m.GetAddress(), m.GetVersion(), m.GetBootId(), m.GetCapabilities(), held
			h.Instance = m.GetInstance()
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
	if err := c.inv.Beat(ctx, id, c.beatLife); err != nil {
		return nil, err
	}
	digests := map[string][]byte{}
	for _, d := range m.GetDigests() {
		digests[d.GetId()] = d.GetDigest()
	}
	began := time.Now()
	c.said.note(id, m.GetVms(), digests, began)
	for _, vm := range m.GetVms() {
		if err := c.noteVMAs(ctx, id, vm, digests[vm.GetId()]); errs.KindOf(err) == errs.Invalid {
			// One that makes no sense must not keep the others from being noted.
			c.log.LogAttrs(ctx, slog.LevelWarn, "VM not noted", slog.String("host", before.Name), slog.String("vm", vm.GetId()), slog.Any("err", err))
		} else if err != nil {
			return nil, err
		}
	}
	if stale {
		c.poke()
	}
	answer.Msg.Lacking = c.said.lacking(id, digests, began)
	last.note(now)
	return answer, nil
}

func (c enroll) RenewCertificate(ctx context.Context, req *connect.Request[strongroomv1.RenewCertificateRequest]) (*connect.Response[strongroomv1.RenewCertificateResponse], error) {
	h, err := c.inv.HostByID(ctx, guard.CallerOf(ctx).Host)
	if err != nil {
		return nil, err
	}
	address, _, err := net.SplitHostPort(h.Address)
	if err != nil {
		return nil, err
	}
	cert, err := c.ca.IssueFromCSR(req.Msg.GetCsr(), pki.Identity{Cluster: h.ClusterID, Role: pki.Host, Name: h.ID}, []string{address})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.RenewCertificateResponse{Certificate: cert.Raw}), nil
}
