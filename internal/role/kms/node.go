package kms

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"strongroom/internal/control/audit"
	"strongroom/internal/control/store"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
	"strongroom/internal/role/kms/cluster"
	"strongroom/internal/role/kms/objectstore"
)

const (
	// membershipName is the file in the data folder that makes a KMS a node of
	// several. It holds no secret.
	membershipName = "cluster.json"
	membershipMax  = 64 << 10
	// waitingEvery is how often a node that waits for a majority says so.
	waitingEvery = 10 * time.Second
)

// membership is which node this is.
type membership struct {
	ID string `json:"id"`
	// Peers are the nodes that were there when this one joined; the first node has
	// none. Where all are now the database tells.
	Peers []cluster.Member `json:"peers,omitempty"`
}

// loadMembership returns which node this is, or nil if it is the only one. With
// a cluster in the configuration a KMS becomes the first node, for good.
func loadMembership(cfg Config) (*membership, error) {
	path := filepath.Join(cfg.DataDir, membershipName)
	m, err := readMembership(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && cfg.Cluster == nil:
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		m = &membership{ID: uuid.NewString()}
		return m, m.write(path)
	case err != nil:
		return nil, errs.Wrap(err, "cannot read which node this is from %s", path)
	case cfg.Cluster == nil:
		return nil, errs.New(errs.Invalid, "this is a node of a KMS of several, and the configuration has no [cluster]").
			WithHint("put [cluster] back into the configuration")
	}
	return m, nil
}

func readMembership(path string) (*membership, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > membershipMax {
		return nil, errs.New(errs.Corrupt, "it has %d bytes, limit %d", info.Size(), membershipMax)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := &membership{}
	if err := json.Unmarshal(b, m); err != nil || uuid.Validate(m.ID) != nil {
		return nil, errs.New(errs.Corrupt, "it is damaged")
	}
	return m, nil
}

func (m *membership) write(path string) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(b, '\n'))
}

// self is this node as others are to know it.
func (c Config) self(id string) cluster.Member {
	return cluster.Member{
		ID: id, Name: c.Cluster.Name, Address: c.Cluster.Advertise, StoreAddress: c.Cluster.StoreAdvertise, Release: Version, Format: cmp.Or(c.format, formatKnown),
	}
}

// openNode makes the node's certificate and opens its database, which needs a
// majority of the nodes.
func (k *KMS) openNode(ctx context.Context, m *membership) (err error) {
	c := k.cfg.Cluster
	var names []string
	for _, address := range []string{c.Advertise, c.StoreAdvertise} {
		host, _, _ := net.SplitHostPort(address) // checked by the configuration
		names = append(names, host)
	}
	if k.node, err = cluster.NewNode(k.ca, m.ID, names); err != nil {
		return err
	}
	cfg := storeConfig(k.cfg, k.log)
	cfg.Cluster = &store.Cluster{Name: m.ID, PeerName: cluster.PeerName, Listen: c.StoreListen, Advertise: c.StoreAdvertise}
	cfg.Cluster.CertFile, cfg.Cluster.KeyFile, cfg.Cluster.CAFile = k.node.Files()
	if len(m.Peers) > 0 && !store.HasData(cfg.Dir) {
		if err := tryListening(k.cfg); err != nil {
			return err
		}
		if cfg.Cluster.Initial, err = k.node.Enter(ctx, m.Peers); err != nil {
			return err
		}
		k.log.Info("the other nodes take this one in")
	}
	opened := make(chan struct{})
	var waiting errgroup.Group
	waiting.Go(func() error {
		for {
			select {
			case <-opened:
				return nil
			case <-time.After(waitingEvery):
				k.log.Warn("waiting for a majority of the nodes")
			}
		}
	})
	k.db, err = store.Open(ctx, cfg)
	close(opened)
	if err = errors.Join(err, waiting.Wait()); err == nil {
		k.log.Info("the node's database is open")
	}
	return err
}

// openCluster makes this node a member. It returns when the node may serve.
func (k *KMS) openCluster(ctx context.Context, m *membership) error {
	k.cluster = cluster.New(cluster.Config{
		Self: k.cfg.self(m.ID), Node: k.node, CA: k.ca, DB: k.db, Ring: k.secrets.ring, Log: k.log, Record: k.recordMember,
	})
	k.metrics.registry.MustRegister(memberMetrics{k.cluster})
	k.objects = objectstore.NewShared(k.db, k.secrets.ring, k.cluster, k.log)
	return k.cluster.Start(ctx)
}

func (k *KMS) recordMember(actor, action, object string, err error) error {
	e := audit.Entry{Actor: actor, Action: action, Object: object, Outcome: audit.Success}
	if err != nil {
		e.Outcome, e.Details = audit.Failed, map[string]string{"kind": errs.KindOf(err).String()}
	}
	return k.recordCall(e)
}

// memberMetrics gives Prometheus what nodes have to do.
type memberMetrics struct{ cluster *cluster.Cluster }

// scrapeTimeout bounds what is read for one scrape: without a majority there is
// no answer.
const scrapeTimeout = 2 * time.Second

// erasuresDue is read only.
var erasuresDue = prometheus.NewDesc("strongroom_kms_member_erasures_due", "Epochs of destroyed keys whose KEKs a node has yet to erase.", []string{"member"}, nil)

// Describe implements [prometheus.Collector].
func (m memberMetrics) Describe(ch chan<- *prometheus.Desc) { ch <- erasuresDue }

// Collect implements [prometheus.Collector].
func (m memberMetrics) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	members, err := m.cluster.List(ctx)
	if err != nil {
		return // not known: not told, rather than wrong
	}
	for _, one := range members {
		ch <- prometheus.MustNewConstMetric(erasuresDue, prometheus.GaugeValue, float64(one.ErasuresDue), one.Name)
	}
}

// serveMembers serves other nodes until ctx ends.
func (k *KMS) serveMembers(ctx context.Context, group *errgroup.Group, l net.Listener) error {
	server, err := k.cluster.Server()
	if err != nil {
		return err
	}
	group.Go(func() error { return server.Serve(ctx, l) })
	group.Go(func() error { return k.cluster.Run(ctx, k.objects.Wake) })
	group.Go(func() error {
		k.node.KeepFresh(ctx, k.log)
		return nil
	})
	return nil
}
