package kmipclient

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"testing"
	"time"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
)

// serveRaw accepts connections on the loopback address and hands them to f.
func serveRaw(t *testing.T, f func(net.Conn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-ended })
	return l.Addr().String()
}

// TestCheck shows each state that a server can be found in: each is told apart
// and comes within the deadlines.
func TestCheck(t *testing.T) {
	t.Parallel()
	ca, foreign := testca.New(t), testca.New(t)
	store := kmipserver.NewMemory()
	t.Cleanup(func() { store.Close() })
	good, _ := start(t, ca, store, "127.0.0.1:0")
	tlsServer := func(cert tls.Certificate) string {
		return serveRaw(t, func(c net.Conn) {
			server := tls.Server(c, kmipserver.TLSConfig(cert, ca.Pool(), false))
			if server.HandshakeContext(t.Context()) == nil {
				io.Copy(io.Discard, server)
			}
		})
	}
	silent := serveRaw(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	const closed = "127.0.0.1:1"
	password := func(text string) *keymem.Key {
		k, err := keymem.Take([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.Close() })
		return k
	}
	clientCert := ca.Client(t, "controller")
	for _, tt := range []struct {
		name    string
		addr    string
		edit    func(*Config)
		problem Problem
		// as in Condition
		connected, trusts, trusted, shown bool
	}{
		{"well", good.Addr().String(), nil, "", true, true, true, true},
		{"pinned", good.Addr().String(), func(c *Config) {
			*c = Config{Provider: c.Provider, Servers: c.Servers, TLS: Pinned(FingerprintOf(certOf(t, good.Addr().String(), clientCert)))}
			c.TLS.Certificates = []tls.Certificate{clientCert}
		}, "", true, true, true, true},
		{"pinned to another", good.Addr().String(), func(c *Config) {
			c.TLS = Pinned(Fingerprint{1})
		}, ServerUntrusted, true, false, false, true},
		{"right password", good.Addr().String(), func(c *Config) { c.User, c.Password = "vcenter", password("s3cret\xc3\xa9") }, "", true, true, true, true},
		{"wrong password", good.Addr().String(), func(c *Config) { c.User, c.Password = "vcenter", password("guess") }, WrongCredentials, true, true, false, true},
		{"name unknown", "kms.invalid:5696", nil, AddressUnknown, false, false, false, false},
		{"refused", closed, nil, Unreachable, false, false, false, false},
		{"through a proxy that is away", good.Addr().String(), func(c *Config) { c.Proxy = closed }, ProxyFailed, false, false, false, false},
		{"never greets", silent, func(c *Config) { c.Handshake = 500 * time.Millisecond }, NoAnswer, true, false, false, false},
		{"never answers", tlsServer(ca.Server(t)), func(c *Config) { c.Request = 500 * time.Millisecond }, NoAnswer, true, true, false, true},
		{"no TLS", serveRaw(t, func(c net.Conn) { io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n") }), nil, NotTLS, true, false, false, false},
		{"foreign certificate", tlsServer(foreign.Server(t)), nil, ServerUntrusted, true, false, false, true},
		{"expired certificate", tlsServer(ca.Expired(t)), nil, ServerCertExpired, true, false, false, true},
		{"other client", good.Addr().String(), func(c *Config) { c.TLS.Certificates = []tls.Certificate{foreign.Client(t, "controller")} }, ClientRefused, true, true, false, true},
		{"hangs up", serveRaw(t, func(c net.Conn) {
			tls.Server(c, kmipserver.TLSConfig(ca.Server(t), ca.Pool(), false)).HandshakeContext(t.Context())
		}), nil, ClientRefused, true, true, false, true},
		{"no KMIP", serveRaw(t, func(c net.Conn) {
			server := tls.Server(c, kmipserver.TLSConfig(ca.Server(t), ca.Pool(), false))
			io.WriteString(server, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			io.Copy(io.Discard, server)
		}), nil, NotKMIP, true, true, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newClient(t, ca, tt.edit, tt.addr)
			begin := time.Now()
			got := c.Check(t.Context(), tt.addr)
			if got.Problem != tt.problem || (got.Err == nil) != (tt.problem == "") {
				t.Errorf("problem %q, %v; want %q", got.Problem, got.Err, tt.problem)
			}
			if got.Connected != tt.connected || got.ClientTrustServer != tt.trusts || got.ServerTrustClient != tt.trusted || (got.Certificate != nil) != tt.shown {
				t.Errorf("condition %+v", got)
			}
			t.Logf("after %v: %v", time.Since(begin).Round(time.Millisecond), got.Err)
		})
	}
}

func certOf(t *testing.T, addr string, client tls.Certificate) *x509.Certificate {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{client}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}
