package controller

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
)

// The kinds of task on VMs.
const (
	taskCreate     = "vm.create"
	taskClone      = "vm.clone"
	taskPowerOn    = "vm.power-on"
	taskPowerOff   = "vm.power-off"
	taskEncrypt    = "vm.encrypt"
	taskDecrypt    = "vm.decrypt"
	taskRekey      = "vm.rekey"
	taskFill       = "disk.fill"
	taskResize     = "disk.resize"
	taskRegister   = "vm.register"
	taskUnregister = "vm.unregister"
	taskDelete     = "vm.delete"
	taskUnlock     = "vm.unlock"

	taskSnapshot       = "vm.snapshot.create"
	taskRevert         = "vm.snapshot.revert"
	taskRenameSnapshot = "vm.snapshot.rename"
	taskDeleteSnapshot = "vm.snapshot.delete"
	taskConsolidate    = "vm.snapshot.consolidate"
)

// retryAfter is how long a step waits for a host that does not answer.
const retryAfter = 2 * time.Second

// vmArgs are the arguments of a task on a VM. They name keys and hold none. The
// VM's id and the new key's id are chosen before the task starts, so that a
// host recognises what it has done already.
type vmArgs struct {
	ID     string `json:"id,omitempty"`
	Name   string `json:"name"`
	HostID string `json:"host_id"`

	Key *inventory.KeyRef `json:"key,omitempty"`
	// NewKeyOf is the standard provider that the task has make the key: Key is
	// known after that.
	NewKeyOf string   `json:"new_key_of,omitempty"`
	Disks    []string `json:"disks,omitempty"`
	Deep     bool     `json:"deep,omitempty"`
	// OwnKey: a shallow rekey is of the disks named, which may be none, and of the
	// VM's own key.
	OwnKey bool `json:"own_key,omitempty"`
	// InPlace: disks are encrypted in their own files, with the VM off.
	InPlace bool  `json:"in_place,omitempty"`
	Rate    int64 `json:"rate,omitempty"` // bytes a second that are copied or rewritten while the VM runs; 0: any number
	Size    int64 `json:"size,omitempty"` // of a disk that is resized, in bytes

	Source   string `json:"source,omitempty"`    // id of the VM that is cloned
	SourceVM string `json:"source_vm,omitempty"` // and its name
	Recrypt  bool   `json:"recrypt,omitempty"`
	// SourceRuns: the VM that is cloned is needed for a moment only, but for its keys.
	SourceRuns bool `json:"source_runs,omitempty"`

	// Runs are the parts of the site that the VM runs, or will once it is made.
	Runs []string `json:"runs,omitempty"`
	// AllowCircular: go on although the VM would wait for itself, as Circle says.
	AllowCircular bool   `json:"allow_circular,omitempty"`
	Circle        string `json:"circle,omitempty"`

	Snapshot *snapshotArgs `json:"snapshot,omitempty"`

	Hard           bool   `json:"hard,omitempty"`
	TimeoutSeconds uint32 `json:"timeout_seconds,omitempty"`

	Datastore string                   `json:"datastore,omitempty"`
	Folder    string                   `json:"folder,omitempty"`
	Settings  *strongroomv1.VMSettings `json:"settings,omitempty"`
	NewDisks  []*strongroomv1.NewDisk  `json:"new_disks,omitempty"`
	// Passphrases are those of LUKS images, by the number of the disk, in parcels
	// that only the host opens.
	Passphrases map[uint32][]byte `json:"passphrases,omitempty"`
}

// vmStep is the work of a step: it does it on the host and returns the VM as the
// host left it, or nil.
type vmStep func(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error)

// taskKinds returns all kinds of task.
func (c *Controller) taskKinds() []task.Kind {
	one := func(name, step string, noReturn bool, do vmStep) task.Kind {
		return task.Kind{Name: name, Steps: []task.StepFuncs{{Name: step, Do: c.step(do), NoReturn: noReturn}}}
	}
	newKey := task.StepFuncs{Name: stepNewKey, Do: c.keyStep(c.makeKey), Undo: c.keyStep(c.unmakeKey)}
	keyed := func(name, step string, do vmStep) task.Kind {
		return task.Kind{Name: name, Steps: []task.StepFuncs{newKey, {Name: step, Do: c.step(do)}}}
	}
	return []task.Kind{
		{Name: taskCreate, Steps: []task.StepFuncs{
			newKey,
			{Name: "create the VM folder", Do: c.step(c.createOnHost), Undo: c.step(c.deleteOnHost)},
			{Name: "add to the inventory", Do: c.step(c.addCreated)},
		}},
		{Name: taskClone, Steps: []task.StepFuncs{
			newKey,
			{Name: "clone the VM folder", Do: c.step(c.cloneOnHost), Undo: c.step(c.deleteOnHost)},
			{Name: "add to the inventory", Do: c.step(c.addCreated)},
		}},
		{Name: taskSnapshot, Steps: []task.StepFuncs{{Name: "copy the disks", Do: c.step(c.createSnapshot), Undo: c.step(c.deleteSnapshot)}}},
		one(taskRevert, "revert the disks", false, c.revertToSnapshot),
		one(taskRenameSnapshot, "rename the snapshot", false, c.renameSnapshot),
		one(taskDeleteSnapshot, "delete the snapshot", true, c.deleteSnapshot),
		one(taskConsolidate, "delete files that no snapshot has", false, c.consolidateSnapshots),
		{Name: taskRegister, Steps: []task.StepFuncs{
			{Name: "register on the host", Do: c.step(c.registerOnHost), Undo: c.step(c.unregisterRegistered)},
			{Name: "add to the inventory", Do: c.step(c.addRegistered)},
		}},
		one(taskPowerOn, "power on", false, c.powerOn),
		one(taskPowerOff, "power off", false, c.powerOff),
		keyed(taskEncrypt, "encrypt disks", c.encrypt),
		one(taskDecrypt, "decrypt disks", false, c.decrypt),
		keyed(taskRekey, "rekey disks", c.rekey),
		one(taskFill, "fill disks", false, c.fill),
		one(taskResize, "resize the disk", false, c.resize),
		one(taskUnlock, "look for keys", false, c.unlock),
		one(taskUnregister, "unregister", true, c.unregister),
		one(taskDelete, "delete", true, c.delete),
		c.rotateKind(),
		{Name: taskDestroyOrphans, Steps: []task.StepFuncs{{Name: "destroy keys that nothing needs", Do: c.destroyOrphans}}},
	}
}

// step makes a task's step of a VM step: it notes the VM as the host left it,
// tells what happened, and has the step tried again while the host is away.
func (c *Controller) step(do vmStep) func(context.Context, *task.Run) error {
	return func(ctx context.Context, r *task.Run) error {
		var a vmArgs
		if err := r.Args(&a); err != nil {
			return err
		}
		if a.NewKeyOf != "" {
			var made madeKey
			if err := r.Data(&made); err != nil {
				return err
			}
			a.Key = made.Key
		}
		h, err := c.inv.HostByID(ctx, a.HostID)
		if err != nil {
			return err
		}
		vm, err := do(ctx, r, h, a)
		if err == nil && vm != nil {
			err = c.noteVM(ctx, h.ID, vm)
			if !c.servers.Empty() {
				c.poke() // a KEK that it needs no more leaves the hosts' memory
			}
		}
		// A host that is busy with the VM may be at work on an earlier call of
		// this very step, whose connection broke.
		later := errors.Is(err, errUnreachable) || errs.ReasonOf(err) == strongroomv1.ReasonVMBusy
		if later && ctx.Err() == nil && waits(r.Task().Kind) {
			return &task.Retry{After: retryAfter, Reason: err.Error()}
		}
		if retry := new(task.Retry); errors.As(err, &retry) {
			return err
		}
		if ctx.Err() == nil {
			err = c.conclude(ctx, r.Task(), a, err)
		}
		return err
	}
}

// waits reports whether a task of that kind waits for a host that is away. One
// who powers a VM on or off wants to know at once.
func waits(kind string) bool { return kind != taskPowerOn && kind != taskPowerOff }

// conclude audits what a step came to and tells of it: a failure, an undo, and
// the success of the last step. It returns err, or that the audit record could
// not be written.
func (c *Controller) conclude(ctx context.Context, t task.Task, a vmArgs, err error) error {
	last := t.CurrentStep() == t.Steps[len(t.Steps)-1].Name
	if err == nil && !last && !t.Undoing {
		return nil
	}
	if a.Key == nil && a.NewKeyOf != "" {
		a.Key = &inventory.KeyRef{Provider: a.NewKeyOf}
	}
	entry := audit.Entry{Actor: t.Owner, Action: t.Kind, Object: "/" + t.Target, Outcome: audit.Success, Details: map[string]string{"task": t.ID}}
	tell := event.New{Principal: t.Owner, Target: t.Target, Args: map[string]string{}}
	if a.Key != nil {
		entry.Details["provider"], entry.Details["key_id"] = a.Key.Provider, a.Key.KeyID
		tell.Args["provider"] = a.Key.Provider
	}
	if a.Circle != "" {
		entry.Details["circular"] = a.Circle
	}
	if t.Kind == taskRekey {
		tell.Args["depth"] = depth(a)
		entry.Action += "." + depth(a)
	}
	if a.InPlace {
		entry.Action += ".in-place"
	}
	if t.Kind == taskClone {
		entry.Details["source"], tell.Args["source"] = "/vm/"+a.SourceVM, a.SourceVM
		if a.Recrypt {
			entry.Action += ".recrypt"
		}
	}
	if a.Snapshot != nil {
		entry.Details["snapshot"], tell.Args["snapshot"] = a.Snapshot.Name, a.Snapshot.Name
		if a.Snapshot.NewName != "" {
			entry.Details["name"], tell.Args["name"] = a.Snapshot.NewName, a.Snapshot.NewName
		}
	}
	if t.Undoing {
		entry.Action += ".undo"
	}
	if err == nil {
		tell.Type = doneEvent(t.Kind)
	} else {
		entry.Outcome, entry.Details["error"] = audit.Failed, err.Error()
		tell.Type, tell.Args["kind"], tell.Args["error"], tell.Args["datastore"] = failedEvent(t.Kind, err), t.Kind, err.Error(), a.Datastore
	}
	if tell.Type != "" && (err != nil || !t.Undoing) {
		c.post(ctx, tell)
		if err == nil && len(a.Passphrases) > 0 {
			c.post(ctx, event.New{Type: event.VMLUKSAdopted, Principal: t.Owner, Target: t.Target, Args: map[string]string{"vm": a.Name}})
		}
	}
	if _, auditErr := c.audit.Append(entry); auditErr != nil {
		c.log.LogAttrs(ctx, slog.LevelError, "audit record not written", slog.String("task", t.ID), slog.Any("err", auditErr))
		return errors.Join(err, errs.Wrap(auditErr, "cannot write the audit log"))
	}
	return err
}

// locks are the locks of a task of that kind on a VM: its power, and its disks. What
// takes long and works in any power state leaves the VM to be powered on and off
// meanwhile.
func locks(kind, vm string, a vmArgs) []string {
	power, disks := "vm/"+vm, "vm/"+vm+"/disks"
	switch {
	case kind == taskPowerOn || kind == taskPowerOff:
		return []string{power}
	case kind == taskClone:
		source := "vm/" + a.SourceVM
		if a.SourceRuns {
			return []string{power, disks, source + "/disks"}
		}
		return []string{power, disks, source, source + "/disks"}
	case kind == taskRekey && a.Deep, kind == taskEncrypt && !a.InPlace, kind == taskDecrypt:
		return []string{disks}
	}
	return []string{power, disks}
}

func depth(a vmArgs) string {
	if a.Deep {
		return "deep"
	}
	return "shallow"
}

// doneEvent is the type of event that tells of a task that succeeded; empty if
// something else tells of it.
func doneEvent(kind string) string {
	switch kind {
	case taskCreate:
		return event.VMCreated
	case taskClone:
		return event.VMCloned
	case taskRegister:
		return event.VMRegistered
	case taskUnregister:
		return event.VMUnregistered
	case taskDelete:
		return event.VMDeleted
	case taskEncrypt:
		return event.VMEncrypted
	case taskDecrypt:
		return event.VMDecrypted
	case taskRekey:
		return event.VMRekeyed
	case taskFill:
		return event.VMDisksFilled
	case taskResize:
		return event.VMDiskResized
	case taskSnapshot:
		return event.VMSnapshotCreated
	case taskRevert:
		return event.VMSnapshotReverted
	case taskRenameSnapshot:
		return event.VMSnapshotRenamed
	case taskDeleteSnapshot:
		return event.VMSnapshotDeleted
	case taskConsolidate:
		return event.VMConsolidated
	}
	return ""
}

// failedEvent is the type of event that tells of a task that failed.
func failedEvent(kind string, err error) string {
	switch {
	case errs.KindOf(err) == errs.NoSpace:
		return event.VMNoDiskSpace
	case kind == taskRekey:
		return event.VMRekeyFailed
	}
	return event.TaskFailed
}

// progress tells a task what the host tells.
func progress(ctx context.Context, r *task.Run) func(*strongroomv1.AgentProgress) {
	return func(p *strongroomv1.AgentProgress) { r.Progress(ctx, p.GetDone(), p.GetTotal(), p.GetUnit()) }
}

func (c *Controller) createOnHost(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	// The host may be new or the datastore: it needs both before the VM.
	if err := c.syncHost(ctx, h.ID); err != nil {
		return nil, err
	}
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).CreateVM, &strongroomv1.AgentCreateVMRequest{
		Id: a.ID, Name: a.Name, Datastore: a.Datastore, Settings: a.Settings, Disks: a.NewDisks, Key: keyToAPI(a.Key), Passphrases: a.Passphrases,
	}, progress(ctx, r))
}

func (c *Controller) deleteOnHost(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	_, err := callHost(ctx, h, c.agents.of(h).DeleteVM, &strongroomv1.AgentDeleteVMRequest{Id: a.ID})
	return nil, err
}

func (c *Controller) addCreated(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	a.Folder = a.Name
	return nil, c.addToInventory(ctx, h, a.ID, a)
}

// addToInventory takes in the VM with that id, which a task has made or registered
// as its arguments say, as its host describes it. One that is there is no error.
func (c *Controller) addToInventory(ctx context.Context, h inventory.Host, id string, a vmArgs) error {
	res, err := callHost(ctx, h, c.agents.of(h).GetVM, &strongroomv1.AgentGetVMRequest{Id: id})
	if err != nil {
		return err
	}
	said := res.GetVm()
	// The caller has privileges on what was asked for, not on what the host may tell of.
	if said.GetId() != id || said.GetDatastore() != a.Datastore || said.GetFolder() != a.Folder || a.Name != "" && said.GetName() != a.Name {
		return errs.New(errs.Corrupt, "host %s tells of VM %.80q in folder %.80q of datastore %.80q, which is not what it was asked for", h.Name, said.GetName(), said.GetFolder(), said.GetDatastore()).
			WithHint("strongroom host show %s", h.Name)
	}
	switch v, err := c.inv.VMByID(ctx, id); {
	case err == nil && v.HostID == h.ID && v.Datastore == a.Datastore && v.Folder == a.Folder:
		return c.noteVM(ctx, h.ID, said)
	case err == nil:
		return errs.New(errs.Exists, "VM %s, in folder %s of datastore %s, has the same id: one is a copy of the other", v.Name, v.Folder, v.Datastore).
			WithHint("strongroom vm unregister %s", v.Name)
	}
	last, done, err := c.heard.turn(ctx, h.ID, id)
	if err != nil {
		return err
	}
	defer done()
	v := inventory.VM{
		ID: id, Name: said.GetName(), ClusterID: h.ClusterID, HostID: h.ID, Datastore: said.GetDatastore(), Folder: said.GetFolder(),
		Created: said.GetCreated().AsTime(), Runs: a.Runs,
	}
	apply(&v, said)
	if err := c.mayNeed(ctx, v, nil); err != nil {
		return err
	}
	for _, d := range v.Disks {
		if encrypted(d) && d.Key == nil {
			return errs.New(errs.Corrupt, "cannot tell which key %s needs: %s", d.Name, said.GetLockReason())
		}
	}
	if _, err := c.inv.CreateVM(ctx, v); err != nil {
		return err
	}
	last.note(said.GetDescription())
	c.said.doubt(h.ID, id)
	return c.events.Evaluate(ctx, c.inv)
}

// registered is what the first step of a registration leaves to the second.
type registered struct {
	ID string `json:"id"`
	// Before: the VM was on the host before the task; undoing leaves it there.
	Before bool `json:"before"`
}

func (c *Controller) registerOnHost(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.syncHost(ctx, h.ID); err != nil {
		return nil, err
	}
	res, err := callHost(ctx, h, c.agents.of(h).RegisterVM, &strongroomv1.AgentRegisterVMRequest{Datastore: a.Datastore, Folder: a.Folder, Name: a.Name})
	if err != nil {
		return nil, err
	}
	v, err := c.inv.VMByID(ctx, res.GetVm().GetId())
	return nil, r.SetData(ctx, registered{ID: res.GetVm().GetId(), Before: err == nil && v.HostID == h.ID})
}

func (c *Controller) addRegistered(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	var reg registered
	if err := r.Data(&reg); err != nil {
		return nil, err
	}
	if err := c.addToInventory(ctx, h, reg.ID, a); err != nil {
		return nil, err
	}
	// It is wanted from now on. Without its keys it is locked, which says why.
	if err := c.equipVM(ctx, h, vmArgs{ID: reg.ID}); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "registered VM lacks its keys", slog.String("vm", reg.ID), slog.Any("err", err))
		return nil, nil
	}
	if v, err := c.inv.VMByID(ctx, reg.ID); err == nil && v.CryptoState == inventory.Locked {
		_, err = c.lookAgain(ctx, v)
		return nil, err
	}
	return nil, nil
}

func (c *Controller) unregisterRegistered(ctx context.Context, r *task.Run, h inventory.Host, _ vmArgs) (*strongroomv1.VM, error) {
	var reg registered
	if err := r.Data(&reg); err != nil || reg.ID == "" || reg.Before {
		return nil, err
	}
	_, err := callHost(ctx, h, c.agents.of(h).UnregisterVM, &strongroomv1.AgentUnregisterVMRequest{Id: reg.ID})
	return nil, err
}

func (c *Controller) powerOn(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	res, err := callHost(ctx, h, c.agents.of(h).PowerOnVM, &strongroomv1.AgentPowerOnVMRequest{Id: a.ID})
	return res.GetVm(), err
}

func (c *Controller) powerOff(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	res, err := callHostLong(ctx, h, c.agents.of(h).PowerOffVM, &strongroomv1.AgentPowerOffVMRequest{Id: a.ID, Hard: a.Hard, TimeoutSeconds: a.TimeoutSeconds})
	return res.GetVm(), err
}

func (c *Controller) encrypt(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).EncryptVM, &strongroomv1.AgentEncryptVMRequest{Id: a.ID, Disks: a.Disks, Key: keyToAPI(a.Key), Rate: a.Rate, InPlace: a.InPlace}, progress(ctx, r))
}

func (c *Controller) decrypt(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).DecryptVM, &strongroomv1.AgentDecryptVMRequest{Id: a.ID, Disks: a.Disks, Rate: a.Rate}, progress(ctx, r))
}

func (c *Controller) rekey(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipSnapshots(ctx, h, a); err != nil {
		return nil, err
	}
	tell := progress(ctx, r)
	if a.Deep {
		tell = c.checkRate(ctx, r, h, a, tell)
	}
	return streamHost(ctx, h, c.agents.of(h).RekeyVM, &strongroomv1.AgentRekeyVMRequest{Id: a.ID, Disks: a.Disks, Key: keyToAPI(a.Key), Deep: a.Deep, Rate: a.Rate, OwnKey: a.OwnKey}, tell)
}

// checkRate returns tell, which at the first progress, when the host is at work,
// also looks whether the rate was changed since the step began: the host was
// told of that too early. If it cannot be told now, the rate stays as it was.
func (c *Controller) checkRate(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs, tell func(*strongroomv1.AgentProgress)) func(*strongroomv1.AgentProgress) {
	var once sync.Once
	return func(p *strongroomv1.AgentProgress) {
		once.Do(func() {
			t, err := c.tasks.Get(ctx, r.Task().ID)
			now := a
			if err == nil {
				err = json.Unmarshal(t.Args, &now)
			}
			if err == nil && now.Rate != a.Rate {
				err = c.tellRate(ctx, h, now)
			}
			if err != nil {
				c.log.LogAttrs(ctx, slog.LevelWarn, "cannot tell the rate of a rekey", slog.String("task", r.Task().ID), slog.Any("err", err))
			}
		})
		tell(p)
	}
}

func (c *Controller) fill(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	return streamHost(ctx, h, c.agents.of(h).FillDisks, &strongroomv1.AgentFillDisksRequest{Id: a.ID, Disks: a.Disks}, progress(ctx, r))
}

func (c *Controller) resize(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	res, err := callHost(ctx, h, c.agents.of(h).ResizeDisk, &strongroomv1.AgentResizeDiskRequest{Id: a.ID, Disk: a.Disks[0], SizeBytes: a.Size})
	return res.GetVm(), err
}

func (c *Controller) unlock(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if err := c.syncHost(ctx, h.ID); err != nil {
		return nil, err
	}
	if err := c.equipVM(ctx, h, a); err != nil {
		return nil, err
	}
	v, err := c.inv.VMByID(ctx, a.ID)
	if err != nil {
		return nil, err
	}
	if v, err = c.lookAgain(ctx, v); err != nil {
		return nil, err
	}
	if v.CryptoState == inventory.Locked {
		return nil, errs.New(errs.Locked, "VM %s is still locked: %s", v.Name, v.LockReason).WithHint("strongroom provider import FILE.p12")
	}
	return nil, nil
}

func (c *Controller) unregister(ctx context.Context, _ *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if _, err := callHost(ctx, h, c.agents.of(h).UnregisterVM, &strongroomv1.AgentUnregisterVMRequest{Id: a.ID}); err != nil {
		return nil, err
	}
	return nil, c.forgotten(ctx, a, c.inv.UnregisterVM(ctx, a.ID))
}

func (c *Controller) delete(ctx context.Context, r *task.Run, h inventory.Host, a vmArgs) (*strongroomv1.VM, error) {
	if _, err := c.deleteOnHost(ctx, r, h, a); err != nil {
		return nil, err
	}
	return nil, c.forgotten(ctx, a, c.inv.DeleteVM(ctx, a.ID))
}

// forgotten puts right what depends on a VM that the inventory has forgotten.
func (c *Controller) forgotten(ctx context.Context, a vmArgs, err error) error {
	if err != nil {
		return err
	}
	c.heard.forget(a.HostID, a.ID)
	c.poke() // its KEKs of standard providers leave the hosts' memory
	return c.events.Evaluate(ctx, c.inv)
}
