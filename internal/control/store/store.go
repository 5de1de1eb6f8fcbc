// Package store keeps the state of a controller or a key management server in an
// embedded etcd member, as typed tables with optimistic transactions, watches and
// leases (see docs/adr/0002-etcd-as-store.md).
//
// The member is used in process: it opens no client port, and, as a single
// member, no peer port either. Members of a [Cluster] talk over mutual TLS.
// Reads are linearizable in a cluster too: a member that is cut off from the
// majority has no answers, rather than old ones. Every acknowledged write is on disk (etcd syncs
// its log before it answers). Values are JSON of plain Go structs in an
// envelope with a schema number; see [Table] for the rules of evolution.
//
// Invariants: no key material is ever put into a table (control may not import
// it), every key is under one prefix, and every read inside a transaction is of
// one revision. All types are safe for concurrent use unless they say
// otherwise.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"

	"strongroom/internal/control/groupcommit"
	"strongroom/internal/errs"
)

// Sentinels that callers branch on. Each carries its [errs.Kind].
var (
	// ErrNotFound: the key does not exist.
	ErrNotFound error = errs.New(errs.NotFound, "not found")
	// ErrExists: the key exists already.
	ErrExists error = errs.New(errs.Exists, "exists already")
	// ErrConflict: others changed the same keys on every attempt.
	ErrConflict error = errs.New(errs.Unavailable, "changed by others at the same time")
	// ErrNewerSchema: the record was written by a newer release.
	ErrNewerSchema error = errs.New(errs.InvalidState, "record was written by a newer release")
	// ErrCorrupt: the stored bytes are not a record.
	ErrCorrupt error = errs.New(errs.Corrupt, "stored record is damaged")
	// ErrTooLarge: the value exceeds [MaxValueBytes].
	ErrTooLarge error = errs.New(errs.Invalid, "value too large")
	// ErrInvalidKey: the key is empty, too long or holds a control character.
	ErrInvalidKey error = errs.New(errs.Invalid, "invalid key")
	// ErrFull: the database has reached its quota.
	ErrFull error = errs.New(errs.NoSpace, "state database is full")
	// ErrClosed: the database is closed.
	ErrClosed error = errs.New(errs.Unavailable, "state database is closed")
	// ErrLeaseExpired: the lease ran out or was revoked.
	ErrLeaseExpired error = errs.New(errs.NotFound, "lease expired")
)

const (
	// MaxValueBytes is the largest encoded record.
	MaxValueBytes = 1 << 20
	// MaxKeyBytes is the longest key of a table.
	MaxKeyBytes = 512

	keyRoot = "strongroom/"

	// A single member elects itself: short ticks make it ready at once. The
	// election time-out must be at least five ticks.
	tickMillis     = 20
	electionMillis = 100

	defaultQuotaBytes = 2 << 30
	maxRequestBytes   = 4 << 20
	maxTxnOps         = 4096
	// Raft entries that are read again at a start, at most, and those of them that
	// are kept in memory for members that lag. An entry of a single member holds
	// what was committed together, up to 64 transactions, and nobody lags.
	snapshotEvery, catchUp           = 1000, 1
	clusterSnapshotEvery, clusterLag = 5000, 1000
	// History that a watcher can still resume from.
	historyKept = "30m"
	// Freed space that makes a defragmentation at start worth its time: so much,
	// and a third of the file, which is written anew.
	defragAtStartMiB, defragPart = 64, 3
)

// Config says where and how a database lives.
type Config struct {
	// Dir holds the member's data. It is created with mode 0700 if missing.
	Dir string
	// Log receives etcd's warnings and errors. Nil discards them.
	Log *slog.Logger
	// QuotaBytes bounds the database file; beyond it writes fail with
	// [ErrFull]. Default: 2 GiB.
	QuotaBytes int64
	// Cluster replicates the database. Nil: a single member, without a port.
	Cluster *Cluster
	// Token goes into the identity of a database that is made, which etcd takes of
	// its first member's address else: members of a database with another token are
	// strangers, even at an address that they know. It is of no effect later.
	Token string
}

// DB is an open database: one etcd member and a client in the same process.
type DB struct {
	etcd   *embed.Etcd
	client *clientv3.Client
	kv     etcdserverpb.KVServer // for what the client cannot do in process: streams
	// unlock releases our lock of the directory. Without that lock a second
	// process would wait for etcd's own one for ever, without a word.
	unlock    func()
	file      string       // of the database
	scanned   atomic.Int64 // bytes, by scans, since they were unmapped
	clustered bool
	commits   *groupcommit.Queue[*pending] // of a single member

	life    context.Context // of commits; ended by Close
	end     context.CancelFunc
	closing chan struct{} // closed by Close, before the client is
	// reading is held by who reads what a single member has applied: there is none
	// of it once it was closed.
	reading   sync.RWMutex
	closeOnce sync.Once
}

// Open starts the member in cfg.Dir, or makes a new one, and returns when it
// can serve: in a cluster, when a majority is there. A directory that another
// process has open is an error.
//
// If the log cannot be written to disk, etcd ends the process: a member that
// goes on after a failed sync could forget what it has acknowledged.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	if cfg.Dir == "" {
		return nil, errs.New(errs.Invalid, "cannot open state database: no directory given")
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot open state database: %w", err)
	}
	unlock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open state database in %s: %w", cfg.Dir, err)
	}
	etcd, err := start(ctx, cfg)
	if err != nil {
		unlock()
		return nil, fmt.Errorf("cannot open state database in %s: %w", cfg.Dir, err)
	}
	db := &DB{
		etcd: etcd, client: v3client.New(etcd.Server), kv: v3rpc.NewKVServer(etcd.Server), unlock: unlock,
		file: fileIn(cfg.Dir), clustered: cfg.Cluster != nil, closing: make(chan struct{}),
	}
	db.life, db.end = context.WithCancel(context.Background())
	db.commits = groupcommit.New(together, db.commitGroup)
	return db, nil
}

// fileIn returns where a member keeps its database.
func fileIn(dir string) string { return filepath.Join(dir, "member", "snap", "db") }

func start(ctx context.Context, cfg Config) (*embed.Etcd, error) {
	ec := embed.NewConfig()
	ec.Name = "controller"
	ec.Dir = cfg.Dir
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapTo(cfg.Log))

	// No listeners at all. A member must still have an address by name; a
	// single member never dials it.
	ec.ListenPeerUrls, ec.ListenClientUrls = nil, nil
	self := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	ec.AdvertisePeerUrls, ec.AdvertiseClientUrls = []url.URL{self}, nil
	ec.InitialCluster = ec.InitialClusterFromName(ec.Name)
	ec.EnableGRPCGateway = false

	ec.TickMs, ec.ElectionMs = tickMillis, electionMillis
	ec.PreVote = true
	if cfg.Cluster != nil {
		if err := cfg.Cluster.configure(ec); err != nil {
			return nil, err
		}
	}
	if cfg.Token != "" {
		ec.InitialClusterToken = cfg.Token
	}
	ec.SnapshotCount, ec.SnapshotCatchUpEntries = snapshotEvery, catchUp
	if cfg.Cluster != nil {
		ec.SnapshotCount, ec.SnapshotCatchUpEntries = clusterSnapshotEvery, clusterLag
	}
	ec.AutoCompactionMode, ec.AutoCompactionRetention = embed.CompactorModePeriodic, historyKept
	ec.BootstrapDefragThresholdMegabytes = defragAtStartMiB
	if info, err := os.Stat(fileIn(cfg.Dir)); err == nil {
		ec.BootstrapDefragThresholdMegabytes = max(defragAtStartMiB, uint(info.Size()>>20)/defragPart)
	}
	ec.QuotaBackendBytes = cfg.QuotaBytes
	if ec.QuotaBackendBytes <= 0 {
		ec.QuotaBackendBytes = defaultQuotaBytes
	}
	ec.MaxRequestBytes, ec.MaxTxnOps = maxRequestBytes, maxTxnOps

	etcd, err := embed.StartEtcd(ec)
	if err != nil {
		return nil, err
	}
	select {
	case <-etcd.Server.ReadyNotify():
		unmap(fileIn(cfg.Dir))
		return etcd, nil
	case <-etcd.Server.StopNotify():
		err = errors.New("stopped while starting")
		if cfg.Cluster != nil {
			err = errs.New(errs.InvalidState, "it stopped while starting: the cluster may have removed this member")
		}
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	etcd.Close()
	return nil, err
}

// Close stops the member and waits for it. Calls in flight fail with
// [ErrClosed]. Later calls of Close do nothing.
func (db *DB) Close() error {
	var err error
	db.closeOnce.Do(func() {
		close(db.closing)
		db.end()
		db.reading.Lock()
		defer db.reading.Unlock()
		// Watches and leases first: they use the server.
		err = db.client.Close()
		if errors.Is(err, context.Canceled) {
			err = nil
		}
		db.etcd.Close()
		db.unlock()
	})
	return err
}

// Revision returns the database's current revision. It grows by one with each
// committed transaction, or with several that were committed in one step.
func (db *DB) Revision(ctx context.Context) (int64, error) {
	resp, err := db.get(ctx, keyRoot, clientv3.WithCountOnly())
	if err != nil {
		return 0, db.mapErr(err)
	}
	return resp.Header.Revision, nil
}

// Snapshot writes a consistent copy of the whole database to w and returns its
// length in bytes: an etcd snapshot, an etcd database file with its SHA-256
// appended, as `etcdutl snapshot restore` takes it.
func (db *DB) Snapshot(ctx context.Context, w io.Writer) (int64, error) {
	r, err := db.client.Snapshot(ctx)
	if err != nil {
		return 0, fmt.Errorf("cannot take snapshot: %w", db.mapErr(err))
	}
	defer r.Close()
	n, err := io.Copy(w, r)
	if err != nil {
		return n, fmt.Errorf("cannot take snapshot: %w", db.mapErr(err))
	}
	return n, nil
}

// Compact forgets history before revision rev. Current values stay. Watchers
// that lag behind see a [Reset].
func (db *DB) Compact(ctx context.Context, rev int64) error {
	_, err := db.client.Compact(ctx, rev, clientv3.WithCompactPhysical())
	if errors.Is(err, rpctypes.ErrCompacted) {
		return nil
	}
	return db.mapErr(err)
}

// mapErr turns etcd's errors into this package's.
func (db *DB) mapErr(err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-db.closing:
		return ErrClosed
	default:
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, rpctypes.ErrNoSpace):
		return ErrFull
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return ErrLeaseExpired
	case errors.Is(err, rpctypes.ErrRequestTooLarge), errors.Is(err, rpctypes.ErrTooManyOps):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	return errs.New(errs.Unavailable, "state database: %w", err)
}

// Lease is a promise to be heard from: the keys bound to it vanish when it is
// not renewed within its time.
type Lease struct {
	db *DB
	id clientv3.LeaseID
}

// NewLease returns a lease that runs out ttl after its last renewal. Times
// below one second and fractions of a second are rounded up.
func (db *DB) NewLease(ctx context.Context, ttl time.Duration) (*Lease, error) {
	secs := max(1, int64((ttl+time.Second-1)/time.Second))
	resp, err := db.client.Grant(ctx, secs)
	if err != nil {
		return nil, db.mapErr(err)
	}
	return &Lease{db: db, id: resp.ID}, nil
}

// Renew starts the lease's time anew, or returns [ErrLeaseExpired].
func (l *Lease) Renew(ctx context.Context) error {
	_, err := l.db.client.KeepAliveOnce(ctx, l.id)
	return l.db.mapErr(err)
}

// Revoke ends the lease and deletes its keys. Revoking an ended lease is no
// error.
func (l *Lease) Revoke(ctx context.Context) error {
	_, err := l.db.client.Revoke(ctx, l.id)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return nil
	}
	return l.db.mapErr(err)
}
