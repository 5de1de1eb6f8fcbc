package controller

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/keyscan"
	"strongroom/test/kms"
)

// standardSettings are settings for a server that takes any client certificate.
func standardSettings(server *kms.Server) *strongroomv1.StandardSettings {
	return &strongroomv1.StandardSettings{
		Servers: []*strongroomv1.TrustedServer{{Address: server.Addr, Fingerprint: kmipclient.FingerprintOf(server.Certificate.Leaf).String()}}, TimeoutSeconds: 30,
	}
}

// anyClient makes a server that takes any client certificate, and starts it.
func anyClient(t *testing.T, ca *testca.Authority) *kms.Server {
	t.Helper()
	server := kms.NewServer(t, ca)
	server.Clients = nil
	server.Start(t)
	return server
}

func (s *site) addStandard(name string, settings *strongroomv1.StandardSettings) {
	s.t.Helper()
	must[strongroomv1.Provider](s.t)(client.Call(s.t.Context(), s.admin.Provider().AddStandardProvider, &strongroomv1.AddStandardProviderRequest{Name: name, Settings: settings}))
}

func (s *site) check(name string) (*strongroomv1.Provider, error) {
	return client.Call(s.t.Context(), s.admin.Provider().CheckProvider, &strongroomv1.CheckProviderRequest{Name: name})
}

// materials returns the keys that a server has, by identifier.
func materials(t *testing.T, server *kms.Server, account string) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	if err := server.Store.View(t.Context(), account, func(r kmipserver.Reader) error {
		for o, err := range r.Find(kmipserver.Query{}) {
			if err != nil {
				return err
			}
			full, err := r.Get(o.ID)
			if err != nil {
				return err
			}
			if full.Material != nil {
				found[o.ID] = bytes.Clone(full.Material.Bytes())
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// keks returns the KEKs that a fake host has, by "provider/key id".
func (h *fakeHost) keksNow() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var refs []string
	for ref := range h.keks {
		refs = append(refs, ref)
	}
	slices.Sort(refs)
	return refs
}

// TestStandardKeys follows KEKs from the key server to all hosts of the cluster,
// and out of their memory.
func TestStandardKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	s.cluster("west")
	one, two, far := s.host("east", "host-1"), s.host("east", "host-2"), s.host("west", "host-3")
	s.addStandard("kms-1", standardSettings(server))
	if _, err := client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-0", "east", "kms-1")); errs.ReasonOf(err) != "NotEstablished" {
		t.Errorf("creation before the provider is established: %v", err)
	}
	p := must[strongroomv1.Provider](t)(s.check("kms-1"))
	if p.GetState() != "Active" || p.GetStandard().GetServers()[0].GetStatus() != "green" {
		t.Fatalf("provider %v", p)
	}
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	if s.vm("web-1").HostID == two.id {
		one, two = two, one // either may be chosen
	}
	key := s.vm("web-1").Key
	if key == nil || key.Provider != "kms-1" || len(materials(t, server, clientName)[key.KeyID]) != 32 {
		t.Fatalf("web-1 has key %+v", key)
	}
	ref := key.Provider + "/" + key.KeyID
	eventually(t, "both hosts of the cluster have the key", func() bool {
		return slices.Equal(one.keksNow(), []string{ref}) && slices.Equal(two.keksNow(), []string{ref})
	})
	if got := far.keksNow(); len(got) != 0 {
		t.Errorf("a host of another cluster has %v", got)
	}

	// An agent that restarts has nothing; a heartbeat tells.
	one.change(func() { clear(one.keks); one.instance = "second" })
	one.beat()
	eventually(t, "the restarted host has the key again", func() bool { return slices.Equal(one.keksNow(), []string{ref}) })

	// A rekey takes the old key out of memory, and the KMS keeps it.
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	next := s.vm("web-1").Key
	if *next == *key {
		t.Fatal("rekeyed to the same key")
	}
	want := []string{next.Provider + "/" + next.KeyID}
	eventually(t, "the hosts have the new key alone", func() bool { return slices.Equal(one.keksNow(), want) && slices.Equal(two.keksNow(), want) })
	if n := len(materials(t, server, clientName)); n != 2 {
		t.Errorf("the KMS has %d keys, want 2: a backup may need the old one", n)
	}

	// A failed rekey leaves no key behind, and the VM as it was.
	one.failing("RekeyVM", 1, fault{refuse: errs.New(errs.NoSpace, "no room")})
	_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})))
	wantKind(t, err, errs.NoSpace)
	if n := len(materials(t, server, clientName)); n != 2 || *s.vm("web-1").Key != *next {
		t.Errorf("the KMS has %d keys, want 2; web-1 has %v", n, s.vm("web-1").Key)
	}
	// One that was done, though its answer says otherwise, keeps its key.
	one.change(func() {
		one.fault = func(method string, _ int) fault {
			if method != "RekeyVM" {
				return fault{}
			}
			one.fault = nil
			for _, vm := range one.vms { // the lock is held here
				wrap(vm, &strongroomv1.KeyRef{Provider: "kms-1", KeyId: newestOf(t, server)})
			}
			return fault{refuse: errs.New(errs.Other, "it says that it failed")}
		}
	})
	if _, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))); err == nil {
		t.Error("the rekey did not fail")
	}
	if n := len(materials(t, server, clientName)); n != 3 {
		t.Errorf("the KMS has %d keys, want 3: the VM uses the third", n)
	}

	// Deleted, the VM's key leaves all memories.
	s.success(client.Call(t.Context(), s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-1"}))
	eventually(t, "the hosts forget the key", func() bool { return len(one.keksNow()) == 0 && len(two.keksNow()) == 0 })

	// Nothing of a KEK is in any file of the controller.
	scan := new(keyscan.Scanner)
	for id, kek := range materials(t, server, clientName) {
		scan.AddKey("KEK "+id, kek)
	}
	found, read, err := scan.Tree(s.cfg.DataDir, 10)
	if err != nil || len(found) > 0 || read < 1<<16 {
		t.Errorf("found %v in %d bytes, %v", found, read, err)
	}
}

// newestOf returns the key that the server made last.
func newestOf(t *testing.T, server *kms.Server) string {
	t.Helper()
	id := ""
	if err := server.Store.View(t.Context(), clientName, func(r kmipserver.Reader) error {
		for o, err := range r.Find(kmipserver.Query{}) {
			if err != nil {
				return err
			}
			id = o.ID
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	return id
}

func createVM(name, datastore, provider string) *strongroomv1.CreateVMRequest {
	return &strongroomv1.CreateVMRequest{
		Name: name, Datastore: datastore, Encrypt: true, Provider: provider, Disks: []*strongroomv1.NewDisk{{SizeBytes: 1 << 20}}, Settings: &strongroomv1.VMSettings{},
	}
}

// TestStandardOutage: a key server that is away costs nobody his time but those
// who need a new key, who are told why; the provider can be removed.
func TestStandardOutage(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	ref := s.vm("web-1").Key
	eventually(t, "the host has the key", func() bool { return len(h.keksNow()) == 1 })
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.check("kms-1"); errs.KindOf(err) != errs.Unavailable || errs.ReasonOf(err) != string(kmipclient.Unreachable) {
		t.Errorf("check: %v (%s)", err, errs.ReasonOf(err))
	}
	if got := s.alarms("provider/kms-1/" + server.Addr); !slices.Equal(got, []string{event.AlarmKeyServer}) {
		t.Errorf("alarms %v", got)
	}
	// From the host's memory it works.
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	// From an empty one it does not.
	h.change(func() { clear(h.keks) })
	_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"})))
	if errs.KindOf(err) != errs.Locked || errs.ReasonOf(err) != standard.ReasonUnreachable || !strings.Contains(err.Error(), "kms-1") || !strings.Contains(err.Error(), ref.KeyID) {
		t.Errorf("power-on: %v (%v, %s)", err, errs.KindOf(err), errs.ReasonOf(err))
	}
	_, err = s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})))
	if err == nil || !strings.Contains(err.Error(), ", which was made for nothing: ") {
		t.Errorf("of the key that may have been made the rekey says: %v", err)
	}
	if errs.KindOf(err) != errs.Unavailable || errs.ReasonOf(err) != standard.ReasonUnreachable {
		t.Errorf("rekey: %v (%v, %s)", err, errs.KindOf(err), errs.ReasonOf(err))
	}
	// A controller that starts without its key servers is well.
	s.restart()
	h.beat()
	server.Start(t)
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	eventually(t, "the host has the key again", func() bool { return len(h.keksNow()) == 1 })

	// A key that the KMS lost is another matter than a KMS that is away.
	server2 := anyClient(t, testca.New(t))
	must[strongroomv1.Provider](t)(client.Call(t.Context(), s.admin.Provider().UpdateStandardProvider,
		&strongroomv1.UpdateStandardProviderRequest{Name: "kms-1", Settings: standardSettings(server2)}))
	h.change(func() { clear(h.keks) })
	_, err = s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"})))
	if errs.KindOf(err) != errs.Locked || errs.ReasonOf(err) != standard.ReasonMissing {
		t.Errorf("power-on with a KMS that lost the key: %v (%v, %s)", err, errs.KindOf(err), errs.ReasonOf(err))
	}

	_, err = client.Call(t.Context(), s.admin.Provider().ExportProvider, &strongroomv1.ExportProviderRequest{Name: "kms-1"})
	wantKind(t, err, errs.InvalidState) // there is nothing to back up here

	// In use, it is guarded; by force it goes, whatever its server does.
	_, err = client.Call(t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kms-1"})
	wantKind(t, err, errs.InvalidState)
	must[strongroomv1.DeleteProviderResponse](t)(client.Call(t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kms-1", Force: true}))
	if secrets, err := s.c.keys.credentials("kms-1"); err != nil || secrets.ClientKey != nil {
		t.Errorf("its credentials are still in the vault (%v)", err)
	}
	s.addStandard("kms-1", standardSettings(server)) // the name is free for it again
}

// TestBlackHole: a server that accepts and never answers holds up nothing.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := listenLoopback(t)
	var open []net.Conn
	var mu sync.Mutex
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
		for _, c := range open {
			c.Close()
		}
	})
	settings := &strongroomv1.StandardSettings{
		Servers: []*strongroomv1.TrustedServer{{Address: l.Addr().String(), Fingerprint: kmipclient.Fingerprint{1}.String()}}, TimeoutSeconds: 1,
	}
	s.addStandard("kms-1", settings)
	// Other calls do not wait for it, and it is told what it is.
	eventually(t, "its state to be known", func() bool {
		p := must[strongroomv1.Provider](t)(client.Call(t.Context(), s.admin.Provider().GetProvider, &strongroomv1.GetProviderRequest{Name: "kms-1"}))
		return p.GetStandard().GetServers()[0].GetProblem() == string(kmipclient.NoAnswer)
	})
	res := must[strongroomv1.InspectKeyServersResponse](t)(client.Call(t.Context(), s.admin.Provider().InspectKeyServers,
		&strongroomv1.InspectKeyServersRequest{Servers: []string{l.Addr().String()}, TimeoutSeconds: 1}))
	if got := res.GetServers()[0].GetProblem(); got != string(kmipclient.NoAnswer) {
		t.Errorf("inspected: %q", got)
	}
	must[strongroomv1.DeleteProviderResponse](t)(client.Call(t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kms-1"}))
}

// TestClientMethods goes the four ways of being known to a key server, on one
// provider and one account, and looks for private keys where none may be.
func TestClientMethods(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	theirs := testca.New(t)
	server := kms.NewServer(t, theirs)
	server.User, server.Password = "app-1", "the password of app-1"
	server.Clients = x509.NewCertPool()
	server.Start(t)
	trust := func(text []byte) {
		t.Helper()
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
		server.Clients = x509.NewCertPool()
		if !server.Clients.AppendCertsFromPEM(text) {
			t.Fatalf("no certificate in %q", text)
		}
		server.Start(t)
	}
	identity := func() *strongroomv1.ClientIdentity {
		t.Helper()
		return must[strongroomv1.ClientIdentity](t)(client.Call(t.Context(), s.admin.Provider().GetClientIdentity, &strongroomv1.GetClientIdentityRequest{Name: "kms-1"}))
	}
	update := func(settings *strongroomv1.StandardSettings) error {
		_, err := client.Call(t.Context(), s.admin.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{Name: "kms-1", Settings: settings})
		return err
	}
	wantProblem := func(want kmipclient.Problem) {
		t.Helper()
		if _, err := s.check("kms-1"); errs.ReasonOf(err) != string(want) {
			t.Errorf("check: %v (%s), want %s", err, errs.ReasonOf(err), want)
		}
	}
	well := func() {
		t.Helper()
		if p := must[strongroomv1.Provider](t)(s.check("kms-1")); p.GetState() != "Active" {
			t.Errorf("state %s: %v", p.GetState(), p.GetDetails())
		}
	}

	s.addStandard("kms-1", standardSettings(server))
	wantProblem(kmipclient.ClientRefused)
	trust(identity().GetCertificate())
	wantProblem(kmipclient.WrongCredentials)
	if err := update(&strongroomv1.StandardSettings{User: "app-1", Password: []byte("the password of app-1")}); err != nil {
		t.Fatal(err)
	}
	well()

	if err := update(&strongroomv1.StandardSettings{ClientMethod: "controller-ca"}); err != nil {
		t.Fatal(err)
	}
	wantProblem(kmipclient.ClientRefused)
	trust(identity().GetAuthority())
	well()

	if err := update(&strongroomv1.StandardSettings{ClientMethod: "csr"}); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(identity().GetRequest())
	ca, caText := newAuthority(t)
	trust(caText)
	other, _ := newAuthority(t)
	if err := update(&strongroomv1.StandardSettings{ClientMethod: "csr", ClientCertificate: other.sign(t, nil)}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a certificate for another key: %v", err)
	}
	s.restart() // the request outlives it
	if err := update(&strongroomv1.StandardSettings{ClientMethod: "csr", ClientCertificate: ca.sign(t, block.Bytes)}); err != nil {
		t.Fatal(err)
	}
	well()

	cert, key := testca.KeyPEM(t, theirs.Client(t, clientName))
	trust(theirs.PEM())
	if err := update(&strongroomv1.StandardSettings{ClientMethod: "upload", ClientCertificate: cert, ClientKey: []byte("no key")}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("an upload without key: %v", err)
	}
	if err := update(&strongroomv1.StandardSettings{ClientMethod: "upload", ClientCertificate: cert, ClientKey: bytes.Clone(key)}); err != nil {
		t.Fatal(err)
	}
	p := must[strongroomv1.Provider](t)(s.check("kms-1"))
	if p.GetState() != "Warning" || !slices.Contains(s.alarms("provider/kms-1"), event.AlarmClientCertificate) {
		t.Errorf("with a certificate for an hour the state is %s, alarms %v", p.GetState(), s.alarms("provider/kms-1"))
	}
	s.restart()
	must[strongroomv1.Provider](t)(s.check("kms-1"))

	scan := new(keyscan.Scanner)
	scan.AddMarker("password", []byte("the password of app-1"))
	keyBlock, _ := pem.Decode(key)
	scan.AddKey("uploaded key", keyBlock.Bytes[len(keyBlock.Bytes)-120:])
	found, _, err := scan.Tree(s.cfg.DataDir, 10)
	if err != nil || len(found) > 0 {
		t.Errorf("found %v, %v in %s", found, err, filepath.Base(s.cfg.DataDir))
	}
	for _, bad := range []*strongroomv1.StandardSettings{
		{ClientMethod: "magic"},
		{TimeoutSeconds: 61},
		{Proxy: "no port"},
		{Servers: []*strongroomv1.TrustedServer{{Address: "kms:5696", Fingerprint: "sha256:1"}}},
		{Servers: []*strongroomv1.TrustedServer{{Address: "kms", Fingerprint: kmipclient.Fingerprint{}.String()}}},
		{Password: []byte("without user")},
	} {
		if err := update(bad); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%v: %v", bad, err)
		}
	}
	must[strongroomv1.Provider](t)(s.check("kms-1")) // none of that changed anything
}

// TestKeyServerChanges: a renewed or expired certificate is told as what it is.
func TestKeyServerChanges(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca := testca.New(t)
	server := anyClient(t, ca)
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	for _, tt := range []struct {
		problem kmipclient.Problem
		change  func() *strongroomv1.StandardSettings
	}{
		{kmipclient.ServerUntrusted, func() *strongroomv1.StandardSettings {
			server.Certificate = ca.Server(t)
			return &strongroomv1.StandardSettings{TimeoutSeconds: 29}
		}},
		{kmipclient.ServerCertExpired, func() *strongroomv1.StandardSettings {
			server.Certificate = ca.Expired(t)
			return standardSettings(server)
		}},
	} {
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
		settings := tt.change()
		server.Start(t)
		p := must[strongroomv1.Provider](t)(client.Call(t.Context(), s.admin.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{Name: "kms-1", Settings: settings}))
		if got := p.GetStandard().GetServers()[0]; got.GetProblem() != string(tt.problem) || got.GetStatus() != "red" || got.GetClientTrustServer() {
			t.Errorf("%s: found %v", tt.problem, got)
		}
	}
	soon := inventory.Certificate{NotAfter: time.Now().Add(inventory.CertificateWarning - time.Minute)}
	if soon.Ending(time.Now()) == "" || soon.Ending(time.Now().Add(-time.Hour)) != "" {
		t.Error("the warning does not begin 30 days before the end")
	}
}

// authority signs certificate requests as a key server does.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) (*authority, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "KMS"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// sign returns the certificate for a request, or for the authority's own key.
func (a *authority) sign(t *testing.T, request []byte) []byte {
	t.Helper()
	name, public := pkix.Name{CommonName: clientName}, any(a.key.Public())
	if request != nil {
		req, err := x509.ParseCertificateRequest(request)
		if err != nil {
			t.Fatal(err)
		}
		name, public = req.Subject, req.PublicKey
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: name, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestSettle: a change of settings does not undo what the controller found out or
// did while it was being made.
func TestSettle(t *testing.T) {
	t.Parallel()
	seen := time.Now().UTC()
	before := inventory.Standard{Servers: []inventory.KeyServer{{Address: "a:1"}}, TimeoutSeconds: 5}
	now := before
	now.Servers, now.Established = []inventory.KeyServer{{Address: "a:1", Checked: true}}, seen
	now.Wrapping = &inventory.Wrapping{Current: &inventory.WrappingKey{KeyID: "k"}}
	for _, c := range []struct {
		what     string
		settings *strongroomv1.StandardSettings
		checked  bool
		seen     time.Time
	}{
		{"timeout", &strongroomv1.StandardSettings{TimeoutSeconds: 9}, true, seen},
		{"credential", &strongroomv1.StandardSettings{User: "u"}, true, time.Time{}},
		{"servers", &strongroomv1.StandardSettings{Servers: []*strongroomv1.TrustedServer{{Address: "a:1"}}}, false, time.Time{}},
	} {
		next, got := before, now
		next.TimeoutSeconds = 9
		settle(&got, next, c.settings)
		if got.TimeoutSeconds != 9 || got.Wrapping != now.Wrapping || got.Servers[0].Checked != c.checked || !got.Established.Equal(c.seen) {
			t.Errorf("%s: %+v", c.what, got)
		}
	}
}
