package nbd_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/nbd"
)

// authority is a certificate authority.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}}
	var err error
	a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &a.key.PublicKey, a.key)
	check(t, err)
	a.cert, err = x509.ParseCertificate(der)
	check(t, err)
	return a
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// issue makes a certificate for 127.0.0.1.
func (a *authority) issue(t testing.TB, use x509.ExtKeyUsage) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "peer"}, ExtKeyUsage: []x509.ExtKeyUsage{use},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, a.cert, &key.PublicKey, a.key)
	check(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// folder holds what libnbd and QEMU need of a client's certificate.
func (a *authority) folder(t testing.TB, client tls.Certificate) string {
	t.Helper()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	check(t, err)
	for name, block := range map[string]*pem.Block{
		"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: a.cert.Raw},
		"client-cert.pem": {Type: "CERTIFICATE", Bytes: client.Certificate[0]},
		"client-key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		check(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
	return dir
}

// secured is a server's configuration for clients of a.
func (a *authority) secured(t testing.TB) nbd.Config {
	c := config()
	c.TLS = &tls.Config{
		Certificates: []tls.Certificate{a.issue(t, x509.ExtKeyUsageServerAuth)}, MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool(),
	}
	return c
}

// startTCP serves exports on TCP until the test ends, and returns the address.
func startTCP(t testing.TB, c nbd.Config, exports ...nbd.Export) string {
	t.Helper()
	s := nbd.NewServer(c)
	for _, e := range exports {
		check(t, s.AddExport(e))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		check(t, <-ended)
	})
	return l.Addr().String()
}

// TestTLSPeers copies over TCP with libnbd and QEMU, which show certificates. (fio
// has no way to name one.)
func TestTLSPeers(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir := a.folder(t, a.issue(t, x509.ExtKeyUsageClientAuth))
	mem, want := sparse(t)
	address := startTCP(t, a.secured(t), nbd.Export{Name: "disk", Device: mem})
	uri := fmt.Sprintf("nbds://%s/disk?tls-certificates=%s", address, dir)

	if out := tool(t, "nbdinfo", uri); !bytes.Contains([]byte(out), []byte("with TLS")) {
		t.Errorf("nbdinfo does not speak of TLS:\n%s", out)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	tool(t, "nbdcopy", uri, copied)
	got, err := os.ReadFile(copied)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Error("nbdcopy has read other data")
	}
	changed := pattern(16 << 20)
	check(t, os.WriteFile(copied, changed, 0o600))
	tool(t, "nbdcopy", "--connections=4", copied, uri)
	if !bytes.Equal(contents(t, mem), changed) {
		t.Error("nbdcopy has written other data")
	}

	host, port, err := net.SplitHostPort(address)
	check(t, err)
	tool(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=t,endpoint=client,verify-peer=yes,dir="+dir, "--image-opts",
		fmt.Sprintf("driver=nbd,server.type=inet,server.host=%s,server.port=%s,export=disk,tls-creds=t", host, port),
		"driver=file,filename="+copied)
}

// TestTLSRefused has the wrong clients try.
func TestTLSRefused(t *testing.T) {
	t.Parallel()
	a, foreign := newAuthority(t), newAuthority(t)
	address := startTCP(t, a.secured(t), nbd.Export{Name: "rw", Device: blockdev.NewMemory(1<<20, 4096)})
	good := a.issue(t, x509.ExtKeyUsageClientAuth)

	// attempt begins TLS, and then asks for the export.
	attempt := func(c *tls.Config) error {
		r := connectTo(t, "tcp", address)
		r.hello(3)
		if got := answer(r, 5, ""); got != ack {
			t.Fatalf("STARTTLS is answered by %#x", got)
		}
		c.RootCAs, c.ServerName = a.pool(), "127.0.0.1"
		conn := tls.Client(r.Conn, c)
		defer conn.Close()
		check(t, conn.SetDeadline(time.Now().Add(deadline)))
		if _, err := conn.Write(goOption("rw")); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 20)) // with TLS 1.3 this is where a client learns that it is refused
		return err
	}
	check(t, attempt(&tls.Config{Certificates: []tls.Certificate{good}}))
	for name, c := range map[string]*tls.Config{
		"no certificate":       {},
		"foreign certificate":  {Certificates: []tls.Certificate{foreign.issue(t, x509.ExtKeyUsageClientAuth)}},
		"server's certificate": {Certificates: []tls.Certificate{a.issue(t, x509.ExtKeyUsageServerAuth)}},
		"TLS 1.2":              {Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12},
	} {
		if attempt(c) == nil {
			t.Errorf("%s: the client is served", name)
		}
	}
	cmd := exec.CommandContext(testContext(t), "nbdinfo", "nbd://"+address+"/rw")
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("nbdinfo is served without TLS:\n%s", out)
	}
}

// TestTLSNegotiation: nothing is offered before TLS, and what was said before it
// is forgotten.
func TestTLSNegotiation(t *testing.T) {
	t.Parallel()
	const tlsRequired, unsupported = 1<<31 | 5, 1<<31 | 1
	a := newAuthority(t)
	address := startTCP(t, a.secured(t), nbd.Export{Name: "rw", Device: blockdev.NewMemory(1<<20, 4096)})
	r := connectTo(t, "tcp", address)
	r.hello(3)
	for opt, data := range map[uint32]string{3: "", 7: text("rw") + "\x00\x00", 8: "", 99: "abc"} {
		if got := answer(r, opt, data); got != tlsRequired {
			t.Errorf("option %d before TLS is answered by %#x", opt, got)
		}
	}
	if got := answer(r, 5, "data"); got != invalid {
		t.Errorf("STARTTLS with data is answered by %#x", got)
	}
	if got := answer(r, 5, ""); got != ack {
		t.Fatalf("STARTTLS is answered by %#x", got)
	}
	conn := tls.Client(r.Conn, &tls.Config{Certificates: []tls.Certificate{a.issue(t, x509.ExtKeyUsageClientAuth)}, RootCAs: a.pool(), ServerName: "127.0.0.1"})
	check(t, conn.Handshake())
	r.Conn = conn
	if got := answer(r, 5, ""); got != invalid {
		t.Errorf("a second STARTTLS is answered by %#x", got)
	}
	if got := answer(r, 7, text("rw")+"\x00\x00"); got != ack {
		t.Errorf("GO over TLS is answered by %#x", got)
	}

	// An export cannot be chosen, nor a word slipped in after STARTTLS.
	r = connectTo(t, "tcp", address)
	r.hello(3)
	r.send(option(1, "rw"))
	r.wantEnd()
	r = connectTo(t, "tcp", address)
	r.hello(3)
	r.send(append(option(5, ""), goOption("rw")...))
	if got := r.reply(5); got.typ != ack {
		t.Errorf("STARTTLS is answered by %#x", got.typ)
	}
	if b, err := io.ReadAll(r); err != nil && !isReset(err) || bytes.Contains(b, be.AppendUint64(nil, 0x3e889045565a9)) {
		t.Errorf("an option in the place of TLS is answered by %q, %v", b, err)
	}

	// A unix socket has no need of it.
	r = connect(t, pair(t, a.secured(t)))
	r.hello(3)
	if got := answer(r, 5, ""); got != unsupported {
		t.Errorf("STARTTLS on a unix socket is answered by %#x", got)
	}
}

// answer returns the type of the last reply to an option.
func answer(r raw, opt uint32, data string) uint32 {
	all := r.ask(opt, data)
	return all[len(all)-1].typ
}

// TestTLSNeeded: without a configuration that asks for certificates, nothing is
// served on TCP.
func TestTLSNeeded(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	weaken := func(f func(c *tls.Config)) *tls.Config {
		c := a.secured(t).TLS
		f(c)
		return c
	}
	for name, c := range map[string]*tls.Config{
		"none":              nil,
		"old version":       weaken(func(c *tls.Config) { c.MinVersion = tls.VersionTLS12 }),
		"no certificate":    weaken(func(c *tls.Config) { c.ClientAuth = tls.NoClientCert }),
		"given certificate": weaken(func(c *tls.Config) { c.ClientAuth = tls.VerifyClientCertIfGiven }),
		"any certificate":   weaken(func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }),
		"system's CAs":      weaken(func(c *tls.Config) { c.ClientCAs = nil }),
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		check(t, err)
		cfg := config()
		cfg.TLS = c
		if err := nbd.NewServer(cfg).Serve(testContext(t), l); err == nil {
			t.Errorf("%s: served", name)
		}
		if _, err := l.Accept(); err == nil {
			t.Errorf("%s: the listener is open", name)
		}
	}
}

// TestTLSStrangers: one address cannot take all connections without a certificate.
func TestTLSStrangers(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	c := a.secured(t)
	c.MaxConnections = 8
	mem := blockdev.NewMemory(1<<20, 4096)
	address := startTCP(t, c, nbd.Export{Name: "rw", Device: mem})
	first, second := connectTo(t, "tcp", address), connectTo(t, "tcp", address)
	first.hello(3)
	second.hello(3)
	connectTo(t, "tcp", address).wantEnd()
	check(t, first.Close())
	// One that has shown its certificate does not count any more.
	dir := a.folder(t, a.issue(t, x509.ExtKeyUsageClientAuth))
	tool(t, "nbdsh", "-c", fmt.Sprintf(`
import socket
h.set_uri_allow_local_file(True)
h.connect_uri("nbds://%s/rw?tls-certificates=%s")
h.pwrite(b"x" * 512, 0)
s = socket.create_connection(%q.rsplit(":", 1))
assert len(s.recv(18, socket.MSG_WAITALL)) == 18
h.flush()`, address, dir, address))
}
