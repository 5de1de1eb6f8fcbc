package cluster

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

// joinTimeout bounds the whole of a join.
const joinTimeout = 30 * time.Second

// Joined is what a machine gets that becomes a node. It must be closed.
type Joined struct {
	ID    string
	CA    []byte      // its certificate, DER
	CAKey *keymem.Key // PKCS #8
	Ring  *keymem.Key // an excerpt of the key ring: the metadata epoch
	Peers []Member    // the other members
}

// Close wipes the keys.
func (j *Joined) Close() error {
	for _, k := range []*keymem.Key{j.CAKey, j.Ring} {
		if k != nil {
			k.Close()
		}
	}
	return nil
}

// Join asks the node at server ("host:port") to take self as a member; self has
// no id yet.
func Join(ctx context.Context, server, text string, self Member) (_ *Joined, err error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	token, err := pki.ParseJoinToken(text)
	if err != nil {
		return nil, withTokenHint(err)
	}
	if err := self.check(); err != nil {
		return nil, err
	}
	recipient, err := parcel.NewRecipient()
	if err != nil {
		return nil, err
	}
	defer recipient.Close()
	t := &http.Transport{TLSClientConfig: pki.JoinConfig(token.CA, pki.KMS), ForceAttemptHTTP2: true}
	defer t.CloseIdleConnections()
	res, err := clientOf(t, server).Join(ctx, connect.NewRequest(&strongroomv1.KMSJoinRequest{
		Token: token.String(), Name: self.Name, Address: self.Address, StoreAddress: self.StoreAddress, ParcelPublicKey: recipient.PublicKey(), Format: int32(self.Format),
	}))
	if err != nil {
		return nil, apierr.From(err)
	}
	j := &Joined{ID: res.Msg.GetId(), CA: res.Msg.GetCaCertificate()}
	defer func() {
		if err != nil {
			j.Close()
		}
	}()
	ca, err := x509.ParseCertificate(j.CA)
	if err != nil || pki.FingerprintOf(ca) != token.CA {
		return nil, errs.New(errs.Denied, "the CA that the node answers with is not the one that the token names")
	}
	if j.CAKey, err = recipient.Open(res.Msg.GetCaKey(), caContext(j.ID)); err != nil {
		return nil, err
	}
	if j.Ring, err = recipient.Open(res.Msg.GetRing(), ringContext(j.ID)); err != nil {
		return nil, err
	}
	for _, m := range res.Msg.GetMembers() {
		j.Peers = append(j.Peers, Member{ID: m.GetId(), Name: m.GetName(), Address: m.GetAddress(), StoreAddress: m.GetStoreAddress()})
	}
	return j, nil
}

// Enter has one of the members take this node's database in, and returns what it
// starts with: [store.Cluster.Initial].
func (n *Node) Enter(ctx context.Context, members []Member) (initial string, err error) {
	for _, m := range members {
		initial, oneErr := n.enter(ctx, m)
		if oneErr == nil {
			return initial, nil
		}
		err = errors.Join(err, oneErr)
	}
	return "", errs.New(errs.Unavailable, "no node takes this one in: %w", err).WithHint("see that another node runs, and that this one is in: strongroom kms member ls")
}

func (n *Node) enter(ctx context.Context, m Member) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	t := n.transport(m.ID)
	defer t.CloseIdleConnections()
	res, err := clientOf(t, m.Address).Enter(ctx, connect.NewRequest(&strongroomv1.KMSEnterRequest{}))
	if err != nil {
		return "", errs.Wrap(apierr.From(err), "node %s", m)
	}
	return res.Msg.GetInitial(), nil
}
