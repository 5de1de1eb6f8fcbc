package host

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// TestNews: what is new or lacking is told in full, as much as fits; the rest by its
// digest.
func TestNews(t *testing.T) {
	t.Parallel()
	all := make([]*strongroomv1.VM, 1000)
	for i := range all {
		vm := &strongroomv1.VM{Id: fmt.Sprintf("%04d", i), Description: &strongroomv1.Description{Sequence: 1}}
		for j := range 32 {
			vm.Snapshots = append(vm.Snapshots, &strongroomv1.Snapshot{Id: fmt.Sprint(j), Description: strings.Repeat("d", 350)})
		}
		all[i] = vm
	}
	var n news
	told := map[string]bool{}
	next := func() []string {
		t.Helper()
		full, digests, err := n.of(all)
		if err != nil {
			t.Fatal(err)
		}
		if len(digests) != len(all) {
			t.Errorf("%d digests", len(digests))
		}
		if size := proto.Size(&strongroomv1.HeartbeatRequest{Vms: full, Digests: digests}); size > tellMax+1<<17 {
			t.Errorf("a heartbeat of %d bytes", size)
		}
		var ids []string
		for _, vm := range full {
			ids = append(ids, vm.GetId())
			told[vm.GetId()] = true
			if vm.GetDescription() == nil {
				t.Error("a VM without its number")
			}
		}
		return ids
	}
	for range 14 {
		next()
		n.lacking = nil
		for _, vm := range all { // as the controller does
			if !told[vm.GetId()] {
				n.lacking = append(n.lacking, vm.GetId())
			}
		}
	}
	if len(told) != len(all) {
		t.Fatalf("%d VMs were told in fourteen heartbeats", len(told))
	}
	all[5].Description = &strongroomv1.Description{Sequence: 2}
	if got := next(); len(got) > 0 {
		t.Errorf("nothing is new, told %v", got)
	}
	all[7].Snapshots[31].LockReason = "its key is lost"
	n.lacking = []string{"0003", "gone", "0007", "0003"}
	if got := next(); !slices.Equal(got, []string{"0003", "0007"}) {
		t.Errorf("told %v", got)
	}
	// One that is too large for a heartbeat is told in one all the same.
	n.lacking = nil
	all[9].LockReason = strings.Repeat("x", tellMax)
	all[10].LockReason = "x"
	if full, _, err := n.of(all); err != nil || len(full) != 1 || full[0] != all[9] {
		t.Errorf("told %d VMs, %v", len(full), err)
	}
}

// TestSlowLook: a host that looks at its VMs for long, or for ever, tells what it saw
// last, and later what it sees; but nothing before it has seen anything.
func TestSlowLook(t *testing.T) {
	t.Parallel()
	seen := make(chan []*strongroomv1.VM)
	var looks atomic.Int32
	v := view{look: func() []*strongroomv1.VM { looks.Add(1); return <-seen }}
	web := []*strongroomv1.VM{{Id: "web"}}
	go func() {
		time.Sleep(50 * time.Millisecond) // longer than it is waited for afterwards
		seen <- web
	}()
	if got := v.now(t.Context(), time.Nanosecond); len(got) != 1 {
		t.Errorf("first seen: %v", got)
	}
	for range 3 {
		if got := v.now(t.Context(), time.Nanosecond); len(got) != 1 || got[0] != web[0] {
			t.Errorf("while it looks: %v", got)
		}
	}
	if n := looks.Load(); n > 2 {
		t.Errorf("%d looks, one behind the other", n)
	}
	seen <- append(web, &strongroomv1.VM{Id: "db"})
	if got := v.now(t.Context(), time.Minute); len(got) != 2 {
		t.Errorf("in the end: %v", got)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	v.now(ended, time.Minute)
	go func() { seen <- nil }()
	v.close()
}
