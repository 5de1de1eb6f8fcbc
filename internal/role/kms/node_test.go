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
	"strings"
	"sync"
	"sync/atomic"
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

// freePort returns a port that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func newSite(t *testing.T, name string) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{t: t, name: name, config: filepath.Join(dir, "kms.toml")}
	text := fmt.Sprintf(`data_dir = %q
listen = "127.0.0.1:%d"
metrics_listen = "127.0.0.1:%d"
local_socket = %q
api_listen = "127.0.0.1:%d"
[cluster]
name = %q
listen = "127.0.0.1:%d"
store_listen = "127.0.0.1:%d"
`, filepath.Join(dir, "kms"), freePort(t), freePort(t), filepath.Join(socketDir(t), "s"), freePort(t), name, freePort(t), freePort(t))
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
	token, err := at.members().CreateKMSJoinToken(s.t.Context(), connect.NewRequest(&strongroomv1.CreateKMSJoinTokenRequest{}))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := Join(s.t.Context(), s.cfg, token.Msg.GetAddress(), token.Msg.GetToken()); err != nil {
		s.t.Fatal(err)
	}
	// It is used up.
	other := newSite(s.t, s.name+"-again")
	if err := Join(s.t.Context(), other.cfg, token.Msg.GetAddress(), token.Msg.GetToken()); errs.KindOf(err) != errs.Denied {
		s.t.Errorf("a second join with the same token: %v", err)
	}
}

// list returns the members as the site's node knows them.
func (s *site) list() []*strongroomv1.KMSMember {
	s.t.Helper()
	res, err := s.members().ListKMSMembers(s.t.Context(), connect.NewRequest(&strongroomv1.ListKMSMembersRequest{}))
	if err != nil {
		s.t.Fatal(apierr.From(err))
	}
	return res.Msg.GetMembers()
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

// eventually waits for what must come.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for begin := time.Now(); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > 2*time.Minute {
			t.Fatalf("still not: %s", what)
		}
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

// load is clients that create keys at whatever node answers, as a client with
// three servers does.
type load struct {
	mu     sync.Mutex
	keys   map[string][]byte // acknowledged: what Get gave
	pause  time.Duration     // longest time between two acknowledgements
	last   time.Time
	failed int
	stop   atomic.Bool
	all    sync.WaitGroup
}

func (n *trio) load(clients int) *load {
	l := &load{keys: map[string][]byte{}, last: time.Now()}
	for c := range clients {
		l.all.Go(func() {
			for at := c; !l.stop.Load(); {
				addr := n.sites[at%len(n.sites)].cfg.Listen
				if !l.one(addr, n.tls) {
					at++
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
	return l
}

func (l *load) one(addr string, cfg *tls.Config) bool {
	item, err := doOn(addr, cfg, 2*time.Second, newAES(""))
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.failed++
		return false
	}
	id := item.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	l.mu.Lock()
	now := time.Now()
	l.pause, l.last = max(l.pause, now.Sub(l.last)), now
	l.keys[id] = nil
	l.mu.Unlock()
	if item, err = doOn(addr, cfg, 2*time.Second, &payloads.GetRequestPayload{UniqueIdentifier: id}); err != nil {
		return false
	}
	secret, err := secretOf(item)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys[id] = secret
	return err == nil
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.keys)
}

// more waits until so many more keys were acknowledged.
func (l *load) more(t *testing.T, count int) {
	t.Helper()
	before := l.count()
	eventually(t, "clients get on", func() bool { return l.count() >= before+count })
}

// pauseMax is how long the loss of a leader may keep clients waiting.
const pauseMax = 5 * time.Second

// TestThreeNodes takes a KMS of one node to three, and through what happens to
// three: the leader killed under load, each node restarted in turn, a node cut
// off, keys destroyed while a node is away, a node removed.
func TestThreeNodes(t *testing.T) {
	t.Parallel()
	n, keys := newTrio(t)
	for _, s := range n.sites {
		n.check(s, keys) // from when it was alone
	}
	id, secret := n.create(n.sites[2])
	keys[id] = secret
	n.check(n.sites[0], keys)

	t.Run("leader killed under load", func(t *testing.T) {
		l := n.load(4)
		l.more(t, 30)
		l.mu.Lock()
		busy := l.pause // with nothing wrong: a loaded machine pauses, too
		l.mu.Unlock()
		leader := n.leader()
		leader.stop()
		l.more(t, 30)
		leader.run()
		l.more(t, 10)
		l.stop.Store(true)
		l.all.Wait()
		for _, s := range n.sites {
			for id, want := range l.keys {
				n.has(s, id, want)
			}
		}
		if limit := pauseMax + 3*busy; l.pause > limit {
			t.Errorf("writes paused for %v, want less than %v", l.pause, limit)
		}
		t.Logf("%d keys acknowledged, %d requests failed, writes paused for at most %v", len(l.keys), l.failed, l.pause)
	})

	t.Run("restarted one by one", func(t *testing.T) {
		l := n.load(2)
		for _, s := range n.sites {
			l.more(t, 5)
			s.stop()
			s.run()
		}
		l.more(t, 5)
		l.stop.Store(true)
		l.all.Wait()
		n.check(n.sites[1], l.keysGot())
		t.Logf("%d keys acknowledged, %d requests failed, writes paused for at most %v", len(l.keys), l.failed, l.pause)
	})

	t.Run("cut off", func(t *testing.T) { n.testCutOff(t) })
	t.Run("revoked elsewhere", func(t *testing.T) { n.testRevoked(t) })
	t.Run("quorum", func(t *testing.T) { n.testQuorum(t) })
	t.Run("destroyed while away", func(t *testing.T) { n.testAway(t) })
	n.check(n.sites[0], keys)
	t.Run("removed", func(t *testing.T) { n.testRemoved(t, keys) })
}

func (l *load) keysGot() map[string][]byte {
	out := map[string][]byte{}
	for id, secret := range l.keys {
		if secret != nil {
			out[id] = secret
		}
	}
	return out
}

// testCutOff has a node sleep while a key is destroyed, and wake up when it
// reaches nobody: it has the key, and must not give it out. It is the leader, to
// be the one that would trust itself most.
func (n *trio) testCutOff(t *testing.T) {
	leader := n.leader()
	others := slices.DeleteFunc(slices.Clone(n.sites), func(s *site) bool { return s == leader })
	id, secret := n.create(leader)
	leader.signal(syscall.SIGSTOP)
	defer leader.signal(syscall.SIGCONT)
	n.destroy(others[0], id)
	for _, s := range others {
		s.signal(syscall.SIGSTOP)
		defer s.signal(syscall.SIGCONT)
	}
	leader.signal(syscall.SIGCONT)
	got, err := n.get(leader, id)
	if err == nil {
		t.Errorf("a node that is cut off gave out a key that was destroyed; it is the key: %v", bytes.Equal(got, secret))
	} else if isNotFound(err) {
		t.Errorf("a node that is cut off knows what it cannot know: %v", err)
	}
	for _, s := range others {
		s.signal(syscall.SIGCONT)
	}
	eventually(t, "the node that was cut off knows", func() bool {
		_, err := n.get(leader, id)
		return isNotFound(err)
	})
}

// destroy destroys a key; a node that lost its leader does not know whether it
// did.
func (n *trio) destroy(at *site, id string) {
	n.t.Helper()
	eventually(n.t, "node "+at.name+" destroys the key", func() bool {
		_, err := n.do(at, &payloads.DestroyRequestPayload{UniqueIdentifier: id})
		return err == nil || isNotFound(err)
	})
}

// isNotFound reports whether a server said that there is no such key.
func isNotFound(err error) bool { return err != nil && strings.Contains(err.Error(), "ItemNotFound") }

// testRevoked revokes a credential at one node: the others refuse it from the
// next request on.
func (n *trio) testRevoked(t *testing.T) {
	admin := strongroomv1connect.NewKMSServiceClient(&http.Client{Transport: n.sites[0].conn}, "http://kms")
	for range 5 {
		if _, err := admin.SetKMSApplicationDisabled(t.Context(), connect.NewRequest(&strongroomv1.SetKMSApplicationDisabledRequest{Name: FirstApplication, Disabled: true})); err != nil {
			t.Fatal(err)
		}
		for _, s := range n.sites {
			if _, err := n.do(s, newAES("")); err == nil {
				t.Errorf("node %s does not know that the application is disabled", s.name)
			}
		}
		if _, err := admin.SetKMSApplicationDisabled(t.Context(), connect.NewRequest(&strongroomv1.SetKMSApplicationDisabledRequest{Name: FirstApplication})); err != nil {
			t.Fatal(err)
		}
		for _, s := range n.sites {
			n.create(s)
		}
	}
}

// testAway destroys a key while a node is away: the node is to erase the KEK, and
// has done so when it serves again.
func (n *trio) testAway(t *testing.T) {
	away := n.sites[1]
	id, _ := n.create(n.sites[0])
	away.stop()
	n.destroy(n.sites[0], id)
	due := func(name string) int64 {
		for _, m := range n.sites[0].list() {
			if m.GetName() == name {
				return m.GetErasuresDue()
			}
		}
		return -1
	}
	eventually(t, "the others have erased the KEK", func() bool { return due("b") > 0 && due("a") == 0 && due("c") == 0 })
	metrics := n.sites[0].metrics()
	for name, want := range map[string]string{"a": "0", "b": fmt.Sprint(due("b")), "c": "0"} {
		if line := fmt.Sprintf("strongroom_kms_member_erasures_due{member=%q} %s\n", name, want); !strings.Contains(metrics, line) {
			t.Errorf("metrics lack %s:\n%s", line, metrics)
		}
	}
	away.run()
	if d := due("b"); d != 0 {
		t.Errorf("a node that was away serves, and has %d KEKs to erase", d)
	}
}

// testRemoved removes a node, which then does not start any more, and takes it in
// anew.
func (n *trio) testRemoved(t *testing.T, keys map[string][]byte) {
	gone := n.sites[2]
	if _, err := n.sites[2].members().RemoveKMSMember(t.Context(), connect.NewRequest(&strongroomv1.RemoveKMSMemberRequest{Name: "c"})); err == nil {
		t.Error("a node removed itself")
	}
	if _, err := n.sites[0].members().RemoveKMSMember(t.Context(), connect.NewRequest(&strongroomv1.RemoveKMSMemberRequest{Name: "d"})); errs.KindOf(apierr.From(err)) != errs.NotFound {
		t.Errorf("removing who is not there: %v", err)
	}
	if _, err := n.sites[0].members().RemoveKMSMember(t.Context(), connect.NewRequest(&strongroomv1.RemoveKMSMemberRequest{Name: "c"})); err != nil {
		t.Fatal(err)
	}
	if members := n.sites[0].list(); len(members) != 2 {
		t.Errorf("members after a removal: %v", members)
	}
	gone.stop()
	cmd := self()
	cmd.Env = append(os.Environ(), childVariable+"="+gone.config)
	if text, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(text, []byte("removed")) {
		t.Errorf("a node that was removed: %v\n%s", err, text)
	}
	back := newSite(t, "c")
	back.join(n.sites[1])
	back.run()
	n.sites[2] = back
	n.check(back, keys)
}
