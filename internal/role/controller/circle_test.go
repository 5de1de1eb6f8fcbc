package controller

import (
	"slices"
	"strings"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/testca"
)

// TestCircularDependency: no operation encrypts a VM with keys that come by way of
// what it runs, unless that is allowed, which is audited and has an alarm.
func TestCircularDependency(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	ctx := t.Context()
	s.addStandard("kms-1", standardSettings(anyClient(t, testca.New(t))))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	mark := func(name string, runs ...string) (*strongroomv1.VM, error) {
		return client.Call(ctx, s.admin.VM().MarkVM, &strongroomv1.MarkVMRequest{Name: name, Runs: runs})
	}
	for name, encrypt := range map[string]bool{"plain": false, "native": true, "clonable": true} {
		s.success(s.create(name, encrypt))
		v := must[strongroomv1.VM](t)(mark(name, "provider:kms-1", "controller"))
		if !slices.Equal(v.GetRuns(), []string{"controller", "provider:kms-1"}) {
			t.Fatalf("%s runs %q", name, v.GetRuns())
		}
		if got := s.alarms("vm/" + name); len(got) != 0 {
			t.Errorf("%s has alarms %q", name, got)
		}
	}
	h.beat() // what the host says leaves the marks
	if got := s.vm("plain").Runs; len(got) != 2 {
		t.Errorf("after a heartbeat it runs %q", got)
	}

	create := func(runs, name string) func(bool) (*strongroomv1.Task, error) {
		return func(allow bool) (*strongroomv1.Task, error) {
			req := createVM(name, "lab", "kms-1")
			req.Runs, req.AllowCircular = []string{runs}, allow
			return client.Call(ctx, s.admin.VM().CreateVM, req)
		}
	}
	encrypt := func(inPlace bool) func(bool) (*strongroomv1.Task, error) {
		return func(allow bool) (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "plain", Provider: "kms-1", InPlace: inPlace, AllowCircular: allow})
		}
	}
	rekey := func(deep bool) func(bool) (*strongroomv1.Task, error) {
		return func(allow bool) (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "native", Provider: "kms-1", Deep: deep, AllowCircular: allow})
		}
	}
	clone := func(allow bool) (*strongroomv1.Task, error) {
		return client.Call(ctx, s.admin.VM().CloneVM, &strongroomv1.CloneVMRequest{Name: "clonable", Clone: "clone", Provider: "kms-1", AllowCircular: allow})
	}
	for _, c := range []struct {
		name, vm string
		start    func(allow bool) (*strongroomv1.Task, error)
		only     bool // refused only: another case has it allowed
	}{
		{"create a key server", "new-kms", create("provider:kms-1", "new-kms"), false},
		{"create a controller", "new-ctl", create("controller", "new-ctl"), false},
		{"encrypt in place", "plain", encrypt(true), true},
		{"encrypt", "plain", encrypt(false), false},
		{"rekey deeply", "native", rekey(true), true},
		{"rekey", "native", rekey(false), false},
		{"rekey within the provider", "native", func(allow bool) (*strongroomv1.Task, error) {
			return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "native", AllowCircular: allow})
		}, false},
		{"clone", "clone", clone, false},
	} {
		_, err := c.start(false)
		if errs.KindOf(err) != errs.InvalidState || errs.ReasonOf(err) != strongroomv1.ReasonCircularDependency || !strings.Contains(errs.HintOf(err), "--allow-circular") {
			t.Fatalf("%s: %v (hint %q)", c.name, err, errs.HintOf(err))
		}
		if c.only {
			continue
		}
		s.success(c.start(true))
		if key := s.vm(c.vm).Key; key == nil || key.Provider != "kms-1" {
			t.Errorf("%s: key %v", c.name, key)
		}
		eventually(t, c.name+": the alarm", func() bool { return slices.Equal(s.alarms("vm/"+c.vm), []string{event.AlarmCircular}) })
	}
	if got := s.vm("clone").Runs; len(got) != 2 {
		t.Errorf("the clone runs %q", got)
	}
	allowed := map[string]bool{}
	for _, r := range s.records() {
		if strings.HasPrefix(r.Details["circular"], "key provider kms-1") || strings.HasPrefix(r.Details["circular"], "the controller") {
			allowed[r.Action+" "+r.Object] = true
		}
	}
	for _, want := range []string{"vm.create /vm/new-kms", "vm.create /vm/new-ctl", "vm.encrypt /vm/plain", "vm.rekey.shallow /vm/native", "vm.clone /vm/clone"} {
		if !allowed[want] {
			t.Errorf("no audit record of %q that says what was allowed: %v", want, allowed)
		}
	}

	// Back with a native provider, which needs nobody's leave.
	s.success(client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "native", Provider: "kp-1"}))
	eventually(t, "the alarm is cleared", func() bool { return len(s.alarms("vm/native")) == 0 })
	// Hosts that ask the key server themselves do not need the controller.
	must[strongroomv1.Provider](t)(client.Call(ctx, s.admin.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{
		Name: "kms-1", Settings: &strongroomv1.StandardSettings{HostAccess: inventory.HostsDirect},
	}))
	eventually(t, "the alarm of the controller's VM is cleared", func() bool { return len(s.alarms("vm/new-ctl")) == 0 })
	if got := s.alarms("vm/new-kms"); len(got) != 1 {
		t.Errorf("alarms of the key server's VM: %q", got)
	}
}

// TestProviderMakesCircle: a provider is not changed so that a VM waits for itself,
// unless that is allowed.
func TestProviderMakesCircle(t *testing.T) {
	t.Parallel()
	s, _ := ready(t)
	ctx := t.Context()
	settings := standardSettings(anyClient(t, testca.New(t)))
	settings.HostAccess = inventory.HostsDirect
	s.addStandard("kms-1", settings)
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	for name, runs := range map[string][]string{"kms-a": nil, "ctl": {"controller"}} {
		s.success(client.Call(ctx, s.admin.VM().CreateVM, createVM(name, "lab", "kms-1")))
		must[strongroomv1.VM](t)(client.Call(ctx, s.admin.VM().MarkVM, &strongroomv1.MarkVMRequest{Name: name, Runs: runs}))
	}
	update := func(s *site, more *strongroomv1.StandardSettings, allow bool) error {
		_, err := client.Call(ctx, s.admin.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{Name: "kms-1", Settings: more, AllowCircular: allow})
		return err
	}
	stored := func() *inventory.Standard {
		t.Helper()
		p, err := s.c.inv.Provider(ctx, "kms-1")
		if err != nil {
			t.Fatal(err)
		}
		return p.Standard
	}
	before := stored()
	server := &strongroomv1.StandardSettings{Servers: []*strongroomv1.TrustedServer{settings.GetServers()[0], {Address: "kms-a.example:5696", Fingerprint: settings.GetServers()[0].GetFingerprint()}}}
	brokered := &strongroomv1.StandardSettings{HostAccess: inventory.HostsBrokered}
	for vm, change := range map[string]*strongroomv1.StandardSettings{"kms-a": server, "ctl": brokered} {
		err := update(s, change, false)
		if errs.ReasonOf(err) != strongroomv1.ReasonCircularDependency || !strings.Contains(err.Error(), "VM "+vm) || !strings.Contains(errs.HintOf(err), "vm rekey "+vm) {
			t.Errorf("%s: %v (hint %q)", vm, err, errs.HintOf(err))
		}
		if got := stored(); got.HostAccess != before.HostAccess || len(got.Servers) != len(before.Servers) {
			t.Errorf("%s: the provider was changed to %+v", vm, got)
		}
		if err := update(s, change, true); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the alarm of "+vm, func() bool { return slices.Equal(s.alarms("vm/"+vm), []string{event.AlarmCircular}) })
		before = stored()
	}
	if err := update(s, &strongroomv1.StandardSettings{TimeoutSeconds: 7}, false); err != nil {
		t.Errorf("a change that makes no circle, with circles there: %v", err)
	}
	said := 0
	for _, r := range s.records() {
		if r.Action == "provider.update" && r.Details["circular"] != "" {
			said++
		}
	}
	if said != 2 {
		t.Errorf("%d audit records say what was allowed", said)
	}
}

// TestMark: a mark can be taken away, and one of a VM that is encrypted so already
// is a fact with an alarm; what makes no sense changes nothing.
func TestMark(t *testing.T) {
	t.Parallel()
	s, _ := ready(t)
	ctx := t.Context()
	s.addStandard("kms-1", standardSettings(anyClient(t, testca.New(t))))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(ctx, s.admin.VM().CreateVM, createVM("web-1", "lab", "kms-1")))
	mark := func(c *client.Client, runs ...string) (*strongroomv1.VM, error) {
		return client.Call(ctx, c.VM().MarkVM, &strongroomv1.MarkVMRequest{Name: "web-1", Runs: runs})
	}
	must[strongroomv1.VM](t)(mark(s.admin, "provider:kms-1"))
	if got := s.alarms("vm/web-1"); !slices.Equal(got, []string{event.AlarmCircular}) {
		t.Errorf("alarms %q", got)
	}
	for part, kind := range map[string]errs.Kind{"kms": errs.Invalid, "provider:kp-1": errs.Invalid, "provider:kp-9": errs.NotFound} {
		_, err := mark(s.admin, part)
		wantKind(t, err, kind)
	}
	_, err := mark(s.user("reader", "ReadOnly"), "controller")
	wantKind(t, err, errs.Denied)
	if got := s.vm("web-1").Runs; !slices.Equal(got, []string{"provider:kms-1"}) {
		t.Errorf("it runs %q", got)
	}
	s.restart()
	must[strongroomv1.VM](t)(mark(s.admin))
	if runs, alarms := s.vm("web-1").Runs, s.alarms("vm/web-1"); len(runs) != 0 || len(alarms) != 0 {
		t.Errorf("it runs %q and has alarms %q", runs, alarms)
	}
	var said []string
	for _, r := range s.records() {
		if r.Action == "vm.mark" && r.Object == "/vm/web-1" {
			said = append(said, r.Details["before"]+">"+r.Details["runs"])
		}
	}
	if !slices.Equal(said, []string{">provider:kms-1", "provider:kms-1>"}) {
		t.Errorf("audit records %q", said)
	}
}
