package host

import (
	"testing"

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
