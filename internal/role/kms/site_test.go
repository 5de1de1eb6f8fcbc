package kms

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/errs"
	"strongroom/test/port"
)

// nodeChild makes the test's binary a node with that configuration.
func nodeChild(config string) {
	cfg, err := LoadConfig(config)
	cfg.format, _ = strconv.Atoi(os.Getenv(childVariable + "_FORMAT"))
	var log slog.Handler = slog.NewTextHandler(os.Stderr, nil)
	done := func(string) {}
	if os.Getenv(childVariable+"_STEPS") != "" {
		log, done = pausing{log}, pause
	}
	if server := os.Getenv(childVariable + "_JOIN"); server != "" && err == nil {
		if err = join(context.Background(), cfg, server, os.Getenv(childVariable+"_TOKEN"), done); err == nil {
			os.Exit(0)
		}
	} else if err == nil {
		err = RunReady(context.Background(), cfg, slog.New(log), func(k *KMS) error {
			fmt.Println(k.Address())
			return nil
		})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// site is the machine that a node runs on.
type site struct {
	t      *testing.T
	name   string
	config string // file
	cfg    Config
	out    *os.File // what all its nodes wrote to standard error
	node   *process // nil when it does not run
	format int      // that its release knows; 0: what this one does
	conn   *http.Transport
}

func newSite(t *testing.T, name string) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{t: t, name: name, config: filepath.Join(dir, "kms.toml")}
	text := fmt.Sprintf(`data_dir = %q
listen = %q
metrics_listen = %q
local_socket = %q
api_listen = %q
[cluster]
name = %q
listen = %q
store_listen = %q
`, filepath.Join(dir, "kms"), port.For(t), port.For(t), filepath.Join(socketDir(t), "s"), port.For(t), name, port.For(t), port.For(t))
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.cfg, err = LoadConfig(s.config); err != nil {
		t.Fatal(err)
	}
	if s.out, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	s.conn = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", s.cfg.LocalSocket)
	}}
	t.Cleanup(func() {
		s.conn.CloseIdleConnections()
		if t.Failed() {
			text, _ := os.ReadFile(s.out.Name())
			t.Logf("log of node %s:\n%s", name, text[max(0, len(text)-8000):])
		}
		s.out.Close()
	})
	return s
}

// run starts the site's node and waits until it serves.
func (s *site) run() {
	s.t.Helper()
	p := &process{cmd: self(), addr: s.cfg.Listen}
	p.cmd.Env = append(os.Environ(), childVariable+"="+s.config, fmt.Sprintf("%s_FORMAT=%d", childVariable, s.format))
	p.cmd.Stderr = s.out
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.node = p
	s.t.Cleanup(p.kill)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		s.t.Fatalf("node %s did not start: %v", s.name, err)
	}
}

func (s *site) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.node.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) stop() {
	s.node.kill()
	s.node = nil
}

func (s *site) members() strongroomv1connect.KMSClusterServiceClient {
	return strongroomv1connect.NewKMSClusterServiceClient(&http.Client{Transport: s.conn}, "http://kms")
}

// join makes the site a node of the KMS that at is one of.
func (s *site) join(at *site) {
	s.t.Helper()
	token := at.joinToken()
	if err := Join(s.t.Context(), s.cfg, token.GetAddress(), token.GetToken()); err != nil {
		s.t.Fatal(err)
	}
	// It is used up.
	other := newSite(s.t, s.name+"-again")
	if err := Join(s.t.Context(), other.cfg, token.GetAddress(), token.GetToken()); errs.KindOf(err) != errs.Denied {
		s.t.Errorf("a second join with the same token: %v", err)
	}
}

// joinToken returns a token of the site's node for another one.
func (s *site) joinToken() *strongroomv1.CreateKMSJoinTokenResponse {
	s.t.Helper()
	res, err := ledBy(s.t, func() (*connect.Response[strongroomv1.CreateKMSJoinTokenResponse], error) {
		return s.members().CreateKMSJoinToken(s.t.Context(), connect.NewRequest(&strongroomv1.CreateKMSJoinTokenRequest{}))
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return res.Msg
}

// list returns the members as the site's node knows them.
func (s *site) list() []*strongroomv1.KMSMember {
	s.t.Helper()
	res, err := ledBy(s.t, func() (*connect.Response[strongroomv1.ListKMSMembersResponse], error) {
		return s.members().ListKMSMembers(s.t.Context(), connect.NewRequest(&strongroomv1.ListKMSMembersRequest{}))
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return res.Msg.GetMembers()
}

// remove has the site's node remove another one.
func (s *site) remove(name string) error {
	_, err := ledBy(s.t, func() (*connect.Response[strongroomv1.RemoveKMSMemberResponse], error) {
		return s.members().RemoveKMSMember(s.t.Context(), connect.NewRequest(&strongroomv1.RemoveKMSMemberRequest{Name: name}))
	})
	return err
}

// metrics returns what Prometheus gets from the site's node.
func (s *site) metrics() string {
	s.t.Helper()
	res, err := http.Get("http://" + s.cfg.MetricsListen + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(text)
}

// patience bounds everything that a test waits for.
const patience = 2 * time.Minute

// eventually waits for what must come.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for begin := time.Now(); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > patience {
			t.Fatalf("in %v it did not happen: %s", patience, what)
		}
	}
}

// ledBy calls f until it says something else than that the nodes have no leader: on
// a busy machine they may lose one at any time. f may have done what it said that it
// could not do.
func ledBy[Res any](t *testing.T, f func() (Res, error)) (res Res, err error) {
	t.Helper()
	begin := time.Now()
	for {
		if res, err = f(); errs.KindOf(apierr.From(err)) != errs.Unavailable {
			return res, apierr.From(err)
		}
		if time.Since(begin) > patience {
			t.Fatalf("for %v there was no leader: %v", patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// trio is a KMS of three nodes, and a client of it.
type trio struct {
	t     *testing.T
	sites []*site
	tls   *tls.Config
}

// newTrio makes the first node of a KMS that is one of one node already, with
// keys, and has two others join.
func newTrio(t *testing.T) (*trio, map[string][]byte) {
	t.Helper()
	return newNodes(t, "b", "c")
}

// newNodes is [newTrio] with others of those names.
func newNodes(t *testing.T, others ...string) (*trio, map[string][]byte) {
	t.Helper()
	a := newSite(t, "a")
	// A KMS of one node, with the first application, and keys.
	alone := a.cfg
	alone.Cluster = nil
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- RunReady(ctx, alone, slog.New(slog.DiscardHandler), func(k *KMS) error {
			defer close(ready)
			return k.EnsureFirstApplication(ctx)
		})
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	n := &trio{t: t, sites: []*site{a}, tls: tlsOf(t, alone.DataDir, first(t, alone.DataDir))}
	keys := map[string][]byte{}
	for range 3 {
		id, secret := n.create(a)
		keys[id] = secret
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	a.run()
	for _, name := range others {
		s := newSite(t, name)
		s.join(a)
		s.run()
		n.sites = append(n.sites, s)
	}
	return n, keys
}

// do does one operation at a node, on a connection of its own.
func (n *trio) do(at *site, p kmip.OperationPayload) (kmip.ResponseBatchItem, error) {
	return doOn(at.cfg.Listen, n.tls, time.Minute, p)
}

func doOn(addr string, cfg *tls.Config, limit time.Duration, p kmip.OperationPayload) (kmip.ResponseBatchItem, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: limit}, "tcp", addr, cfg)
	if err != nil {
		return kmip.ResponseBatchItem{}, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	r, err := exchange(conn, &m)
	if err != nil {
		return kmip.ResponseBatchItem{}, err
	}
	return r.BatchItem[0], r.BatchItem[0].Err()
}

func (n *trio) get(at *site, id string) ([]byte, error) {
	item, err := n.do(at, &payloads.GetRequestPayload{UniqueIdentifier: id})
	if err != nil {
		return nil, err
	}
	return secretOf(item)
}

func (n *trio) create(at *site) (id string, secret []byte) {
	n.t.Helper()
	eventually(n.t, "node "+at.name+" makes a key", func() bool {
		item, err := n.do(at, newAES(""))
		if err != nil {
			return false
		}
		id = item.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
		secret, err = n.get(at, id)
		return err == nil
	})
	return id, secret
}

// check gets all keys at a node.
func (n *trio) check(at *site, keys map[string][]byte) {
	n.t.Helper()
	for id, want := range keys {
		n.has(at, id, want)
	}
}

// has waits until a node that may be looking for a leader gives out a key, which
// must be want unless that is nil.
func (n *trio) has(at *site, id string, want []byte) {
	n.t.Helper()
	eventually(n.t, "node "+at.name+" gives out key "+id, func() bool {
		got, err := n.get(at, id)
		if isNotFound(err) || err == nil && want != nil && !bytes.Equal(got, want) {
			n.t.Fatalf("acknowledged key %s at node %s: %v", id, at.name, err)
		}
		return err == nil
	})
}

// leader returns the site of the leader, once all that run know one.
func (n *trio) leader() (leader *site) {
	n.t.Helper()
	eventually(n.t, "there is a leader", func() bool {
		for _, s := range n.sites {
			if s.node == nil {
				continue
			}
			for _, m := range s.list() {
				if m.GetState() == "leader" {
					leader = n.sites[slices.IndexFunc(n.sites, func(s *site) bool { return s.name == m.GetName() })]
				}
			}
			return leader != nil && leader.node != nil
		}
		return false
	})
	return leader
}
