package controller

import (
	"crypto/tls"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipclient"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

// rawServer accepts connections on the loopback address and hands each to f.
func rawServer(t *testing.T, f func(net.Conn)) (addr string) {
	t.Helper()
	l := listenLoopback(t)
	var open []net.Conn
	var mu sync.Mutex
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			serving.Go(func() { f(c); c.Close() })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return l.Addr().String()
}

func silence(c net.Conn) { io.Copy(io.Discard, c) }

// blackHole returns an address to which no connection can be made, and from which
// no refusal comes: the queue of its listener is full.
func blackHole(t *testing.T) (addr string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr = (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*unix.SockaddrInet4).Port}).String()
	for i := range uint32(8) {
		c, err := net.DialTimeout("tcp", addr, patience)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		// Of a listener, what waits in its queue is unacked, and what may sacked.
		var queue *unix.TCPInfo
		eventually(t, "the connection to be in the queue", func() bool {
			if queue, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err != nil {
				t.Fatal(err)
			}
			return queue.Unacked > i
		})
		if queue.Unacked > queue.Sacked {
			return addr
		}
	}
	t.Fatal("the queue of a listener does not fill")
	return ""
}

// TestKeyServerStates: whatever is wrong with a key server is told as what it is,
// holds up nobody, and the entry can be removed.
func TestKeyServerStates(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca, foreign := testca.New(t), testca.New(t)
	tlsServer := func(cert tls.Certificate, f func(net.Conn)) func(*testing.T) *strongroomv1.TrustedServer {
		return func(t *testing.T) *strongroomv1.TrustedServer {
			config := kmipserver.TLSConfig(cert, nil, false)
			config.ClientAuth = tls.RequireAnyClientCert
			addr := rawServer(t, func(c net.Conn) {
				server := tls.Server(c, config)
				if server.HandshakeContext(t.Context()) == nil {
					f(server)
				}
			})
			return &strongroomv1.TrustedServer{Address: addr, Fingerprint: kmipclient.FingerprintOf(cert.Leaf).String()}
		}
	}
	plain := func(addr func(*testing.T) string) func(*testing.T) *strongroomv1.TrustedServer {
		return func(t *testing.T) *strongroomv1.TrustedServer {
			return &strongroomv1.TrustedServer{Address: addr(t), Fingerprint: kmipclient.Fingerprint{1}.String()}
		}
	}
	ours := func(change func(*kms.Server)) func(*testing.T) *strongroomv1.TrustedServer {
		return func(t *testing.T) *strongroomv1.TrustedServer {
			server := kms.NewServer(t, ca)
			server.Clients = nil
			change(server)
			server.Start(t)
			return &strongroomv1.TrustedServer{Address: server.Addr, Fingerprint: kmipclient.FingerprintOf(server.Certificate.Leaf).String()}
		}
	}
	states := map[string]struct {
		server func(*testing.T) *strongroomv1.TrustedServer
		want   kmipclient.Problem
		change func(*strongroomv1.StandardSettings)
	}{
		"unknown-name":  {plain(func(*testing.T) string { return "kms.invalid:5696" }), kmipclient.AddressUnknown, nil},
		"refused":       {plain(func(*testing.T) string { return "127.0.0.1:1" }), kmipclient.Unreachable, nil},
		"black-hole":    {plain(blackHole), kmipclient.Unreachable, nil},
		"never-greets":  {plain(func(t *testing.T) string { return rawServer(t, silence) }), kmipclient.NoAnswer, nil},
		"never-answers": {tlsServer(ca.Server(t), silence), kmipclient.NoAnswer, nil},
		"not-tls": {plain(func(t *testing.T) string {
			return rawServer(t, func(c net.Conn) { io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n") })
		}), kmipclient.NotTLS, nil},
		"not-kmip": {tlsServer(ca.Server(t), func(c net.Conn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"); silence(c) }), kmipclient.NotKMIP, nil},
		"foreign": {plain(func(t *testing.T) string {
			return ours(func(k *kms.Server) { k.Certificate = foreign.Server(t) })(t).GetAddress()
		}), kmipclient.ServerUntrusted, nil},
		"expired":            {ours(func(k *kms.Server) { k.Certificate = ca.Expired(t) }), kmipclient.ServerCertExpired, nil},
		"client-not-trusted": {ours(func(k *kms.Server) { k.Clients = foreign.Pool() }), kmipclient.ClientRefused, nil},
		"wrong-password": {ours(func(k *kms.Server) { k.User, k.Password = "vcenter", "s3cret" }), kmipclient.WrongCredentials, func(set *strongroomv1.StandardSettings) {
			set.User, set.Password = "vcenter", []byte("guess")
		}},
		"proxy-away": {ours(func(*kms.Server) {}), kmipclient.ProxyFailed, func(set *strongroomv1.StandardSettings) { set.Proxy = "127.0.0.1:1" }},
	}
	addresses := map[string]string{}
	for name, state := range states {
		// A slow machine must not make one that answers late look silent.
		settings := &strongroomv1.StandardSettings{Servers: []*strongroomv1.TrustedServer{state.server(t)}, TimeoutSeconds: 20}
		if state.want == kmipclient.NoAnswer || name == "black-hole" {
			settings.TimeoutSeconds = 1
		}
		if state.change != nil {
			state.change(settings)
		}
		addresses[name] = settings.Servers[0].GetAddress()
		s.addStandard(name, settings)
	}
	for name, state := range states {
		var got *strongroomv1.KeyServer
		eventually(t, name+" to be looked at", func() bool {
			got = s.getProvider(name).GetStandard().GetServers()[0]
			return got.GetProblem() != ""
		})
		if got.GetProblem() != string(state.want) || got.GetStatus() != "red" || got.GetMessage() == "" {
			t.Errorf("%s: found %v, want %s", name, got, state.want)
		}
		eventually(t, name+" to alarm", func() bool {
			return slices.Contains(s.alarms("provider/"+name+"/"+addresses[name]), event.AlarmKeyServer)
		})
	}
	// To ask says the same, with what to do.
	for name, state := range states {
		if _, err := s.check(name); errs.KindOf(err) != errs.Unavailable || errs.ReasonOf(err) != string(state.want) || errs.HintOf(err) == "" {
			t.Errorf("%s: check said %v (reason %q, hint %q)", name, err, errs.ReasonOf(err), errs.HintOf(err))
		}
	}
	for name := range states {
		must[strongroomv1.DeleteProviderResponse](t)(client.Call(t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: name}))
		if alarms := s.alarms("provider/" + name + "/" + addresses[name]); len(alarms) > 0 {
			t.Errorf("%s: deleted, and alarms %v", name, alarms)
		}
	}
}

// TestCertificateEnds: a key server's certificate that ends within 30 days is
// warned of, and one that ends later is not; a renewed one ends the alarm.
func TestCertificateEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca := testca.New(t)
	server := kms.NewServer(t, ca)
	server.Clients = nil
	for i, c := range []struct {
		left time.Duration
		warn bool
	}{
		{inventory.CertificateWarning - time.Hour, true},
		{inventory.CertificateWarning + time.Hour, false},
		{time.Hour, true},
	} {
		server.Certificate = ca.ServerUntil(t, time.Now().Add(c.left))
		server.Start(t)
		if i == 0 {
			s.addStandard("kms-1", standardSettings(server))
		} else {
			must[strongroomv1.Provider](t)(client.Call(t.Context(), s.admin.Provider().UpdateStandardProvider,
				&strongroomv1.UpdateStandardProviderRequest{Name: "kms-1", Settings: standardSettings(server)}))
		}
		p := must[strongroomv1.Provider](t)(s.check("kms-1"))
		status, state := "green", "Active"
		if c.warn {
			status, state = "yellow", "Warning"
		}
		if got := p.GetStandard().GetServers()[0]; got.GetStatus() != status || got.GetProblem() != "" || p.GetState() != state {
			t.Errorf("%v left: the provider is %s, its server %v; want %s, %s", c.left, p.GetState(), got, state, status)
		}
		if alarms := s.alarms("provider/kms-1/" + server.Addr); slices.Contains(alarms, event.AlarmServerCertificate) != c.warn || slices.Contains(alarms, event.AlarmKeyServer) {
			t.Errorf("%v left: alarms %v", c.left, alarms)
		}
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}
