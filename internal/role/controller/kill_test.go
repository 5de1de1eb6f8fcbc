package controller

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/block/blockdev/blockdevtest"
	"strongroom/test/kms"
)

// childVariable makes the test's binary a controller in the folder that it names.
const childVariable = "STRONGROOM_TEST_CONTROLLER_DIR"

func controllerChild(dir string) {
	err := func() error {
		cfg, err := Config{DataDir: dir, Listen: os.Getenv(childVariable + "_LISTEN")}.withDefaults()
		if err != nil {
			return err
		}
		cfg.KMS.RemediationInterval = Duration(200 * time.Millisecond)
		c, err := open(context.Background(), cfg, testLog(), cheapHashing)
		if err != nil {
			return err
		}
		c.beatLife, c.reluctant.again, c.orphanAgeMin = 10*time.Minute, 100*time.Millisecond, time.Second
		l, err := net.Listen("tcp", cfg.Listen)
		if err != nil {
			return err
		}
		fmt.Println("ready")
		return c.run(context.Background(), l)
	}()
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// killable is a site whose controller is a process of its own. What it is asked
// goes through its API only.
type killable struct {
	*site
	h      *fakeHost
	server *kms.Server
	f      *faulty
	cmd    *exec.Cmd
	killed int
}

// newKillable moves the controller of a site into a process of its own.
func newKillable(s *site, h *fakeHost, server *kms.Server, f *faulty) *killable {
	s.t.Helper()
	_, token := s.token("administrator", time.Hour)
	admin := s.as(token)
	s.stop()
	s.admin = admin
	k := &killable{site: s, h: h, server: server, f: f}
	s.t.Cleanup(k.kill)
	k.start()
	return k
}

func (k *killable) start() {
	k.t.Helper()
	k.cmd = exec.Command("/proc/self/exe")
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it ends with the test, whatever ends that
	k.cmd.Env = append(os.Environ(), childVariable+"="+k.cfg.DataDir, childVariable+"_LISTEN="+k.cfg.Listen)
	k.cmd.Stderr = os.Stderr
	out, err := k.cmd.StdoutPipe()
	if err == nil {
		err = k.cmd.Start()
	}
	if err != nil {
		k.t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		k.t.Fatal("the controller did not start: ", err)
	}
	k.heard()
}

// kill is kill -9.
func (k *killable) kill() {
	k.cmd.Process.Kill()
	k.cmd.Wait()
}

// heard has the controller hear of the host.
func (k *killable) heard() {
	k.t.Helper()
	eventually(k.t, "the host is heard", func() bool {
		_, err := k.h.enroll.Heartbeat(k.t.Context(), connect.NewRequest(k.h.heartbeat()))
		return err == nil
	})
}

// at kills the controller at the nth step of what submit begins, starts it again
// and waits until that has come to its end: done must become true. A step is an
// answer of the key server, which it gave and which does not arrive, or a call to
// the host. It reports whether there were so many steps.
func (k *killable) at(n int, submit func(), done func() bool) bool {
	k.t.Helper()
	hold := make(chan struct{})
	hit := k.f.arm(n, hold)
	k.h.change(func() {
		k.h.fault = func(string, int) fault {
			if k.f.step() {
				return fault{hang: hold, lost: true}
			}
			return fault{}
		}
	})
	submit()
	killed := false
	eventually(k.t, "the end, or the step", func() bool {
		select {
		case <-hit:
			killed = true
		default:
		}
		return killed || done()
	})
	if !k.f.disarm() { // also if it was behind the end
		killed = true
		k.kill()
		k.killed++
	}
	close(hold)
	k.h.change(func() { k.h.fault = nil })
	if killed {
		k.start()
		eventually(k.t, "the end after the restart", done)
	}
	return killed
}

// each kills at one step after another: every second one, or as many as a run under
// the race detector has time for, from one on that chance chooses.
func (k *killable) each(t *testing.T, what string, begin func() (submit func(), done func() bool, check func())) {
	t.Helper()
	stride := 2
	if blockdevtest.RaceDetector {
		stride = 8
	}
	first := 1 + rand.IntN(stride)
	for n := first; ; n += stride {
		if n > faultsMax {
			t.Fatalf("%s needs more than %d steps", what, faultsMax)
		}
		submit, done, check := begin()
		before := k.killed
		k.at(n, submit, done)
		check()
		if t.Failed() {
			t.Fatalf("%s, killed at step %d; the first was %d", what, n, first)
		}
		if k.killed == before {
			t.Logf("%s needs fewer than %d steps; killed at every %dth from %d on", what, n, stride, first)
			return
		}
	}
}

// task returns what submits a task and what tells that it has succeeded.
func (k *killable) task(call func() (*strongroomv1.Task, error)) (submit func(), done func() bool) {
	var id string
	return func() {
			k.t.Helper()
			id = must[strongroomv1.Task](k.t)(call()).GetId()
		}, func() bool {
			got, err := client.Call(k.t.Context(), k.admin.Task().GetTask, &strongroomv1.GetTaskRequest{Id: id})
			if err == nil && (got.GetState() == "error" || got.GetState() == "canceled") {
				k.t.Errorf("task %s: %s: %v", got.GetKind(), got.GetState(), got.GetError())
				return true
			}
			return err == nil && got.GetState() == "success"
		}
}

// keysOf returns the keys that VMs need of a provider, by VM: each one key.
func (k *killable) keysOf(provider string) map[string]string {
	k.t.Helper()
	res := must[strongroomv1.ListVMsResponse](k.t)(client.Call(k.t.Context(), k.admin.VM().ListVMs, &strongroomv1.ListVMsRequest{}))
	keys := map[string]string{}
	for _, v := range res.GetVms() {
		for _, d := range v.GetDisks() {
			if d.GetKey().GetProvider() != v.GetKey().GetProvider() || d.GetKey().GetKeyId() != v.GetKey().GetKeyId() {
				k.t.Errorf("%s has key %v, its %s %v", v.GetName(), v.GetKey(), d.GetName(), d.GetKey())
			}
		}
		if v.GetKey().GetProvider() == provider {
			keys[v.GetName()] = v.GetKey().GetKeyId()
		}
	}
	return keys
}

// TestKilledController kills the controller at steps of making a VM with a key
// of its own at the key server, of a shallow rekey to a native provider and back,
// and of the rotation of a wrapping key. After its next start each has come to its
// end: with one new key, which its VM has, no VM has that of another, and what the
// key server has beyond those is what the report of orphans tells.
func TestKilledController(t *testing.T) {
	t.Parallel()
	s, h, server, f := faultySite(t)
	s.provider("kp-1")
	k := newKillable(s, h, server, f)
	call := func(req *strongroomv1.RekeyVMRequest) func() (*strongroomv1.Task, error) {
		return func() (*strongroomv1.Task, error) { return client.Call(t.Context(), k.admin.VM().RekeyVM, req) }
	}
	// made checks that so many keys were made since before, and that VMs have theirs.
	made := func(before, count int, shared bool) {
		t.Helper()
		has := materials(t, server, clientName)
		if len(has) != before+count {
			t.Errorf("%d keys were made, want %d", len(has)-before, count)
		}
		var used []string
		for vm, id := range k.keysOf("kms-1") {
			if has[id] == nil {
				t.Errorf("key %s of %s is not at the key server", id, vm)
			}
			if slices.Contains(used, id) && !shared {
				t.Errorf("key %s has two VMs", id)
			}
			used = append(used, id)
		}
	}
	// accounted checks that all other keys are told as orphans.
	accounted := func() {
		t.Helper()
		var want []string
		used := k.keysOf("kms-1")
		for id := range materials(t, server, clientName) {
			if !slices.Contains(slices.Collect(maps.Values(used)), id) {
				want = append(want, id)
			}
		}
		slices.Sort(want)
		var got []string
		eventually(t, "orphans are old enough", func() bool {
			k.heard()
			got = orphanIDs(k.orphans("kms-1"))
			return slices.Equal(got, want)
		})
		t.Logf("%d keys in use, %d orphans", len(used), len(want))
	}
	keys := func() int { return len(materials(t, server, clientName)) }

	k.each(t, "creation", func() (func(), func() bool, func()) {
		name, before := fmt.Sprintf("web-%d", 1+len(k.keysOf("kms-1"))), keys()
		submit, done := k.task(func() (*strongroomv1.Task, error) {
			return client.Call(t.Context(), k.admin.VM().CreateVM, createVM(name, "east", "kms-1"))
		})
		return submit, done, func() {
			made(before, 1, false)
			if k.keysOf("kms-1")[name] == "" {
				t.Errorf("%s has no key", name)
			}
		}
	})
	accounted()

	k.each(t, "rekey to native", func() (func(), func() bool, func()) {
		if k.keysOf("kms-1")["web-1"] == "" { // back, for another one
			k.success(call(&strongroomv1.RekeyVMRequest{Name: "web-1", Provider: "kms-1"})())
		}
		before := keys()
		submit, done := k.task(call(&strongroomv1.RekeyVMRequest{Name: "web-1", Provider: "kp-1"}))
		return submit, done, func() {
			made(before, 0, false)
			if k.keysOf("kp-1")["web-1"] == "" {
				t.Error("web-1 has no native key")
			}
		}
	})
	k.each(t, "rekey to standard", func() (func(), func() bool, func()) {
		if k.keysOf("kp-1")["web-1"] == "" {
			k.success(call(&strongroomv1.RekeyVMRequest{Name: "web-1", Provider: "kp-1"})())
		}
		before := keys()
		submit, done := k.task(call(&strongroomv1.RekeyVMRequest{Name: "web-1", Provider: "kms-1"}))
		return submit, done, func() {
			made(before, 1, false)
			if k.keysOf("kms-1")["web-1"] == "" {
				t.Error("web-1 has no key of the key server")
			}
		}
	})
	accounted()
}

// TestKilledControllerRotates kills the controller at steps of the rotation of a
// wrapping key that two VMs have: one new key is made, both follow, and the use
// of the one before is ended.
func TestKilledControllerRotates(t *testing.T) {
	t.Parallel()
	s, h, server, f := faultySite(t)
	if err := s.update("kms-1", &strongroomv1.StandardSettings{Keys: keysWrapping}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web-1", "web-2"} {
		s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
	}
	key := s.current("kms-1", "")
	k := newKillable(s, h, server, f)
	rotated := 0
	k.each(t, "a rotation", func() (func(), func() bool, func()) {
		before := key
		rotated++
		return func() { must[strongroomv1.Task](t)(k.rotate("kms-1")) }, func() bool {
				p, err := client.Call(t.Context(), k.admin.Provider().GetProvider, &strongroomv1.GetProviderRequest{Name: "kms-1"})
				if err != nil {
					return false
				}
				k.heard()
				w := p.GetStandard().GetWrapping()
				key = w.GetCurrent().GetKeyId()
				return key != before && w.GetVmsToFollow() == 0 &&
					!slices.ContainsFunc(w.GetReplaced(), func(r *strongroomv1.WrappingKey) bool { return r.GetEnded() == nil })
			}, func() {
				if has := materials(t, server, clientName); len(has) != rotated+1 || has[key] == nil {
					t.Errorf("%d keys at the key server, want %d; the current one is there: %v", len(has), rotated+1, has[key] != nil)
				}
				for vm, id := range k.keysOf("kms-1") {
					if id != key {
						t.Errorf("%s has key %s, the current one is %s", vm, id, key)
					}
				}
			}
	})
	var got []string
	eventually(t, "the ended keys are orphans", func() bool {
		k.heard()
		got = orphanIDs(k.orphans("kms-1"))
		return len(got) == rotated && !slices.Contains(got, key)
	})
}
