package cluster

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

// dialTimeout bounds a connection's first step.
const dialTimeout = 2 * time.Second

// ringContext is the context of a parcel with an excerpt of a key ring, caContext
// that of one with the CA's key: docs/spec/kms-cluster.md.
func ringContext(recipient string) string {
	return fmt.Sprintf("sender=\"kms\" recipient=%q ring", recipient)
}

func caContext(recipient string) string {
	return fmt.Sprintf("sender=\"kms\" recipient=%q ca-key", recipient)
}

// peers calls other members, each over a connection that is kept.
type peers struct {
	node *Node

	mu         sync.Mutex
	transports map[string]*http.Transport // by member id
}

func (p *peers) client(m Member) strongroomv1connect.KMSMemberServiceClient {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.transports[m.ID]
	if t == nil {
		t = p.node.transport(m.ID)
		if p.transports == nil {
			p.transports = map[string]*http.Transport{}
		}
		p.transports[m.ID] = t
	}
	return clientOf(t, m.Address)
}

// transport connects to the member of that id and to nobody else.
func (n *Node) transport(id string) *http.Transport {
	dialer := &net.Dialer{Timeout: dialTimeout}
	return &http.Transport{
		TLSClientConfig: pki.ClientConfig(n.credential, n.ca.Certificate(), n.identity(id)), ForceAttemptHTTP2: true,
		DialContext: dialer.DialContext, TLSHandshakeTimeout: callTimeout, IdleConnTimeout: time.Minute,
		HTTP2: &http.HTTP2Config{SendPingTimeout: callTimeout, PingTimeout: callTimeout},
	}
}

func clientOf(t *http.Transport, address string) strongroomv1connect.KMSMemberServiceClient {
	return strongroomv1connect.NewKMSMemberServiceClient(&http.Client{Transport: t}, "https://"+address, connect.WithReadMaxBytes(requestMax))
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.transports {
		t.CloseIdleConnections()
	}
}

// hold has m fetch an epoch from here.
func (p *peers) hold(ctx context.Context, m Member, epoch uint64) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := p.client(m).HoldEpoch(ctx, connect.NewRequest(&strongroomv1.KMSHoldEpochRequest{Epoch: epoch}))
	return errs.Wrap(apierr.From(err), "node %s", m)
}

// fetch returns an excerpt of m's key ring with those of the epochs that it has.
// self is the caller's id. The caller closes the excerpt.
func (p *peers) fetch(ctx context.Context, m Member, self string, epochs []uint64) (*keymem.Key, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	recipient, err := parcel.NewRecipient()
	if err != nil {
		return nil, err
	}
	defer recipient.Close()
	res, err := p.client(m).FetchEpochs(ctx, connect.NewRequest(&strongroomv1.KMSFetchEpochsRequest{Epochs: epochs, ParcelPublicKey: recipient.PublicKey()}))
	if err != nil {
		return nil, errs.Wrap(apierr.From(err), "node %s", m)
	}
	excerpt, err := recipient.Open(res.Msg.GetRing(), ringContext(self))
	return excerpt, errs.Wrap(err, "node %s", m)
}
