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
	lie      func(*strongroomv1.VM)            // changes what it answers to GetVM
	// latecomer: a rekey that is broken off is done when the host was asked to settle.
	latecomer bool
	unsettled map[string]*strongroomv1.KeyRef // by VM id
	// fault is asked before each call and says how it ends; nil: as it should.
	fault func(method string, call int) fault
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
		held:   map[string]string{}, keks: map[string]bool{}, instance: "first", vms: map[string]*strongroomv1.VM{}, calls: map[string]int{}, unsettled: map[string]*strongroomv1.KeyRef{},
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
	size := proto.Size(req)
	for _, id := range lacking {
		if n := proto.Size(full[id]) + 8; full[id] != nil && size+n < 1<<20 { // 8: for its tag and length
			req.Vms, size = append(req.Vms, full[id]), size+n
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
