package controller

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/audit"
	"strongroom/internal/control/event"
	"strongroom/internal/control/inventory"
	"strongroom/internal/control/task"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
	"strongroom/internal/keys/kmip/testca"
	"strongroom/test/kms"
)

// wrappingSettings are settings for a provider with one key for all VMs.
func wrappingSettings(server *kms.Server, days int32) *strongroomv1.StandardSettings {
	settings := standardSettings(server)
	settings.Keys, settings.RotateDays = keysWrapping, days
	return settings
}

func (s *site) rotate(name string) (*strongroomv1.Task, error) {
	return client.Call(s.t.Context(), s.admin.Provider().RotateProvider, &strongroomv1.RotateProviderRequest{Name: name})
}

// current waits until the provider has a wrapping key other than that one, and
// all VMs follow, and returns its id.
func (s *site) current(name, other string) string {
	s.t.Helper()
	var id string
	eventually(s.t, "another wrapping key, which all VMs have", func() bool {
		w := s.getProvider(name).GetStandard().GetWrapping()
		id = w.GetCurrent().GetKeyId()
		if w.GetVmsToFollow() > 0 {
			s.c.poke() // for one that failed at first
		}
		return id != "" && id != other && w.GetVmsToFollow() == 0
	})
	return id
}

func (s *site) update(name string, settings *strongroomv1.StandardSettings) error {
	_, err := client.Call(s.t.Context(), s.admin.Provider().UpdateStandardProvider, &strongroomv1.UpdateStandardProviderRequest{Name: name, Settings: settings})
	return err
}

// keyOf is the key id of a VM, all of whose disks must have it.
func (s *site) keyOf(vm string) string {
	s.t.Helper()
	keys := s.vm(vm).Keys()
	if len(keys) != 1 {
		s.t.Fatalf("%s needs the keys %v", vm, keys)
	}
	return keys[0].KeyID
}

// TestWrappingKey: one key wraps those of all VMs; a rotation takes all of them
// along, those that cannot come at once later, and ends the key before.
func TestWrappingKey(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.c.orphanAgeMin = time.Second
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", wrappingSettings(server, 90))
	_, err := s.rotate("kms-1")
	wantKind(t, err, errs.InvalidState) // nothing was established yet
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
	}
	first := s.current("kms-1", "")
	if got := materials(t, server, clientName); len(got) != 1 || got[first] == nil {
		t.Fatalf("the key server has %d keys, want the wrapping key %s alone", len(got), first)
	}
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		if s.keyOf(name) != first {
			t.Errorf("%s has key %s, want %s", name, s.keyOf(name), first)
		}
	}
	if got := h.keksNow(); !slices.Equal(got, []string{"kms-1/" + first}) {
		t.Errorf("the host has %v", got)
	}
	w := s.getProvider("kms-1").GetStandard().GetWrapping()
	if !w.GetOn() || w.GetRotateDays() != 90 || w.GetCurrent().GetVms() != 3 || !w.GetNextRotation().AsTime().Equal(w.GetCurrent().GetMade().AsTime().Add(90*24*time.Hour)) {
		t.Errorf("shown: %v", w)
	}

	// A VM that fails, or goes, leaves the key of the others alone.
	h.failing("CreateVM", 1, fault{refuse: errs.New(errs.NoSpace, "no room")})
	_, err = s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-4", "east", "kms-1"))))
	wantKind(t, err, errs.NoSpace)
	s.success(client.Call(t.Context(), s.admin.VM().DeleteVM, &strongroomv1.DeleteVMRequest{Name: "web-3"}))
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	if got := h.keksNow(); !slices.Equal(got, []string{"kms-1/" + first}) || len(materials(t, server, clientName)) != 1 {
		t.Errorf("after a deletion the host has %v", got)
	}
	if got := s.orphans("kms-1"); len(got.GetKeys()) > 0 {
		t.Errorf("orphans: %v", got)
	}

	// A shallow rekey would do nothing, and a deep one has a KEK of its own on the
	// way.
	_, err = client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1"})
	if errs.KindOf(err) != errs.InvalidState || errs.ReasonOf(err) != "WrappingKeyInUse" || !strings.Contains(errs.HintOf(err), "provider rotate kms-1") {
		t.Errorf("shallow rekey: %v (%s)", err, errs.HintOf(err))
	}
	s.success(client.Call(t.Context(), s.admin.VM().RekeyVM, &strongroomv1.RekeyVMRequest{Name: "web-1", Deep: true}))
	if n := len(materials(t, server, clientName)); n != 2 {
		t.Errorf("the key server has %d keys after a deep rekey, want 2", n)
	}
	eventually(t, "the VM to have the wrapping key again", func() bool { return s.keyOf("web-1") == first })

	// Rotation. One VM fails at first, its task says so; the other is told lost.
	s.success(s.rotate("kms-1"))
	second := s.current("kms-1", first)
	for _, name := range []string{"web-1", "web-2"} {
		if s.keyOf(name) != second {
			t.Errorf("%s has key %s, want %s", name, s.keyOf(name), second)
		}
	}
	if vm := s.vm("web-1"); vm.PowerState != inventory.PoweredOn {
		t.Errorf("web-1 is %s", vm.PowerState)
	}
	var replaced *strongroomv1.WrappingKey
	eventually(t, "the use of the first key to be ended", func() bool {
		h.beat() // a host tells that nothing there needs it
		s.c.poke()
		replaced = s.getProvider("kms-1").GetStandard().GetWrapping().GetReplaced()[0]
		return replaced.GetEnded() != nil
	})
	if replaced.GetKeyId() != first || replaced.GetVms() != 0 {
		t.Errorf("replaced: %v", replaced)
	}
	open, err := s.c.servers.Lookup("kms-1")
	if err != nil {
		t.Fatal(err)
	}
	ref := inventory.KeyRef{Provider: "kms-1", KeyID: first}
	if _, err := open.KEK(t.Context(), safeRef(ref)); keyErrorReason(err) != standard.ReasonNotActive {
		t.Errorf("the first key, as any other: %v", err)
	}
	if n := s.events(event.WrappingKeyRotated, "provider/kms-1"); n != 2 {
		t.Errorf("%d events of rotations", n)
	}
	eventually(t, "the event", func() bool { return s.events(event.WrappingKeyEnded, "provider/kms-1") == 1 })

	// A VM from a backup: it still has the first key, opens, and follows.
	var id string
	h.change(func() {
		h.keks = map[string]bool{}
		for _, vm := range h.vms {
			if vm.GetName() == "web-2" {
				id = vm.GetId()
				wrap(vm, &strongroomv1.KeyRef{Provider: "kms-1", KeyId: first})
			}
		}
	})
	h.beat()
	eventually(t, "the VM from the backup to follow", func() bool { return s.keyOf("web-2") == second && s.vm("web-2").ID == id })

	// Then it goes for good, on request.
	var found *strongroomv1.ListOrphanKeysResponse
	eventually(t, "the keys to be old enough", func() bool {
		h.beat() // the host tells that nothing there needs them
		found = s.orphans("kms-1")
		return len(found.GetKeys()) == 2
	})
	if i := slices.IndexFunc(found.GetKeys(), func(k *strongroomv1.OrphanKey) bool { return k.GetKeyId() == first }); i < 0 ||
		found.GetKeys()[i].GetComponent() != standard.ComponentWrapping || found.GetKeys()[i].GetVm() != "kms-1" {
		t.Errorf("orphans: %v", found)
	}
	s.success(s.destroyOrphans("kms-1"))
	if got := materials(t, server, clientName); len(got) != 1 || got[second] == nil {
		t.Errorf("the key server has %d keys, want the second wrapping key alone", len(got))
	}
	if left := s.getProvider("kms-1").GetStandard().GetWrapping().GetReplaced(); len(left) > 0 {
		t.Errorf("still known as replaced: %v", left)
	}
	records := 0
	for _, r := range s.records() {
		if r.Action == taskRotate && r.Outcome == audit.Success && r.Details["key_id"] == second && r.Details["replaced"] == first {
			records++
		}
	}
	if records != 1 {
		t.Errorf("%d records of the rotation", records)
	}
	_, err = client.Call(t.Context(), s.user("eve", "NoCryptoAdmin").Provider().RotateProvider, &strongroomv1.RotateProviderRequest{Name: "kms-1"})
	wantKind(t, err, errs.Denied)
}

// keyErrorReason is the reason that people are told.
func keyErrorReason(err error) string { return errs.ReasonOf(keyError("get key", "kms-1", "x", err)) }

// TestWrappingMode: a provider changes between a key for each VM and one for
// all, and the VMs follow, those that cannot at once later; disks that have keys
// of other providers keep them.
func TestWrappingMode(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	near, far := s.host("east", "host-1"), s.host("east", "host-2")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	for _, v := range [][2]string{{"web-1", "host-1"}, {"locked-1", "host-1"}, {"busy-1", "host-1"}, {"mixed-1", "host-1"}, {"mixed-2", "host-1"}, {"mixed-3", "host-1"}, {"far-1", "host-2"}} {
		req := createVM(v[0], "east", "kms-1")
		req.Host, req.Disks = v[1], append(req.Disks, &strongroomv1.NewDisk{SizeBytes: 1 << 20})
		s.success(client.Call(t.Context(), s.admin.VM().CreateVM, req))
	}
	if n := len(materials(t, server, clientName)); n != 7 {
		t.Fatalf("%d keys, want one for each VM", n)
	}
	for _, bad := range []*strongroomv1.StandardSettings{
		{RotateDays: 90},
		{Keys: "some"},
		{Keys: keysWrapping, RotateDays: 29},
		{Keys: keysWrapping, RotateDays: 3651},
		{Keys: keysWrapping, RotateDays: -2},
		{Keys: keysPerVM, RotateDays: 30},
	} {
		wantKind(t, s.update("kms-1", bad), errs.Invalid)
	}
	_, err := s.rotate("kms-1")
	wantKind(t, err, errs.InvalidState)
	_, err = s.rotate("kms-2")
	wantKind(t, err, errs.NotFound)

	// Neither a VM that is locked, nor one of a host that is away, nor one that has
	// something under way is rekeyed; a disk with a foreign key keeps it.
	foreign := &strongroomv1.KeyRef{Provider: "kp-9", KeyId: "x"}
	named := func(h *fakeHost, name string, f func(*strongroomv1.VM)) {
		h.change(func() {
			for _, vm := range h.vms {
				if vm.GetName() == name {
					f(vm)
				}
			}
		})
		h.beat()
	}
	named(near, "locked-1", func(vm *strongroomv1.VM) { vm.CryptoState, vm.LockReason = "locked", "for a test" })
	named(near, "busy-1", func(vm *strongroomv1.VM) {
		vm.Disks[0].Rekey = &strongroomv1.DiskRekey{Key: vm.GetKey(), TotalBytes: 1}
	})
	named(near, "mixed-1", func(vm *strongroomv1.VM) { vm.Disks[1].Key = foreign })
	named(near, "mixed-2", func(vm *strongroomv1.VM) { vm.Disks[0].Key, vm.Disks[1].Key = foreign, foreign })
	named(near, "mixed-3", func(vm *strongroomv1.VM) { vm.Disks[0].Key, vm.Key = foreign, foreign })
	if _, err := s.c.inv.UpdateHost(t.Context(), far.id, func(h *inventory.Host) error { h.State = inventory.NotResponding; return nil }); err != nil {
		t.Fatal(err)
	}
	own := map[string]string{}
	for _, name := range []string{"locked-1", "busy-1", "far-1"} {
		own[name] = s.keyOf(name)
	}
	if err := s.update("kms-1", &strongroomv1.StandardSettings{Keys: keysWrapping, RotateDays: 30}); err != nil {
		t.Fatal(err)
	}
	var shared string
	has := func(name string, keys ...string) bool { // of the VM and of its disks
		v := s.vm(name)
		var got []string
		for _, k := range []*inventory.KeyRef{v.Key, v.Disks[0].Key, v.Disks[1].Key} {
			got = append(got, k.KeyID)
		}
		return slices.Equal(got, keys)
	}
	eventually(t, "web-1 and what the others have of the provider to follow", func() bool {
		shared = s.getProvider("kms-1").GetStandard().GetWrapping().GetCurrent().GetKeyId()
		return shared != "" && s.keyOf("web-1") == shared && has("mixed-1", shared, shared, "x") && has("mixed-2", shared, "x", "x") && has("mixed-3", "x", "x", shared)
	})
	for name, key := range own {
		if s.keyOf(name) != key {
			t.Errorf("%s followed", name)
		}
	}
	if w := s.getProvider("kms-1").GetStandard().GetWrapping(); w.GetVmsToFollow() != 3 {
		t.Errorf("%d VMs are to follow, want 3", w.GetVmsToFollow())
	}
	named(near, "locked-1", func(vm *strongroomv1.VM) { vm.CryptoState, vm.LockReason = "unlocked", "" })
	named(near, "busy-1", func(vm *strongroomv1.VM) { vm.Disks[0].Rekey = nil })
	named(near, "mixed-1", func(vm *strongroomv1.VM) {
		vm.Disks[1].Key = vm.GetDisks()[0].GetKey()
		vm.Key = vm.GetDisks()[0].GetKey()
	})
	far.change(func() { far.instance = "second" })
	far.beat()
	if got := s.current("kms-1", ""); got != shared {
		t.Errorf("the wrapping key is %s, want %s", got, shared)
	}
	for name := range own {
		if s.keyOf(name) != shared {
			t.Errorf("%s did not follow", name)
		}
	}

	// And back: each has its own again, and the shared one is ended.
	if err := s.update("kms-1", &strongroomv1.StandardSettings{Keys: keysPerVM}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "each VM to have a key of its own", func() bool {
		near.beat()
		far.beat()
		s.c.poke()
		w := s.getProvider("kms-1").GetStandard().GetWrapping()
		return !w.GetOn() && w.GetCurrent() == nil && w.GetVmsToFollow() == 0 && len(w.GetReplaced()) == 1 && w.GetReplaced()[0].GetEnded() != nil
	})
	seen := map[string]bool{}
	for _, name := range []string{"web-1", "locked-1", "busy-1", "mixed-1", "far-1"} {
		key := s.keyOf(name)
		if seen[key] || key == shared || key == own[name] {
			t.Errorf("%s has key %s", name, key)
		}
		seen[key] = true
	}
	// Hosts that ask the key server themselves know which keys may be ended ones.
	if err := s.update("kms-1", &strongroomv1.StandardSettings{HostAccess: inventory.HostsDirect}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a host to be told of the ended key", func() bool { return slices.Equal(near.lastAccess("kms-1").GetEndedKeys(), []string{shared}) })
	// A new wrapping key is made when it is to be shared again.
	if err := s.update("kms-1", &strongroomv1.StandardSettings{Keys: keysWrapping}); err != nil {
		t.Fatal(err)
	}
	if got := s.current("kms-1", ""); got == shared {
		t.Error("a key whose use was ended is in use again")
	}
}

// TestRotationSchedule: wrapping keys are replaced when they are due, whatever
// the clock does, also by a controller that was not there at the time; a key
// server that is away holds up nothing but the rotation, which an alarm tells.
func TestRotationSchedule(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", wrappingSettings(server, 30))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	key := s.current("kms-1", "")
	const day = 24 * time.Hour
	// at has the controller look what is due, so long after it began.
	began, passed := time.Now(), new(atomic.Int64)
	s.now = func() time.Time { return began.Add(time.Duration(passed.Load())) }
	s.restart()
	h.beat()
	at := func(after time.Duration) {
		t.Helper()
		passed.Store(int64(after))
		if err := s.c.rotateDue(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	stays := func(when string) {
		t.Helper()
		active, err := s.c.tasks.List(t.Context(), 0, true)
		if err != nil {
			t.Fatal(err)
		}
		rotating := slices.ContainsFunc(active, func(t task.Task) bool { return t.Kind == taskRotate })
		if got := s.getProvider("kms-1").GetStandard().GetWrapping().GetCurrent().GetKeyId(); got != key || rotating {
			t.Errorf("%s: key %s, want %s; rotating: %v", when, got, key, rotating)
		}
	}
	at(29 * day)
	stays("a day early")
	at(31 * day)
	key = s.current("kms-1", key)
	at(31 * day)
	stays("again at the same time")
	at(20 * 365 * day) // somebody sets the clock wrong
	key = s.current("kms-1", key)
	at(32 * day) // and right again: the key is 20 years ahead
	key = s.current("kms-1", key)
	at(33 * day)
	stays("after the clock was set right")

	// The key server is away when the time comes, and the controller at times.
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	s.restart()
	h.beat()
	at(70 * day)
	eventually(t, "the alarm", func() bool { return slices.Contains(s.alarms("provider/kms-1"), event.AlarmRotationOverdue) })
	w := s.getProvider("kms-1").GetStandard().GetWrapping()
	if w.GetCurrent().GetKeyId() != key || w.GetProblem() == "" {
		t.Errorf("shown: %v", w)
	}
	s.success(client.Call(t.Context(), s.admin.VM().PowerOnVM, &strongroomv1.PowerOnVMRequest{Name: "web-1"}))
	at(71 * day) // no second task
	active, err := s.c.tasks.List(t.Context(), 0, true)
	if err != nil || len(active) != 1 || active[0].Kind != taskRotate {
		t.Fatalf("tasks %v, %v", active, err)
	}
	_, err = s.rotate("kms-1")
	if errs.ReasonOf(err) != "TaskInProgress" {
		t.Errorf("rotation by hand meanwhile: %v", err)
	}
	wantKind(t, s.deleteProvider("kms-1", false), errs.InvalidState)
	server.Start(t)
	s.restart() // which asks the key server again at once
	h.beat()
	key = s.current("kms-1", key)
	eventually(t, "the alarm to end", func() bool { return !slices.Contains(s.alarms("provider/kms-1"), event.AlarmRotationOverdue) })
	if n := len(materials(t, server, clientName)); n != 5 {
		t.Errorf("%d keys at the key server, want 5: no attempt made two", n)
	}
}
