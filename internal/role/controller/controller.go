// Package controller is the role that knows the whole installation: inventory,
// key providers, tasks, access, events. It serves the API to users and to
// hosts, and asks hosts over mutual TLS to do what must be done.
//
// Invariants: KDKs are in locked memory, in the sealed key store and, as HPKE
// parcels, on their way to hosts, never elsewhere; a KEK or DEK never comes
// here; everything that takes long is a task, whose state is in the store before
// and after each step, so a controller that is killed goes on where it was. A
// controller that is away stops no VM and, with a native provider, no power-on.
package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
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
)

// Version is what the controller tells about itself.
const Version = "0.1.0"

// renewRetry is the time between attempts to renew the own certificate.
const renewRetry = time.Hour

// Files in the data folder.
const (
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

	credential *pki.Credential
	agents     *agents
	wake       chan struct{} // buffered by one: remediate soon
}

// Run runs the controller until ctx ends. Tasks that run go on at the next
// start.
func Run(ctx context.Context, cfg Config, log *slog.Logger) (err error) {
	if err := daemon.Harden(); err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return err
	}
	db, err := store.Open(ctx, store.Config{Dir: filepath.Join(cfg.DataDir, "store"), Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	keys, err := openKeystore(cfg)
	if err != nil {
		return err
	}
	defer keys.Close()
	signer, err := keys.auditSigner()
	if err != nil {
		return err
	}
	if err := writePublicKey(filepath.Join(cfg.DataDir, auditKeyName), signer.Public()); err != nil {
		return err
	}
	auditLog, err := audit.Open(audit.Config{Dir: filepath.Join(cfg.DataDir, "audit"), Signer: signer})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, auditLog.Close()) }()

	c := &Controller{
		cfg: cfg, log: log, keys: keys, inv: inventory.New(db), events: event.Open(db, 0), audit: auditLog,
		joins: pki.NewJoins(db), wake: make(chan struct{}, 1),
	}
	if c.access, err = access.New(access.Config{DB: db}); err != nil {
		return err
	}
	c.tasks = task.NewEngine(task.Config{DB: db, Log: log, Kinds: c.taskKinds()})
	if err := c.openIdentity(); err != nil {
		return err
	}
	c.agents = newAgents(c.credential, c.ca.Certificate())
	defer c.agents.Close()
	if err := c.ensureAdministrator(ctx); err != nil {
		return err
	}
	if _, err := c.events.Post(ctx, event.New{Type: event.SystemStarted, Principal: caller{}.name(), Args: map[string]string{"version": Version}}); err != nil {
		return err
	}
	return c.run(ctx)
}

func (c *Controller) run(ctx context.Context) error {
	server, err := c.apiServer()
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", c.cfg.Listen)
	if err != nil {
		return errs.New(errs.Unavailable, "cannot listen for users and hosts: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return daemon.Serve(ctx, server, listener) })
	group.Go(func() error { return c.tasks.Run(ctx) })
	group.Go(func() error { return c.remediate(ctx) })
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
func (c *Controller) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
