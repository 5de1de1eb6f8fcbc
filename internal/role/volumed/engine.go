package volumed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/mirror"
	"strongroom/internal/block/nbd"
	"strongroom/internal/block/volume"
	"strongroom/internal/block/volumectl"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// What is in work at a time, so that a process with four busy disks stays below
// 32 MiB.
const (
	// buffersMax is for the data of NBD requests on all disks together, in bytes:
	// a busy disk has as many workers as it likes, more of them share.
	buffersMax = 6 << 20
	// vhostWorkers is how many vhost-user requests are in work on each disk.
	vhostWorkers = 12
)

// How long NBD clients may take to finish before their connections are broken.
const (
	removeTimeout   = 5 * time.Second
	shutdownTimeout = 10 * time.Second
)

// engine holds the disks and serves them. It implements [volumectl.Handler].
type engine struct {
	log    *slog.Logger
	server *nbd.Server
	config *Config
	end    func() // ends Run

	// change is held while a disk is added or removed, a socket taken, or all
	// shut down, so that these come one at a time. It is taken before mu.
	change sync.Mutex

	mu      sync.Mutex
	disks   map[string]*disk // guarded by mu
	service *service         // guarded by mu: nil before the first socket
	had     bool             // guarded by mu: there has been a disk
	down    bool             // guarded by mu: shut down
}

// disk is an open disk.
type disk struct {
	spec   volumectl.Disk
	device *counted
	volume *volume.Volume // nil for a raw disk
	vhost  *vhost         // guarded by the engine's mu: nil if it is not served so
	rekey  rekeys
	// conversion is the one under way, or that has failed; nil: none. It changes while
	// both of the engine's locks are held.
	conversion *conversion
}

// service is NBD on one socket.
type service struct {
	stop context.CancelFunc
	done chan struct{}
}

func newEngine(c *Config, end func()) *engine {
	return &engine{
		log: c.Log, config: c, end: end, disks: make(map[string]*disk),
		server: nbd.NewServer(nbd.Config{Log: c.Log, MaxBuffers: buffersMax}),
	}
}

// used reports whether there has been a disk.
func (e *engine) used() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.had
}

func (e *engine) find(name string) (*disk, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	d, ok := e.disks[name]
	if !ok {
		return nil, errs.New(errs.NotFound, "there is no disk %s", name)
	}
	return d, nil
}

// AddDisk implements [volumectl.Handler].
func (e *engine) AddDisk(_ context.Context, spec volumectl.Disk, file *os.File, dek, next *keymem.Key) error {
	defer dek.Close() // the volume has made what it needs of them
	defer next.Close()
	e.change.Lock()
	defer e.change.Unlock()
	if _, err := e.find(spec.Name); err == nil {
		file.Close()
		return errs.New(errs.Exists, "there is a disk %s already", spec.Name)
	}
	if e.isDown() {
		file.Close()
		return errShutDown()
	}
	d, err := open(spec, file, dek, next)
	if err != nil {
		return classify(err)
	}
	if err := e.server.AddExport(nbd.Export{Name: spec.Name, Device: d.device, ReadOnly: spec.ReadOnly}); err != nil {
		d.device.Close()
		return err
	}
	e.mu.Lock()
	e.disks[spec.Name], e.had = d, true
	e.mu.Unlock()
	e.config.program.drop()
	return nil
}

// open opens a disk; file is closed if it fails.
func open(spec volumectl.Disk, file *os.File, dek, next *keymem.Key) (*disk, error) {
	f, err := blockdev.NewFile(file, blockdev.FileOptions{ReadOnly: spec.ReadOnly})
	if err != nil {
		file.Close()
		return nil, err
	}
	d := &disk{spec: spec}
	var device blockdev.Device = f
	if spec.Format == volumectl.LUKS {
		d.volume, err = volume.Open(f, dek, volume.Options{ReadOnly: spec.ReadOnly, SizeMin: spec.SizeMin, NextDEK: next})
		if err != nil {
			f.Close()
			return nil, err
		}
		device = d.volume
	}
	if device.Size() < spec.SizeMin {
		err := fmt.Errorf("%w: disk %s has %d bytes of %d", volume.ErrTruncated, spec.Name, device.Size(), spec.SizeMin)
		device.Close()
		return nil, err
	}
	d.device = newCounted(device)
	return d, nil
}

// RemoveDisk implements [volumectl.Handler].
func (e *engine) RemoveDisk(ctx context.Context, name string) error {
	e.change.Lock()
	defer e.change.Unlock()
	d, err := e.find(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	if err := e.server.RemoveExport(ctx, name); err != nil && !errors.Is(err, nbd.ErrNotFound) {
		return err
	}
	e.stopVhost(d)
	d.stopCopy()
	e.mu.Lock()
	delete(e.disks, name)
	e.mu.Unlock()
	d.rekey.end()
	return classify(errors.Join(d.device.Flush(), d.device.Close()))
}

// Listen implements [volumectl.Handler].
func (e *engine) Listen(_ context.Context, socket *os.File) error {
	listener, err := listenerOf(socket)
	if err != nil {
		return err
	}
	e.change.Lock()
	defer e.change.Unlock()
	if e.isDown() {
		listener.Close()
		return errShutDown()
	}
	e.stopService()
	ctx, stop := context.WithCancel(context.Background())
	s := &service{stop: stop, done: make(chan struct{})}
	e.mu.Lock()
	e.service = s
	e.mu.Unlock()
	go func() {
		defer close(s.done)
		if err := e.server.Serve(ctx, listener); err != nil && !errors.Is(err, nbd.ErrStopped) {
			e.log.LogAttrs(ctx, slog.LevelError, "NBD service ended", slog.Any("err", err))
		}
	}()
	return nil
}

// listenerOf returns the listener that a host has passed, and closes socket.
func listenerOf(socket *os.File) (net.Listener, error) {
	defer socket.Close() // FileListener duplicates it
	listener, err := net.FileListener(socket)
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	if listener.Addr().Network() != "unix" {
		listener.Close()
		return nil, errs.New(errs.Invalid, "it is not a unix stream socket")
	}
	return listener, nil
}

// stopService breaks NBD on the present socket, if there is one, and waits.
// e.change is held.
func (e *engine) stopService() {
	e.mu.Lock()
	s := e.service
	e.mu.Unlock()
	if s != nil {
		s.stop()
		<-s.done
	}
}

// ReplaceSafe implements [volumectl.Handler].
func (e *engine) ReplaceSafe(_ context.Context, name string, safe *keysafe.Safe) error {
	d, err := e.find(name)
	if err != nil {
		return err
	}
	if d.volume == nil {
		return errs.New(errs.Invalid, "disk %s is not encrypted", name)
	}
	return classify(d.volume.ReplaceSafe(safe))
}

// Resize implements [volumectl.Handler].
func (e *engine) Resize(_ context.Context, name string, size int64) error {
	d, err := e.find(name)
	if err != nil {
		return err
	}
	if d.spec.ReadOnly {
		return errs.New(errs.InvalidState, "disk %s is read-only", name)
	}
	if e.conversionOf(d) != nil {
		return errs.New(errs.InvalidState, "disk %s is being converted", name).WithHint("wait for the task that converts it")
	}
	if size < d.device.Size() {
		return errs.New(errs.Invalid, "a disk in use cannot shrink from %d to %d bytes", d.device.Size(), size)
	}
	if err := d.device.resize(size); err != nil {
		return classify(err)
	}
	e.tellSize(d)
	return nil
}

// Flush implements [volumectl.Handler].
func (e *engine) Flush(_ context.Context, name string) error {
	d, err := e.find(name)
	if err != nil {
		return err
	}
	return classify(d.device.Flush())
}

// Status implements [volumectl.Handler].
func (e *engine) Status(context.Context) (*volumectl.Status, error) {
	e.mu.Lock()
	disks := slices.Collect(maps.Values(e.disks))
	status := &volumectl.Status{
		Listening: e.service != nil && !e.service.ended(), Disks: []volumectl.DiskStatus{},
		Sandbox: volumectl.Sandbox{Landlock: e.config.Sandbox.Landlock, Seccomp: e.config.Sandbox.Seccomp, Missing: e.config.Sandbox.Missing()},
	}
	e.mu.Unlock()
	for _, d := range disks {
		s := d.status()
		s.VhostUser = e.vhostOf(d) != nil
		if c := e.conversionOf(d); c != nil {
			s.Conversion = c.status()
		}
		status.Disks = append(status.Disks, s)
	}
	slices.SortFunc(status.Disks, func(a, b volumectl.DiskStatus) int {
		if a.Disk < b.Disk {
			return -1
		}
		return 1
	})
	return status, nil
}

func (s *service) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func (d *disk) status() volumectl.DiskStatus {
	s := volumectl.DiskStatus{Disk: d.spec.Name, Format: d.spec.Format, ReadOnly: d.spec.ReadOnly, Size: d.device.Size()}
	d.device.report(&s)
	if d.volume == nil {
		return s
	}
	s.UUID = d.volume.UUID()
	info, err := d.volume.Inspect()
	if err != nil {
		s.HeaderError = err.Error()
	}
	for _, damage := range info.Damage {
		s.Damage = append(s.Damage, fmt.Sprint(damage))
	}
	s.Rekey = d.rekey.status(info.Rekey)
	return s
}

// Shutdown implements [volumectl.Handler]. It is idempotent.
func (e *engine) Shutdown(ctx context.Context) error {
	e.change.Lock()
	defer e.change.Unlock()
	if e.isDown() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	if err := e.server.Shutdown(ctx); err != nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "NBD clients did not finish", slog.Any("err", err))
	}
	e.stopService()
	e.mu.Lock()
	disks := e.disks
	e.disks, e.down = nil, true
	e.mu.Unlock()
	var failed []error
	for name, d := range disks {
		e.stopVhost(d)
		d.rekey.end()
		d.stopCopy()
		if err := errors.Join(d.device.Flush(), d.device.Close()); err != nil {
			failed = append(failed, fmt.Errorf("disk %s: %w", name, err))
		}
	}
	e.end()
	return classify(errors.Join(failed...))
}

func (e *engine) isDown() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.down
}

func errShutDown() error { return errs.New(errs.InvalidState, "the volume process is shutting down") }

// classify adds the kind by which a host tells errors apart.
func classify(err error) error {
	if err == nil || errs.KindOf(err) != errs.Other {
		return err
	}
	for _, c := range []struct {
		is   error
		kind errs.Kind
	}{
		{volume.ErrWrongKey, errs.Corrupt}, // the safe that gave the key opened, so they do not belong together
		{volume.ErrNotVolume, errs.Corrupt},
		{volume.ErrCorrupt, errs.Corrupt},
		{volume.ErrTruncated, errs.Corrupt},
		{volume.ErrRekeying, errs.InvalidState}, // it is an ErrUnsupported too
		{volume.ErrUnsupported, errs.Invalid},
		{volume.ErrWrongSafe, errs.Invalid},
		{volume.ErrChanged, errs.InvalidState},
		{blockdev.ErrInUse, errs.InvalidState},
		{blockdev.ErrReadOnly, errs.InvalidState},
		{blockdev.ErrNoSpace, errs.NoSpace},
		{blockdev.ErrBadSize, errs.Invalid},
		{mirror.ErrVerify, errs.Corrupt},
		{mirror.ErrParted, errs.InvalidState},
		{context.Canceled, errs.Canceled},
	} {
		if !errors.Is(err, c.is) {
			continue
		}
		out := errs.New(c.kind, "%w", err)
		if c.kind == errs.NoSpace {
			return out.WithHint("free space on the datastore, then repeat the command")
		}
		return out
	}
	return err
}
