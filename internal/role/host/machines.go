package host

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/volume"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// busyWait is how long an operation waits for another one on the same VM: long
// enough for one that was cancelled to come to its safe point.
const busyWait = 5 * time.Second

// machine is a VM that is registered on this host.
type machine struct {
	id string
	op chan struct{} // holds one token; who has it may change the VM

	describing    sync.Mutex // who has it describes the VM
	snapshotDisks snapshotDisks

	mu      sync.Mutex // guards what follows
	reg     registered
	running *running // nil while powered off
	// interrupt stops the operation under way, so that the VM can be powered on;
	// nil if there is none that may be stopped.
	interrupt context.CancelCauseFunc
	// rekeyRate is that of the deep rekey that this agent has under way; nil:
	// there is none.
	rekeyRate *volume.Rate
	// rekeyEnds is closed when the call returns that has a deep rekey under way; nil:
	// there is none.
	rekeyEnds chan struct{}
}

func newMachine(reg registered) *machine {
	m := &machine{id: reg.ID, op: make(chan struct{}, 1), reg: reg, snapshotDisks: snapshotDisks{now: time.Now}}
	m.op <- struct{}{}
	return m
}

// state returns where the VM is and whether it is powered on.
func (m *machine) state() (registered, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reg, m.running != nil
}

// setPlace notes a new name or place of the VM.
func (m *machine) setPlace(reg registered) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reg = reg
}

// rekeysAt notes the rate of a deep rekey until end is called, or another deep
// rekey begins while this one is being stopped.
func (m *machine) rekeysAt(rate *volume.Rate) (end func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ends := make(chan struct{})
	m.rekeyRate, m.rekeyEnds = rate, ends
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		close(ends)
		if m.rekeyEnds == ends {
			m.rekeyRate, m.rekeyEnds = nil, nil
		}
	}
}

// settle waits until nothing is under way on the VM that was before: neither what
// has it reserved, nor a deep rekey, which has not while the VM runs.
func (m *machine) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, busyWait)
	defer cancel()
	m.mu.Lock()
	ends := m.rekeyEnds
	m.mu.Unlock()
	if ends != nil {
		select {
		case <-ends:
		case <-ctx.Done():
			return errVMBusy()
		}
	}
	release, err := m.acquire(ctx)
	if err == nil {
		release()
	} else if ctx.Err() != nil {
		err = errVMBusy()
	}
	return err
}

func errVMBusy() error {
	return errs.New(errs.InvalidState, "%w", errBusy).WithReason(strongroomv1.ReasonVMBusy).WithHint("strongroom task ls --active")
}

func (m *machine) run() *running {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.running
}

func (m *machine) setRunning(r *running) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.running = r
}

// idle reports whether no operation has the VM reserved.
func (m *machine) idle() bool { return len(m.op) > 0 }

// acquire reserves the VM for one operation; release must be called.
func (m *machine) acquire(ctx context.Context) (release func(), err error) {
	return m.take(ctx, nil)
}

// acquireFirst is acquire for an operation that does not wait for one that is
// [machine.interruptible].
func (m *machine) acquireFirst(ctx context.Context) (release func(), err error) {
	m.stopInterruptible()
	// Again and again: what was stopped may be back before us.
	ticker := time.NewTicker(interruptEvery)
	defer ticker.Stop()
	return m.take(ctx, ticker.C)
}

// interruptEvery is how often an operation that goes first stops what is in its
// way.
const interruptEvery = 50 * time.Millisecond

func (m *machine) take(ctx context.Context, stop <-chan time.Time) (release func(), err error) {
	timeout := time.NewTimer(busyWait)
	defer timeout.Stop()
	for {
		select {
		case <-m.op:
			if ctx.Err() != nil { // of two that are ready, select takes any: who has gone must begin nothing
				m.op <- struct{}{}
				return nil, context.Cause(ctx)
			}
			return func() { m.op <- struct{}{} }, nil
		case <-stop:
			m.stopInterruptible()
			continue
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-timeout.C:
		}
		return nil, errVMBusy()
	}
}

// interruptible returns a context for an operation that may be stopped so that
// the VM is powered on: it then ends with [errPowerChanged]. end must be called
// before the VM is given back.
func (m *machine) interruptible(ctx context.Context) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	m.setInterrupt(cancel)
	return ctx, func() {
		m.setInterrupt(nil)
		cancel(nil)
	}
}

func (m *machine) setInterrupt(cancel context.CancelCauseFunc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.interrupt = cancel
}

func (m *machine) stopInterruptible() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.interrupt != nil {
		m.interrupt(errPowerChanged)
	}
}

// machine returns the registered VM with that id or name.
func (h *Host) machine(what string) (*machine, error) {
	reg, err := h.secrets.find(what)
	if err != nil {
		return nil, err
	}
	return h.machineOf(reg), nil
}

// machineOf returns the one machine of a VM, which need not be registered yet.
func (h *Host) machineOf(reg registered) *machine {
	h.mu.Lock()
	defer h.mu.Unlock()
	m, ok := h.machines[reg.ID]
	if !ok {
		m = newMachine(reg)
		h.machines[reg.ID] = m
	}
	return m
}

// reserve finds the VM with that id or name and reserves it for one operation;
// release must be called.
func (h *Host) reserve(ctx context.Context, what string) (_ *machine, release func(), err error) {
	m, err := h.machine(what)
	if err != nil {
		return nil, nil, err
	}
	release, err = m.acquire(ctx)
	return m, release, err
}

// all returns every registered VM.
func (h *Host) all() []*machine {
	var ms []*machine
	for _, reg := range h.secrets.snapshot().VMs {
		if m, err := h.machine(reg.ID); err == nil {
			ms = append(ms, m)
		}
	}
	return ms
}

// folder returns the path of a VM's folder.
func (h *Host) folder(reg registered) (string, error) {
	path, err := h.secrets.datastorePath(reg.Datastore)
	if err != nil {
		return "", err
	}
	if !bundle.ValidName(reg.Folder) {
		return "", errs.New(errs.Invalid, "%q cannot be the name of a VM folder", reg.Folder)
	}
	return filepath.Join(path, reg.Folder), nil
}

// errPoweredOn: the VM runs.
var errPoweredOn = errors.New("needs the VM to be powered off")

var errOtherVM = errors.New("holds another VM")

// readVM returns what is in a VM's folder. It refuses a folder that holds
// another VM than was registered.
func readVM(reg registered, dir string) (*bundle.VM, error) {
	vm, err := bundle.Read(dir)
	if err != nil {
		return nil, err
	}
	if vm.ID != reg.ID {
		return nil, errs.New(errs.InvalidState, "folder %s of datastore %s %w (%s) than was registered", reg.Folder, reg.Datastore, errOtherVM, vm.ID).
			WithHint("put the folder of %s back, or unregister it and register what is there", reg.Name)
	}
	return vm, nil
}

// offline is a VM that is powered off and reserved for one operation, or what
// [Host.online] says of one that runs.
type offline struct {
	m    *machine
	dir  string
	vm   *bundle.VM
	lock *bundle.Lock
	done func()
	// running is not nil if the VM runs and is reserved all the same
	// ([Host.changing]).
	running *running
}

// takeOffline reserves a VM that must be powered off, and locks its folder.
func (h *Host) takeOffline(ctx context.Context, id, purpose string) (_ *offline, err error) {
	m, release, err := h.reserve(ctx, id)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	reg, on := m.state()
	if on {
		return nil, errs.New(errs.InvalidState, "%s %w", purpose, errPoweredOn).
			WithHint("strongroom vm power-off %s", reg.Name)
	}
	dir, err := h.folder(reg)
	if err != nil {
		return nil, err
	}
	lock, err := bundle.Acquire(dir)
	if err != nil {
		return nil, err
	}
	vm, err := readVM(reg, dir)
	if err == nil {
		vm, err = sweep(dir, vm)
	}
	if err != nil {
		lock.Release()
		return nil, err
	}
	return &offline{m: m, dir: dir, vm: vm, lock: lock, done: release}, nil
}

// release gives the VM back. What an operation left unfinished is removed: it
// holds nothing that is not elsewhere.
func (o *offline) release() {
	folder := recrypt.Dir{Path: o.dir}
	if names, err := bundle.Unfinished(o.dir); err == nil {
		for _, name := range names {
			_ = folder.Remove(name) // the next operation tries again
		}
	}
	o.lock.Release()
	o.done()
}

func (o *offline) folder() recrypt.Dir { return recrypt.Dir{Path: o.dir} }

// all returns the indices of a VM's disks.
func all(vm *bundle.VM) []int {
	var indices []int
	for i := range vm.Disks {
		indices = append(indices, i)
	}
	return indices
}

// chosen returns the indices of the disks of those names, each once; no names:
// all.
func chosen(vm *bundle.VM, names []string) ([]int, error) {
	if len(names) == 0 {
		return all(vm), nil
	}
	var indices []int
	for _, name := range names {
		i := slices.IndexFunc(vm.Disks, func(d bundle.Disk) bool { return d.Name == name })
		if i >= 0 && !slices.Contains(indices, i) {
			indices = append(indices, i)
		}
		if i < 0 {
			return nil, errs.New(errs.NotFound, "VM %s has no disk %q", vm.Name, name).WithHint("strongroom vm show %s", vm.Name)
		}
	}
	return indices, nil
}
