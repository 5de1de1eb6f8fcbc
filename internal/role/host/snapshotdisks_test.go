package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/machine/bundle"
)

// opens counts how often a file of snapshots in dir is opened, as the kernel says.
func opens(t *testing.T, dir string) (since func() int) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_OPEN)
	check(t, err)
	return func() int {
		t.Helper()
		n, buf := 0, make([]byte, 1<<16)
		for {
			got, err := unix.Read(fd, buf)
			if err == unix.EAGAIN {
				return n
			}
			check(t, err)
			n += strings.Count(string(buf[:got]), "."+bundle.FormatLUKS+"\x00")
		}
	}
}

// TestUnchangedSnapshotsAreNotRead: a look at a VM opens the disks of those
// snapshots only that changed since they were read, by whomever.
func TestUnchangedSnapshotsAreNotRead(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.newRef(t)
	id := b.create(t, "web-1", first)
	const snapshots = 8
	var ids []string
	for i := range snapshots {
		ids = append(ids, b.snapshot(t, id, fmt.Sprint(i)))
	}
	m, err := b.machine(id)
	check(t, err)
	clock := time.Now()
	m.snapshotDisks.now = func() time.Time { return clock }
	dir := filepath.Join(b.root, "web-1")
	opened := opens(t, dir)
	look := func(step string, want int) *strongroomv1.VM {
		t.Helper()
		opened()
		vm := b.described(t, id)
		if got := opened() - 1; got != want { // one: the VM's own disk
			t.Errorf("%s: %d disks of snapshots opened, want %d", step, got, want)
		}
		return vm
	}
	keyOf := func(vm *strongroomv1.VM, snapshot int) string {
		return vm.GetSnapshots()[snapshot].GetDisks()[1].GetKey().GetKeyId()
	}
	settle := func() {
		t.Helper()
		b.described(t, id)
		clock = clock.Add(settleTime)
		b.described(t, id)
	}
	look("the first look", snapshots)
	clock = clock.Add(settleTime - 1)
	look("not settled", snapshots)
	clock = clock.Add(1)
	look("settled", snapshots)
	if vm := look("unchanged", 0); keyOf(vm, 0) != first.KeyID || vm.GetSnapshots()[0].GetDisks()[1].GetUuid() == "" {
		t.Errorf("unread it is told as %v", vm.GetSnapshots()[0])
	}

	second := b.newRef(t)
	check(t, b.rekeyVM(t.Context(), id, nil, second, depth{}, quiet))
	vm := look("after a rekey", snapshots)
	for i := range snapshots {
		if keyOf(vm, i) != second.KeyID {
			t.Errorf("snapshot %d is told under its old key", i)
		}
	}
	settle()
	look("unchanged after a rekey", 0)

	// From outside: one written in place, one replaced, one gone, one come back.
	path := func(i int) string {
		return filepath.Join(dir, bundle.SnapshotFile(ids[i], "disk-1", bundle.FormatLUKS))
	}
	check(t, os.WriteFile(path(2)+".tmp", make([]byte, 4096), 0o600))
	check(t, os.Rename(path(2)+".tmp", path(2)))
	check(t, os.Rename(path(3), path(3)+".away"))
	file, err := os.OpenFile(path(1), os.O_WRONLY, 0)
	check(t, err)
	_, err = file.WriteAt(make([]byte, 1<<20), 0)
	check(t, err)
	check(t, file.Close())
	vm = look("changed from outside", 2)
	for i, s := range vm.GetSnapshots() {
		if bad := i >= 1 && i <= 3; (s.GetLockReason() != "") != bad {
			t.Errorf("snapshot %d: %q", i, s.GetLockReason())
		}
	}
	look("what fails is read again", 2)
	check(t, os.Rename(path(3)+".away", path(3)))
	if vm := look("one is back", 3); keyOf(vm, 3) != second.KeyID {
		t.Errorf("it is told as %v", vm.GetSnapshots()[3])
	}

	// The key is asked for at each look, whatever is read.
	check(t, b.syncProviders(nil))
	if vm := look("without its key", 3); vm.GetSnapshots()[0].GetLockReason() == "" {
		t.Error("a snapshot whose key is gone is told as one that opens")
	}
	if known := len(m.snapshotDisks.known); known != snapshots-2 {
		t.Errorf("%d disks are remembered, want %d", known, snapshots-2)
	}
}
