package controller

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/test/keyscan"
)

// ready is a site with one host and a provider kp-1 that is active and default.
func ready(t testing.TB) (*site, *fakeHost) {
	t.Helper()
	s := newSite(t)
	s.cluster("lab")
	h := s.host("lab", "host-1")
	s.provider("kp-1")
	must[strongroomv1.SetDefaultProviderResponse](t)(client.Call(t.Context(), s.admin.Provider().SetDefaultProvider, &strongroomv1.SetDefaultProviderRequest{Name: "kp-1"}))
	return s, h
}

func (s *site) create(name string, encrypt bool) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), s.admin.VM().CreateVM, &strongroomv1.CreateVMRequest{
		Name: name, Datastore: "lab", Encrypt: encrypt, Disks: []*strongroomv1.NewDisk{{SizeBytes: 1 << 20}, {SizeBytes: 1 << 20}},
	})
}

func TestLostAnswers(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	ctx := t.Context()
	check := func(method, vm string, start func() (*strongroomv1.Task, error)) inventory.VM {
		t.Helper()
		before := h.count(method)
		h.failing(method, 1, fault{lost: true})
		s.success(start())
		if n := h.count(method) - before; n != 2 {
			t.Errorf("%s was called %d times, want once more after the lost answer", method, n)
		}
		v, err := s.c.inv.VM(ctx, vm)
		if err != nil && errs.KindOf(err) != errs.NotFound {
			t.Fatal(err)
		}
		return v
	}
	v := check("CreateVM", "web-1", func() (*strongroomv1.Task, error) { return s.create("web-1", true) })
	h.change(func() {
		if len(h.vms) != 1 || h.vms[v.ID] == nil {
			t.Errorf("the host has %d VMs, want the one of the inventory", len(h.vms))
		}
	})
	if v.Key == nil || v.Key.Provider != "kp-1" || v.Disks[1].Generation != 1 {
		t.Errorf("created: %+v", v)
	}
	first := *v.Key

	v = check("RekeyVM", "web-1", func() (*strongroomv1.Task, error) {
		return client.Call(ctx, s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})
	})
	if *v.Key == first || v.Key.Provider != "kp-1" || v.Disks[0].Generation != 2 {
		t.Errorf("rekeyed twice or not at all: %+v", v)
	}
	v = check("DecryptVM", "web-1", func() (*strongroomv1.Task, error) {
		return client.Call(ctx, s.admin.VM().DecryptVM, &strongroomv1.DecryptVMRequest{Name: "web-1"})
	})
	if v.Encrypted() {
		t.Errorf("not decrypted: %+v", v)
	}
	v = check("EncryptVM", "web-1", func() (*strongroomv1.Task, error) {
		return client.Call(ctx, s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1"})
	})
	if !v.Encrypted() || v.Disks[0].Generation != 1 {
		t.Errorf("encrypted twice or not at all: %+v", v)
	}
	v = check("DeleteVM", "web-1", func() (*strongroomv1.Task, error) {
		return client.Call(ctx, s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-1"})
	})
	if v.ID != "" {
		t.Errorf("still there: %+v", v)
	}
	for _, e := range []string{event.VMCreated, event.VMRekeyed, event.VMDecrypted, event.VMEncrypted, event.VMDeleted} {
		if n := s.events(e, "vm/web-1"); n != 1 {
			t.Errorf("%d events %s, want one", n, e)
		}
	}
	done := map[string]int{}
	for _, r := range s.records() {
		if r.Object == "/vm/web-1" {
			done[r.Action+" "+r.Outcome]++
		}
	}
	for _, action := range []string{"vm.create", "vm.rekey.shallow", "vm.decrypt", "vm.encrypt", "vm.delete"} {
		if done[action+" success"] != 1 {
			t.Errorf("%d audit records of %s, want one: %v", done[action+" success"], action, done)
		}
	}
}

// TestPassphraseIsSealed: what is stored of a LUKS image's passphrase opens on
// the host that makes the disk, and nowhere else.
func TestPassphraseIsSealed(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	const secret = "correct horse battery staple"
	disk := func(format, passphrase string) *strongroomv1.NewDisk {
		return &strongroomv1.NewDisk{Image: "a.luks", ImageFormat: format, Passphrase: []byte(passphrase)}
	}
	create := func(d *strongroomv1.NewDisk) (*strongroomv1.Task, error) {
		return client.Call(t.Context(), s.admin.VM().CreateVM, &strongroomv1.CreateVMRequest{
			Name: "web-1", Datastore: "lab", Encrypt: true, Disks: []*strongroomv1.NewDisk{{SizeBytes: 1 << 20}, d},
		})
	}
	for name, d := range map[string]*strongroomv1.NewDisk{
		"none": disk("luks", ""), "too long": disk("luks", strings.Repeat("x", 64<<10+1)), "for a raw image": disk("raw", secret),
	} {
		if _, err := create(d); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	h.failing("CreateVM", 1, fault{refuse: errs.New(errs.NoSpace, "no room")})
	if _, err := s.ended(must[strongroomv1.Task](t)(create(disk("luks", secret)))); errs.KindOf(err) != errs.NoSpace {
		t.Fatal(err)
	}
	if n := s.events(event.VMLUKSAdopted, "vm/web-1"); n != 0 {
		t.Error("told of a disk that was not made")
	}
	if _, err := s.ended(must[strongroomv1.Task](t)(create(disk("luks", secret)))); err != nil {
		t.Fatal(err)
	}
	if n := s.events(event.VMLUKSAdopted, "vm/web-1"); n != 1 {
		t.Errorf("%d events that the image's key is known elsewhere", n)
	}
	h.mu.Lock()
	got := h.created
	h.mu.Unlock()
	opened, err := h.recipient.Open(got.GetPassphrases()[1], parcel.ImageContext{Recipient: h.id, VM: got.GetId(), Disk: 1}.String())
	if err != nil || len(got.GetPassphrases()) != 1 {
		t.Fatalf("%d parcels, %v", len(got.GetPassphrases()), err)
	}
	defer opened.Close()
	if string(opened.Bytes()) != secret || len(got.GetDisks()[1].GetPassphrase()) != 0 {
		t.Error("the host got another passphrase, or got it in the clear")
	}
	scan := new(keyscan.Scanner)
	scan.AddMarker("passphrase", []byte(secret))
	if found, read, err := scan.Tree(s.cfg.DataDir, 10); err != nil || len(found) > 0 || read < 1<<16 {
		t.Errorf("found %v in %d bytes of the controller's files, %v", found, read, err)
	}
}

// TestRekeyRate changes the rate of a deep rekey before the host is at work on it.
func TestRekeyRate(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	set := func(rate int64) error {
		_, err := client.Call(t.Context(), s.admin.VM().SetRekeyRate, &strongroomv1.SetRekeyRateRequest{Name: "web-1", Rate: rate})
		return err
	}
	if err := set(1); errs.KindOf(err) != errs.InvalidState || errs.HintOf(err) == "" {
		t.Errorf("without a rekey: %v", err)
	}
	proceed := make(chan struct{})
	h.failing("RekeyVM", 1, fault{hang: proceed})
	task := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Deep: true, Rate: 1 << 20}))
	eventually(t, "the host is asked for a rekey", func() bool { return h.count("RekeyVM") == 1 })
	if err := set(-1); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a negative rate: %v", err)
	}
	if err := set(5 << 20); err != nil {
		t.Fatal(err)
	}
	close(proceed)
	if _, err := s.ended(task); err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	// Once at once, and once more when the host had begun with the rate of before.
	if !slices.Equal(h.rates, []int64{5 << 20, 5 << 20}) {
		t.Errorf("the host was told %v", h.rates)
	}
}

func TestHostsError(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	h.failing("CreateVM", 1, fault{refuse: errs.New(errs.NoSpace, "no room for disk-0").WithReason("DatastoreFull").WithHint("strongroom datastore ls")})
	task := must[strongroomv1.Task](t)(s.create("web-1", true))
	_, err := s.ended(task)
	if errs.KindOf(err) != errs.NoSpace || errs.ReasonOf(err) != "DatastoreFull" || errs.HintOf(err) != "strongroom datastore ls" || !strings.Contains(err.Error(), "no room for disk-0") {
		t.Errorf("got %v (kind %v, reason %q, hint %q)", err, errs.KindOf(err), errs.ReasonOf(err), errs.HintOf(err))
	}
	if n := h.count("DeleteVM"); n != 1 {
		t.Errorf("the failed create was undone %d times", n)
	}
	if n := s.events(event.VMNoDiskSpace, "vm/web-1"); n != 1 {
		t.Errorf("%d events of the full datastore, want one", n)
	}
	if n := s.events(event.VMCreated, "vm/web-1"); n != 0 {
		t.Errorf("the VM is said to be created")
	}
	if _, err := s.c.inv.VM(t.Context(), "web-1"); errs.KindOf(err) != errs.NotFound {
		t.Errorf("inventory: %v", err)
	}
	var actions []string
	for _, r := range s.records() {
		if r.Object == "/vm/web-1" && strings.HasPrefix(r.Action, "vm.") {
			actions = append(actions, r.Action+" "+r.Outcome)
		}
	}
	if !slices.Equal(actions, []string{"vm.create error", "vm.create.undo success"}) {
		t.Errorf("audit records: %q", actions)
	}
}

func TestHostAwayAndControllerRestarted(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", false))
	h.failing("EncryptVM", 1, fault{vanish: true})
	task := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1"}))
	eventually(t, "the task waits for the host", func() bool {
		now, err := client.Call(t.Context(), s.admin.Task().GetTask, &strongroomv1.GetTaskRequest{Id: task.GetId()})
		return err == nil && strings.Contains(now.GetStep(), "waiting: ")
	})
	// The disks stay locked while the task waits.
	_, err := client.Call(t.Context(), s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1"})
	if errs.ReasonOf(err) != "TaskInProgress" || !strings.Contains(errs.HintOf(err), task.GetId()) {
		t.Errorf("a second task on the disks: %v, hint %q", err, errs.HintOf(err))
	}
	s.restart()
	if _, err := s.ended(task); err != nil {
		t.Fatal(err)
	}
	v := s.vm("web-1")
	if !v.Encrypted() || v.Disks[0].Generation != 1 {
		t.Errorf("after the restart: %+v", v)
	}
}

func TestControllerStoppedWhileHostWorks(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", false))
	release := make(chan struct{})
	h.failing("EncryptVM", 1, fault{hang: release})
	task := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().EncryptVM, &strongroomv1.EncryptVMRequest{Name: "web-1"}))
	eventually(t, "the host is at work", func() bool { return h.count("EncryptVM") == 1 })
	s.restart()
	close(release)
	if _, err := s.ended(task); err != nil {
		t.Fatal(err)
	}
	if v := s.vm("web-1"); !v.Encrypted() || v.Disks[0].Generation != 1 {
		t.Errorf("after the restart: %+v", v)
	}
	if n := s.events(event.TaskFailed, "vm/web-1"); n != 0 {
		t.Errorf("a task that was cut off is told as failed")
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	release := make(chan struct{})
	defer close(release)
	h.failing("CreateVM", 1, fault{hang: release})
	task := must[strongroomv1.Task](t)(s.create("web-1", true))
	eventually(t, "the host is at work", func() bool { return h.count("CreateVM") == 1 })

	// A task that is about to use a provider's key keeps it from being deleted.
	_, err := client.Call(t.Context(), s.admin.Provider().DeleteProvider, &strongroomv1.DeleteProviderRequest{Name: "kp-1"})
	if errs.ReasonOf(err) != "ResourceInUse" || !strings.Contains(errs.HintOf(err), task.GetId()) {
		t.Errorf("delete of a provider that a task uses: %v, hint %q", err, errs.HintOf(err))
	}

	must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.Task().CancelTask, &strongroomv1.CancelTaskRequest{Id: task.GetId()}))
	_, err = s.ended(task)
	wantKind(t, err, errs.Canceled)
	if h.count("DeleteVM") != 1 {
		t.Error("the canceled create was not undone")
	}
	s.success(s.create("web-1", true)) // name and target are free again
}

func TestPowerOnDoesNotWait(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", false))
	h.failing("PowerOnVM", 1, fault{vanish: true})
	task := must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	_, err := s.ended(task)
	wantKind(t, err, errs.Unavailable)
	if errs.HintOf(err) != "strongroom host show host-1" {
		t.Errorf("hint %q", errs.HintOf(err))
	}

	// Task and heartbeats tell of the same change: one event.
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { h.beat() })
	}
	wg.Wait()
	if n := s.events(event.VMPoweredOn, "vm/web-1"); n != 1 {
		t.Errorf("%d events tell that it was powered on, want one", n)
	}
	h.change(func() {
		for _, vm := range h.vms {
			vm.PowerState = "poweredOff"
		}
	})
	for range 4 {
		wg.Go(func() { h.beat() })
	}
	wg.Wait()
	if n := s.events(event.VMPoweredOff, "vm/web-1"); n != 1 {
		t.Errorf("%d events tell that it was powered off, want one", n)
	}
}

func TestHeartbeatsThatMakeNoSense(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	s.success(s.create("web-2", true))
	web1, web2 := s.vm("web-1"), s.vm("web-2")

	// A VM that the inventory does not know is not taken in.
	h.change(func() { h.vms["stranger"] = h.newVM("stranger", "stranger", "lab", nil, 1) })
	h.beat()
	if _, err := s.c.inv.VM(t.Context(), "stranger"); errs.KindOf(err) != errs.NotFound {
		t.Errorf("the VM of a heartbeat was taken in: %v", err)
	}
	// One that makes no sense does not keep the others from being noted.
	h.change(func() {
		h.vms[web1.ID].PowerState = "levitating"
		h.vms[web2.ID].PowerState = "poweredOn"
	})
	h.beat()
	if got := s.vm("web-1"); got.PowerState != inventory.PoweredOff {
		t.Errorf("web-1 is %s", got.PowerState)
	}
	if got := s.vm("web-2"); got.PowerState != inventory.PoweredOn {
		t.Errorf("web-2 is %s", got.PowerState)
	}
	// A disk whose header cannot be read keeps the key that it needs.
	h.change(func() {
		vm := h.vms[web2.ID]
		vm.CryptoState, vm.LockReason = "locked", "disk-0: its header cannot be read"
		vm.Disks[0].Key, vm.Disks[0].Generation = nil, 0
	})
	h.beat()
	if got := s.vm("web-2"); got.CryptoState != inventory.Locked || got.Disks[0].Key == nil || *got.Disks[0].Key != *web2.Disks[0].Key {
		t.Errorf("web-2: %+v", got)
	}

	// Another host cannot speak for a VM that is not its own.
	other := s.host("lab", "host-2")
	other.change(func() {
		other.vms[web1.ID] = other.newVM(web1.ID, "web-1", "lab", nil, 2)
		other.vms[web1.ID].PowerState = "poweredOn"
	})
	other.beat()
	if got := s.vm("web-1"); got.PowerState != inventory.PoweredOff || !got.Encrypted() {
		t.Errorf("another host changed web-1: %+v", got)
	}

	for name, spoil := range map[string]func(*strongroomv1.HeartbeatRequest){
		"address": func(r *strongroomv1.HeartbeatRequest) { r.Address = "nowhere" },
		"version": func(r *strongroomv1.HeartbeatRequest) { r.Version = strings.Repeat("v", 1000) },
		"boot id": func(r *strongroomv1.HeartbeatRequest) { r.BootId = strings.Repeat("b", 1000) },
		"capability": func(r *strongroomv1.HeartbeatRequest) {
			r.Capabilities = map[string]bool{strings.Repeat("c", 1000): true}
		},
		"capabilities": func(r *strongroomv1.HeartbeatRequest) { r.Capabilities = many() },
		"providers":    func(r *strongroomv1.HeartbeatRequest) { r.Providers = make([]*strongroomv1.HeldProvider, 33) },
		"VMs":          func(r *strongroomv1.HeartbeatRequest) { r.Vms = make([]*strongroomv1.VM, vmsMax+1) },
	} {
		req := h.heartbeat()
		spoil(req)
		if _, err := h.enroll.Heartbeat(t.Context(), connect.NewRequest(req)); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func many() map[string]bool {
	m := map[string]bool{}
	for i := range capabilitiesMax + 1 {
		m[fmt.Sprint(i)] = true
	}
	return m
}

func TestSilentHostAndLockedVM(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("web-1", true))
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	web1 := s.vm("web-1")

	h.change(func() {
		h.vms[web1.ID].CryptoState, h.vms[web1.ID].LockReason = "locked", "provider kp-1 is missing"
	})
	h.beat()
	if got := s.alarms("vm/web-1"); !slices.Equal(got, []string{event.AlarmVMLocked}) {
		t.Errorf("alarms of a locked VM: %q", got)
	}
	h.change(func() { h.vms[web1.ID].CryptoState, h.vms[web1.ID].LockReason = "unlocked", "" })
	h.beat()
	if got := s.alarms("vm/web-1"); len(got) != 0 {
		t.Errorf("alarms of an unlocked VM: %q", got)
	}
	if l, u := s.events(event.VMLocked, "vm/web-1"), s.events(event.VMUnlocked, "vm/web-1"); l != 1 || u != 1 {
		t.Errorf("%d events of locking, %d of unlocking, want one each", l, u)
	}

	// Its last sign of life ends before long.
	s.beatLife = 2 * time.Second
	s.restart()
	h.beat()
	eventually(t, "the silent host's VM is unknown", func() bool { return s.vm("web-1").PowerState == inventory.PowerUnknown })
	eventually(t, "the silent host raises an alarm", func() bool {
		return slices.Equal(s.alarms("host/host-1"), []string{event.AlarmHostNotResponding})
	})
	_, err := client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})
	wantKind(t, err, errs.Unavailable)

	on := s.events(event.VMPoweredOn, "vm/web-1")
	s.c.beatLife = 10 * time.Minute // it is not silent again
	h.beat()
	eventually(t, "the alarm ends", func() bool { return len(s.alarms("host/host-1")) == 0 })
	if got := s.vm("web-1"); got.PowerState != inventory.PoweredOn {
		t.Errorf("web-1 is %s", got.PowerState)
	}
	if n := s.events(event.VMPoweredOn, "vm/web-1"); n != on {
		t.Errorf("a VM that was on all the time is told to have been powered on")
	}
}
