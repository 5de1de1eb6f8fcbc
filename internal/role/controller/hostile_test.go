package controller

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/control/access"
	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/testca"
)

// TestLyingHost: what a host in wrong hands answers to the controller gives it
// nothing that it was not asked for.
func TestLyingHost(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	s.cluster("west")
	h := s.host("east", "host-1")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "web-1"}))
	for what, lie := range map[string]func(*strongroomv1.VM){
		"the folder of another VM": func(vm *strongroomv1.VM) { vm.Folder = "web-1" },
		"another name":             func(vm *strongroomv1.VM) { vm.Name = "payroll" },
		"another datastore":        func(vm *strongroomv1.VM) { vm.Datastore = "west" },
		"another VM":               func(vm *strongroomv1.VM) { vm.Id = "2f1fcbd5-4a0e-4f8b-a6b9-d0d9f0b1f4a5" },
	} {
		h.change(func() { h.lie = lie })
		_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-2", "east", "kms-1"))))
		if errs.KindOf(err) != errs.Corrupt {
			t.Errorf("%s: %v (kind %v)", what, err, errs.KindOf(err))
		}
		if all, err := s.c.inv.VMs(t.Context(), ""); err != nil || len(all) > 0 {
			t.Errorf("%s: the inventory has %+v, %v", what, all, err)
		}
		if kept, err := s.c.inv.KeptVMs(t.Context()); err != nil || len(kept) != 1 {
			t.Errorf("%s: unregistered are %+v, %v", what, kept, err)
		}
	}
	h.change(func() { h.lie = nil })
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-2", "east", "kms-1")))
	host, err := s.c.inv.HostByID(t.Context(), h.id)
	if err != nil {
		t.Fatal(err)
	}
	// One that answers without end fills no memory.
	h.change(func() { h.lie = func(vm *strongroomv1.VM) { vm.LockReason = strings.Repeat(" ", answerMax) } })
	if res, err := callHost(t.Context(), host, s.c.agents.of(host).GetVM, &strongroomv1.AgentGetVMRequest{Id: s.vm("web-2").ID}); err == nil {
		t.Errorf("an answer of %d bytes was taken", proto.Size(res))
	}
}

// TestKeysOfOtherClusters: a host that says that its VM needs the key of a VM of
// another cluster is not given it.
func TestKeysOfOtherClusters(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server := anyClient(t, testca.New(t))
	s.cluster("east")
	s.cluster("west")
	east, west := s.host("east", "host-1"), s.host("west", "host-2")
	s.addStandard("kms-1", standardSettings(server))
	must[strongroomv1.Provider](t)(s.check("kms-1"))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-1", "east", "kms-1")))
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM("web-2", "west", "kms-1")))
	secret, own, id := *s.vm("web-1").Key, *s.vm("web-2").Key, s.vm("web-2").ID
	gets := func() bool {
		t.Helper()
		if err := s.c.supplyOnce(t.Context()); err != nil {
			t.Fatal(err)
		}
		return slices.Contains(west.keksNow(), safeRef(secret).String())
	}
	for what, claim := range map[string]func(*strongroomv1.VM){
		"a disk":  func(vm *strongroomv1.VM) { vm.Disks[0].Key = keyToAPI(&secret) },
		"the VM":  func(vm *strongroomv1.VM) { vm.Key = keyToAPI(&secret) },
		"a rekey": func(vm *strongroomv1.VM) { vm.Disks[0].Rekey = &strongroomv1.DiskRekey{Key: keyToAPI(&secret)} },
		"a snapshot": func(vm *strongroomv1.VM) {
			vm.Snapshots = []*strongroomv1.Snapshot{{Id: "s", Name: "s", Disks: []*strongroomv1.Disk{{Name: "disk-0", Encrypted: true, Key: keyToAPI(&secret)}}}}
		},
	} {
		var honest *strongroomv1.VM
		west.change(func() {
			honest = proto.CloneOf(west.vms[id])
			claim(west.vms[id])
		})
		west.beat()
		if keys := s.vm("web-2").Keys(); !slices.Equal(keys, []inventory.KeyRef{own}) || gets() {
			t.Errorf("%s: web-2 needs %v, and its host has %v", what, keys, west.keksNow())
		}
		west.change(func() { west.vms[id] = honest })
		west.beat()
	}
	// Nor if it says so of a VM that is registered.
	west.change(func() { west.vms["stolen"] = west.newVM("stolen", "web-3", "west", keyToAPI(&secret), 1) })
	_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RegisterVM, &strongroomv1.RegisterVMRequest{Datastore: "west", Folder: "web-3"})))
	if wantKind(t, err, errs.Invalid); gets() || errs.HintOf(err) == "" {
		t.Errorf("%v (hint %q); the host has %v", err, errs.HintOf(err), west.keksNow())
	}
	// In its own cluster it has it anyway, and a wrapping key is of all clusters.
	other := s.host("east", "host-3")
	if err := s.c.supplyOnce(t.Context()); err != nil || !slices.Contains(other.keksNow(), safeRef(secret).String()) || !slices.Contains(east.keksNow(), safeRef(secret).String()) {
		t.Errorf("hosts of its own cluster have %v and %v, %v", other.keksNow(), east.keksNow(), err)
	}
	if _, err := s.c.updateStandard(t.Context(), "kms-1", func(p *inventory.Standard) error {
		p.Wrapping = &inventory.Wrapping{Replaced: []inventory.WrappingKey{{KeyID: secret.KeyID, Ended: time.Now()}}, Off: true}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.c.mayNeed(t.Context(), inventory.VM{ClusterID: s.vm("web-2").ClusterID, Key: &secret}, nil); err != nil {
		t.Error(err)
	}
}

// TestRegisterCopies: of a VM and its copy with the same id one is registered.
func TestRegisterCopies(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	other := s.host("lab", "host-2")
	s.success(client.Call(t.Context(), s.admin.VM().CreateVM, &strongroomv1.CreateVMRequest{
		Name: "web-1", Datastore: "lab", Host: "host-1", Encrypt: true, Disks: []*strongroomv1.NewDisk{{SizeBytes: 1 << 20}},
	}))
	id := s.vm("web-1").ID
	put := func() {
		h.mu.Lock()
		vm := proto.CloneOf(h.vms[id])
		h.mu.Unlock()
		vm.Folder, vm.Host = "copy", "host-2"
		other.change(func() { other.vms[id] = vm })
	}
	put()
	register := &strongroomv1.RegisterVMRequest{Datastore: "lab", Folder: "copy", Host: "host-2", Name: "web-2"}
	_, err := s.ended(must[strongroomv1.Task](t)(client.Call(t.Context(), s.admin.VM().RegisterVM, register)))
	wantKind(t, err, errs.Exists)
	if v := s.vm("web-1"); v.HostID != h.id || v.Folder != "web-1" {
		t.Errorf("web-1 is %+v", v)
	}
	if n := other.count("UnregisterVM"); n != 1 {
		t.Errorf("the copy was taken off its host %d times", n)
	}
	put()
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "web-1"}))
	s.success(client.Call(t.Context(), s.admin.VM().RegisterVM, register))
	if v := s.vm("web-2"); v.ID != id || v.HostID != other.id || v.Folder != "copy" {
		t.Errorf("web-2 is %+v", v)
	}
}

// TestImageOfAnother: who may not clone a VM makes none of its disks either.
func TestImageOfAnother(t *testing.T) {
	t.Parallel()
	s, _ := ready(t)
	s.success(s.create("payroll", false))
	s.success(s.create("vault", true))
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "vault"}))
	if err := s.c.access.PutRole(t.Context(), access.Role{Name: "maker", Privileges: []access.Privilege{"VirtualMachine.Inventory.Create", "System.Read"}}); err != nil {
		t.Fatal(err)
	}
	ann := s.user("ann", "maker")
	n := 0
	create := func(who *client.Client, image, kernel, initrd string) error {
		n++
		task, err := client.Call(t.Context(), who.VM().CreateVM, &strongroomv1.CreateVMRequest{
			Name: fmt.Sprintf("web-%d", n), Datastore: "lab", Settings: &strongroomv1.VMSettings{Kernel: kernel, Initrd: initrd},
			Disks: []*strongroomv1.NewDisk{{Image: image, ImageFormat: "raw"}},
		})
		if err == nil {
			s.success(task, nil)
		}
		return err
	}
	wantKind(t, create(ann, "payroll/disk-0.raw", "", ""), errs.Denied)
	wantKind(t, create(ann, "images/../payroll/disk-0.raw", "", ""), errs.Denied)
	wantKind(t, create(ann, "vault/disk-0.raw", "", ""), errs.Denied)
	wantKind(t, create(ann, "", "payroll/disk-0.raw", ""), errs.Denied)
	wantKind(t, create(ann, "", "images/vmlinuz", "payroll/disk-0.raw"), errs.Denied)
	for what, err := range map[string]error{
		"an image":          create(ann, "images/debian.raw", "images/vmlinuz", ""),
		"one in no folder":  create(ann, "payroll", "", ""),
		"the administrator": create(s.admin, "payroll/disk-0.raw", "", ""),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.c.access.Grant(t.Context(), access.Permission{Principal: "user:ann", Object: "/vm/payroll", Roles: []string{access.NoCryptoAdmin}, Propagate: true}); err != nil {
		t.Fatal(err)
	}
	if err := create(ann, "payroll/disk-0.raw", "", ""); err != nil {
		t.Error(err)
	}
}

// TestRegisterAsAnother: who may register one VM does not get another by calling it so.
func TestRegisterAsAnother(t *testing.T) {
	t.Parallel()
	s, h := ready(t)
	s.success(s.create("payroll", true))
	v := s.vm("payroll")
	s.success(client.Call(t.Context(), s.admin.VM().UnregisterVM, &strongroomv1.UnregisterVMRequest{Name: "payroll"}))
	h.change(func() { h.vms[v.ID] = h.newVM(v.ID, "payroll", "lab", keyToAPI(v.Key), 2) })
	ann := s.user("ann")
	if err := s.c.access.Grant(t.Context(), access.Permission{Principal: "user:ann", Object: "/vm/mine", Roles: []string{access.Administrator}, Propagate: true}); err != nil {
		t.Fatal(err)
	}
	register := &strongroomv1.RegisterVMRequest{Datastore: "lab", Folder: "payroll", Name: "mine"}
	_, err := client.Call(t.Context(), ann.VM().RegisterVM, register)
	wantKind(t, err, errs.Denied)
	s.success(client.Call(t.Context(), s.admin.VM().RegisterVM, register))
}

// TestTellingTooMuch: what is kept of what a host tells is bounded, and what was not
// kept counts as not told.
func TestTellingTooMuch(t *testing.T) {
	t.Parallel()
	s := said{hosts: map[string]map[string]told{}}
	vm := &strongroomv1.VM{Id: "b", PowerState: "poweredOff"}
	for i := range 16 { // as much as one message can hold
		vm.Disks = append(vm.Disks, &strongroomv1.Disk{Name: fmt.Sprint(i), Encrypted: true, Key: &strongroomv1.KeyRef{Provider: "p", KeyId: fmt.Sprint(i) + strings.Repeat("x", 1<<20)}})
	}
	digests := map[string][]byte{"a": {1}, "b": {1}, "c": {1}, "d": {1}, "e": {1}, "f": {1}}
	small := &strongroomv1.VM{Id: "a", PowerState: "poweredOff", Disks: []*strongroomv1.Disk{{Encrypted: true, Key: &strongroomv1.KeyRef{Provider: "p", KeyId: "k"}}}}
	s.note("host", []*strongroomv1.VM{small}, digests, time.Now())
	for _, id := range []string{"b", "c", "d", "e", "f"} {
		vm.Id = id
		s.note("host", []*strongroomv1.VM{vm}, digests, time.Now())
	}
	keys, ok := s.keys("host")
	total := 0
	for _, refs := range keys {
		total += sizeOf(refs)
	}
	if ok || total > keysMax || len(keys["a"]) != 1 || len(keys) != len(digests) {
		t.Errorf("%d bytes are kept, of %d VMs; all is told: %v", total, len(keys), ok)
	}
	for _, id := range []string{"b", "c", "d", "e", "f"} {
		s.note("host", []*strongroomv1.VM{{Id: id, PowerState: "poweredOff"}}, digests, time.Now())
	}
	if keys, ok := s.keys("host"); !ok || len(keys["a"]) != 1 || len(keys["b"]) != 0 {
		t.Errorf("told again: %v, %v", keys, ok)
	}

	w := &word{}
	w.note(&strongroomv1.Description{Instance: strings.Repeat("x", 1<<20), Sequence: 1})
	if w.last != nil {
		t.Error("an instance of 1 MiB is kept")
	}
}
