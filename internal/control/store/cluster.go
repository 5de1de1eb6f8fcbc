package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"strongroom/internal/errs"
)

const (
	// Members on other machines answer later than one alone answers itself.
	clusterTickMillis     = 100
	clusterElectionMillis = 1000
	// commitTimeout is how long a commit in a cluster may take. One that was on
	// its way to a leader which died is never answered: whoever waits for it must
	// learn soon that nobody knows what became of it.
	commitTimeout = 3 * time.Second
	// readRetry is the pause before a read that lost its leader is repeated, and
	// readTimeout how long that may go on.
	readRetry   = 20 * time.Millisecond
	readTimeout = 5 * time.Second
	// changeRetry is the pause before a change of members that was refused is tried
	// again, and changeTimeout how long that may go on.
	changeRetry   = 250 * time.Millisecond
	changeTimeout = 20 * time.Second
)

// Cluster has a database replicated with those of other processes. Members know
// each other by certificates of one CA, which bear a name that no other has.
type Cluster struct {
	// Name is the member's, unique in the cluster.
	Name string
	// PeerName is the DNS name in every member's certificate, and in none that the CA
	// issues to others: whoever has it can read and write everything.
	PeerName string
	// Listen and Advertise are where this member listens for others, an IP
	// address and a port, and how they reach it, "host:port".
	Listen, Advertise string
	// Initial is the answer of [DB.AddMember] when a member starts the first
	// time. Without it a member that has no data yet is the first.
	Initial string
	// CertFile, KeyFile and CAFile hold, in PEM, the member's certificate, good
	// for Advertise and as a client, its key and the CA. They are read at each
	// connection.
	CertFile, KeyFile, CAFile string
}

// Member is one member of a cluster.
type Member struct {
	Address string // "host:port", as in [Cluster.Advertise]
	Learner bool   // it gets data, and has no say yet
	Leader  bool

	id uint64
}

// HasData reports whether a member has run in dir.
func HasData(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "member", "wal"))
	return err == nil
}

func peerURL(address string) string {
	u := url.URL{Scheme: "https", Host: address}
	return u.String()
}

// configure turns the configuration of a single member into that of one of
// several.
func (c *Cluster) configure(ec *embed.Config) error {
	if strings.ContainsAny(c.Name, "=,") || c.Name == "" {
		return errs.New(errs.Invalid, "member name %.64q is empty or has '=' or ','", c.Name)
	}
	if c.PeerName == "" {
		return errs.New(errs.Invalid, "no name tells members from others that have a certificate")
	}
	ec.Name = c.Name
	ec.ListenPeerUrls = []url.URL{{Scheme: "https", Host: c.Listen}}
	ec.AdvertisePeerUrls = []url.URL{{Scheme: "https", Host: c.Advertise}}
	ec.PeerTLSInfo = transport.TLSInfo{
		CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.CAFile, ClientCertAuth: true,
		// A client's address may be translated on its way.
		SkipClientSANVerify: true, AllowedHostnames: []string{c.PeerName},
	}
	ec.TlsMinVersion = "TLS1.3"
	ec.InitialCluster = ec.InitialClusterFromName(c.Name)
	if c.Initial != "" {
		ec.InitialCluster, ec.ClusterState = c.Initial, embed.ClusterStateFlagExisting
	}
	ec.TickMs, ec.ElectionMs = clusterTickMillis, clusterElectionMillis
	return nil
}

// Members returns the cluster's members, by address.
func (db *DB) Members(ctx context.Context) ([]Member, error) {
	resp, err := db.client.MemberList(ctx)
	if err != nil {
		return nil, db.mapErr(err)
	}
	var out []Member
	for _, m := range resp.Members {
		out = append(out, Member{id: m.ID, Address: addressOf(m.PeerURLs), Learner: m.IsLearner, Leader: m.ID == uint64(db.etcd.Server.Leader())})
	}
	slices.SortFunc(out, func(a, b Member) int { return strings.Compare(a.Address, b.Address) })
	return out, nil
}

func addressOf(urls []string) string {
	if len(urls) == 0 {
		return ""
	}
	u, err := url.Parse(urls[0])
	if err != nil {
		return ""
	}
	return u.Host
}

// AddMember adds a member that will be reached at address, as a learner: until
// it has all data and [DB.Promote] succeeds nothing depends on it. It returns
// [Cluster.Initial] for that member. Adding one again changes nothing.
func (db *DB) AddMember(ctx context.Context, name, address string) (initial string, err error) {
	resp, err := db.client.MemberList(ctx)
	if err != nil {
		return "", db.mapErr(err)
	}
	members := resp.Members
	if !slices.ContainsFunc(members, func(m *etcdserverpb.Member) bool { return addressOf(m.PeerURLs) == address }) {
		err := db.whenHealthy(ctx, func() error {
			added, err := db.client.MemberAddAsLearner(ctx, []string{peerURL(address)})
			if err == nil {
				members = added.Members
			}
			return err
		})
		if err != nil {
			return "", fmt.Errorf("cannot add member %s: %w", address, err)
		}
	}
	var parts []string
	for i, m := range members {
		n := m.Name
		switch {
		case addressOf(m.PeerURLs) == address:
			n = name
		case n == "":
			n = fmt.Sprintf("unnamed-%d", i) // it has not started yet; names are for people
		}
		for _, u := range m.PeerURLs {
			parts = append(parts, n+"="+u)
		}
	}
	return strings.Join(parts, ","), nil
}

// whenHealthy does f, which changes who is a member, again until the members have
// been connected for some seconds: earlier etcd refuses, for they might not be
// there.
func (db *DB) whenHealthy(ctx context.Context, f func() error) error {
	for begun := time.Now(); ; {
		err := f()
		waits := errors.Is(err, rpctypes.ErrUnhealthy) || errors.Is(err, rpctypes.ErrTooManyLearners)
		if !waits || time.Since(begun) > changeTimeout {
			return db.mapErr(err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-db.closing:
			return ErrClosed
		case <-time.After(changeRetry):
		}
	}
}

// RemoveMember removes the member at address for good. It is no error if there
// is none.
func (db *DB) RemoveMember(ctx context.Context, address string) error {
	members, err := db.Members(ctx)
	if err != nil {
		return err
	}
	for _, m := range members {
		if m.Address != address {
			continue
		}
		err := db.whenHealthy(ctx, func() error {
			_, err := db.client.MemberRemove(ctx, m.id)
			if errors.Is(err, rpctypes.ErrMemberNotFound) {
				return nil
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("cannot remove member %s: %w", address, err)
		}
	}
	return nil
}

// Promote gives this member, if it is a learner, its say. It fails until the
// member has nearly all data.
func (db *DB) Promote(ctx context.Context) error {
	_, err := db.client.MemberPromote(ctx, uint64(db.etcd.Server.MemberID()))
	if errors.Is(err, rpctypes.ErrMemberNotLearner) {
		return nil
	}
	return db.mapErr(err)
}

// Learns reports whether this member is a learner.
func (db *DB) Learns() bool { return db.etcd.Server.IsLearner() }

// Leads reports whether this member is the leader, as far as it knows.
func (db *DB) Leads() bool { return db.etcd.Server.Leader() == db.etcd.Server.MemberID() }

// Stopped is closed when the member has ended by itself: the others removed it.
func (db *DB) Stopped() <-chan struct{} { return db.etcd.Server.StopNotify() }

// MoveTo tells the cluster under which address this member is reached from now
// on.
func (db *DB) MoveTo(ctx context.Context, address string) error {
	_, err := db.client.MemberUpdate(ctx, uint64(db.etcd.Server.MemberID()), []string{peerURL(address)})
	return db.mapErr(err)
}

// errNoMajority is reported for a read that no majority confirmed.
var errNoMajority = errs.New(errs.Unavailable, "this member of the state database does not reach a majority of the members")

// get reads. In a cluster it is repeated when the leader that was to confirm it
// is gone, for a while. A member that is alone has applied what it acknowledged:
// there is nobody to ask.
func (db *DB) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if !db.clustered {
		db.reading.RLock()
		defer db.reading.RUnlock()
		select {
		case <-db.closing:
			return nil, ErrClosed
		default:
			return db.client.Get(ctx, key, append(opts, clientv3.WithSerializable())...)
		}
	}
	inner, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	for {
		resp, err := db.client.Get(inner, key, opts...)
		if err == nil || inner.Err() == nil && !errors.Is(err, rpctypes.ErrLeaderChanged) && !errors.Is(err, rpctypes.ErrNoLeader) {
			return resp, err
		}
		select {
		case <-db.closing:
			return nil, ErrClosed
		case <-time.After(readRetry):
		case <-inner.Done():
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if inner.Err() != nil {
			return nil, errNoMajority
		}
	}
}

// errNotKnown is reported for a commit that was not answered.
var errNotKnown = errs.New(errs.Unavailable, "the state database did not confirm the change in time; it may be stored or not")

// commitToCluster commits within bounds of its own.
func (db *DB) commitToCluster(outer context.Context, cmps []clientv3.Cmp, ops []clientv3.Op) (bool, error) {
	ctx, cancel := context.WithTimeout(outer, commitTimeout)
	defer cancel()
	resp, err := db.client.Txn(ctx).If(cmps...).Then(ops...).Commit()
	switch {
	case err == nil:
		return resp.Succeeded, nil
	case ctx.Err() != nil && outer.Err() == nil:
		return false, errNotKnown
	}
	return false, db.mapErr(err)
}
