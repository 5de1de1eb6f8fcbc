package controller

import (
	"bytes"
	"slices"
	"sync"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/inventory"
)

// tellAgain is after how long a VM is told in full although its host says that it
// has not changed.
const tellAgain = 10 * time.Minute

// said is what the hosts last told of their VMs, whether or not the inventory knows
// those. A new controller has been told nothing. It is safe for concurrent use.
type said struct {
	mu    sync.Mutex
	hosts map[string]map[string]told // by host id and VM id
}

// told is what a host told of a VM.
type told struct {
	at     time.Time          // when it told the VM in full; zero: never
	keys   []inventory.KeyRef // that the VM needs; nil: it has not told
	digest []byte             // of what the inventory has; nil: not known
	size   int                // of keys, in bytes, about
}

// keysMax bounds what is kept of the keys of a host's VMs, in bytes: some hundred
// thousand keys. VMs beyond it count as not told.
const keysMax = 64 << 20

// sizeOf returns about how many bytes of memory keys take.
func sizeOf(keys []inventory.KeyRef) int {
	n := 0
	for _, k := range keys {
		n += len(k.Provider) + len(k.KeyID) + 64
	}
	return n
}

// note notes which VMs a host has, those that digests has and, if that is empty,
// those that it tells in full now, and what keys the latter need.
func (s *said) note(hostID string, full []*strongroomv1.VM, digests map[string][]byte, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, vms, size := s.hosts[hostID], map[string]told{}, 0
	for id := range digests {
		vms[id] = old[id]
		size += old[id].size
	}
	for _, vm := range full {
		if _, ok := digests[vm.GetId()]; !ok && len(digests) > 0 {
			continue
		}
		counted := vms[vm.GetId()].size
		t := told{at: now, keys: old[vm.GetId()].keys, size: old[vm.GetId()].size}
		if !unread(vm) { // else it could be read once, perhaps
			var v inventory.VM
			apply(&v, vm)
			t.keys = append([]inventory.KeyRef{}, v.Keys()...)
			t.size = sizeOf(t.keys)
		}
		if size += t.size - counted; size > keysMax {
			size -= t.size
			t = told{}
		}
		vms[vm.GetId()] = t
	}
	s.hosts[hostID] = vms
}

// noted notes that the inventory has the VM as it is under that digest.
func (s *said) noted(hostID, vmID string, digest []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.hosts[hostID][vmID]; ok {
		t.digest = digest
		s.hosts[hostID][vmID] = t
	}
}

// doubt has the host tell the VM in full: the inventory has it otherwise.
func (s *said) doubt(hostID, vmID string) { s.noted(hostID, vmID, nil) }

// lacking returns which VMs the host shall tell in full, those first that it told
// longest ago. What it told now and could not be noted is for the next time.
func (s *said) lacking(hostID string, digests map[string][]byte, now time.Time) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	vms := s.hosts[hostID]
	var ids []string
	for id, digest := range digests {
		t := vms[id]
		if known := t.digest != nil && bytes.Equal(t.digest, digest); !t.at.Equal(now) && (!known || now.Sub(t.at) > tellAgain) {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b string) int { return vms[a].at.Compare(vms[b].at) })
	return ids
}

// keys returns the keys that each VM of a host needs, nil of one whose host cannot
// tell, and whether the host has told all its VMs. They must not be changed.
func (s *said) keys(hostID string) (keys map[string][]inventory.KeyRef, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	vms, ok := s.hosts[hostID]
	keys = make(map[string][]inventory.KeyRef, len(vms))
	for id, t := range vms {
		keys[id] = t.keys
		ok = ok && !t.at.IsZero()
	}
	return keys, ok
}
