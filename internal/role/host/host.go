// Package host is the role that runs virtual machines: it holds the keys of
// native providers in its sealed configuration, makes and unwraps DEKs, starts
// one volume process and one QEMU for each VM, and does what its controller
// asks over mutual TLS.
//
// It works without the controller: what a power-on needs (the VM folder, the
// keys) is here, and the local socket takes commands of the host's own
// administrators.
//
// Invariants: no key is on disk but inside the sealed configuration
// (docs/spec/vault.md); a VM is changed by one operation at a time; VMs live on
// when the host agent ends and are found again by the next one. Every method of
// the agent API is idempotent.
package host

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/filelock"
	"strongroom/internal/machine/qemu"
)

// Version is what the host tells its controller about itself.
const Version = "0.1.0"

// Host is a running host agent.
type Host struct {
	cfg      Config
	log      *slog.Logger
	secrets  *secrets
	prober   *qemu.Prober
	bootID   string
	instance string // of this start of the agent

	credential *pki.Credential
	enroll     strongroomv1connect.EnrollServiceClient

	syncing  sync.Mutex // who has it makes what a controller wants the host's
	mu       sync.Mutex // guards machines
	machines map[string]*machine

	// life ends with the agent; watchers of running VMs wait for it.
	life     context.Context
	watchers sync.WaitGroup
	changed  chan struct{} // buffered by one: something to tell the controller

	told      atomic.Uint64    // the number of the last description of a VM or of this host
	lacking   chan keysafe.Ref // buffered: KEKs that VMs lack, of key servers that this host may ask
	unlocking chan struct{}    // buffered by one: whoever derives a key from a passphrase
}

// Run runs the host agent until ctx ends. VMs live on.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	if err := daemon.Harden(); err != nil {
		return err
	}
	for _, dir := range []string{cfg.DataDir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	unlock, err := onlyOne(filepath.Join(cfg.DataDir, "host.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	s, err := openSecrets(cfg)
	if err != nil {
		return err
	}
	defer s.Close()

	life, end := context.WithCancel(context.WithoutCancel(ctx))
	h := &Host{
		cfg: cfg, log: log.With(slog.String("host", s.identity.Name)), secrets: s, prober: qemu.NewProber("", filepath.Join(cfg.RunDir, "probe")), bootID: readBootID(), instance: uuid.NewString(),
		machines: map[string]*machine{}, life: life, changed: make(chan struct{}, 1), unlocking: make(chan struct{}, 1),
		lacking: make(chan keysafe.Ref, lackingMax),
	}
	defer func() {
		end()
		h.watchers.Wait()
		h.letGo()
	}()
	if h.credential, err = s.credential(); err != nil {
		return err
	}
	if h.enroll, err = h.enrollClient(); err != nil {
		return err
	}
	h.adoptAll(ctx)

	agent, err := h.agentServer()
	if err != nil {
		return err
	}
	agentListener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return errs.New(errs.Unavailable, "cannot listen for the controller: %w", err)
	}
	localListener, err := daemon.ListenLocal(cfg.LocalSocket)
	if err != nil {
		return errors.Join(err, agentListener.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return agent.Serve(ctx, agentListener) })
	group.Go(func() error { return daemon.Serve(ctx, h.localServer(), localListener) })
	group.Go(func() error { return h.heartbeats(ctx) })
	group.Go(func() error { return h.fetchLacking(ctx) })
	group.Go(func() error { // the first probe takes seconds, a power-on should not
		if accel, err := h.prober.Probe(); err != nil {
			h.log.LogAttrs(ctx, slog.LevelWarn, "guests run without hardware acceleration", slog.String("accel", string(accel)), slog.Any("err", err))
		}
		if err := h.prober.VhostUser(); err != nil {
			h.log.LogAttrs(ctx, slog.LevelWarn, "guests reach their disks over NBD, because vhost-user does not work", slog.Any("err", err))
		}
		return nil
	})
	h.log.LogAttrs(ctx, slog.LevelInfo, "host is ready", slog.String("address", cfg.Listen), slog.String("socket", cfg.LocalSocket))
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// onlyOne makes sure that this is the only agent of this host.
func onlyOne(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Take(f); err != nil {
		f.Close()
		if errors.Is(err, filelock.ErrHeld) {
			return nil, errs.New(errs.InvalidState, "cannot start host: another one runs with %s", path)
		}
		return nil, err
	}
	return func() { f.Close() }, nil
}

// readBootID returns what changes at every start of the machine.
func readBootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(text) < 36 {
		return ""
	}
	return string(text[:36])
}

// notify has the controller told soon that something has changed.
func (h *Host) notify() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}
