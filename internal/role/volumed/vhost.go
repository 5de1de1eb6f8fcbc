package volumed

import (
	"context"
	"errors"
	"log/slog"
	"os"

	"strongroom/internal/block/vhostuser"
	"strongroom/internal/errs"
)

// vhost is vhost-user on one socket, of one disk.
type vhost struct {
	server *vhostuser.Server
	done   chan struct{} // closed when it does not serve any more
}

// ListenVhostUser implements [volumectl.Handler].
func (e *engine) ListenVhostUser(_ context.Context, name string, socket *os.File) error {
	listener, err := listenerOf(socket)
	if err != nil {
		return err
	}
	e.change.Lock()
	defer e.change.Unlock()
	d, err := e.find(name)
	if err != nil {
		listener.Close()
		return err
	}
	server, err := vhostuser.NewServer(vhostuser.Config{
		Device: d.device, Name: name, ReadOnly: d.spec.ReadOnly, Serial: name, Log: e.log,
		Workers: vhostWorkers,
	})
	if err != nil {
		listener.Close()
		return errs.New(errs.Invalid, "%w", err)
	}
	e.stopVhost(d)
	v := &vhost{server: server, done: make(chan struct{})}
	e.mu.Lock()
	d.vhost = v
	e.mu.Unlock()
	go func() {
		defer close(v.done)
		if err := server.Serve(context.Background(), listener); err != nil && !errors.Is(err, vhostuser.ErrClosed) {
			e.log.LogAttrs(context.Background(), slog.LevelError, "vhost-user service ended", slog.String("disk", name), slog.Any("err", err))
		}
	}()
	return nil
}

// vhostOf returns the vhost-user service of a disk, or nil if there is none.
func (e *engine) vhostOf(d *disk) *vhost {
	e.mu.Lock()
	defer e.mu.Unlock()
	return d.vhost
}

// stopVhost ends the vhost-user service of a disk, if there is one, and waits
// until requests in work are done and given back. e.change is held.
func (e *engine) stopVhost(d *disk) {
	v := e.vhostOf(d)
	if v == nil {
		return
	}
	v.server.Close()
	<-v.done
	e.mu.Lock()
	d.vhost = nil
	e.mu.Unlock()
}

// tellSize tells the guest that a disk has another size.
func (e *engine) tellSize(d *disk) {
	if v := e.vhostOf(d); v != nil {
		v.server.Resized()
	}
}
