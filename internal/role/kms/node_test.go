package kms

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go/payloads"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/api/strongroom/v1/strongroomv1connect"
	"strongroom/internal/errs"
)

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
		for try := 1; ; try++ {
			l.more(t, 30)
			busy := l.paused() // with nothing wrong: a loaded machine pauses, too
			leader := n.leader()
			leader.stop()
			l.more(t, 30)
			pause, limit := l.paused(), pauseMax+3*busy
			leader.run()
			l.more(t, 10)
			l.paused()
			t.Logf("writes paused for at most %v, and before that for %v", pause, busy)
			if pause <= limit {
				break
			}
			if try == 3 { // a machine can be busy at the wrong moment, but not each time
				t.Errorf("writes paused for %v, want less than %v", pause, limit)
				break
			}
		}
		l.stop.Store(true)
		l.all.Wait()
		for _, s := range n.sites {
			for id, want := range l.keys {
				n.has(s, id, want)
			}
		}
		t.Logf("%d keys acknowledged, %d requests failed", len(l.keys), l.failed)
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
		t.Logf("%d keys acknowledged, %d requests failed, writes paused for at most %v", len(l.keys), l.failed, l.paused())
	})

	t.Run("cut off", func(t *testing.T) { n.testCutOff(t) })
	t.Run("revoked elsewhere", func(t *testing.T) { n.testRevoked(t) })
	t.Run("REST", func(t *testing.T) { n.testREST(t) })
	t.Run("quorum", func(t *testing.T) { n.testQuorum(t) })
	t.Run("stale", func(t *testing.T) { n.testStale(t) })
	t.Run("destroyed while away", func(t *testing.T) { n.testAway(t) })
	n.check(n.sites[0], keys)
	t.Run("removed", func(t *testing.T) { n.testRemoved(t, keys) })
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
	disable := func(disabled bool) {
		t.Helper()
		if _, err := ledBy(t, func() (*connect.Response[strongroomv1.KMSApplication], error) {
			return admin.SetKMSApplicationDisabled(t.Context(), connect.NewRequest(&strongroomv1.SetKMSApplicationDisabledRequest{Name: FirstApplication, Disabled: disabled}))
		}); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		disable(true)
		for _, s := range n.sites {
			if _, err := n.do(s, newAES("")); err == nil {
				t.Errorf("node %s does not know that the application is disabled", s.name)
			}
		}
		disable(false)
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
	if err := gone.remove("c"); err == nil {
		t.Error("a node removed itself")
	}
	if err := n.sites[0].remove("d"); errs.KindOf(err) != errs.NotFound {
		t.Errorf("removing who is not there: %v", err)
	}
	if err := n.sites[0].remove("c"); err != nil && errs.KindOf(err) != errs.NotFound { // or a first attempt was not answered
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
