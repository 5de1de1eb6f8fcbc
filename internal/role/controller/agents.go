package controller

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/errs"
)

const (
	// agentTimeout bounds a short call to a host.
	agentTimeout = 30 * time.Second
	// agentDial bounds finding and greeting a host.
	agentDial = 5 * time.Second
	// agentPing finds a host that vanished during a long call.
	agentPing = 15 * time.Second
	// answerMax bounds an answer of a host, in bytes: those keys that it lacks, of
	// all VMs of its cluster, are the largest.
	answerMax = 16 << 20
)

// agents keeps the connections to the hosts' agents. It is safe for concurrent
// use.
type agents struct {
	credential *pki.Credential
	ca         *x509.Certificate

	mu      sync.Mutex               // guards the maps
	clients map[string]*agentClient  // by host id
	busy    map[string]chan struct{} // by host id, buffered by one: who has put something in has the lock
}

type agentClient struct {
	strongroomv1connect.AgentServiceClient
	address   string
	transport *http.Transport
}

func newAgents(credential *pki.Credential, ca *x509.Certificate) *agents {
	return &agents{credential: credential, ca: ca, clients: map[string]*agentClient{}, busy: map[string]chan struct{}{}}
}

// of returns the client of a host's agent. The host proves to be the one with
// that id, wherever it listens.
func (a *agents) of(h inventory.Host) strongroomv1connect.AgentServiceClient {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c, ok := a.clients[h.ID]; ok {
		if c.address == h.Address {
			return c
		}
		c.transport.CloseIdleConnections()
	}
	want := pki.Identity{Cluster: h.ClusterID, Role: pki.Host, Name: h.ID}
	transport := &http.Transport{
		TLSClientConfig: pki.ClientConfig(a.credential, a.ca, want), ForceAttemptHTTP2: true, TLSHandshakeTimeout: agentDial,
		HTTP2: &http.HTTP2Config{SendPingTimeout: agentPing, PingTimeout: agentPing},
	}
	// Nor does a host lead the controller elsewhere, or fill its memory.
	caller := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	c := &agentClient{strongroomv1connect.NewAgentServiceClient(caller, "https://"+h.Address, connect.WithReadMaxBytes(answerMax)), h.Address, transport}
	a.clients[h.ID] = c
	return c
}

// lock waits until nobody else has the lock of that host.
func (a *agents) lock(ctx context.Context, id string) (unlock func(), err error) {
	a.mu.Lock()
	busy, ok := a.busy[id]
	if !ok {
		busy = make(chan struct{}, 1)
		a.busy[id] = busy
	}
	a.mu.Unlock()
	select {
	case busy <- struct{}{}:
		return func() { <-busy }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// drop forgets the connections to a host.
func (a *agents) drop(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c, ok := a.clients[id]; ok {
		c.transport.CloseIdleConnections()
		delete(a.clients, id)
	}
}

// Close drops the connections.
func (a *agents) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.clients {
		c.transport.CloseIdleConnections()
	}
}

// errUnreachable says that a host did not answer: what it did is not known.
var errUnreachable = errors.New("host does not answer")

// agentError tells what a host said from what became of the connection to it.
func agentError(h inventory.Host, err error) error {
	if err == nil {
		return nil
	}
	// Canceled and DeadlineExceeded say that the host stopped, or that the call
	// took too long, not what it thinks of it.
	if code := connect.CodeOf(err); connect.IsWireError(err) && code != connect.CodeCanceled && code != connect.CodeDeadlineExceeded {
		return apierr.From(err)
	}
	return errs.New(errs.Unavailable, "%w: %s at %s: %v", errUnreachable, h.Name, h.Address, err).
		WithHint("strongroom host show %s", h.Name)
}

// callHost makes a short call to a host.
func callHost[Req, Res any](ctx context.Context, h inventory.Host, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	return callHostLong(ctx, h, method, req)
}

// callHostLong makes a call that takes as long as ctx allows.
func callHostLong[Req, Res any](ctx context.Context, h inventory.Host, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	res, err := method(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, agentError(h, err)
	}
	return res.Msg, nil
}

// streamHost makes a call that tells its progress, and returns the VM as the
// host left it.
func streamHost[Req any](ctx context.Context, h inventory.Host, method func(context.Context, *connect.Request[Req]) (*connect.ServerStreamForClient[strongroomv1.AgentProgress], error), req *Req, progress func(*strongroomv1.AgentProgress)) (*strongroomv1.VM, error) {
	stream, err := method(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, agentError(h, err)
	}
	defer stream.Close()
	var result *strongroomv1.VM
	for stream.Receive() {
		if result = stream.Msg().GetResult(); result == nil {
			progress(stream.Msg())
		}
	}
	switch err := stream.Err(); {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, agentError(h, err)
	case result == nil:
		return nil, agentError(h, errors.New("it ended the call without a result"))
	}
	return result, nil
}
