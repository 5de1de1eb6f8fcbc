package host

import (
	"context"
	"testing"
	"time"

	"connectrpc.com/connect"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// TestSettled: who asks how a VM is once it is settled waits for what is under way.
func TestSettled(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.create(t, "web-1", keysafe.Ref{})
	ask := func(ctx context.Context, settled bool) error {
		_, err := (&agent{b.Host}).GetVM(ctx, connect.NewRequest(&strongroomv1.AgentGetVMRequest{Id: id, Settled: settled}))
		return err
	}
	m, release, err := b.reserve(t.Context(), id)
	check(t, err)
	busy := func(what string) {
		t.Helper()
		check(t, ask(t.Context(), false))
		soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := ask(soon, true); errs.ReasonOf(err) != strongroomv1.ReasonVMBusy {
			t.Errorf("it was told how the VM is during %s: %v", what, err)
		}
	}
	busy("an operation")
	release()
	check(t, ask(t.Context(), true))
	first, second := m.rekeysAt(volume.NewRate(0)), m.rekeysAt(volume.NewRate(0))
	first() // it was being stopped while the other began
	busy("a deep rekey of the running VM")
	second()
	check(t, ask(t.Context(), true))

	// What was called off before it had the VM does not begin.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		if release, err := m.acquire(gone); err == nil {
			release()
			t.Fatal("an operation that was called off has the VM")
		}
	}
	if !m.idle() {
		t.Error("the VM stays reserved")
	}
}
