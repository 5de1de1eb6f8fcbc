package pki_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"strongroom/internal/control/pki"
	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// gcm is a sealer as the role's: AES-256-GCM with the name authenticated.
type gcm struct{ aead cipher.AEAD }

func newSealer(t *testing.T) gcm {
	t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	return gcm{aead}
}

func (g gcm) Seal(name string, b []byte) ([]byte, error) {
	return g.aead.Seal(nil, nil, b, []byte(name)), nil
}

func (g gcm) Open(name string, b []byte) ([]byte, error) {
	return g.aead.Open(nil, nil, b, []byte(name))
}

func newCA(t *testing.T) *pki.CA {
	t.Helper()
	ca, err := pki.OpenCA(t.TempDir(), "test", newSealer(t))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestOpenCA(t *testing.T) {
	t.Parallel()
	dir, sealer := t.TempDir(), newSealer(t)
	first, err := pki.OpenCA(dir, "test", sealer)
	if err != nil {
		t.Fatal(err)
	}
	again, err := pki.OpenCA(dir, "test", sealer)
	if err != nil || !again.Certificate().Equal(first.Certificate()) {
		t.Fatalf("opened again: %v", err)
	}
	for _, name := range []string{"ca.pem", "ca.key.sealed"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	key, err := os.ReadFile(filepath.Join(dir, "ca.key.sealed"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509.ParsePKCS8PrivateKey(key); err == nil {
		t.Error("the key is not sealed")
	}
	if _, err := pki.OpenCA(dir, "test", newSealer(t)); err == nil {
		t.Error("opened with another sealing key")
	}
	// A crash between key and certificate leaves no CA; one is made.
	half := t.TempDir()
	if err := os.WriteFile(filepath.Join(half, "ca.key.sealed"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.OpenCA(half, "test", sealer); err != nil {
		t.Errorf("after a crash: %v", err)
	}
	// The key of one CA with the certificate of another.
	other := t.TempDir()
	if _, err := pki.OpenCA(other, "test", sealer); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "ca.key.sealed"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.OpenCA(other, "test", sealer); errs.KindOf(err) != errs.Corrupt {
		t.Errorf("key and certificate that do not fit: %v", err)
	}
	// A lost key is never replaced: it would orphan every host.
	if err := os.Remove(filepath.Join(dir, "ca.key.sealed")); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.OpenCA(dir, "test", sealer); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without key: %v", err)
	}
}

func TestIssueFromCSR(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	id := pki.Identity{Cluster: "c-1", Role: pki.Host, Name: "h-1"}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	// What the request asks for beside the key is ignored.
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "controller"},
		DNSNames: []string{"evil.example"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueFromCSR(csr, id, []string{"host-1.example", "192.0.2.7"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := pki.IdentityOf(cert); err != nil || got != id {
		t.Errorf("identity %v, %v", got, err)
	}
	if cert.IsCA || !slices.Equal(cert.DNSNames, []string{"host-1.example"}) || len(cert.IPAddresses) != 1 || strings.Contains(cert.Subject.String(), "controller") {
		t.Errorf("%v %v %v %v", cert.IsCA, cert.DNSNames, cert.IPAddresses, cert.Subject)
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		t.Error(err)
	}
	client, err := ca.IssueFromCSR(csr, pki.Identity{Cluster: "c-1", Role: pki.Client, Name: "ann"}, []string{"host-1.example"})
	if err != nil {
		t.Fatal(err)
	}
	if len(client.DNSNames) != 0 {
		t.Error("a client's certificate has a server's names")
	}
	if _, err := client.Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("a client's certificate can be a server's")
	}

	changed := bytes.Clone(csr)
	changed[len(changed)-1] ^= 1
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edCSR, err := pki.NewCSR(edKey)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384CSR, err := pki.NewCSR(p384)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		csr []byte
		id  pki.Identity
	}{
		"wrong signature": {changed, id},
		"empty":           {nil, id},
		"too large":       {make([]byte, 20<<10), id},
		"Ed25519":         {edCSR, id},
		"P-384":           {p384CSR, id},
		"no role":         {csr, pki.Identity{Cluster: "c", Name: "n"}},
		"slash in name":   {csr, pki.Identity{Cluster: "c", Role: pki.Host, Name: "a/controller/b"}},
		"no name":         {csr, pki.Identity{Cluster: "c", Role: pki.Host}},
	} {
		if cert, err := ca.IssueFromCSR(c.csr, c.id, nil); errs.KindOf(err) != errs.Invalid || cert != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// talk makes one TLS connection and returns what each side says to it, and the
// client's view.
func talk(t *testing.T, server, client *tls.Config) (state tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		raw, err := ln.Accept()
		if err != nil {
			done <- err
			return
		}
		defer raw.Close()
		conn := tls.Server(raw, server)
		if err := conn.HandshakeContext(ctx); err != nil {
			done <- err
			return
		}
		_, err = conn.Write([]byte("hello"))
		done <- err
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, client)
	clientErr = conn.HandshakeContext(ctx)
	if clientErr == nil {
		// With TLS 1.3 a server's refusal arrives with the first read.
		_, clientErr = io.ReadFull(conn, make([]byte, 5))
		state = conn.ConnectionState()
	}
	raw.Close()
	return state, <-done, clientErr
}

func issue(t *testing.T, ca *pki.CA, id pki.Identity) *pki.Credential {
	t.Helper()
	c, err := ca.Issue(id, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	ca, otherCA := newCA(t), newCA(t)
	controller := pki.Identity{Cluster: "main", Role: pki.Controller, Name: "controller"}
	host := pki.Identity{Cluster: "c-1", Role: pki.Host, Name: "h-1"}
	hostsOnly := func(id pki.Identity) error {
		if id.Role != pki.Host {
			return errs.New(errs.Denied, "not a host")
		}
		return nil
	}
	cc, hc := issue(t, ca, controller), issue(t, ca, host)
	required := pki.ServerConfig(cc, ca.Certificate(), false, hostsOnly)
	optional := pki.ServerConfig(cc, ca.Certificate(), true, hostsOnly)
	tls12 := pki.ClientConfig(hc, ca.Certificate(), controller)
	tls12.MinVersion, tls12.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for _, c := range []struct {
		name   string
		server *tls.Config
		client *tls.Config
		ok     bool
	}{
		{"host to controller", required, pki.ClientConfig(hc, ca.Certificate(), controller), true},
		{"no certificate", required, pki.ClientConfig(nil, ca.Certificate(), controller), false},
		{"no certificate, optional", optional, pki.ClientConfig(nil, ca.Certificate(), controller), true},
		{"wrong role", required, pki.ClientConfig(issue(t, ca, pki.Identity{Cluster: "c-1", Role: pki.Client, Name: "h-1"}), ca.Certificate(), controller), false},
		{"wrong role, optional", optional, pki.ClientConfig(issue(t, ca, pki.Identity{Cluster: "c-1", Role: pki.Client, Name: "h-1"}), ca.Certificate(), controller), false},
		{"client of another CA", required, pki.ClientConfig(issue(t, otherCA, host), ca.Certificate(), controller), false},
		{"server of another CA", pki.ServerConfig(issue(t, otherCA, controller), ca.Certificate(), false, nil), pki.ClientConfig(hc, ca.Certificate(), controller), false},
		{"another server", required, pki.ClientConfig(hc, ca.Certificate(), host), false},
		{"a client as server", pki.ServerConfig(issue(t, ca, pki.Identity{Cluster: "main", Role: pki.Client, Name: "x"}), ca.Certificate(), true, nil), pki.ClientConfig(nil, ca.Certificate(), pki.Identity{Cluster: "main", Role: pki.Client, Name: "x"}), false},
		{"TLS 1.2", required, tls12, false},
		{"join", optional, pki.JoinConfig(pki.FingerprintOf(ca.Certificate()), pki.Controller), true},
		{"join, other pin", optional, pki.JoinConfig(pki.FingerprintOf(otherCA.Certificate()), pki.Controller), false},
		{"join, to a host", pki.ServerConfig(hc, ca.Certificate(), true, nil), pki.JoinConfig(pki.FingerprintOf(ca.Certificate()), pki.Controller), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			state, serverErr, clientErr := talk(t, c.server, c.client)
			if c.ok && (serverErr != nil || clientErr != nil || state.Version != tls.VersionTLS13) {
				t.Errorf("server: %v, client: %v, version %x", serverErr, clientErr, state.Version)
			}
			if !c.ok && clientErr == nil {
				t.Errorf("the connection was made (server: %v)", serverErr)
			}
			if c.ok && strings.HasPrefix(c.name, "join") {
				got, err := pki.PresentedCA(state, pki.FingerprintOf(ca.Certificate()))
				if err != nil || !got.Equal(ca.Certificate()) {
					t.Errorf("presented CA: %v", err)
				}
			}
		})
	}
	// A man in the middle who shows the right CA certificate, but has a
	// certificate of his own.
	mitm := issue(t, otherCA, controller)
	cfg := pki.ServerConfig(mitm, otherCA.Certificate(), true, nil)
	get := cfg.GetCertificate
	cfg.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := get(h)
		if err != nil {
			return nil, err
		}
		forged := *cert
		forged.Certificate = [][]byte{cert.Certificate[0], ca.Certificate().Raw}
		return &forged, nil
	}
	if _, _, err := talk(t, cfg, pki.JoinConfig(pki.FingerprintOf(ca.Certificate()), pki.Controller)); err == nil {
		t.Error("joined through a man in the middle")
	}
}

func TestExpiredCertificateIsRefused(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	controller := pki.Identity{Cluster: "main", Role: pki.Controller, Name: "controller"}
	host := pki.Identity{Cluster: "c-1", Role: pki.Host, Name: "h-1"}
	good := issue(t, ca, controller)
	ca.SetClock(func() time.Time { return time.Now().Add(-pki.CertLife - time.Hour) })
	old, oldServer := issue(t, ca, host), issue(t, ca, controller)
	if _, _, err := talk(t, pki.ServerConfig(good, ca.Certificate(), false, nil), pki.ClientConfig(old, ca.Certificate(), controller)); err == nil {
		t.Error("an expired client came in")
	}
	if _, _, err := talk(t, pki.ServerConfig(oldServer, ca.Certificate(), true, nil), pki.ClientConfig(nil, ca.Certificate(), controller)); err == nil {
		t.Error("an expired server was believed")
	}
}

func TestReplaceWhileServing(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	id := pki.Identity{Cluster: "main", Role: pki.Controller, Name: "controller"}
	c := issue(t, ca, id)
	server := pki.ServerConfig(c, ca.Certificate(), true, nil)
	before := c.Leaf().SerialNumber
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueFromCSR(csr, id, nil)
	if err != nil {
		t.Fatal(err)
	}
	wrongKey, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Replace(cert, wrongKey, ca.Certificate()); errs.KindOf(err) != errs.Invalid {
		t.Errorf("replaced with a key that does not fit: %v", err)
	}
	if err := c.Replace(cert, key, newCA(t).Certificate()); errs.KindOf(err) != errs.Invalid {
		t.Errorf("replaced with another CA: %v", err)
	}
	if err := c.Replace(cert, key, ca.Certificate()); err != nil {
		t.Fatal(err)
	}
	state, _, err := talk(t, server, pki.ClientConfig(nil, ca.Certificate(), id))
	if err != nil || state.PeerCertificates[0].SerialNumber.Cmp(before) == 0 {
		t.Errorf("still the old certificate (%v)", err)
	}
}

// TestKeepFresh lets half a year pass, with renewals that fail at first.
func TestKeepFresh(t *testing.T) {
	t.Parallel()
	dir, sealer := t.TempDir(), newSealer(t)
	synctest.Test(t, func(t *testing.T) {
		ca, err := pki.OpenCA(dir, "test", sealer)
		if err != nil {
			t.Fatal(err)
		}
		id := pki.Identity{Cluster: "c-1", Role: pki.Host, Name: "h-1"}
		c, err := ca.Issue(id, nil)
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		calls, reports := 0, 0
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- c.KeepFresh(ctx, ca.Certificate(), time.Hour, func(_ context.Context, csr []byte) (*x509.Certificate, error) {
				mu.Lock()
				defer mu.Unlock()
				if calls++; calls <= 2 {
					return nil, errors.New("controller does not answer")
				}
				return ca.IssueFromCSR(csr, id, nil)
			}, func(error) { mu.Lock(); defer mu.Unlock(); reports++ })
		}()
		for day := range 180 {
			time.Sleep(24 * time.Hour) // of the bubble's clock
			synctest.Wait()
			if left := time.Until(c.Leaf().NotAfter); left < 28*24*time.Hour {
				t.Fatalf("day %d: the certificate has %v left", day, left)
			}
		}
		mu.Lock()
		if calls < 4 || calls > 6 || reports != 2 {
			t.Errorf("%d renewals, %d failures reported", calls, reports)
		}
		mu.Unlock()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("KeepFresh: %v", err)
		}
	})
}

func TestJoinTokens(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db, err := store.Open(ctx, store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	j := pki.NewJoins(db)
	now := time.Now().UTC()
	j.SetClock(func() time.Time { return now })
	ca := pki.Fingerprint{1, 2, 3}
	tok, expires, err := j.Create(ctx, "c-1", 0, ca)
	if err != nil || !expires.Equal(now.Add(time.Hour)) || tok.CA != ca {
		t.Fatalf("%v, %v", expires, err)
	}
	parsed, err := pki.ParseJoinToken(tok.String())
	if err != nil || parsed != tok {
		t.Fatalf("%+v, %v", parsed, err)
	}
	var b bytes.Buffer
	if _, err := db.Snapshot(ctx, &b); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b.Bytes(), tok.Secret[:]) || bytes.Contains(b.Bytes(), []byte(strings.Split(tok.String(), ".")[2])) {
		t.Error("the secret is in the store")
	}
	wrong := tok
	wrong.Secret[0] ^= 1
	if _, err := j.Redeem(ctx, wrong); errs.KindOf(err) != errs.Denied {
		t.Errorf("wrong secret: %v", err)
	}
	if _, err := j.Check(ctx, wrong); errs.KindOf(err) != errs.Denied {
		t.Errorf("wrong secret: %v", err)
	}
	for range 2 { // it does not use the token up
		if cluster, err := j.Check(ctx, tok); err != nil || cluster != "c-1" {
			t.Errorf("checked: %q, %v", cluster, err)
		}
	}
	// Many at once: exactly one joins.
	var wg sync.WaitGroup
	results := make([]error, 5)
	for i := range results {
		wg.Go(func() {
			cluster, err := j.Redeem(ctx, tok)
			if err == nil && cluster != "c-1" {
				t.Errorf("cluster %q", cluster)
			}
			results[i] = err
		})
	}
	wg.Wait()
	won := 0
	for _, err := range results {
		if err == nil {
			won++
		} else if errs.KindOf(err) != errs.Denied {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d joined with one token", won)
	}
	if _, err := j.Check(ctx, tok); errs.KindOf(err) != errs.Denied {
		t.Errorf("used: %v", err)
	}
	tok, _, err = j.Create(ctx, "c-1", time.Minute, ca)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Minute)
	if _, err := j.Redeem(ctx, tok); errs.KindOf(err) != errs.Denied {
		t.Errorf("expired: %v", err)
	}
	if _, _, err := j.Create(ctx, "c-1", 25*time.Hour, ca); errs.KindOf(err) != errs.Invalid {
		t.Errorf("too long a life: %v", err)
	}
}

func TestJoinTokenVector(t *testing.T) {
	t.Parallel()
	tok := pki.JoinToken{ID: "0001020304050607"}
	copy(tok.Secret[:], bytes.Repeat([]byte{0xaa}, 32))
	copy(tok.CA[:], bytes.Repeat([]byte{0x55}, 32))
	spec, err := os.ReadFile("../../../docs/spec/join-token.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(spec, []byte("    "+tok.String()+"\n")) {
		t.Errorf("%s is not what docs/spec/join-token.md says", tok)
	}
}

func FuzzJoinToken(f *testing.F) {
	tok := pki.JoinToken{ID: "0001020304050607"}
	f.Add(tok.String())
	f.Add(strings.Replace(tok.String(), "A.A", "B.A", 1)) // bits in the unused end
	f.Add("")
	f.Add("strongroom-join-1...")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := pki.ParseJoinToken(s)
		if err != nil && tok != (pki.JoinToken{}) {
			t.Errorf("result with error: %+v", tok)
		}
		if err == nil && tok.String() != s {
			t.Errorf("%q became %q", s, tok)
		}
	})
}

func FuzzIdentity(f *testing.F) {
	f.Add("strongroom://c-1/host/h-1")
	f.Add("strongroom://c-1/host/h-1/x")
	f.Add("strongroom://c%2f1/host/..")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := pki.ParseIdentity(s)
		if err != nil && id != (pki.Identity{}) {
			t.Errorf("result with error: %+v", id)
		}
		if err == nil && id.String() != s {
			t.Errorf("%q became %q", s, id)
		}
	})
}

// TestInstallCA puts a CA on a second node: it issues what the first accepts, and
// replaces nothing.
func TestInstallCA(t *testing.T) {
	t.Parallel()
	first, sealer := newCA(t), newSealer(t)
	key, err := first.PrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	second, err := pki.InstallCA(dir, first.Certificate().Raw, key, sealer)
	if err != nil {
		t.Fatal(err)
	}
	own, err := second.Issue(pki.Identity{Cluster: "c", Role: pki.KMS, Name: "b"}, []string{"127.0.0.1"})
	if err != nil || own.Leaf().CheckSignatureFrom(first.Certificate()) != nil {
		t.Errorf("a certificate of the second node: %v", err)
	}
	if _, err := pki.InstallCA(dir, first.Certificate().Raw, key, sealer); errs.KindOf(err) != errs.Exists {
		t.Errorf("a CA where there is one: %v", err)
	}
	if again, err := pki.OpenCA(dir, "x", sealer); err != nil || !again.Certificate().Equal(first.Certificate()) {
		t.Errorf("the second node's CA after a restart: %v", err)
	}
	other, dir := newCA(t), t.TempDir()
	if _, err := pki.InstallCA(dir, other.Certificate().Raw, key, sealer); err == nil {
		t.Error("certificate and key that do not fit were installed")
	}
	if _, err := pki.InstallCA(dir, first.Certificate().Raw, key, sealer); err != nil {
		t.Errorf("after an attempt that failed: %v", err)
	}
}
