// Package kms is the key management server: KMIP for clients such as vCenter
// and controllers, over an etcd database in which keys are wrapped, with groups,
// applications and their credentials.
//
// Invariants: key material is in locked memory and, wrapped, in the database,
// never elsewhere; what was acknowledged is on disk, and so is its audit record;
// a client sees its group's keys only; a destroyed key is gone for good
// (docs/spec/kms-keyring.md).
package kms

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"strongroom/internal/control/access"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/rootkey"
	"strongroom/internal/role/kms/approval"
	"strongroom/internal/role/kms/cluster"
	"strongroom/internal/role/kms/objectstore"
	"strongroom/internal/role/kms/usage"
)

// Version is what the KMS tells about itself.
const Version = "0.1.0"

// formatKnown is the newest format of the database that this release knows
// (docs/spec/database-format.md).
const formatKnown = 1

const (
	// quotaBytes bounds the database: some 4 million keys.
	quotaBytes = 8 << 30
	// checkpointRecords is after how many records the audit log is signed.
	checkpointRecords = 1000
	// flushEvery is how long a record of something that changed nothing may
	// stay unsynced.
	flushEvery = time.Second
	// closeTime bounds the last flush of the usage counters.
	closeTime = 10 * time.Second
)

// KMS is a running key management server.
type KMS struct {
	cfg Config
	log *slog.Logger

	lock        *rootkey.Lock
	db          *store.DB
	secrets     *secrets
	audit       *audit.Log
	auditKey    ed25519.PublicKey // of its signer
	verifying   sync.Mutex        // held while the API verifies it
	ca          *pki.CA
	certificate tls.Certificate
	directory   *directory.Directory
	objects     *objectstore.Store
	usage       *usage.Meter
	access      *access.Control
	approvals   *approval.Book
	credential  *pki.Credential  // of the API; nil if it is not on the network
	node        *cluster.Node    // nil, like the next, if it is the only one
	cluster     *cluster.Cluster // of this node and the others
	metrics     *metrics
	pace        pace
	backups     backups
	now         func() time.Time
	address     net.Addr // of the KMIP server, once it listens
	apiAddress  net.Addr // of the API; nil if it is not on the network
}

// Address returns where the KMIP server listens; it may be called once the KMS
// is ready.
func (k *KMS) Address() net.Addr { return k.address }

// Run runs a KMS until ctx ends.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	return RunReady(ctx, cfg, log, func(*KMS) error { return nil })
}

// RunReady is Run that calls ready once, when clients can connect; an error of
// it ends the KMS.
func RunReady(ctx context.Context, cfg Config, log *slog.Logger, ready func(*KMS) error) (err error) {
	if err := daemon.Harden(); err != nil {
		return err
	}
	if err := errors.Join(checkRestored(cfg), checkJoined(cfg)); err != nil {
		return err
	}
	u, err := unlock(ctx, cfg, log)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // it was sealed until the end
	}
	if err != nil {
		return err
	}
	k, err := open(ctx, cfg, u, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	return k.run(ctx, ready)
}

// open opens what a KMS has in its data folder, or makes it the first time, and
// takes u over. The caller closes the KMS.
func open(ctx context.Context, cfg Config, u *unlocked, log *slog.Logger) (_ *KMS, err error) {
	defer u.root.Close()
	k := &KMS{cfg: cfg, log: log, lock: u.lock, metrics: newMetrics(), now: time.Now}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.close())
		}
	}()
	collectAtStart(cfg)
	membership, err := loadMembership(cfg)
	if err != nil {
		return nil, err
	}
	if membership == nil {
		// First, for it keeps another process out of the folder.
		if k.db, err = store.Open(ctx, storeConfig(cfg, log)); err != nil {
			return nil, err
		}
	}
	if k.secrets, err = openSecrets(cfg, u.root, nil); err != nil {
		return nil, err
	}
	if err := k.openIdentity(); err != nil {
		return nil, err
	}
	if membership != nil {
		if err := k.openNode(ctx, membership); err != nil {
			return nil, err
		}
	}
	if err := k.checkFormat(ctx); err != nil {
		return nil, err
	}
	used, err := objectstore.NewestEpoch(ctx, k.db)
	if err != nil {
		return nil, err
	}
	k.secrets.ring.UsedUpTo(used)
	if err := k.openAudit(); err != nil {
		return nil, err
	}
	if err := k.recordUnsealed(u); err != nil {
		return nil, err
	}
	if k.directory, err = directory.Open(ctx, k.db); err != nil {
		return nil, err
	}
	if membership == nil {
		k.objects = objectstore.New(k.db, k.secrets.ring, log)
	} else if err := k.openCluster(ctx, membership); err != nil {
		return nil, err
	}
	if err := k.openUsers(ctx); err != nil {
		return nil, err
	}
	k.approvals = approval.Open(k.db, k.directory, k.approverCredential)
	k.directory.RequireClear(k.checkClear)
	k.objects.RequireAccount(k.checkGroup)
	if k.usage, err = usage.Open(ctx, k.db, k.objects.Keys, log); err != nil {
		return nil, err
	}
	k.metrics.registry.MustRegister(&usageMetrics{k}, &backupMetrics{k})
	return k, nil
}

// checkFormat refuses a database that this release does not know enough for. That of
// several nodes has its format raised when all of them know it.
func (k *KMS) checkFormat(ctx context.Context) error {
	known := cmp.Or(k.cfg.format, formatKnown)
	err := k.db.Txn(ctx, func(tx *store.Tx) error {
		if err := tx.Admit(ctx, known); err != nil || k.node != nil {
			return err
		}
		return tx.Raise(ctx, store.Format{Version: known, Release: Version})
	})
	return errs.Wrap(err, "cannot use the database")
}

func storeConfig(cfg Config, log *slog.Logger) store.Config {
	return store.Config{Dir: filepath.Join(cfg.DataDir, storeName), Log: log, QuotaBytes: quotaBytes}
}

func (k *KMS) openAudit() error {
	signer, err := k.secrets.auditSigner()
	if err != nil {
		return err
	}
	k.auditKey = signer.Public().(ed25519.PublicKey)
	der, err := x509.MarshalPKIXPublicKey(k.auditKey)
	if err != nil {
		return err
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	if err := os.WriteFile(filepath.Join(k.cfg.DataDir, auditKeyName), public, 0o644); err != nil {
		return err
	}
	k.audit, err = audit.Open(audit.Config{
		Dir: k.auditDir(), Signer: signer, Sync: audit.SyncCheckpoint, CheckpointRecords: checkpointRecords,
	})
	return err
}

// close is the reverse of open, also of one that failed half-way.
func (k *KMS) close() error {
	var err error
	if k.objects != nil {
		k.objects.Close()
	}
	if k.usage != nil {
		ctx, cancel := context.WithTimeout(context.Background(), closeTime)
		err = k.usage.Flush(ctx)
		cancel()
	}
	if k.cluster != nil {
		err = errors.Join(err, k.cluster.Close())
	}
	if k.audit != nil {
		err = errors.Join(err, k.audit.Close())
	}
	if k.secrets != nil {
		k.secrets.Close()
	}
	k.lock.Close()
	if k.db != nil {
		err = errors.Join(err, k.db.Close())
	}
	if k.node != nil {
		err = errors.Join(err, k.node.Close())
	}
	return err
}

// run serves until ctx ends.
func (k *KMS) run(ctx context.Context, ready func(*KMS) error) error {
	kmip, err := kmipserver.New(kmipserver.Config{
		Store: k.objects, Authenticate: k.authenticate, TLS: k.tlsConfig(), Log: k.log, Observe: k.observe,
		Limits: kmipserver.Limits{Connections: k.cfg.MaxConnections, PerAddress: k.cfg.MaxConnectionsPerAddress},
	})
	if err != nil {
		return err
	}
	local, err := k.localServer()
	if err != nil {
		return err
	}
	var users *guard.Server
	if k.credential != nil {
		if users, err = k.apiServer(kmip); err != nil {
			return err
		}
	}
	l, err := listen(k.cfg)
	if err != nil {
		return err
	}
	k.address = l.kmip.Addr()
	if l.api != nil {
		k.apiAddress = l.api.Addr()
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return kmip.Serve(ctx, l.kmip) })
	group.Go(func() error { return daemon.Serve(ctx, local, l.local) })
	if users != nil {
		group.Go(func() error { return users.Serve(ctx, l.api) })
		group.Go(func() error { return k.keepCertificate(ctx) })
	}
	group.Go(func() error { return k.keepApprovals(ctx) })
	group.Go(func() error { return k.keepImportKeys(ctx) })
	if l.metrics != nil {
		group.Go(func() error { return daemon.Serve(ctx, k.metricsServer(), l.metrics) })
	}
	if l.members != nil {
		if err := k.serveMembers(ctx, group, l.members); err != nil {
			l.close()
			return err
		}
	}
	group.Go(func() error { return k.objects.Run(ctx) })
	group.Go(func() error { return k.objects.RunIndex(ctx) })
	group.Go(func() error {
		return keepHeap(ctx, func(ctx context.Context) error { _, err := k.objects.Keys(ctx, ""); return err })
	})
	group.Go(func() error { return k.objects.RunCounts(ctx) })
	group.Go(func() error { return k.usage.Run(ctx) })
	group.Go(func() error { return k.keepDates(ctx, kmip) })
	group.Go(func() error { return k.keepAudit(ctx) })
	group.Go(func() error { return k.keepBackups(ctx) })
	k.log.LogAttrs(ctx, slog.LevelInfo, "kms is ready", slog.String("kmip", l.kmip.Addr().String()),
		slog.String("socket", k.cfg.LocalSocket), slog.String("certificate", fmt.Sprintf("sha256:%x", fingerprint(k.certificate.Leaf))))
	group.Go(func() error { return ready(k) })
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
