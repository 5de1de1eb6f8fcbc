package controller

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/client"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/pki"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider"
)

// fakeHost speaks the agent's protocol over real mutual TLS and keeps its VMs
// in memory. It is here to fail in ways that a real host does not on demand,
// and to be many.
type fakeHost struct {
	strongroomv1connect.UnimplementedAgentServiceHandler

	t         testing.TB
	id        string
	name      string
	address   string
	recipient *parcel.Recipient
	enroll    strongroomv1connect.EnrollServiceClient
	tpm       bool

	mu   sync.Mutex // guards all below
	held map[string]string
	keks map[string]bool // by "provider/key id"
	// instance is this start of the agent, and told the number of its last word.
	instance string
	told     uint64
	vms      map[string]*strongroomv1.VM // by id
	calls    map[string]int              // by method
	syncs    []*strongroomv1.SyncHostRequest
	created  *strongroomv1.AgentCreateVMRequest // the last one
	rates    []int64                            // that rekeys were set to
	reverts  []string                           // ids of the reverts that were asked for
	encrypts []*strongroomv1.AgentEncryptVMRequest
	found    *strongroomv1.AgentFindVMResponse // nil: nothing on its datastores
	// fault is asked before each call and says how it ends; nil: as it should.
	fault func(method string, call int) fault
}

// fault is how a call to a fake host ends.
type fault struct {
	refuse error           // not done, and this is the answer
	lost   bool            // done, but the answer is lost with the connection
	vanish bool            // not done, and the connection breaks
	hang   <-chan struct{} // not done before this is closed
}

// newJoin makes the keys of a host and the request to join with them.
func newJoin(t testing.TB, token, name, address string) (*strongroomv1.JoinRequest, *parcel.Recipient, func(cert, ca []byte) *pki.Credential) {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	recipient, err := parcel.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { recipient.Close() })
	credential := func(cert, ca []byte) *pki.Credential {
		t.Helper()
		leaf, err1 := x509.ParseCertificate(cert)
		root, err2 := x509.ParseCertificate(ca)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		c, err := pki.NewCredential(leaf, key, root)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	return &strongroomv1.JoinRequest{
		Token: token, Name: name, Address: address, Csr: csr, ParcelPublicKey: recipient.PublicKey(), Version: "test",
		Capabilities: map[string]bool{inventory.CapabilityTPM: false},
	}, recipient, credential
}

// enrollClient returns a client of EnrollService that shows a certificate, or
// none.
func (s *site) enrollClient(config *tls.Config) strongroomv1connect.EnrollServiceClient {
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	s.t.Cleanup(transport.CloseIdleConnections)
	return strongroomv1connect.NewEnrollServiceClient(&http.Client{Transport: transport}, "https://"+s.cfg.Listen)
}

func (s *site) joinToken(cluster string) string {
	s.t.Helper()
	return must[strongroomv1.CreateJoinTokenResponse](s.t)(client.Call(s.t.Context(), s.admin.Host().CreateJoinToken,
		&strongroomv1.CreateJoinTokenRequest{Cluster: cluster})).GetToken()
}

// host has a fake host join a cluster, serve and send its first heartbeat.
func (s *site) host(cluster, name string) *fakeHost {
	s.t.Helper()
	l := listenLoopback(s.t)
	text := s.joinToken(cluster)
	token, err := pki.ParseJoinToken(text)
	if err != nil {
		s.t.Fatal(err)
	}
	req, recipient, credential := newJoin(s.t, text, name, l.Addr().String())
	res, err := s.enrollClient(pki.JoinConfig(token.CA, pki.Controller)).Join(s.t.Context(), connect.NewRequest(req))
	if err != nil {
		s.t.Fatal(err)
	}
	cred := credential(res.Msg.GetCertificate(), res.Msg.GetCaCertificate())
	h := &fakeHost{
		t: s.t, id: res.Msg.GetHostId(), name: name, address: l.Addr().String(), recipient: recipient,
		enroll: s.enrollClient(pki.ClientConfig(cred, s.c.ca.Certificate(), s.c.identity())),
		held:   map[string]string{}, keks: map[string]bool{}, instance: "first", vms: map[string]*strongroomv1.VM{}, calls: map[string]int{},
	}
	h.serve(l, cred, s.c.ca.Certificate(), s.c.identity())
	h.beat()
	return h
}

func (h *fakeHost) serve(l net.Listener, cred *pki.Credential, ca *x509.Certificate, controller pki.Identity) {
	mux := http.NewServeMux()
	mux.Handle(strongroomv1connect.NewAgentServiceHandler(h, connect.WithInterceptors(faults{h})))
	accept := func(id pki.Identity) error {
		if id != controller {
			return errs.New(errs.Denied, "%s is not the controller", id)
		}
		return nil
	}
	server := &http.Server{Handler: mux, TLSConfig: pki.ServerConfig(cred, ca, false, accept), ErrorLog: log.New(io.Discard, "", 0)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := daemon.Serve(ctx, server, l); err != nil {
			h.t.Errorf("fake host: %v", err)
		}
	}()
	h.t.Cleanup(func() { cancel(); <-ended })
}

// beat sends a heartbeat that must be taken.
func (h *fakeHost) beat() {
	h.t.Helper()
	if _, err := h.enroll.Heartbeat(h.t.Context(), connect.NewRequest(h.heartbeat())); err != nil {
		h.t.Fatal(err)
	}
}

// brief is a heartbeat with all digests and, in full, the VMs of lacking that fit.
func (h *fakeHost) brief(lacking []string) *strongroomv1.HeartbeatRequest {
	h.t.Helper()
	req := h.heartbeat()
	full := map[string]*strongroomv1.VM{}
	for _, vm := range req.GetVms() {
		said := vm.GetDescription()
		vm.Description = nil
		text, err := proto.MarshalOptions{Deterministic: true}.Marshal(vm)
		if err != nil {
			h.t.Fatal(err)
		}
		vm.Description = said
		digest := sha256.Sum256(text)
		full[vm.GetId()], req.Digests = vm, append(req.Digests, &strongroomv1.VMDigest{Id: vm.GetId(), Digest: digest[:]})
	}
	req.Vms = nil
	for _, id := range lacking {
		if vm := full[id]; vm != nil && proto.Size(req)+proto.Size(vm) < 1<<20 {
			req.Vms = append(req.Vms, vm)
		}
	}
	return req
}

// lacks sends req and returns what the controller says that it lacks.
func (h *fakeHost) lacks(req *strongroomv1.HeartbeatRequest) []string {
	h.t.Helper()
	res, err := h.enroll.Heartbeat(h.t.Context(), connect.NewRequest(req))
	if err != nil {
		h.t.Fatal(err)
	}
	return res.Msg.GetLacking()
}

func (h *fakeHost) heartbeat() *strongroomv1.HeartbeatRequest {
	h.mu.Lock()
	defer h.mu.Unlock()
	req := &strongroomv1.HeartbeatRequest{
		Address: h.address, Version: "test", BootId: "boot-1", Capabilities: map[string]bool{inventory.CapabilityTPM: h.tpm}, Providers: h.heldNow(), Instance: h.instance,
	}
	h.told++
	req.Sequence = h.told
	for _, vm := range h.vms {
		req.Vms = append(req.Vms, h.describe(vm))
	}
	return req
}

func (h *fakeHost) describe(vm *strongroomv1.VM) *strongroomv1.VM {
	out := proto.CloneOf(vm)
	h.told++
	out.Description = &strongroomv1.Description{Instance: h.instance, Sequence: h.told}
	return out
}

func (h *fakeHost) heldNow() []*strongroomv1.HeldProvider {
	var held []*strongroomv1.HeldProvider
	for name, id := range h.held {
		held = append(held, &strongroomv1.HeldProvider{Name: name, KeyId: id})
	}
	slices.SortFunc(held, func(a, b *strongroomv1.HeldProvider) int {
		if a.GetName() < b.GetName() {
			return -1
		}
		return 1
	})
	return held
}

// change changes the host under its lock.
func (h *fakeHost) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// failing has the calls of one method end so, from the first now on; after n
// calls all is well again.
func (h *fakeHost) failing(method string, n int, f fault) {
	h.change(func() {
		first := h.calls[method]
		h.fault = func(m string, call int) fault {
			if m == method && call-first < n {
				return f
			}
			return fault{}
		}
	})
}

func (h *fakeHost) count(method string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls[method]
}

func (h *fakeHost) allSyncs() []*strongroomv1.SyncHostRequest {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.syncs)
}

// faults counts calls and lets them end as the test says.
type faults struct{ h *fakeHost }

func (f faults) before(ctx context.Context, procedure string) (fault, error) {
	method := procedure[len("/"+strongroomv1connect.AgentServiceName+"/"):]
	f.h.mu.Lock()
	call := f.h.calls[method]
	f.h.calls[method]++
	var out fault
	if f.h.fault != nil {
		out = f.h.fault(method, call)
	}
	f.h.mu.Unlock()
	if out.vanish {
		panic(http.ErrAbortHandler)
	}
	if out.hang != nil {
		select {
		case <-out.hang:
		case <-ctx.Done():
			return out, ctx.Err()
		}
	}
	return out, out.refuse
}

func (f faults) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		out, err := f.before(ctx, req.Spec().Procedure)
		var res connect.AnyResponse
		if err == nil {
			res, err = next(ctx, req)
		}
		if out.lost {
			panic(http.ErrAbortHandler)
		}
		if err != nil {
			return nil, apierr.To(err)
		}
		return res, nil
	}
}

func (f faults) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		out, err := f.before(ctx, conn.Spec().Procedure)
		if err == nil {
			if out.lost {
				conn = muted{conn}
			}
			err = next(ctx, conn)
		}
		if out.lost {
			panic(http.ErrAbortHandler)
		}
		if err != nil {
			return apierr.To(err)
		}
		return nil
	}
}

func (f faults) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// muted is a stream whose answers do not arrive.
type muted struct{ connect.StreamingHandlerConn }

func (muted) Send(any) error { return nil }

func (h *fakeHost) SyncHost(_ context.Context, req *connect.Request[strongroomv1.SyncHostRequest]) (*connect.Response[strongroomv1.SyncHostResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.syncs = append(h.syncs, proto.CloneOf(req.Msg))
	wanted := map[string]string{}
	for _, p := range req.Msg.GetProviders() {
		if len(p.GetParcel()) > 0 {
			id, err := uuid.Parse(p.GetKeyId())
			if err != nil {
				return nil, err
			}
			native, err := keyprovider.OpenNative(keyprovider.NativeInfo{
				Name: p.GetName(), KeyID: id, TPMRequired: p.GetTpmRequired(), Created: p.GetCreated().AsTime(),
			}, h.recipient, "controller", h.id, p.GetParcel())
			if err != nil {
				return nil, err
			}
			native.Close()
			h.held[p.GetName()] = p.GetKeyId()
		}
		if h.held[p.GetName()] == p.GetKeyId() {
			wanted[p.GetName()] = p.GetKeyId()
		}
	}
	h.held = wanted
	res := &strongroomv1.SyncHostResponse{Providers: h.heldNow()}
	keks := map[string]bool{}
	for _, w := range req.Msg.GetKeks() {
		ref := keysafe.Ref{Provider: w.GetKey().GetProvider(), KeyID: w.GetKey().GetKeyId()}
		if len(w.GetParcel()) > 0 {
			kek, err := h.recipient.Open(w.GetParcel(), keyprovider.KEKContext("controller", h.id, ref))
			if err != nil {
				return nil, err
			}
			kek.Close()
			h.keks[ref.String()] = true
		}
		if keks[ref.String()] = h.keks[ref.String()]; !keks[ref.String()] {
			delete(keks, ref.String())
			res.MissingKeks = append(res.MissingKeks, w.GetKey())
		}
	}
	h.keks = keks
	for _, d := range req.Msg.GetDatastores() {
		res.Datastores = append(res.Datastores, &strongroomv1.DatastoreSpace{Name: d.GetName(), Accessible: true, CapacityBytes: 100, FreeBytes: 50})
	}
	return connect.NewResponse(res), nil
}

// newVM is a VM as its host describes it.
func (h *fakeHost) newVM(id, name, datastore string, key *strongroomv1.KeyRef, disks int) *strongroomv1.VM {
	vm := &strongroomv1.VM{
		Id: id, Name: name, Host: h.name, Datastore: datastore, Folder: name, PowerState: "poweredOff", CryptoState: "unlocked",
		Settings: &strongroomv1.VMSettings{Cpus: 1, MemoryMib: 64},
	}
	for i := range disks {
		disk := "disk-" + string(rune('0'+i))
		vm.Disks = append(vm.Disks, &strongroomv1.Disk{Name: disk, File: disk + ".raw", SizeBytes: 1 << 20})
	}
	wrap(vm, key)
	return vm
}

// wrap encrypts a VM's disks under a key, or rekeys them, and the VM with them
// unless some are named; a key that they have changes nothing.
func wrap(vm *strongroomv1.VM, key *strongroomv1.KeyRef, disks ...string) {
	if key == nil {
		return
	}
	for _, d := range vm.GetDisks() {
		if len(disks) > 0 && !slices.Contains(disks, d.GetName()) {
			continue
		}
		if !proto.Equal(d.GetKey(), key) {
			d.Encrypted, d.Key, d.Generation, d.Cipher = true, key, d.GetGeneration()+1, "xts-aes-256"
		}
	}
	if len(disks) == 0 {
		vm.Key = key
	}
}

func (h *fakeHost) find(id string) (*strongroomv1.VM, error) {
	vm, ok := h.vms[id]
	if !ok {
		return nil, errs.New(errs.NotFound, "no VM %s", id)
	}
	return vm, nil
}

// work changes a VM and sends it as a stream's result.
func (h *fakeHost) work(out *connect.ServerStream[strongroomv1.AgentProgress], id string, f func(*strongroomv1.VM)) error {
	h.mu.Lock()
	vm, err := h.find(id)
	if err == nil {
		f(vm)
		vm = h.describe(vm)
	}
	h.mu.Unlock()
	if err != nil {
		return err
	}
	if err := out.Send(&strongroomv1.AgentProgress{Step: "working", Done: 1, Total: 2, Unit: "bytes"}); err != nil {
		return err
	}
	return out.Send(&strongroomv1.AgentProgress{Result: vm})
}

func (h *fakeHost) CreateVM(_ context.Context, req *connect.Request[strongroomv1.AgentCreateVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	m := req.Msg
	h.change(func() {
		h.created = m
		if h.vms[m.GetId()] == nil {
			h.vms[m.GetId()] = h.newVM(m.GetId(), m.GetName(), m.GetDatastore(), m.GetKey(), len(m.GetDisks()))
		}
	})
	return h.work(out, m.GetId(), func(*strongroomv1.VM) {})
}

func (h *fakeHost) CloneVM(_ context.Context, req *connect.Request[strongroomv1.AgentCloneVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	m := req.Msg
	h.mu.Lock()
	source, err := h.find(m.GetSourceId())
	if err == nil && h.vms[m.GetId()] == nil {
		h.vms[m.GetId()] = h.newVM(m.GetId(), m.GetName(), m.GetDatastore(), m.GetKey(), len(source.GetDisks()))
	}
	h.mu.Unlock()
	if err != nil {
		return err
	}
	return h.work(out, m.GetId(), func(*strongroomv1.VM) {})
}

func (h *fakeHost) CreateSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentCreateSnapshotRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	m := req.Msg
	return h.work(out, m.GetId(), func(vm *strongroomv1.VM) {
		for _, s := range vm.GetSnapshots() {
			if s.GetId() == m.GetSnapshotId() {
				return
			}
		}
		s := &strongroomv1.Snapshot{Id: m.GetSnapshotId(), Name: m.GetSnapshot(), Description: m.GetDescription(), Parent: vm.GetCurrentSnapshot(), Settings: proto.CloneOf(vm.GetSettings())}
		for _, d := range vm.GetDisks() {
			s.Disks = append(s.Disks, proto.CloneOf(d))
		}
		vm.Snapshots, vm.CurrentSnapshot = append(vm.Snapshots, s), s.GetId()
	})
}

func (h *fakeHost) RevertToSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentRevertToSnapshotRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	h.change(func() { h.reverts = append(h.reverts, req.Msg.GetRevertId()) })
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.CurrentSnapshot = req.Msg.GetSnapshotId() })
}

func (h *fakeHost) DeleteSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentDeleteSnapshotRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) {
		id := req.Msg.GetSnapshotId()
		i := slices.IndexFunc(vm.GetSnapshots(), func(s *strongroomv1.Snapshot) bool { return s.GetId() == id })
		if i < 0 {
			return
		}
		parent := vm.GetSnapshots()[i].GetParent()
		vm.Snapshots = slices.Delete(vm.Snapshots, i, i+1)
		for _, s := range vm.GetSnapshots() {
			if s.GetParent() == id {
				s.Parent = parent
			}
		}
		if vm.GetCurrentSnapshot() == id {
			vm.CurrentSnapshot = parent
		}
	})
}

func (h *fakeHost) RenameSnapshot(_ context.Context, req *connect.Request[strongroomv1.AgentRenameSnapshotRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) {
		for _, s := range vm.GetSnapshots() {
			if s.GetId() == req.Msg.GetSnapshotId() {
				s.Name, s.Description = req.Msg.GetSnapshot(), req.Msg.GetDescription()
			}
		}
	})
}

func (h *fakeHost) ConsolidateSnapshots(_ context.Context, req *connect.Request[strongroomv1.AgentConsolidateSnapshotsRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.ConsolidationNeeded = false })
}

func (h *fakeHost) EncryptVM(_ context.Context, req *connect.Request[strongroomv1.AgentEncryptVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) {
		h.encrypts = append(h.encrypts, proto.CloneOf(req.Msg))
		wrap(vm, req.Msg.GetKey())
		for _, d := range vm.GetDisks() {
			d.Encryption = nil
		}
	})
}

func (h *fakeHost) DecryptVM(_ context.Context, req *connect.Request[strongroomv1.AgentDecryptVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) {
		vm.Key = nil
		for _, d := range vm.GetDisks() {
			d.Encrypted, d.Key, d.Generation, d.Cipher = false, nil, 0, ""
		}
	})
}

func (h *fakeHost) RekeyVM(_ context.Context, req *connect.Request[strongroomv1.AgentRekeyVMRequest], out *connect.ServerStream[strongroomv1.AgentProgress]) error {
	return h.work(out, req.Msg.GetId(), func(vm *strongroomv1.VM) {
		if !req.Msg.GetOwnKey() || len(req.Msg.GetDisks()) > 0 {
			wrap(vm, req.Msg.GetKey(), req.Msg.GetDisks()...)
		}
		if req.Msg.GetOwnKey() {
			vm.Key = req.Msg.GetKey()
		}
	})
}

func (h *fakeHost) SetRekeyRate(_ context.Context, req *connect.Request[strongroomv1.AgentSetRekeyRateRequest]) (*connect.Response[strongroomv1.AgentSetRekeyRateResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rates = append(h.rates, req.Msg.GetRate())
	return connect.NewResponse(&strongroomv1.AgentSetRekeyRateResponse{}), nil
}

func (h *fakeHost) answer(id string, f func(*strongroomv1.VM)) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	vm, err := h.find(id)
	if err != nil {
		return nil, err
	}
	f(vm)
	return connect.NewResponse(&strongroomv1.AgentVMResponse{Vm: h.describe(vm)}), nil
}

func (h *fakeHost) GetVM(_ context.Context, req *connect.Request[strongroomv1.AgentGetVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(*strongroomv1.VM) {})
}

func (h *fakeHost) PowerOnVM(_ context.Context, req *connect.Request[strongroomv1.AgentPowerOnVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.PowerState = "poweredOn" })
}

func (h *fakeHost) PowerOffVM(_ context.Context, req *connect.Request[strongroomv1.AgentPowerOffVMRequest]) (*connect.Response[strongroomv1.AgentVMResponse], error) {
	return h.answer(req.Msg.GetId(), func(vm *strongroomv1.VM) { vm.PowerState = "poweredOff" })
}

func (h *fakeHost) DeleteVM(_ context.Context, req *connect.Request[strongroomv1.AgentDeleteVMRequest]) (*connect.Response[strongroomv1.AgentDeleteVMResponse], error) {
	h.change(func() { delete(h.vms, req.Msg.GetId()) })
	return connect.NewResponse(&strongroomv1.AgentDeleteVMResponse{}), nil
}

func (h *fakeHost) UnregisterVM(_ context.Context, req *connect.Request[strongroomv1.AgentUnregisterVMRequest]) (*connect.Response[strongroomv1.AgentUnregisterVMResponse], error) {
	h.change(func() { delete(h.vms, req.Msg.GetId()) })
	return connect.NewResponse(&strongroomv1.AgentUnregisterVMResponse{}), nil
}
