// Package controller is the role that knows the whole installation: inventory,
// key providers, tasks, access, events. It serves the API to users and to
// hosts, and asks hosts over mutual TLS to do what must be done.
//
// Invariants: KDKs are in locked memory, in the sealed key store and, as HPKE
// parcels, on their way to hosts, never elsewhere; a KEK of a standard provider
// is here in passing, in locked memory, between its key server and a parcel for
// a host; a DEK never comes here; everything that takes long is a task, whose
// state is in the store before and after each step, so a controller that is
// killed goes on where it was. A controller that is away stops no VM and, with
// a native provider, no power-on.
package controller

import (
	"context"
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
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/control/task"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
)

// Version is what the controller tells about itself.
const Version = "0.1.0"

// formatKnown is the newest format of the database that this release knows
// (docs/spec/database-format.md).
const formatKnown = 1

// renewRetry is the time between attempts to renew the own certificate.
const renewRetry = time.Hour

// Files in the data folder.
const (
	pkiName           = "pki"                    // folder of the CA
	caCertName        = "ca.pem"                 // for users: `strongroom login --ca`
	auditKeyName      = "audit-key.pem"          // public: `strongroom audit verify`
	firstPasswordName = "initial-admin-password" // of the first administrator
)

// Controller is a running controller.
type Controller struct {
	cfg    Config
	log    *slog.Logger
	keys   *keystore
	inv    *inventory.Inventory
	access *access.Control
	events *event.Log
	audit  *audit.Log
	tasks  *task.Engine
	joins  *pki.Joins
	ca     *pki.CA

	db         *store.DB
	credential *pki.Credential
	agents     *agents
	servers    *standard.Set
	wake       chan struct{} // buffered by one: remediate soon
	starved    chan struct{} // buffered by one: a host lacks a KEK
	look       chan struct{} // buffered by one: check the key servers soon
	due        chan struct{} // buffered by one: a wrapping key may be due
	stray      chan struct{} // buffered by one: a VM may have another key than it is to have
	reluctant  reluctant
	now        func() time.Time // for rotation

	said  said
	heard heard

	// beatLife is how long a host counts as connected without a heartbeat.
	beatLife time.Duration
	// orphanAgeMin is how long ago a key must have been needed last before it may
	// be destroyed as an orphan.
	orphanAgeMin time.Duration

	// providersMu is held while a provider comes or goes in key store and
	// inventory, and while a task that needs its keys is submitted.
	providersMu sync.Mutex
}

// Run runs the controller until ctx ends. Tasks that run go on at the next
// start.
func Run(ctx context.Context, cfg Config, log *slog.Logger) (err error) {
	if err := daemon.Harden(); err != nil {
		return err
	}
	c, err := open(ctx, cfg, log, access.DefaultHashing)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return errs.New(errs.Unavailable, "cannot listen for users and hosts: %w", err)
	}
	return c.run(ctx, listener)
}

// open opens what a controller has in its data folder, or makes it the first
// time; new passwords are hashed as hashing says. The caller closes the
// controller.
func open(ctx context.Context, cfg Config, log *slog.Logger, hashing access.Hashing) (_ *Controller, err error) {
	c := &Controller{
		cfg: cfg, log: log, servers: &standard.Set{}, wake: make(chan struct{}, 1), starved: make(chan struct{}, 1), look: make(chan struct{}, 1),
		due: make(chan struct{}, 1), stray: make(chan struct{}, 1), reluctant: reluctant{again: followAgainMin, vms: map[string]pause{}}, now: time.Now, beatLife: heartbeatLife,
		said: said{hosts: map[string]map[string]told{}}, heard: heard{words: map[string]*word{}}, orphanAgeMin: orphanAgeMin,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, err
	}
	if c.db, err = store.Open(ctx, store.Config{Dir: filepath.Join(cfg.DataDir, "store"), Log: log}); err != nil {
		return nil, err
	}
	if err := c.db.Txn(ctx, func(tx *store.Tx) error {
		if err := tx.Admit(ctx, formatKnown); err != nil {
			return err
		}
		return tx.Raise(ctx, store.Format{Version: formatKnown, Release: Version})
	}); err != nil {
		return nil, errs.Wrap(err, "cannot use the database")
	}
	if c.keys, err = openKeystore(cfg); err != nil {
		return nil, err
	}
	if err := c.openAudit(); err != nil {
		return nil, err
	}
	c.inv, c.events, c.joins = inventory.New(c.db), event.Open(c.db, 0), pki.NewJoins(c.db)
	c.inv.NameController(controllerNames(cfg)...)
	if c.access, err = access.New(access.Config{DB: c.db, Hashing: hashing}); err != nil {
		return nil, err
	}
	c.tasks = task.NewEngine(task.Config{DB: c.db, Log: log, Kinds: c.taskKinds()})
	if err := c.openIdentity(); err != nil {
		return nil, err
	}
	c.agents = newAgents(c.credential, c.ca.Certificate())
	if err := c.openKeyServers(ctx); err != nil {
		return nil, err
	}
	if err := c.ensureAdministrator(ctx); err != nil {
		return nil, err
	}
	started := event.New{Type: event.SystemStarted, Principal: self, Args: map[string]string{"version": Version}}
	if _, err := c.events.Post(ctx, started); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Controller) openAudit() error {
	signer, err := c.keys.auditSigner()
	if err != nil {
		return err
	}
	if err := writePublicKey(filepath.Join(c.cfg.DataDir, auditKeyName), signer.Public()); err != nil {
		return err
	}
	c.audit, err = audit.Open(audit.Config{Dir: filepath.Join(c.cfg.DataDir, "audit"), Signer: signer})
	return err
}

// close is the reverse of open, also of one that failed half-way.
func (c *Controller) close() error {
	var err error
	if c.agents != nil {
		c.agents.Close()
	}
	c.servers.Close()
	if c.audit != nil {
		err = c.audit.Close()
	}
	if c.keys != nil {
		c.keys.Close()
	}
	if c.db != nil {
		err = errors.Join(err, c.db.Close())
	}
	return err
}

// run serves on listener until ctx ends.
func (c *Controller) run(ctx context.Context, listener net.Listener) error {
	server, err := c.apiServer()
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Serve(ctx, listener) })
	group.Go(func() error { return c.tasks.Run(ctx) })
	group.Go(func() error { return c.remediate(ctx) })
	group.Go(func() error { return c.supply(ctx) })
	group.Go(func() error { return c.watchKeyServers(ctx) })
	group.Go(func() error { return c.rotate(ctx) })
	group.Go(func() error { return c.follow(ctx) })
	group.Go(func() error { return c.signAudit(ctx) })
	group.Go(func() error {
		return c.credential.KeepFresh(ctx, c.ca.Certificate(), renewRetry, c.renew, func(err error) {
			c.log.LogAttrs(ctx, slog.LevelError, "own certificate not renewed", slog.Any("err", err))
		})
	})
	fingerprint := pki.FingerprintOf(c.ca.Certificate())
	c.log.LogAttrs(ctx, slog.LevelInfo, "controller is ready", slog.String("address", c.cfg.Listen), slog.String("ca_fingerprint", fmt.Sprintf("sha256:%x", fingerprint)))
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// signAuditEvery is how long a record of the audit log stays without a
// signature.
const signAuditEvery = time.Minute

// signAudit signs what was added to the audit log, also when nothing more is.
func (c *Controller) signAudit(ctx context.Context) error {
	tick := time.NewTicker(signAuditEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := c.audit.Checkpoint(); err != nil {
			c.log.LogAttrs(ctx, slog.LevelError, "audit log not signed", slog.Any("err", err))
		}
	}
}

// poke has the hosts put right soon.
func (c *Controller) poke() { ring(c.wake) }

// ring wakes who listens to bell, now or when it next does.
func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
