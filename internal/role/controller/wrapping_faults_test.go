package controller

import (
	"slices"
	"testing"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
	"strongroom/internal/block/blockdev/blockdevtest"
)

// TestRotationFaults: whatever answer of the key server is lost while a key is
// made, given to hosts or ended, and wherever the controller ends then, a
// rotation makes one key, all VMs come to have it, and the one before is ended.
func TestRotationFaults(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]bool{"lost": false, "stopped": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, h, server, f := faultySite(t)
			if err := s.update("kms-1", &strongroomv1.StandardSettings{Keys: keysWrapping}); err != nil {
				t.Fatal(err)
			}
			vms := []string{"web-1", "web-2"}
			if stop {
				vms = vms[:1] // a start takes its time
			}
			for _, name := range vms {
				s.success(client.Call(t.Context(), s.admin.VM().CreateVM, createVM(name, "east", "kms-1")))
			}
			key := s.current("kms-1", "")
			step := 1
			if blockdevtest.RaceDetector {
				step = 3 // every one fails in the run without it
			}
			for n, rotated := 1, 1; ; n, rotated = n+step, rotated+1 {
				if n > faultsMax {
					t.Fatalf("a rotation needs more than %d answers", faultsMax)
				}
				var hold chan struct{}
				if stop {
					hold = make(chan struct{})
				}
				hit := f.arm(n, hold)
				must[strongroomv1.Task](t)(s.rotate("kms-1"))
				ended := func() bool {
					if stop {
						select {
						case <-hit:
							return true
						default:
						}
					}
					w := s.getProvider("kms-1").GetStandard().GetWrapping()
					if w.GetCurrent().GetKeyId() == key {
						return false
					}
					if w.GetVmsToFollow() == 0 && !slices.ContainsFunc(w.GetReplaced(), func(k *strongroomv1.WrappingKey) bool { return k.GetEnded() == nil }) {
						return true
					}
					h.beat() // a host tells what it has
					s.c.poke()
					return false
				}
				eventually(t, "the rotation to end, or the fault", ended)
				last := f.disarm()
				if stop && !last {
					<-hit
					s.restart()
					close(hold)
					stop = false // which lets ended look at all
					eventually(t, "the rotation to end", ended)
					stop = true
				}
				s.wrapped(n, key)
				key = s.keyOf(vms[0])
				if len(s.getProvider("kms-1").GetStandard().GetWrapping().GetReplaced()) != rotated || len(materials(t, server, clientName)) != rotated+1 {
					t.Fatalf("answer %d: %d keys at the key server, want %d; shown: %v", n, len(materials(t, server, clientName)), rotated+1,
						s.getProvider("kms-1").GetStandard().GetWrapping())
				}
				if last {
					t.Logf("a rotation needs fewer than %d answers", n)
					break
				}
			}
		})
	}
}

// wrapped fails the test unless all VMs have the current wrapping key, which is
// none before it, and no task is left.
func (s *site) wrapped(n int, before string) {
	s.t.Helper()
	current := s.getProvider("kms-1").GetStandard().GetWrapping().GetCurrent().GetKeyId()
	vms, err := s.c.inv.VMs(s.t.Context(), "")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, v := range vms {
		if keys := v.Keys(); len(keys) != 1 || keys[0].KeyID != current || current == before {
			s.t.Errorf("answer %d: %s has %v, the current key is %s after %s", n, v.Name, keys, current, before)
		}
	}
	eventually(s.t, "all tasks to end", func() bool {
		active, err := s.c.tasks.List(s.t.Context(), 0, true)
		return err == nil && len(active) == 0
	})
}
