package kms

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"golang.org/x/sys/unix"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// space is a network namespace, which lasts as long as its file is open or a
// process is in it.
type space struct{ *os.File }

// newSpace returns a namespace with loopback.
func newSpace(t *testing.T) *space {
	t.Helper()
	var s space
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.File, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.ip(t, nil, "link", "set", "lo", "up")
	return &s
}

// in calls f on a thread that is in the namespace: sockets that it opens and
// processes that it starts are.
func (s *space) in(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(s.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// ip runs ip(8) in the namespace; other is known to it as /proc/self/fd/3.
func (s *space) ip(t *testing.T, other *space, args ...string) {
	t.Helper()
	cmd := exec.Command("ip", args...)
	if other != nil {
		cmd.ExtraFiles = []*os.File{other.File}
	}
	err := s.in(func() error {
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", cmd, err, out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// dial connects to an address on the namespace's loopback.
func (s *space) dial(addr string, cfg *tls.Config) (*tls.Conn, error) {
	var raw net.Conn
	err := s.in(func() (err error) {
		raw, err = net.DialTimeout("tcp4", addr, time.Minute)
		return err
	})
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, cfg)
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	return conn, nil
}

// islands is a KMS of three nodes, each in a namespace of its own. They reach
// each other over a switch, and clients reach each node over its loopback.
type islands struct {
	t      *testing.T
	hub    *space
	spaces []*space
	sites  []*site
	tls    *tls.Config
}

func newIslands(t *testing.T) *islands {
	t.Helper()
	n := &islands{t: t, hub: newSpace(t)}
	n.hub.ip(t, nil, "link", "add", "switch", "type", "bridge")
	n.hub.ip(t, nil, "link", "set", "switch", "up")
	for i, name := range []string{"a", "b", "c"} {
		s, port := newSpace(t), "port-"+name
		n.hub.ip(t, s, "link", "add", port, "type", "veth", "peer", "name", "nodes", "netns", "/proc/self/fd/3")
		n.hub.ip(t, nil, "link", "set", port, "master", "switch", "up")
		address := fmt.Sprintf("10.77.0.%d", i+1)
		s.ip(t, nil, "addr", "add", address+"/24", "dev", "nodes")
		s.ip(t, nil, "link", "set", "nodes", "up")
		n.spaces, n.sites = append(n.spaces, s), append(n.sites, newIsland(t, name, address))
	}
	a := n.sites[0]
	alone := a.cfg
	alone.Cluster, alone.Listen = nil, "127.0.0.1:0"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := RunReady(ctx, alone, slog.New(slog.DiscardHandler), func(k *KMS) error {
		defer cancel()
		return k.EnsureFirstApplication(ctx)
	})
	if err != nil {
		t.Fatal(err)
	}
	n.tls = tlsOf(t, alone.DataDir, first(t, alone.DataDir))
	n.tls.ServerName = "127.0.0.1"
	for i, s := range n.sites {
		if i > 0 {
			token := a.joinToken()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), childVariable+"="+s.config, childVariable+"_JOIN="+token.GetAddress(), childVariable+"_TOKEN="+token.GetToken())
			cmd.Stderr = s.out
			if err := n.spaces[i].in(cmd.Run); err != nil {
				t.Fatalf("node %s does not join: %v", s.name, err)
			}
		}
		n.run(i)
	}
	return n
}

// newIsland is newSite with an address for other nodes.
func newIsland(t *testing.T, name, address string) *site {
	t.Helper()
	s := newSite(t, name)
	text := fmt.Sprintf(`data_dir = %q
listen = "127.0.0.1:5696"
local_socket = %q
[cluster]
name = %q
listen = "%s:5697"
store_listen = "%s:5698"
`, filepath.Join(filepath.Dir(s.config), "kms"), s.cfg.LocalSocket, name, address, address)
	err := os.WriteFile(s.config, []byte(text), 0o600)
	if err == nil {
		s.cfg, err = LoadConfig(s.config)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// run starts a node in its namespace and waits until it serves.
func (n *islands) run(i int) {
	n.t.Helper()
	s := n.sites[i]
	p := &process{cmd: exec.Command("/proc/self/exe"), addr: s.cfg.Listen}
	p.cmd.Env = append(os.Environ(), childVariable+"="+s.config)
	p.cmd.Stderr = s.out
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		err = n.spaces[i].in(p.cmd.Start)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	s.node = p
	n.t.Cleanup(p.kill)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		n.t.Fatalf("node %s did not start: %v", s.name, err)
	}
}

// plug connects a node with the others or cuts it off.
func (n *islands) plug(i int, state string) {
	n.t.Helper()
	n.hub.ip(n.t, nil, "link", "set", "port-"+n.sites[i].name, state)
}

// do does one operation at a node.
func (n *islands) do(i int, p kmip.OperationPayload) (kmip.ResponseBatchItem, error) {
	conn, err := n.spaces[i].dial(n.sites[i].cfg.Listen, n.tls)
	if err != nil {
		return kmip.ResponseBatchItem{}, err
	}
	defer conn.Close()
	m := kmip.NewRequestMessage(kmip.V1_4, p)
	r, err := exchange(conn, &m)
	if err != nil {
		return kmip.ResponseBatchItem{}, err
	}
	return r.BatchItem[0], r.BatchItem[0].Err()
}

func (n *islands) eventually(i int, p kmip.OperationPayload) (item kmip.ResponseBatchItem) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("node %s does %T", n.sites[i].name, p), func() bool {
		var err error
		item, err = n.do(i, p)
		return err == nil
	})
	return item
}

func (n *islands) key() string {
	n.t.Helper()
	item := n.eventually(0, newAES(""))
	id := item.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	n.eventually(0, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
	return id
}

// stateOf is what a node says of a key: its state, or why it has none.
func (n *islands) stateOf(i int, id string) (kmip.State, error) {
	item, err := n.do(i, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState}})
	if err != nil {
		return 0, err
	}
	state, _ := item.ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute[0].AttributeValue.(kmip.State)
	return state, nil
}

// TestPartition cuts the leader off from the others, while clients still reach
// it. The others go on; the one that is cut off never tells of a key what was
// true before they revoked or destroyed it, and is in line once it is back.
func TestPartition(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Fatal("ip(8) of iproute2 is needed: ", err)
	}
	n := newIslands(t)
	revoked, gone := n.key(), n.key()
	for i := range n.sites { // each has them in its cache
		for _, id := range []string{revoked, gone} {
			n.eventually(i, &payloads.GetRequestPayload{UniqueIdentifier: id})
		}
	}
	cut := -1
	eventually(t, "there is a leader", func() bool {
		res, err := n.sites[0].members().ListKMSMembers(t.Context(), connect.NewRequest(&strongroomv1.ListKMSMembersRequest{}))
		if err != nil {
			return false
		}
		for _, m := range res.Msg.GetMembers() {
			if m.GetState() == "leader" {
				cut = slices.IndexFunc(n.sites, func(s *site) bool { return s.name == m.GetName() })
			}
		}
		return cut >= 0
	})
	other := (cut + 1) % len(n.sites)

	n.plug(cut, "down")
	n.eventually(other, &payloads.RevokeRequestPayload{
		UniqueIdentifier: revoked, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise},
	})
	n.eventually(other, &payloads.RevokeRequestPayload{
		UniqueIdentifier: gone, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeCessationOfOperation},
	})
	n.eventually(other, &payloads.DestroyRequestPayload{UniqueIdentifier: gone})

	// From here on only one answer is true.
	var askers sync.WaitGroup
	var unanswered atomic.Int64
	for range 4 {
		askers.Go(func() {
			if state, err := n.stateOf(cut, revoked); err == nil && state != kmip.StateCompromised {
				t.Errorf("the node that is cut off says that the revoked key is %v", state)
			} else if err != nil {
				unanswered.Add(1)
			}
		})
		askers.Go(func() {
			if _, err := n.do(cut, &payloads.GetRequestPayload{UniqueIdentifier: gone}); err == nil {
				t.Error("the node that is cut off gives out the destroyed key")
			} else if !isNotFound(err) {
				unanswered.Add(1)
			}
		})
	}
	made := n.eventually(other, newAES("")).ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	askers.Wait()
	if unanswered.Load() != 8 {
		t.Errorf("%d of 8 questions to the node that is cut off had no answer", unanswered.Load())
	}

	n.plug(cut, "up")
	n.eventually(cut, &payloads.GetRequestPayload{UniqueIdentifier: made})
	// It has a leader, which on a busy machine it may lose again.
	eventually(t, "the node that is back tells the revoked key's state", func() bool {
		state, err := n.stateOf(cut, revoked)
		if isNotFound(err) || err == nil && state != kmip.StateCompromised {
			t.Fatalf("the node that is back says that the revoked key is %v, %v", state, err)
		}
		return err == nil
	})
	eventually(t, "the node that is back knows that the destroyed key is gone", func() bool {
		_, err := n.do(cut, &payloads.GetRequestPayload{UniqueIdentifier: gone})
		if err == nil {
			t.Fatal("the node that is back gives out the destroyed key")
		}
		return isNotFound(err)
	})
	eventually(t, "the node that is back has erased what it should have", func() bool {
		res, err := n.sites[cut].members().ListKMSMembers(t.Context(), connect.NewRequest(&strongroomv1.ListKMSMembersRequest{}))
		if err != nil {
			return false
		}
		for _, m := range res.Msg.GetMembers() {
			if m.GetErasuresDue() != 0 {
				return false
			}
		}
		return true
	})
}
