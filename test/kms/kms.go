// Package kms starts key management servers for tests: PyKMIP, which is not
// ours, as a process, and our own KMIP server front end in this process. Both
// can be stopped and started again at the same address with the keys they had.
package kms

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/port"
)

// program is where Debian puts PyKMIP.
const program = "/usr/bin/pykmip-server"

// startTimeout bounds a start on a machine that is busy with other tests.
const startTimeout = time.Minute

// oldServer is PyKMIP as a server of fewer versions, which its configuration does not
// offer. Its first argument names them.
const oldServer = `
import sys
from kmip.core.messages.contents import ProtocolVersion
from kmip.services.server import engine, server
speaks = [ProtocolVersion(*map(int, v.split("."))) for v in sys.argv.pop(1).split()]
begin = engine.KmipEngine.__init__
def init(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    self._protocol_versions, self.default_protocol_version = speaks, speaks[0]
engine.KmipEngine.__init__ = init
server.main()
`

// PyKMIP is a PyKMIP server that ends with its test.
type PyKMIP struct {
	Addr string // "127.0.0.1:port"

	dir    string
	speaks []string // see StartPyKMIP
	cmd    *exec.Cmd
	output bytes.Buffer
}

// StartPyKMIP starts a server with keys in a new database, whose clients have
// certificates of authorities in clients (PEM). Of KMIP it speaks only those versions,
// such as "1.1"; with none all that it knows.
func StartPyKMIP(t testing.TB, ca *testca.Authority, clients []byte, versions ...string) *PyKMIP {
	t.Helper()
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v (scripts/setup.sh installs it)", err)
	}
	s := &PyKMIP{Addr: port.For(t), dir: t.TempDir(), speaks: versions}
	host, port, _ := net.SplitHostPort(s.Addr)
	cert, key := testca.KeyPEM(t, ca.Server(t))
	policies := filepath.Join(s.dir, "policies")
	config := strings.Join([]string{
		"[server]", "hostname=" + host, "port=" + port, "certificate_path=" + s.dir + "/server.pem", "key_path=" + s.dir + "/server.key",
		"ca_path=" + s.dir + "/ca.pem", "auth_suite=TLS1.2", "policy_path=" + policies, "enable_tls_client_auth=True",
		"logging_level=INFO", "database_path=" + s.dir + "/pykmip.db", "",
	}, "\n")
	if err := os.Mkdir(policies, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"server.pem": cert, "server.key": key, "server.conf": []byte(config)} {
		if err := os.WriteFile(filepath.Join(s.dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.Trust(t, clients)
	s.Start(t)
	t.Cleanup(s.Kill)
	return s
}

// Trust makes the authorities of clients those in text (PEM), from the next
// start on.
func (s *PyKMIP) Trust(t testing.TB, text []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, "ca.pem"), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Start starts the server, again or for the first time, and waits until it
// listens.
func (s *PyKMIP) Start(t testing.TB) {
	t.Helper()
	arguments := []string{"-f", s.dir + "/server.conf", "-l", s.dir + "/server.log"}
	s.cmd = exec.Command(program, arguments...)
	if len(s.speaks) > 0 {
		s.cmd = exec.Command("/usr/bin/python3", append([]string{"-c", oldServer, strings.Join(s.speaks, " ")}, arguments...)...)
	}
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	s.cmd.Env = append(os.Environ(), "TMPDIR="+s.dir) // it leaves folders there when it is killed
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(startTimeout); ; {
		conn, err := net.DialTimeout("tcp", s.Addr, time.Second)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			s.Kill()
			t.Fatalf("PyKMIP does not listen: %s", s.output.String())
		}
		<-time.After(20 * time.Millisecond)
	}
}

// Kill ends the server as a crash does; its polite end takes ten seconds. It is
// idempotent.
func (s *PyKMIP) Kill() {
	if s.cmd == nil {
		return
	}
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	_ = s.cmd.Wait()
	s.cmd = nil
}

// Server is our own KMIP server with a store in memory, which outlives a stop
// and ends with its test. Change its fields before Start only.
type Server struct {
	Addr  string
	Store *kmipserver.Memory
	// Certificate is what it shows.
	Certificate tls.Certificate
	// Clients are the authorities of its clients' certificates. Empty: any
	// certificate will do, and its name is the account.
	Clients *x509.CertPool
	// User and Password must be given by clients, if User is set.
	User, Password string
	// Listener, if set, wraps the listener, to inject faults.
	Listener func(net.Listener) net.Listener

	stop func() error
}

// NewServer returns a server that is not started yet.
func NewServer(t testing.TB, ca *testca.Authority) *Server {
	t.Helper()
	s := &Server{Addr: port.For(t), Store: kmipserver.NewMemory(), Certificate: ca.Server(t), Clients: ca.Pool()}
	t.Cleanup(func() {
		if err := errors.Join(s.Stop(), s.Store.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Start serves at s.Addr.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	config := kmipserver.TLSConfig(s.Certificate, s.Clients, false)
	if s.Clients == nil {
		config.ClientAuth = tls.RequireAnyClientCert
	}
	server, err := kmipserver.New(kmipserver.Config{
		Store: s.Store, TLS: config, Log: slog.New(slog.DiscardHandler), Authenticate: s.authenticate,
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	if s.Listener != nil {
		l = s.Listener(l)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	s.stop = func() error {
		cancel()
		return <-served
	}
}

func (s *Server) authenticate(_ context.Context, state tls.ConnectionState, credentials []kmip.Credential) (kmipserver.Client, error) {
	known := s.User == ""
	for _, c := range credentials {
		if v := c.CredentialValue.UserPassword; v != nil && v.Username == s.User && v.Password == s.Password {
			known = true
		}
	}
	if !known {
		return kmipserver.Client{}, errors.New("wrong credentials")
	}
	return kmipserver.Client{Account: state.PeerCertificates[0].Subject.CommonName}, nil
}

// Stop ends the server; its keys stay. It is idempotent.
func (s *Server) Stop() error {
	if s.stop == nil {
		return nil
	}
	err := s.stop()
	s.stop = nil
	return err
}
