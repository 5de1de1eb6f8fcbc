package host

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
)

// registerVM takes a VM folder into the registry and returns the VM's id. The
// name, which may be empty, replaces the one in vm.json.
func (h *Host) registerVM(datastore, folder, name string) (string, error) {
	reg := registered{Datastore: datastore, Folder: folder}
	dir, err := h.folder(reg)
	if err != nil {
		return "", err
	}
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() { // a link could lead out of the datastore
		return "", errs.New(errs.NotFound, "there is no folder %s on datastore %s", folder, datastore)
	}
	vm, err := bundle.Read(dir)
	if err != nil {
		return "", errs.Wrap(err, "cannot register %s on datastore %s", folder, datastore)
	}
	reg.ID, reg.Name = vm.ID, vm.Name
	if name != "" {
		reg.Name = name
	}
	if !bundle.ValidName(reg.Name) {
		return "", errs.New(errs.Invalid, "%.64q cannot be the name of a VM", reg.Name)
	}
	if other, err := h.secrets.find(vm.ID); err == nil && filepath.Join(other.Datastore, other.Folder) != filepath.Join(datastore, folder) {
		return "", errs.New(errs.Exists, "VM %s in folder %s of datastore %s has the same id: one is a copy of the other", other.Name, other.Folder, other.Datastore).
			WithHint("strongroom vm unregister %s", other.Name)
	}
	return reg.ID, h.register(reg)
}

// unregisterVM takes a VM that is powered off out of the registry, and with
// remove deletes its folder. A VM that is not registered is no error.
func (h *Host) unregisterVM(ctx context.Context, id string, remove bool) error {
	if _, err := h.secrets.find(id); errs.KindOf(err) == errs.NotFound {
		if remove {
			return h.discard(ctx, id)
		}
		return nil
	}
	o, err := h.takeOffline(ctx, id, "unregistering")
	switch {
	case errs.KindOf(err) == errs.NotFound, errors.Is(err, errOtherVM):
		// The folder is gone already: forget the VM.
		return h.unregister(id)
	case err != nil:
		return err
	}
	defer o.release()
	if remove {
		if err := bundle.Remove(o.dir, o.vm); err != nil {
			return err
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "VM deleted", slog.String("vm", o.vm.Name))
	}
	return h.unregister(id)
}

// discard deletes what an interrupted createVM or cloneVM may have left of a VM.
func (h *Host) discard(ctx context.Context, id string) error {
	if parsed, err := uuid.Parse(id); err != nil || parsed.String() != id {
		return nil // no such thing was ever begun
	}
	release, err := h.machineOf(registered{ID: id}).acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	var failures []error
	for _, d := range h.secrets.snapshot().Datastores {
		failures = append(failures, os.RemoveAll(filepath.Join(d.Path, creating(id))), os.RemoveAll(filepath.Join(d.Path, cloning(id))))
	}
	return errors.Join(failures...)
}

// describeAll returns all registered VMs. One that cannot be read is told as
// locked, with the reason and without what is not known: it must not vanish from
// view.
func (h *Host) describeAll(ctx context.Context) []*strongroomv1.VM {
	var out []*strongroomv1.VM
	for _, m := range h.all() {
		out = append(out, h.describeOrSay(ctx, m))
	}
	return out
}

func (h *Host) describeOrSay(ctx context.Context, m *machine) *strongroomv1.VM {
	m.describing.Lock()
	defer m.describing.Unlock()
	vm, err := h.look(ctx, m)
	if err != nil {
		reg, _ := m.state()
		vm = &strongroomv1.VM{
			Id: reg.ID, Name: reg.Name, Cluster: h.secrets.identity.Cluster, Host: h.secrets.identity.Name, Datastore: reg.Datastore,
			Folder: reg.Folder, PowerState: "unknown", CryptoState: "locked", LockReason: reason(err),
		}
	}
	vm.Description = h.nextDescription()
	return vm
}
