package host

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/volumeproc"
)

// TestLocked: a VM is locked if its key cannot be had, unless a volume process
// holds its DEKs: then the guest goes on, also after the agent lost its memory.
func TestLocked(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", b.newRef(t))
	m, err := b.machine(id)
	check(t, err)
	is := func(power, crypto string) {
		t.Helper()
		vm, err := b.describe(t.Context(), m)
		check(t, err)
		if vm.GetPowerState() != power || vm.GetCryptoState() != crypto || (vm.GetLockReason() != "") != (crypto == "locked") || vm.GetKey() == nil {
			t.Errorf("the VM is %s and %s (%s), want %s and %s", vm.GetPowerState(), vm.GetCryptoState(), vm.GetLockReason(), power, crypto)
		}
	}
	is("poweredOff", "unlocked")
	check(t, b.syncProviders(nil)) // the key is gone
	is("poweredOff", "locked")
	r := &running{volumes: new(volumeproc.Process)}
	m.setRunning(r)
	is("poweredOn", "unlocked")
	r.setProcess(nil) // it was killed, and cannot be started again without the key
	is("poweredOn", "locked")
	m.setRunning(nil)
	is("poweredOff", "locked")
}

// TestDescriptionsAreNumbered: of two descriptions of a VM the one with the higher
// number has read what is later, also if they are made at the same time.
func TestDescriptionsAreNumbered(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", keysafe.Ref{})
	m, err := b.machine(id)
	check(t, err)
	dir := filepath.Join(b.root, "web-1")
	var mu sync.Mutex
	all := map[uint64]uint32{} // the VM's CPUs, by number
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range 50 {
				vm := b.describeOrSay(t.Context(), m)
				mu.Lock()
				all[vm.GetDescription().GetSequence()] = vm.GetSettings().GetCpus()
				mu.Unlock()
			}
		})
	}
	for cpus := 2; cpus <= 40; cpus++ {
		vm, err := bundle.Read(dir)
		check(t, err)
		vm.Settings.CPUs = cpus
		check(t, bundle.Write(dir, vm))
	}
	group.Wait()
	var last uint32
	for n := uint64(1); n <= b.told.Load(); n++ {
		if cpus, ok := all[n]; ok && cpus < last {
			t.Fatalf("description %d has %d CPUs, one before it %d", n, cpus, last)
		} else if ok {
			last = cpus
		}
	}
	if len(all) != 200 {
		t.Errorf("%d numbers for 200 descriptions", len(all))
	}

	check(t, os.Rename(dir, dir+".away"))
	vm := b.describeAll(t.Context())[0]
	if vm.GetPowerState() != "unknown" || vm.GetCryptoState() != "locked" || vm.GetLockReason() == "" || vm.GetDescription().GetSequence() <= 200 {
		t.Errorf("a VM without its folder: %v", vm)
	}
}

// TestDescriptionAsksNobody: the key of a snapshot is looked for in memory only, or
// heartbeats would wait for a key server.
func TestDescriptionAsksNobody(t *testing.T) {
	t.Parallel()
	k := newKeyServerBench(t)
	access := k.access(t, nil)
	check(t, k.sync(k.Host, access))
	id := k.create(t, "web-1", k.ref)
	check(t, k.createSnapshot(t.Context(), &strongroomv1.AgentCreateSnapshotRequest{Id: id, Snapshot: "one", SnapshotId: "0193b5e0-0000-4000-8000-000000000001"}, quiet))
	again := openHost(t, k.cfg)
	m, err := again.machine(id)
	check(t, err)
	vm, err := again.describe(t.Context(), m)
	check(t, err)
	if reason := vm.GetSnapshots()[0].GetLockReason(); reason == "" || vm.GetLockReason() == "" {
		t.Errorf("a host whose memory is empty got the key to describe a VM: %v", vm)
	}
	select {
	case ref := <-again.lacking:
		if ref != k.ref {
			t.Errorf("it lacks %v", ref)
		}
	default:
		t.Error("it does not get the key in the background")
	}
}
