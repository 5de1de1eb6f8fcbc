package controller

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"time"

	"connectrpc.com/connect"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// providers serves ProviderService.
type providers struct{ *Controller }

func (c providers) CreateNativeProvider(ctx context.Context, req *connect.Request[strongroomv1.CreateNativeProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	p, err := c.createNative(ctx, req.Msg.GetName(), req.Msg.GetTpmRequired())
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.ProviderCreated, Target: "provider/" + p.Name, Args: map[string]string{"key_id": p.KeyID}})
	if err := c.refresh(ctx); err != nil {
		return nil, err
	}
	c.poke()
	return connect.NewResponse(providerToAPI(p, false)), nil
}

// createNative makes a provider. Its key is stored before the inventory names
// it: a provider whose key is not stored would be a promise that cannot be kept.
// A key that nobody names, which an interrupted call leaves, does no harm.
func (c *Controller) createNative(ctx context.Context, name string, tpmRequired bool) (inventory.Provider, error) {
	c.providersMu.Lock()
	defer c.providersMu.Unlock()
	if _, err := c.inv.Provider(ctx, name); err == nil {
		return inventory.Provider{}, errs.New(errs.Exists, "there is a provider %s already", name)
	}
	native, err := keyprovider.CreateNative(name, tpmRequired, time.Now())
	if err != nil {
		return inventory.Provider{}, errs.New(errs.Invalid, "%w", err)
	}
	record := recordOf(native.Info())
	if err := c.keys.replace(native); err != nil {
		return inventory.Provider{}, err
	}
	p, err := c.inv.CreateProvider(ctx, record)
	if errs.KindOf(err) == errs.Exists { // refused; after another error it may be there
		err = errors.Join(err, c.keys.remove(name))
	}
	return p, err
}

// recordOf is a native provider as the inventory knows it.
func recordOf(info keyprovider.NativeInfo) inventory.Provider {
	return inventory.Provider{
		Name: info.Name, Type: inventory.Native, KeyID: info.KeyID.String(), TPMRequired: info.TPMRequired, Created: info.Created,
	}
}

func (c providers) show(ctx context.Context, p inventory.Provider) (*strongroomv1.Provider, error) {
	users, err := c.inv.Usage(ctx, p.Name, "")
	if err != nil {
		return nil, err
	}
	out := providerToAPI(p, len(users) > 0)
	if p.Standard != nil && p.Standard.Wrapping != nil {
		out.Standard.Wrapping, err = c.wrappingToAPI(ctx, p, users)
	}
	return out, err
}

func (c providers) ListProviders(ctx context.Context, _ *connect.Request[strongroomv1.ListProvidersRequest]) (*connect.Response[strongroomv1.ListProvidersResponse], error) {
	all, err := c.inv.Providers(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.ListProvidersResponse{}
	for _, p := range all {
		out, err := c.show(ctx, p)
		if err != nil {
			return nil, err
		}
		res.Providers = append(res.Providers, out)
	}
	return connect.NewResponse(res), nil
}

func (c providers) GetProvider(ctx context.Context, req *connect.Request[strongroomv1.GetProviderRequest]) (*connect.Response[strongroomv1.Provider], error) {
	p, err := c.inv.Provider(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	out, err := c.show(ctx, p)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// password takes a password out of a request; nil if there is none.
func password(b []byte) (*keymem.Key, error) {
	if len(b) == 0 {
		return nil, nil
	}
	return keymem.Take(b)
}

func (c providers) ExportProvider(ctx context.Context, req *connect.Request[strongroomv1.ExportProviderRequest]) (*connect.Response[strongroomv1.ExportProviderResponse], error) {
	secret, err := password(req.Msg.GetPassword())
	if err != nil {
		return nil, err
	}
	defer secret.Close()
	p, err := c.inv.Provider(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	if p.Standard != nil {
		return nil, errs.New(errs.InvalidState, "key provider %s is a standard one: its key server has the keys, and is to back them up", p.Name)
	}
	native, err := c.keys.native(p.Name)
	if err != nil {
		return nil, err
	}
	p12, err := native.Export(secret, time.Now())
	if err != nil {
		return nil, errs.Wrap(err, "cannot export provider %s", p.Name)
	}
	sum := sha256.Sum256(p12)
	id, err := c.inv.StartExport(ctx, p.Name, hex.EncodeToString(sum[:]))
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.ProviderExported, Target: "provider/" + p.Name})
	// Which choice was made is on record, the password never (behaviour 272).
	if err := c.auditBackup(ctx, p.Name, secret != nil); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.ExportProviderResponse{FileName: p.Name + ".p12", P12: p12, ExportId: id}), nil
}

// auditBackup records that a backup was made, and whether a password protects it.
func (c *Controller) auditBackup(ctx context.Context, name string, protected bool) error {
	_, err := c.audit.Append(audit.Entry{
		Actor: callerName(ctx), Action: "provider.export", Object: "/provider/" + name, Outcome: audit.Success,
		Details: map[string]string{"password": map[bool]string{true: "set", false: "none"}[protected]},
	})
	return errs.Wrap(err, "cannot write the audit log")
}

func (c providers) ConfirmProviderBackup(ctx context.Context, req *connect.Request[strongroomv1.ConfirmProviderBackupRequest]) (*connect.Response[strongroomv1.Provider], error) {
	if _, err := c.inv.ConfirmBackup(ctx, req.Msg.GetName(), req.Msg.GetExportId(), hex.EncodeToString(req.Msg.GetSha256())); err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.ProviderBackedUp, Target: "provider/" + req.Msg.GetName()})
	// The hosts get the key at once, so that the answer tells the state that the
	// user can work with.
	if err := c.remediateOnce(ctx); err != nil {
		return nil, err
	}
	return c.GetProvider(ctx, connect.NewRequest(&strongroomv1.GetProviderRequest{Name: req.Msg.GetName()}))
}

func (c providers) ImportProvider(ctx context.Context, req *connect.Request[strongroomv1.ImportProviderRequest]) (*connect.Response[strongroomv1.ImportProviderResponse], error) {
	secret, err := password(req.Msg.GetPassword())
	if err != nil {
		return nil, err
	}
	defer secret.Close()
	defer clear(req.Msg.GetP12()) // without a password it holds the KDK in the clear
	native, backup, err := keyprovider.Import(req.Msg.GetP12(), secret)
	if err != nil {
		return nil, importError(err)
	}
	res := &strongroomv1.ImportProviderResponse{Exported: stamp(backup.Exported), PasswordProtected: backup.PasswordProtected}
	if req.Msg.GetDryRun() {
		record := recordOf(native.Info())
		if err := native.Close(); err != nil {
			return nil, err
		}
		if _, err := c.inv.CheckImport(ctx, record); err != nil {
			return nil, err
		}
		res.Provider = providerToAPI(record, false)
		return connect.NewResponse(res), nil
	}
	p, imported, err := c.importNative(ctx, native)
	if err != nil {
		return nil, err
	}
	res.Imported = imported
	if imported {
		c.post(ctx, event.New{Type: event.ProviderImported, Target: "provider/" + p.Name, Args: map[string]string{"key_id": p.KeyID}})
	}
	if res.Unlocked, err = c.unlockAll(ctx); err != nil {
		return nil, err
	}
	if p, err = c.inv.Provider(ctx, p.Name); err != nil {
		return nil, err
	}
	if res.Provider, err = c.show(ctx, p); err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// importNative stores an imported provider, which it owns from now on: the key
// first, as in createNative. It reports whether the provider is new here.
func (c *Controller) importNative(ctx context.Context, native *keyprovider.Native) (inventory.Provider, bool, error) {
	c.providersMu.Lock()
	defer c.providersMu.Unlock()
	record := recordOf(native.Info())
	existed, err := c.inv.CheckImport(ctx, record)
	if err != nil {
		return inventory.Provider{}, false, errors.Join(err, native.Close())
	}
	store := c.keys.replace
	if existed {
		store = c.keys.add // refuses other key material under the same key id
	}
	if err := store(native); err != nil {
		return inventory.Provider{}, false, err
	}
	return c.inv.ImportProvider(ctx, record)
}

// importError tells a user what is wrong with a backup file.
func importError(err error) error {
	switch {
	case errors.Is(err, keyprovider.ErrPasswordNeeded):
		return errs.New(errs.Denied, "cannot import: %w", err).WithReason(apierr.ReasonPasswordNeeded).
			WithHint("strongroom provider import FILE.p12 --password-file FILE")
	case errors.Is(err, keyprovider.ErrWrongPassword):
		return errs.New(errs.Denied, "cannot import: %w", err).WithHint("try again with the password that was set at the export")
	}
	return errs.New(errs.Corrupt, "cannot import: %w", err).WithHint("use another copy of the backup")
}

// unlockAll gives the hosts their keys and looks again at the VMs that are
// locked. It returns the names of those that no longer are.
func (c *Controller) unlockAll(ctx context.Context) ([]string, error) {
	// Listed first: a heartbeat may tell of a VM before we look at it.
	vms, err := c.inv.VMs(ctx, "")
	if err != nil {
		return nil, err
	}
	if err := c.remediateOnce(ctx); err != nil {
		return nil, err
	}
	var unlocked []string
	for _, vm := range vms {
		if vm.CryptoState != inventory.Locked {
			continue
		}
		if now, err := c.lookAgain(ctx, vm); err == nil && now.CryptoState == inventory.Unlocked {
			unlocked = append(unlocked, vm.Name)
		}
	}
	return unlocked, c.events.Evaluate(ctx, c.inv)
}

// lookAgain asks the host how a VM is and notes it.
func (c *Controller) lookAgain(ctx context.Context, vm inventory.VM) (inventory.VM, error) {
	h, err := c.inv.HostByID(ctx, vm.HostID)
	if err != nil {
		return vm, err
	}
	res, err := callHost(ctx, h, c.agents.of(h).GetVM, &strongroomv1.AgentGetVMRequest{Id: vm.ID})
	if err != nil {
		return vm, err
	}
	if err := c.noteVM(ctx, h.ID, res.GetVm()); err != nil {
		return vm, err
	}
	return c.inv.VMByID(ctx, vm.ID)
}

func (c providers) SetDefaultProvider(ctx context.Context, req *connect.Request[strongroomv1.SetDefaultProviderRequest]) (*connect.Response[strongroomv1.SetDefaultProviderResponse], error) {
	if err := c.inv.SetDefaultProvider(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	chosen := req.Msg.GetName()
	if chosen == "" {
		chosen = "none"
	}
	c.post(ctx, event.New{Type: event.ProviderDefaultChanged, Target: "provider/" + req.Msg.GetName(), Args: map[string]string{"provider": chosen}})
	if err := c.events.Evaluate(ctx, c.inv); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.SetDefaultProviderResponse{}), nil
}

func (c providers) GetProviderUsage(ctx context.Context, req *connect.Request[strongroomv1.GetProviderUsageRequest]) (*connect.Response[strongroomv1.GetProviderUsageResponse], error) {
	users, err := c.inv.Usage(ctx, req.Msg.GetName(), "")
	if err != nil {
		return nil, err
	}
	if len(users) == 0 {
		if _, err := c.inv.Provider(ctx, req.Msg.GetName()); err != nil {
			return nil, err
		}
	}
	n, err := c.objectNames(ctx)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.GetProviderUsageResponse{}
	for _, u := range users {
		res.Users = append(res.Users, &strongroomv1.KeyUser{Vm: u.VM, Disk: u.Disk, Snapshot: u.Snapshot, KeyId: u.Key.KeyID, Host: n[u.HostID]})
	}
	return connect.NewResponse(res), nil
}

func (c providers) DeleteProvider(ctx context.Context, req *connect.Request[strongroomv1.DeleteProviderRequest]) (*connect.Response[strongroomv1.DeleteProviderResponse], error) {
	name := req.Msg.GetName()
	keyID, err := c.deleteProvider(ctx, name, req.Msg.GetForce())
	if err != nil {
		return nil, err
	}
	c.post(ctx, event.New{Type: event.ProviderDeleted, Target: "provider/" + name, Args: map[string]string{"key_id": keyID}})
	if err := c.remediateOnce(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.DeleteProviderResponse{}), nil
}

// deleteProvider removes a provider and its key, and returns the key's id. The
// inventory comes first: a key that nobody names does no harm. If that is all
// an interrupted call has left, it is removed.
func (c *Controller) deleteProvider(ctx context.Context, name string, force bool) (keyID string, err error) {
	c.providersMu.Lock()
	defer c.providersMu.Unlock()
	p, err := c.inv.Provider(ctx, name)
	if errs.KindOf(err) == errs.NotFound {
		left, lookupErr := c.keys.native(name)
		if lookupErr != nil {
			return "", err
		}
		return left.Info().KeyID.String(), c.keys.remove(name)
	}
	if err != nil {
		return "", err
	}
	if !force {
		if err := c.unneededByTasks(ctx, name); err != nil {
			return "", err
		}
	}
	if err := c.inv.DeleteProvider(ctx, name, force); err != nil {
		return "", err
	}
	if p.Standard != nil {
		// Its key server is not asked: it may be away for ever.
		c.servers.Put(name, nil)
		return "none", c.keys.setCredentials(name, nil)
	}
	return p.KeyID, c.keys.remove(name)
}

// unneededByTasks returns an error if a task that has not ended is about to use
// a key of the provider: no VM tells of that need yet.
func (c *Controller) unneededByTasks(ctx context.Context, provider string) error {
	active, err := c.tasks.List(ctx, 0, true)
	if err != nil {
		return err
	}
	for _, t := range active {
		var a vmArgs
		if err := json.Unmarshal(t.Args, &a); err != nil {
			return errs.New(errs.Corrupt, "arguments of task %s: %w", t.ID, err)
		}
		if a.Key != nil && a.Key.Provider == provider || a.NewKeyOf == provider || t.Kind == taskRotate && t.Target == "provider/"+provider {
			return errs.New(errs.InvalidState, "cannot delete key provider %s: %s of %s uses it", provider, t.Kind, t.Target).
				WithReason("ResourceInUse").WithHint("strongroom task wait %s", t.ID)
		}
	}
	return nil
}
