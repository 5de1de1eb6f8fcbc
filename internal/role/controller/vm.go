package controller

import (
	"context"
	"encoding/json"
	"errors"
	"slices"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
)

// vms serves VMService: it checks what can be checked at once and leaves the
// rest to a task.
type vms struct{ *Controller }

func (c vms) ListVMs(ctx context.Context, _ *connect.Request[strongroomv1.ListVMsRequest]) (*connect.Response[strongroomv1.ListVMsResponse], error) {
	all, err := c.inv.VMs(ctx, "")
	if err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListVMsResponse{}
	for _, v := range all {
		res.Vms = append(res.Vms, vmToAPI(v, n))
	}
	return connect.NewResponse(res), nil
}

func (c vms) GetVM(ctx context.Context, req *connect.Request[strongroomv1.GetVMRequest]) (*connect.Response[strongroomv1.VM], error) {
	v, err := c.inv.VM(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(vmToAPI(v, n)), nil
}

// submit starts a task on a VM for the caller.
func (c *Controller) submit(ctx context.Context, kind, vm string, args vmArgs) (*connect.Response[strongroomv1.Task], error) {
	if args.Key != nil || args.NewKeyOf != "" {
		// The provider must not be deleted between its choice and the task that
		// keeps it from being deleted.
		c.providersMu.Lock()
		defer c.providersMu.Unlock()
		provider := args.NewKeyOf
		if args.Key != nil {
			provider = args.Key.Provider
		}
		if _, err := c.inv.Provider(ctx, provider); err != nil {
			return nil, err
		}
	}
	t, err := c.tasks.Submit(ctx, task.Request{Kind: kind, Target: "vm/" + vm, Locks: locks(kind, vm, args), Owner: guard.CallerOf(ctx).Principal.String(), Args: args})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(taskToAPI(t)), nil
}

// on finds a VM and its host, which must answer.
func (c *Controller) on(ctx context.Context, name string) (inventory.VM, vmArgs, error) {
	v, err := c.inv.VM(ctx, name)
	if err != nil {
		return inventory.VM{}, vmArgs{}, err
	}
	h, err := c.inv.HostByID(ctx, v.HostID)
	if err != nil {
		return inventory.VM{}, vmArgs{}, err
	}
	return v, vmArgs{ID: v.ID, Name: v.Name, HostID: h.ID, Datastore: v.Datastore}, answering(h)
}

func answering(h inventory.Host) error {
	if h.State == inventory.Connected {
		return nil
	}
	return errs.New(errs.Unavailable, "host %s is %s", h.Name, h.State).WithHint("strongroom host show %s", h.Name)
}

// chooseKey says in args which new KEK a VM gets, of that provider or of the
// default one. A native provider's key is named here, which makes nothing: the
// host, which must hold the provider's keys, derives it. A standard provider's
// is made by the task.
func (c *Controller) chooseKey(ctx context.Context, args *vmArgs, provider string) error {
	h, err := c.inv.HostByID(ctx, args.HostID)
	if err != nil {
		return err
	}
	p, err := c.inv.ProviderForEncryption(ctx, provider, h.ClusterID)
	if err != nil {
		return err
	}
	if err := c.refuseCircle(ctx, args, p.Name); err != nil {
		return err
	}
	if p.Standard != nil {
		args.NewKeyOf = p.Name
		return nil
	}
	if !h.Holds(p.Name, p.KeyID) {
		if err := c.syncHost(ctx, h.ID); err != nil {
			return err
		}
		if h, err = c.inv.HostByID(ctx, args.HostID); err != nil {
			return err
		}
	}
	if !h.Holds(p.Name, p.KeyID) {
		err := errs.New(errs.InvalidState, "host %s does not have the keys of provider %s", h.Name, p.Name)
		if p.TPMRequired {
			return err.WithHint("the provider is for hosts with a TPM only; use one that is not: strongroom provider ls")
		}
		return err.WithHint("strongroom provider show %s", p.Name)
	}
	args.Key = &inventory.KeyRef{Provider: p.Name, KeyID: p.KeyID + "/" + uuid.NewString()}
	return nil
}

func (c vms) CreateVM(ctx context.Context, req *connect.Request[strongroomv1.CreateVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := req.Msg
	if err := inventory.CheckName("VM", m.GetName()); err != nil {
		return nil, err
	}
	if m.GetEncrypt() {
		if err := c.access.Check(ctx, guard.CallerOf(ctx).Principal, "Cryptographer.EncryptNew", vmObject(m.GetName())); err != nil {
			return nil, err
		}
	}
	if _, err := c.inv.VM(ctx, m.GetName()); err == nil {
		return nil, errs.New(errs.Exists, "there is a VM %s already", m.GetName()).WithHint("strongroom vm show %s", m.GetName())
	}
	h, err := c.place(ctx, m.GetDatastore(), m.GetHost())
	if err == nil {
		err = c.mayCopy(ctx, m)
	}
	if err != nil {
		return nil, err
	}
	args := vmArgs{ID: uuid.NewString(), Name: m.GetName(), HostID: h.ID, Datastore: m.GetDatastore(), Settings: m.GetSettings(), NewDisks: m.GetDisks(), AllowCircular: m.GetAllowCircular()}
	if args.Runs, err = c.inv.CheckParts(ctx, m.GetRuns()); err != nil {
		return nil, err
	}
	if m.GetEncrypt() {
		if err := c.chooseKey(ctx, &args, m.GetProvider()); err != nil {
			return nil, err
		}
	}
	if args.Passphrases, err = sealPassphrases(h, args.ID, m.GetDisks()); err != nil {
		return nil, err
	}
	return c.submit(ctx, taskCreate, args.Name, args)
}

// passphraseMax is the longest passphrase, in bytes: people use random files.
const passphraseMax = 64 << 10

// sealPassphrases takes the passphrases of LUKS images out of a request for the
// VM with that id, and returns them in parcels for the host: the task is stored.
func sealPassphrases(h inventory.Host, vm string, disks []*strongroomv1.NewDisk) (map[uint32][]byte, error) {
	var sealed map[uint32][]byte
	for i, d := range disks {
		isLUKS, n := d.GetImageFormat() == "luks", len(d.GetPassphrase())
		switch {
		case isLUKS && (n == 0 || n > passphraseMax):
			return nil, errs.New(errs.Invalid, "disk-%d: a LUKS image needs its passphrase, of 1 to %d bytes", i, passphraseMax)
		case !isLUKS && n > 0:
			return nil, errs.New(errs.Invalid, "disk-%d: a passphrase is for an image of format luks", i)
		case !isLUKS:
			continue
		}
		passphrase, err := keymem.Take(d.GetPassphrase()) // wipes it
		if err != nil {
			return nil, err
		}
		d.Passphrase = nil
		parcel, err := parcel.Seal(h.ParcelPublicKey, parcel.ImageContext{Recipient: h.ID, VM: vm, Disk: i}.String(), passphrase)
		if err := errors.Join(err, passphrase.Close()); err != nil {
			return nil, err
		}
		if sealed == nil {
			sealed = map[uint32][]byte{}
		}
		sealed[uint32(i)] = parcel
	}
	return sealed, nil
}

// place returns the host of that name, or any that answers, which has the
// datastore.
func (c *Controller) place(ctx context.Context, datastore, host string) (inventory.Host, error) {
	d, err := c.inv.Datastore(ctx, datastore)
	if err != nil {
		return inventory.Host{}, err
	}
	if host != "" {
		h, err := c.inv.Host(ctx, host)
		if err != nil {
			return inventory.Host{}, err
		}
		if h.ClusterID != d.ClusterID {
			return inventory.Host{}, errs.New(errs.Invalid, "host %s is not in the cluster of datastore %s", h.Name, d.Name)
		}
		return h, answering(h)
	}
	all, err := c.inv.Hosts(ctx, d.ClusterID)
	if err != nil {
		return inventory.Host{}, err
	}
	i := slices.IndexFunc(all, func(h inventory.Host) bool { return h.State == inventory.Connected })
	if i < 0 {
		return inventory.Host{}, errs.New(errs.Unavailable, "no host of the cluster of datastore %s is connected", d.Name).WithHint("strongroom host ls")
	}
	return all[i], nil
}

func (c vms) PowerOnVM(ctx context.Context, req *connect.Request[strongroomv1.PowerOnVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	_, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return c.submit(ctx, taskPowerOn, args.Name, args)
}

func (c vms) PowerOffVM(ctx context.Context, req *connect.Request[strongroomv1.PowerOffVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	_, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	args.Hard, args.TimeoutSeconds = req.Msg.GetHard(), req.Msg.GetTimeoutSeconds()
	return c.submit(ctx, taskPowerOff, args.Name, args)
}

// disks returns the disks of those names, all if there are none.
func disks(v inventory.VM, names []string) ([]inventory.Disk, error) {
	if len(names) == 0 {
		return v.Disks, nil
	}
	var out []inventory.Disk
	for _, name := range names {
		i := slices.IndexFunc(v.Disks, func(d inventory.Disk) bool { return d.Name == name })
		if i < 0 {
			return nil, errs.New(errs.NotFound, "VM %s has no disk %q", v.Name, name).WithHint("strongroom vm show %s", v.Name)
		}
		out = append(out, v.Disks[i])
	}
	return out, nil
}

func encrypted(d inventory.Disk) bool { return d.Format == inventory.LUKS }

func (c vms) EncryptVM(ctx context.Context, req *connect.Request[strongroomv1.EncryptVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	chosen, err := disks(v, req.Msg.GetDisks())
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(chosen, func(d inventory.Disk) bool { return !encrypted(d) || d.Encryption != nil }) {
		return nil, errs.New(errs.InvalidState, "VM %s has no disk that is not encrypted", v.Name).WithHint("strongroom vm rekey %s", v.Name)
	}
	args.Disks, args.InPlace, args.Runs, args.AllowCircular = req.Msg.GetDisks(), req.Msg.GetInPlace(), v.Runs, req.Msg.GetAllowCircular()
	switch {
	case !args.InPlace:
		err = undisturbed(v, chosen)
	case v.PowerState == inventory.PoweredOn:
		err = errs.New(errs.InvalidState, "an encryption in place needs VM %s to be powered off", v.Name).
			WithHint("strongroom vm power-off %s; or leave --in-place away, if there is room for a copy", v.Name)
	}
	if err != nil {
		return nil, err
	}
	if err := withoutSnapshots(v); err != nil {
		return nil, err
	}
	if err := c.chooseEncryptKey(ctx, &args, chosen, req.Msg.GetProvider()); err != nil {
		return nil, err
	}
	if args.Rate, err = rate(req.Msg.GetRate()); err != nil {
		return nil, err
	}
	return c.submit(ctx, taskEncrypt, v.Name, args)
}

// chooseEncryptKey says in args which KEK those disks get: that of an encryption in
// place which goes on, else a new one.
func (c *Controller) chooseEncryptKey(ctx context.Context, args *vmArgs, chosen []inventory.Disk, provider string) error {
	for _, d := range chosen {
		if d.Encryption != nil && d.Key != nil && (provider == "" || provider == d.Key.Provider) {
			args.Key = d.Key
			return nil
		}
	}
	return c.chooseKey(ctx, args, provider)
}

func (c vms) DecryptVM(ctx context.Context, req *connect.Request[strongroomv1.DecryptVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	chosen, err := encryptedOf(v, req.Msg.GetDisks())
	if err == nil {
		err = undisturbed(v, chosen)
	}
	if err == nil {
		err = withoutSnapshots(v)
	}
	if err != nil {
		return nil, err
	}
	if args.Rate, err = rate(req.Msg.GetRate()); err != nil {
		return nil, err
	}
	args.Disks = req.Msg.GetDisks()
	return c.submit(ctx, taskDecrypt, v.Name, args)
}

// rate checks how much may be copied a second.
func rate(bytes int64) (int64, error) {
	if bytes < 0 {
		return 0, errs.New(errs.Invalid, "a rate of %d bytes a second is negative", bytes)
	}
	return bytes, nil
}

// encryptedOf returns the disks of those names, of which one must be encrypted.
func encryptedOf(v inventory.VM, names []string) ([]inventory.Disk, error) {
	chosen, err := disks(v, names)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(chosen, encrypted) {
		return nil, errs.New(errs.InvalidState, "VM %s is not encrypted", v.Name).WithHint("strongroom vm encrypt %s", v.Name)
	}
	return chosen, nil
}

// notEncrypting returns an error if an encryption in place of one of those disks is
// not finished.
func notEncrypting(v inventory.VM, chosen []inventory.Disk) error {
	for _, d := range chosen {
		if d.Encryption != nil {
			return errs.New(errs.InvalidState, "the encryption in place of %s of %s is not finished", d.Name, v.Name).
				WithReason(strongroomv1.ReasonEncryptionInProgress).WithHint("finish it first: strongroom vm encrypt %s --in-place", v.Name)
		}
	}
	return nil
}

// undisturbed returns an error if an encryption in place of one of those disks is
// not finished, or a deep rekey.
func undisturbed(v inventory.VM, chosen []inventory.Disk) error {
	if err := notEncrypting(v, chosen); err != nil {
		return err
	}
	for _, d := range chosen {
		if d.Rekey != nil {
			return errs.New(errs.InvalidState, "a deep rekey of %s of %s is under way", d.Name, v.Name).
				WithReason(strongroomv1.ReasonRekeyInProgress).WithHint("finish it first: strongroom vm rekey %s --deep", v.Name)
		}
	}
	return nil
}

// chooseRekeyKey says in args which new KEK those disks get: that of a deep rekey
// which goes on, else a new one.
func (c *Controller) chooseRekeyKey(ctx context.Context, args *vmArgs, v inventory.VM, chosen []inventory.Disk, provider string) error {
	for _, d := range chosen {
		if args.Deep && d.Rekey != nil && (provider == "" || provider == d.Rekey.Key.Provider) {
			args.Key = &d.Rekey.Key
			return nil
		}
	}
	if provider == "" && v.Key != nil {
		provider = v.Key.Provider
	}
	return c.chooseKey(ctx, args, provider)
}

func (c vms) RekeyVM(ctx context.Context, req *connect.Request[strongroomv1.RekeyVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	m := req.Msg
	chosen, err := encryptedOf(v, m.GetDisks())
	switch {
	case err != nil:
	case m.GetRate() < 0 || m.GetRate() > 0 && !m.GetDeep():
		err = errs.New(errs.Invalid, "only a deep rekey has a rate, and that is not negative")
	case m.GetDeep(): // one that is under way goes on
		if err = notEncrypting(v, chosen); err == nil {
			err = withoutSnapshots(v)
		}
	default:
		err = undisturbed(v, chosen)
	}
	if err != nil {
		return nil, err
	}
	args.Disks, args.Deep, args.Rate, args.Runs, args.AllowCircular = m.GetDisks(), m.GetDeep(), m.GetRate(), v.Runs, m.GetAllowCircular()
	if err := c.chooseRekeyKey(ctx, &args, v, chosen, m.GetProvider()); err != nil {
		return nil, err
	}
	if err := c.notShared(ctx, args, v, chosen); err != nil {
		return nil, err
	}
	return c.submit(ctx, taskRekey, v.Name, args)
}

// SetRekeyRate changes the arguments of the task and then tells the host. A task
// that is only about to call the host looks at them again when it has: see
// [Controller.rekey].
func (c vms) SetRekeyRate(ctx context.Context, req *connect.Request[strongroomv1.SetRekeyRateRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, err := c.inv.VM(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	rate, err := rate(req.Msg.GetRate())
	if err != nil {
		return nil, err
	}
	active, err := c.tasks.List(ctx, 0, true)
	if err != nil {
		return nil, err
	}
	for _, t := range active {
		var a vmArgs
		if t.Kind != taskRekey || t.Target != "vm/"+v.Name || json.Unmarshal(t.Args, &a) != nil || !a.Deep {
			continue
		}
		t, err := c.tasks.SetArgs(ctx, t.ID, func(args json.RawMessage) (any, error) {
			err := json.Unmarshal(args, &a)
			a.Rate = rate
			return a, err
		})
		if err != nil {
			return nil, err
		}
		h, err := c.inv.HostByID(ctx, a.HostID)
		if err != nil {
			return nil, err
		}
		if err := c.tellRate(ctx, h, a); err != nil {
			return nil, err
		}
		return connect.NewResponse(taskToAPI(t)), nil
	}
	return nil, errs.New(errs.InvalidState, "no deep rekey of VM %s is under way", v.Name).WithHint("strongroom vm rekey %s --deep --rate RATE", v.Name)
}

// tellRate tells a host the rate of a deep rekey. One that does not answer, or
// has none at work, gets it from the task when that goes on.
func (c *Controller) tellRate(ctx context.Context, h inventory.Host, a vmArgs) error {
	_, err := callHost(ctx, h, c.agents.of(h).SetRekeyRate, &strongroomv1.AgentSetRekeyRateRequest{Id: a.ID, Rate: a.Rate})
	if errors.Is(err, errUnreachable) || errs.KindOf(err) == errs.InvalidState {
		return nil
	}
	return err
}

func (c vms) FillDisks(ctx context.Context, req *connect.Request[strongroomv1.FillDisksRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	chosen, err := encryptedOf(v, req.Msg.GetDisks())
	if err == nil {
		err = undisturbed(v, chosen)
	}
	if err != nil {
		return nil, err
	}
	args.Disks = req.Msg.GetDisks()
	return c.submit(ctx, taskFill, v.Name, args)
}

func (c vms) ResizeDisk(ctx context.Context, req *connect.Request[strongroomv1.ResizeDiskRequest]) (*connect.Response[strongroomv1.Task], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	disk, size := req.Msg.GetDisk(), req.Msg.GetSizeBytes()
	i := slices.IndexFunc(v.Disks, func(d inventory.Disk) bool { return d.Name == disk })
	switch {
	case i < 0:
		return nil, errs.New(errs.NotFound, "VM %s has no disk %q", v.Name, disk).WithHint("strongroom vm show %s", v.Name)
	case size%512 != 0:
		return nil, errs.New(errs.Invalid, "%d bytes are not a multiple of 512", size)
	case size < v.Disks[i].SizeBytes:
		return nil, errs.New(errs.Invalid, "a disk cannot shrink: %s has %d bytes, more than %d", disk, v.Disks[i].SizeBytes, size)
	}
	args.Disks, args.Size = []string{disk}, size
	return c.submit(ctx, taskResize, v.Name, args)
}

// ExportDiskKey passes a user's public key to the host and the answer back. The
// key in it is for the user alone; it is not handed out if that cannot be
// recorded.
func (c vms) ExportDiskKey(ctx context.Context, req *connect.Request[strongroomv1.ExportDiskKeyRequest]) (*connect.Response[strongroomv1.ExportDiskKeyResponse], error) {
	v, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	disk := req.Msg.GetDisk()
	if _, err := encryptedOf(v, []string{disk}); err != nil {
		return nil, err
	}
	h, err := c.inv.HostByID(ctx, args.HostID)
	if err != nil {
		return nil, err
	}
	if err := c.equipVM(ctx, h, args); err != nil {
		return nil, err
	}
	res, err := callHost(ctx, h, c.agents.of(h).ExportDiskKey, &strongroomv1.AgentExportDiskKeyRequest{
		Id: v.ID, Disk: disk, RecipientPublicKey: req.Msg.GetRecipientPublicKey(),
	})
	if err != nil {
		return nil, err
	}
	key := res.GetLayout().GetKey()
	_, err = c.audit.Append(audit.Entry{
		Actor: callerName(ctx), Action: "disk.export-key", Object: "/vm/" + v.Name, Outcome: audit.Success,
		Details: map[string]string{"disk": disk, "uuid": res.GetLayout().GetUuid(), "provider": key.GetProvider(), "key_id": key.GetKeyId()},
	})
	if err != nil {
		return nil, errs.Wrap(err, "cannot write the audit log")
	}
	c.post(ctx, event.New{Type: event.DiskKeyExported, Target: "vm/" + v.Name, Args: map[string]string{"disk": disk}})
	return connect.NewResponse(res), nil
}

func (c vms) RegisterVM(ctx context.Context, req *connect.Request[strongroomv1.RegisterVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	m := req.Msg
	h, err := c.place(ctx, m.GetDatastore(), m.GetHost())
	if err == nil {
		err = c.mayRegister(ctx, m)
	}
	if err != nil {
		return nil, err
	}
	name := m.GetName()
	if name == "" {
		name = m.GetFolder()
	} else if _, err := c.inv.VM(ctx, name); err == nil {
		return nil, errs.New(errs.Exists, "there is a VM %s already", name).WithHint("choose another name with --name")
	}
	return c.submit(ctx, taskRegister, name, vmArgs{Name: m.GetName(), HostID: h.ID, Datastore: m.GetDatastore(), Folder: m.GetFolder()})
}

func (c vms) UnregisterVM(ctx context.Context, req *connect.Request[strongroomv1.UnregisterVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	_, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return c.submit(ctx, taskUnregister, args.Name, args)
}

func (c vms) DeleteVM(ctx context.Context, req *connect.Request[strongroomv1.DeleteVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	_, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return c.submit(ctx, taskDelete, args.Name, args)
}

func (c vms) UnlockVM(ctx context.Context, req *connect.Request[strongroomv1.UnlockVMRequest]) (*connect.Response[strongroomv1.Task], error) {
	_, args, err := c.on(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return c.submit(ctx, taskUnlock, args.Name, args)
}
