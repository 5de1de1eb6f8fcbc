package cluster

import (
	"context"
	"net"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"strongroom/api/apierr"
	"strongroom/api/rule"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyring"
)

const (
	// requestMax bounds one message, in bytes: a ring's excerpt fits.
	requestMax = 1 << 20
	addressMax = 256 // bytes
	membersMax = 7
	nameMax    = 64 // bytes
)

// service serves other members.
type service struct{ *Cluster }

type callerKey struct{}

// Server returns the server for other members. Who is none, and asks to join, is held
// to what an API on the network allows.
func (c *Cluster) Server() (*guard.Server, error) {
	rules, err := rule.Of(strongroomv1connect.KMSMemberServiceName)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewKMSMemberServiceHandler(service{c}, connect.WithReadMaxBytes(requestMax), connect.WithInterceptors(c.membersOnly(rules))))
	known := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			if id, err := pki.PeerIdentity(*r.TLS); err == nil {
				r = r.WithContext(context.WithValue(r.Context(), callerKey{}, id.Name))
			}
		}
		mux.ServeHTTP(w, r)
	})
	server := guard.NewServer(known, guard.Limits{}, c.Log)
	server.HTTP.TLSConfig = pki.ServerConfig(c.Node.credential, c.CA.Certificate(), true, c.Node.accept)
	server.HTTP.HTTP2.SendPingTimeout, server.HTTP.HTTP2.PingTimeout = 15*time.Second, 15*time.Second
	return server, nil
}

// membersOnly lets members through to what members may do, and nobody else: one that
// was removed still has a certificate.
func (c *Cluster) membersOnly(rules rule.Rules) connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			r := rules[req.Spec().Procedure]
			if !r.Unauthenticated {
				id, _ := ctx.Value(callerKey{}).(string)
				if r.PeerRole != string(pki.KMS) || id == "" {
					return nil, apierr.To(errs.New(errs.Denied, "only a node of this KMS may do this"))
				}
				m, err := c.byID(ctx, id)
				if errs.KindOf(err) == errs.NotFound {
					err = errs.New(errs.Denied, "this node was removed from the KMS")
				}
				if err != nil {
					return nil, apierr.To(err)
				}
				ctx = context.WithValue(ctx, callerKey{}, m)
			}
			res, err := next(ctx, req)
			if err != nil {
				return nil, apierr.To(err)
			}
			return res, nil
		}
	}
}

// caller is the member that calls.
func caller(ctx context.Context) Member { return ctx.Value(callerKey{}).(Member) }

func (s service) Join(ctx context.Context, req *connect.Request[strongroomv1.KMSJoinRequest]) (*connect.Response[strongroomv1.KMSJoinResponse], error) {
	m := Member{
		ID: uuid.NewString(), Name: req.Msg.GetName(), Address: req.Msg.GetAddress(), StoreAddress: req.Msg.GetStoreAddress(), Joined: time.Now().UTC(),
	}
	res, err := s.join(ctx, req.Msg, m)
	actor := "join token"
	if err != nil { // whatever it showed, it may be anybody
		actor = guard.Anonymous
	}
	if recordErr := s.Record(actor, "KMSMemberService/Join", "node/"+m.Name, err); err == nil {
		err = recordErr
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (s service) join(ctx context.Context, req *strongroomv1.KMSJoinRequest, m Member) (*strongroomv1.KMSJoinResponse, error) {
	token, err := pki.ParseJoinToken(req.GetToken())
	if err != nil {
		return nil, withTokenHint(err)
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	if len(req.GetParcelPublicKey()) != parcel.PublicKeySize {
		return nil, errs.New(errs.Invalid, "the node's parcel key has %d bytes, not %d", len(req.GetParcelPublicKey()), parcel.PublicKeySize)
	}
	if err := s.forThis(s.joins.Check(ctx, token)); err != nil { // who has none is not told which members there are
		return nil, err
	}
	all, err := s.members.List(ctx)
	if err != nil {
		return nil, err
	}
	left := slices.DeleteFunc(slices.Clone(all), func(o Member) bool { return !o.leftBy(m) })
	if err := free(slices.DeleteFunc(all, func(o Member) bool { return o.leftBy(m) }), m); err != nil { // before the token is used up
		return nil, err
	}
	if err := s.forThis(s.joins.Redeem(ctx, token)); err != nil {
		return nil, err
	}
	for _, o := range left {
		if err := s.remove(ctx, o); err != nil {
			return nil, err
		}
	}
	// A member first, and only then in possession of keys: so no KEK is erased
	// without it.
	var members []Member
	err = s.DB.Txn(ctx, func(tx *store.Tx) error {
		if err := tx.Admit(ctx, max(int(req.GetFormat()), 1)); err != nil {
			return err
		}
		if members, err = s.members.In(tx).List(ctx, ""); err != nil {
			return err
		}
		if err := free(members, m); err != nil {
			return err
		}
		if len(members) >= membersMax {
			return errs.New(errs.InvalidState, "there are %d nodes; more would make the KMS slower, not safer", membersMax)
		}
		return s.members.In(tx).Create(ctx, m.ID, m)
	})
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.KMSJoinResponse{Id: m.ID, CaCertificate: s.CA.Certificate().Raw}
	for _, other := range members {
		res.Members = append(res.Members, &strongroomv1.KMSMember{Id: other.ID, Name: other.Name, Address: other.Address, StoreAddress: other.StoreAddress})
	}
	if res.CaKey, err = s.caParcel(req.GetParcelPublicKey(), m.ID); err != nil {
		return nil, err
	}
	res.Ring, err = s.ringParcel(req.GetParcelPublicKey(), m.ID, nil)
	return res, err
}

// forThis refuses a join token that is no good, as err says, or for another KMS.
func (s service) forThis(cluster string, err error) error {
	if err == nil && cluster != s.Node.cluster {
		err = errs.New(errs.Denied, "the join token is for something else")
	}
	if err != nil {
		return withTokenHint(err)
	}
	return nil
}

func withTokenHint(err error) error {
	return errs.New(errs.KindOf(err), "%w", err).WithHint("make a new one: strongroom kms member join-token")
}

// check bounds what a joining node says of itself.
func (m Member) check() error {
	if err := (pki.Identity{Cluster: "kms", Role: pki.KMS, Name: m.Name}).Check(); err != nil || len(m.Name) > nameMax {
		return errs.New(errs.Invalid, "a node's name has 1 to %d letters, digits, '.', '_' and '-'", nameMax)
	}
	for _, address := range []string{m.Address, m.StoreAddress} {
		host, port, err := net.SplitHostPort(address)
		if err != nil || host == "" || port == "" || len(address) > addressMax {
			return errs.New(errs.Invalid, "the node's address %.128q is not host:port", address)
		}
	}
	return nil
}

func (s service) caParcel(public []byte, recipient string) ([]byte, error) {
	der, err := s.CA.PrivateKey()
	if err != nil {
		return nil, err
	}
	key, err := keymem.Take(der)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	return parcel.Seal(public, caContext(recipient), key)
}

func (s service) ringParcel(public []byte, recipient string, epochs []uint64) ([]byte, error) {
	excerpt, err := s.Ring.Excerpt(epochs...)
	if err != nil {
		return nil, err
	}
	defer excerpt.Close()
	return parcel.Seal(public, ringContext(recipient), excerpt)
}

func (s service) Enter(ctx context.Context, _ *connect.Request[strongroomv1.KMSEnterRequest]) (*connect.Response[strongroomv1.KMSEnterResponse], error) {
	m := caller(ctx)
	initial, err := s.DB.AddMember(ctx, m.ID, m.StoreAddress)
	if recordErr := s.Record("node/"+m.Name, "KMSMemberService/Enter", "node/"+m.Name, err); err == nil {
		err = recordErr
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.KMSEnterResponse{Initial: initial}), nil
}

func (s service) FetchEpochs(ctx context.Context, req *connect.Request[strongroomv1.KMSFetchEpochsRequest]) (*connect.Response[strongroomv1.KMSFetchEpochsResponse], error) {
	m := caller(ctx)
	if len(req.Msg.GetParcelPublicKey()) != parcel.PublicKeySize || len(req.Msg.GetEpochs()) > keyring.ExcerptMax {
		return nil, errs.New(errs.Invalid, "%d epochs, and a parcel key of %d bytes", len(req.Msg.GetEpochs()), len(req.Msg.GetParcelPublicKey()))
	}
	ring, err := s.ringParcel(req.Msg.GetParcelPublicKey(), m.ID, req.Msg.GetEpochs())
	if recordErr := s.Record("node/"+m.Name, "KMSMemberService/FetchEpochs", "keyring", err); err == nil {
		err = recordErr
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.KMSFetchEpochsResponse{Ring: ring}), nil
}

func (s service) HoldEpoch(ctx context.Context, req *connect.Request[strongroomv1.KMSHoldEpochRequest]) (*connect.Response[strongroomv1.KMSHoldEpochResponse], error) {
	n := req.Msg.GetEpoch()
	if err := s.fetch(ctx, caller(ctx), []uint64{n}); err != nil {
		return nil, err
	}
	if !s.Ring.Has(n) {
		return nil, errs.New(errs.InvalidState, "epoch %d cannot be held: it is not forming any more", n)
	}
	return connect.NewResponse(&strongroomv1.KMSHoldEpochResponse{}), nil
}
