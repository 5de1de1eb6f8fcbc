package host

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"strongroom/api/apierr"
	"strongroom/api/rule"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/control/guard"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// agent serves the controller.
type agent struct {
	host *Host
}

var _ strongroomv1connect.AgentServiceHandler = (*agent)(nil)

// agentServer returns the server of the agent API. Only the controller of the
// host's cluster gets through the TLS handshake; strangers take no more than a
// bounded number of connections, for the time of that.
func (h *Host) agentServer() (*guard.Server, error) {
	rules, err := rule.Of(strongroomv1connect.AgentServiceName)
	if err != nil {
		return nil, err
	}
	for procedure, r := range rules {
		if r.PeerRole != string(pki.Controller) {
			return nil, fmt.Errorf("%s is not declared to be for controllers only", procedure)
		}
	}
	accept := func(id pki.Identity) error {
		if id.String() != h.secrets.identity.ControllerIdentity {
			return errs.New(errs.Denied, "%s is not the controller of this host", id)
		}
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewAgentServiceHandler(&agent{h},
		connect.WithReadMaxBytes(requestMax), connect.WithInterceptors(connect.UnaryInterceptorFunc(explainUnary))))
	server := guard.NewServer(mux, guard.Limits{}, h.log)
	server.HTTP.TLSConfig = pki.ServerConfig(h.credential, h.secrets.ca, false, accept)
	server.HTTP.HTTP2.SendPingTimeout, server.HTTP.HTTP2.PingTimeout = 15*time.Second, 15*time.Second
	return server, nil
}

func (a *agent) SyncHost(ctx context.Context, req *connect.Request[strongroomv1.SyncHostRequest]) (*connect.Response[strongroomv1.SyncHostResponse], error) {
	h := a.host
	missing, err := h.sync(req.Msg)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.SyncHostResponse{Providers: h.held(), MissingKeks: missing}
	for _, d := range h.secrets.snapshot().Datastores {
		space := &strongroomv1.DatastoreSpace{Name: d.Name}
		var fs unix.Statfs_t
		if err := unix.Statfs(d.Path, &fs); err != nil {
			space.Error = err.Error()
		} else {
			space.Accessible = true
			space.CapacityBytes, space.FreeBytes = fs.Blocks*uint64(fs.Bsize), fs.Bavail*uint64(fs.Bsize)
		}
		res.Datastores = append(res.Datastores, space)
	}
	return connect.NewResponse(res), nil
}

// sync makes what is wanted the host's, and returns the keys that it lacks. One at a
// time: a controller that gave up one may begin the next while that goes on.
func (h *Host) sync(req *strongroomv1.SyncHostRequest) (missing []*strongroomv1.KeyRef, err error) {
	h.syncing.Lock()
	defer h.syncing.Unlock()
	if err := h.syncDatastores(req.GetDatastores()); err != nil {
		return nil, err
	}
	if err := h.syncProviders(req.GetProviders()); err != nil {
		return nil, err
	}
	if err := h.syncKeyServers(req.GetProviders()); err != nil {
		return nil, err
	}
	return h.syncKEKs(req.GetProviders(), req.GetKeks())
}

// syncDatastores makes the wanted datastores the host's. One that has
// registered VMs stays.
func (h *Host) syncDatastores(wanted []*strongroomv1.WantedDatastore) error {
	var next []datastore
	for _, w := range wanted {
		if !filepath.IsAbs(w.GetPath()) {
			return errs.New(errs.Invalid, "path %.128q of datastore %s is not absolute", w.GetPath(), w.GetName())
		}
		next = append(next, datastore{Name: w.GetName(), Type: w.GetType(), Path: w.GetPath()})
	}
	current := h.secrets.snapshot()
	for _, vm := range current.VMs {
		named := func(d datastore) bool { return d.Name == vm.Datastore }
		if i := slices.IndexFunc(current.Datastores, named); i >= 0 && !slices.ContainsFunc(next, named) {
			next = append(next, current.Datastores[i])
		}
	}
	if slices.Equal(current.Datastores, next) {
		return nil
	}
	return h.secrets.updateRegistry(func(r *registry) error {
		r.Datastores = next
		return nil
	})
}

// syncProviders makes the wanted native providers the host's, in memory and in the
// sealed configuration. The keys of others are wiped.
func (h *Host) syncProviders(wanted []*strongroomv1.WantedProvider) error {
	set, changed := h.secrets.providers, false
	keep := map[string]bool{}
	var failures []error // one bad provider does not keep the others away
	for _, w := range wanted {
		if w.GetStandard() {
			continue // see syncKEKs
		}
		keep[w.GetName()] = true
		if len(w.GetParcel()) == 0 {
			continue // it is here, the host said so
		}
		if err := h.takeOver(w); err != nil {
			failures = append(failures, errs.Wrap(err, "cannot take over provider %s", w.GetName()))
			continue
		}
		changed = true
	}
	for _, name := range set.Names() {
		if keep[name] {
			continue
		}
		if err := set.Remove(name); err != nil && !errors.Is(err, keyprovider.ErrUnknownProvider) {
			failures = append(failures, err)
			continue
		}
		changed = true
	}
	if changed {
		h.notify()
	}
	if err := h.secrets.saveProviders(changed); err != nil {
		failures = append(failures, errs.Wrap(err, "cannot store providers in the sealed host configuration"))
	}
	return errors.Join(failures...)
}

// takeOver opens the parcel of a provider and adds that to the host's.
func (h *Host) takeOver(w *strongroomv1.WantedProvider) error {
	keyID, err := uuid.Parse(w.GetKeyId())
	if err != nil {
		return errs.New(errs.Invalid, "its key id: %w", err)
	}
	info := keyprovider.NativeInfo{Name: w.GetName(), KeyID: keyID, TPMRequired: w.GetTpmRequired(), Created: w.GetCreated().AsTime()}
	native, err := keyprovider.OpenNative(info, h.secrets.parcel, "controller", h.secrets.identity.HostID, w.GetParcel())
	if err != nil {
		return err
	}
	if err := h.secrets.providers.Add(native); err != nil {
		return errors.Join(err, native.Close())
	}
	return nil
}

// held returns the native providers whose keys the host has, and the standard
// ones that it knows.
func (h *Host) held() []*strongroomv1.HeldProvider {
	var out []*strongroomv1.HeldProvider
	for _, name := range h.secrets.providers.Names() {
		p, err := h.secrets.providers.Lookup(name)
		if native, ok := p.(*keyprovider.Native); err == nil && ok {
			out = append(out, &strongroomv1.HeldProvider{Name: name, KeyId: native.Info().KeyID.String()})
		}
	}
	for _, name := range h.secrets.cache.Providers() {
		out = append(out, &strongroomv1.HeldProvider{Name: name})
	}
	return out
}

func ref(k *strongroomv1.KeyRef) keysafe.Ref {
	return keysafe.Ref{Provider: k.GetProvider(), KeyID: k.GetKeyId()}
}

// progressEvery is how often progress is told: often enough for a bar.
const progressEvery = 200 * time.Millisecond

// stream does work, sends its progress, and ends with the VM as it is then.
func (a *agent) stream(ctx context.Context, out *connect.ServerStream[strongroomv1.AgentProgress], id string, work func(report) error) error {
	var mu sync.Mutex // Send is for one goroutine at a time
	var last time.Time
	var step string
	err := work(func(now string, done, total int64, unit string) {
		mu.Lock()
		defer mu.Unlock()
		if now == step && time.Since(last) < progressEvery {
			return
		}
		last, step = time.Now(), now
		// A broken stream ends ctx, which ends the work.
		_ = out.Send(&strongroomv1.AgentProgress{Step: now, Done: done, Total: total, Unit: unit})
	})
	a.host.notify() // also of what it did before it failed
	if err != nil {
		return apierr.To(explain(err))
	}
	m, err := a.host.machine(id)
	if err != nil {
		return apierr.To(explain(err))
	}
	vm, err := a.host.describe(ctx, m)
	if err != nil {
		return apierr.To(explain(err))
	}
	mu.Lock()
	defer mu.Unlock()
	return out.Send(&strongroomv1.AgentProgress{Result: vm})
}

func (a *agent) CreateVM(ctx context.Context, req *connect.Request[strongroomv1.AgentCreateVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error { return a.host.createVM(ctx, req.Msg, r) })
}

func (a *agent) CloneVM(ctx context.Context, req *connect.Request[strongroomv1.AgentCloneVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error { return a.host.cloneVM(ctx, req.Msg, r) })
}

func (a *agent) CreateSnapshot(ctx context.Context, req *connect.Request[strongroomv1.AgentCreateSnapshotRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error { return a.host.createSnapshot(ctx, req.Msg, r) })
}

func (a *agent) RevertToSnapshot(ctx context.Context, req *connect.Request[strongroomv1.AgentRevertToSnapshotRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error {
		return a.host.revertToSnapshot(ctx, req.Msg.GetId(), req.Msg.GetSnapshotId(), req.Msg.GetRevertId(), r)
	})
}

func (a *agent) RenameSnapshot(ctx context.Context, req *connect.Request[strongroomv1.AgentRenameSnapshotRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return a.answer(ctx, req.Msg.GetId(), a.host.renameSnapshot(ctx, req.Msg))
}

func (a *agent) DeleteSnapshot(ctx context.Context, req *connect.Request[strongroomv1.AgentDeleteSnapshotRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return a.answer(ctx, req.Msg.GetId(), a.host.deleteSnapshot(ctx, req.Msg.GetId(), req.Msg.GetSnapshotId()))
}

func (a *agent) ConsolidateSnapshots(ctx context.Context, req *connect.Request[strongroomv1.AgentConsolidateSnapshotsRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return a.answer(ctx, req.Msg.GetId(), a.host.consolidateSnapshots(ctx, req.Msg.GetId()))
}

func (a *agent) EncryptVM(ctx context.Context, req *connect.Request[strongroomv1.AgentEncryptVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error {
		if req.Msg.GetInPlace() {
			return a.host.encryptInPlace(ctx, req.Msg.GetId(), req.Msg.GetDisks(), ref(req.Msg.GetKey()), req.Msg.GetRate(), r)
		}
		return a.host.encryptVM(ctx, req.Msg.GetId(), req.Msg.GetDisks(), ref(req.Msg.GetKey()), req.Msg.GetRate(), r)
	})
}

func (a *agent) DecryptVM(ctx context.Context, req *connect.Request[strongroomv1.AgentDecryptVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error {
		return a.host.decryptVM(ctx, req.Msg.GetId(), req.Msg.GetDisks(), req.Msg.GetRate(), r)
	})
}

func (a *agent) RekeyVM(ctx context.Context, req *connect.Request[strongroomv1.AgentRekeyVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error {
		return a.host.rekeyVM(ctx, req.Msg.GetId(), req.Msg.GetDisks(), ref(req.Msg.GetKey()), depth{req.Msg.GetDeep(), req.Msg.GetRate(), req.Msg.GetOwnKey()}, r)
	})
}

func (a *agent) SetRekeyRate(_ context.Context, req *connect.Request[strongroomv1.AgentSetRekeyRateRequest]) (*connect.Response[strongroomv1.AgentSetRekeyRateResponse], error) {
	if err := a.host.setRekeyRate(req.Msg.GetId(), req.Msg.GetRate()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.AgentSetRekeyRateResponse{}), nil
}

func (a *agent) FillDisks(ctx context.Context, req *connect.Request[strongroomv1.AgentFillDisksRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return a.stream(ctx, out, req.Msg.GetId(), func(r report) error {
		return a.host.fillDisks(ctx, req.Msg.GetId(), req.Msg.GetDisks(), r)
	})
}

func (a *agent) ResizeDisk(ctx context.Context, req *connect.Request[strongroomv1.AgentResizeDiskRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return a.answer(ctx, req.Msg.GetId(), a.host.resizeDisk(ctx, req.Msg.GetId(), req.Msg.GetDisk(), req.Msg.GetSizeBytes()))
}

func (a *agent) ExportDiskKey(ctx context.Context, req *connect.Request[strongroomv1.AgentExportDiskKeyRequest]) (*connect.Response[strongroomv1.ExportDiskKeyResponse], error) {
	res, err := a.host.exportDiskKey(ctx, req.Msg.GetId(), req.Msg.GetDisk(), req.Msg.GetRecipientPublicKey())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// answer ends a call on a VM with the VM as it is now.
func (a *agent) answer(ctx context.Context, id string, err error) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	if err != nil {
		return nil, err
	}
	m, err := a.host.machine(id)
	if err != nil {
		return nil, err
	}
	vm, err := a.host.describe(ctx, m)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&strongroomv1.AgentVMResponse{Vm: vm}), nil
}

func (a *agent) PowerOnVM(ctx context.Context, req *connect.Request[strongroomv1.AgentPowerOnVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return a.answer(ctx, req.Msg.GetId(), a.host.powerOn(ctx, req.Msg.GetId()))
}

func (a *agent) PowerOffVM(ctx context.Context, req *connect.Request[strongroomv1.AgentPowerOffVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return a.answer(ctx, req.Msg.GetId(), a.host.powerOff(ctx, req.Msg.GetId(), req.Msg.GetHard(), guestTimeout(req.Msg.GetTimeoutSeconds())))
}

func (a *agent) RegisterVM(ctx context.Context, req *connect.Request[strongroomv1.AgentRegisterVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	id, err := a.host.registerVM(req.Msg.GetDatastore(), req.Msg.GetFolder(), req.Msg.GetName())
	a.host.notify()
	return a.answer(ctx, id, err)
}

func (a *agent) GetVM(ctx context.Context, req *connect.Request[strongroomv1.AgentGetVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	if req.Msg.GetSettled() {
		m, err := a.host.machine(req.Msg.GetId())
		if err == nil {
			err = m.settle(ctx)
		}
		if err != nil {
			return nil, err
		}
	}
	return a.answer(ctx, req.Msg.GetId(), nil)
}

func (a *agent) UnregisterVM(ctx context.Context, req *connect.Request[strongroomv1.AgentUnregisterVMRequest]) (*connect.Response[strongroomv1.AgentUnregisterVMResponse], error) {
	if err := a.host.unregisterVM(ctx, req.Msg.GetId(), false); err != nil {
		return nil, err
	}
	a.host.notify()
	return connect.NewResponse(&strongroomv1.AgentUnregisterVMResponse{}), nil
}

func (a *agent) DeleteVM(ctx context.Context, req *connect.Request[strongroomv1.AgentDeleteVMRequest]) (*connect.Response[strongroomv1.AgentDeleteVMResponse], error) {
	if err := a.host.unregisterVM(ctx, req.Msg.GetId(), true); err != nil {
		return nil, err
	}
	a.host.notify()
	return connect.NewResponse(&strongroomv1.AgentDeleteVMResponse{}), nil
}
