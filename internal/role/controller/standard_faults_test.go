package controller

import (
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/kmipclient"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

// faulty is a listener whose server does what it is asked, and whose answer does
// not arrive: the n-th write from arming on, of all connections. It is safe for
// concurrent use.
type faulty struct {
	net.Listener

	mu   sync.Mutex // guards what follows
	left int        // writes until the fault; 0: none to come
	hit  chan struct{}
	hold chan struct{} // the connection does not break before this is closed
}

// arm has the n-th write from now on be lost. The channel is closed when it is.
func (f *faulty) arm(n int, hold chan struct{}) (hit <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left, f.hit, f.hold = n, make(chan struct{}), hold
	return f.hit
}

// disarm reports whether the fault was still to come.
func (f *faulty) disarm() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	left := f.left
	f.left = 0
	return left > 0
}

// step counts one more, outside of the listener, and reports whether it is the one.
func (f *faulty) step() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left == 0 {
		return false
	}
	f.left--
	if f.left == 0 {
		close(f.hit)
	}
	return f.left == 0
}

func (f *faulty) Accept() (net.Conn, error) {
	c, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &faultyConn{c, f}, nil
}

type faultyConn struct {
	net.Conn
	f *faulty
}

func (c *faultyConn) Write(b []byte) (int, error) {
	c.f.mu.Lock()
	if c.f.left > 0 {
		if c.f.left--; c.f.left == 0 {
			close(c.f.hit)
			hold := c.f.hold
			c.f.mu.Unlock()
			if hold != nil {
				<-hold
			}
			c.Close()
			return 0, io.ErrClosedPipe
		}
	}
	c.f.mu.Unlock()
	return c.Conn.Write(b)
}

// faultySite is a site with a VM's cluster and a key server behind a faulty
// listener.
func faultySite(t *testing.T) (*site, *fakeHost, *kms.Server, *faulty) {
	t.Helper()
	s := newSite(t)
	f := new(faulty)
	server := kms.NewServer(t, testca.New(t))
	server.Clients = nil
	server.Listener = func(l net.Listener) net.Listener { f.Listener = l; return f }
	server.Start(t)
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	return s, h, server, f
}

// accounted fails the test unless the key server has the keys of all VMs, each
// its own, and no others.
func (s *site) accounted(t *testing.T, server *kms.Server, when string, n int) {
	t.Helper()
	vms, err := s.c.inv.VMs(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	has := materials(t, server, clientName)
	var used []string
	for _, v := range vms {
		for _, k := range v.Keys() {
			if has[k.KeyID] == nil || slices.Contains(used, k.KeyID) {
				t.Errorf("%s %d: key %s of %s is at the key server: %v; used by others: %v", when, n, k.KeyID, v.Name, has[k.KeyID] != nil, slices.Contains(used, k.KeyID))
			}
			used = append(used, k.KeyID)
		}
	}
	if len(has) != len(used) {
		t.Errorf("%s %d: %d keys at the key server, %d in use", when, n, len(has), len(used))
	}
}

// faultsMax is more than the answers that any operation here needs.
const faultsMax = 60

// TestLostKMSAnswers: whatever answer of the key server is lost, of Create,
// Activate, Add Attribute, Get, Revoke or Destroy, an operation makes one key, or
// if it fails leaves none.
func TestLostKMSAnswers(t *testing.T) {
	t.Parallel()
	s, h, server, f := faultySite(t)
	for n := 1; ; n++ {
		if n > faultsMax {
			t.Fatalf("creation needs more than %d answers", faultsMax)
		}
		f.arm(n, nil)
		name := "web-1"
		_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1"))))
		done := f.disarm()
		s.accounted(t, server, "creation, lost answer", n)
		if err == nil {
			s.success(client.Call(t.Context(), s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: name}))
		} else if done || errs.ReasonOf(err) != standard.ReasonUnreachable { // there is no other server to ask
			t.Errorf("creation, lost answer %d: %v", n, err)
		}
		for id := range materials(t, server, clientName) { // as a clean-up does, so that the next one is alone
			p, err := s.c.servers.Lookup("kms-1")
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Deactivate(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if err := p.Destroy(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if done {
			t.Logf("creation needs %d answers", n-1)
			break
		}
	}
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	for n := 1; ; n++ {
		if n > faultsMax {
			t.Fatalf("a failed rekey needs more than %d answers", faultsMax)
		}
		h.failing("RekeyVM", 1, fault{refuse: errs.New(errs.NoSpace, "no room")})
		f.arm(n, nil)
		_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})))
		done := f.disarm()
		if err == nil || errs.KindOf(err) != errs.NoSpace && (done || errs.ReasonOf(err) != standard.ReasonUnreachable) {
			t.Errorf("failed rekey, lost answer %d: %v", n, err)
		}
		s.accounted(t, server, "failed rekey, lost answer", n)
		if done {
			t.Logf("a failed rekey needs %d answers", n-1)
			break
		}
	}
}

// TestStoppedWhileMaking: a controller that ends at any answer of the key server
// goes on with the same key when it is back: none is made twice, none forgotten.
func TestStoppedWhileMaking(t *testing.T) {
	t.Parallel()
	s, h, server, f := faultySite(t)
	for n := 1; ; n++ {
		if n > faultsMax {
			t.Fatalf("creation needs more than %d answers", faultsMax)
		}
		hold := make(chan struct{})
		hit := f.arm(n, hold)
		name := "web-" + string(rune('0'+n/10)) + string(rune('0'+n%10))
		task := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
		ended := make(chan error, 1)
		admin := s.admin
		go func() {
			_, err := admin.WaitTask(t.Context(), task.GetId(), nil)
			ended <- err
		}()
		last := false
		select {
		case <-hit:
			s.restart()
			h.beat()
			close(hold)
			s.success(task, nil)
			<-ended // its connection is gone, or it saw the end
		case err := <-ended:
			if err != nil {
				t.Fatal(err)
			}
			last = f.disarm()
		}
		s.accounted(t, server, "stopped at answer", n)
		if last {
			t.Logf("creation needs %d answers", n-1)
			break
		}
	}
}

// TestFailover: when the first of two servers is away the second serves, with one
// alarm for the first and no more; when it is back the alarm ends.
func TestFailover(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca := testca.New(t)
	first, second := anyClient(t, ca), kms.NewServer(t, ca)
	second.Clients, second.Store = nil, first.Store
	second.Start(t)
	s.cluster("east")
	h := s.host("east", "host-1")
	settings := standardSettings(first)
	settings.Servers = append(settings.Servers, &strongroomv1.TrustedServer{Address: second.Addr, Fingerprint: kmipclient.FingerprintOf(second.Certificate.Leaf).String()})
	s.addStandard("kms-1", settings)
	state := func(want string) {
		t.Helper()
		if p := must[strongroomv1.Provider](t)(s.check("kms-1")); p.GetState() != want {
			t.Errorf("the provider is %s: %v; want %s", p.GetState(), p.GetDetails(), want)
		}
	}
	state("Active")
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	target := "provider/kms-1/" + first.Addr
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	// A new key, and an old one for a host that lost its memory, from the second.
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	h.change(func() { clear(h.keks) })
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	for range 5 {
		state("Warning")
	}
	if got := s.alarms(target); !slices.Equal(got, []string{event.AlarmKeyServer}) || len(s.alarms("provider/kms-1/"+second.Addr)) > 0 {
		t.Errorf("alarms %v of the first, %v of the second", got, s.alarms("provider/kms-1/"+second.Addr))
	}
	if n := s.events(event.KeyServerFailed, target); n != 1 {
		t.Errorf("%d events tell of one failure", n)
	}
	first.Start(t)
	state("Active")
	if got := s.alarms(target); len(got) > 0 {
		t.Errorf("alarms %v after the return", got)
	}
	if n := s.events(event.KeyServerRecovered, target); n != 1 {
		t.Errorf("%d events tell of one return", n)
	}
	// And the other way round.
	if err := second.Stop(); err != nil {
		t.Fatal(err)
	}
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"}))
	if n := s.events(event.KeyServerFailed, target); n != 1 {
		t.Errorf("%d events tell of one failure", n)
	}
}
