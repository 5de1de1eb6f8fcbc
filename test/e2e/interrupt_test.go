package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"strongroom/internal/machine/bundle"
	"strongroom/test/lab"
)

// interrupted is an operation that rewrites a disk, stopped while it does.
type interrupted struct {
	name string
	// prepare makes the VM as it is before.
	prepare func(t *testing.T, s *site, vm string)
	args    func(vm string) []string
	file    string // the unfinished file, below the datastore; a pattern
	// encrypted: how the VM's disk is before and after.
	before, after bool
	// done tells, if the disk is no other than before, that it is done.
	done func(*bundle.VM) bool
}

const interruptedMiB = 256

func operations() []interrupted {
	create := func(encrypt ...string) func(*testing.T, *site, string) {
		return func(t *testing.T, s *site, vm string) {
			t.Helper()
			s.ok(t, append([]string{"vm", "create", vm, "--datastore", "ds", "--disk", "image=images/data.raw,format=raw"}, encrypt...)...)
		}
	}
	return []interrupted{
		{
			"create", func(*testing.T, *site, string) {},
			func(vm string) []string {
				return []string{"vm", "create", vm, "--datastore", "ds", "--disk", "image=images/data.raw,format=raw", "--encrypt"}
			},
			".creating-*/disk-0.luks.new", false, true, nil,
		},
		{
			"clone", func(t *testing.T, s *site, vm string) {
				t.Helper()
				if _, err := os.Lstat(s.folder("original")); os.IsNotExist(err) {
					create("--encrypt")(t, s, "original")
				}
			},
			func(vm string) []string { return []string{"vm", "clone", "original", vm, "--recrypt"} },
			".creating-*/disk-0.luks.new", false, true, nil,
		},
		{"encrypt", create(), func(vm string) []string { return []string{"vm", "encrypt", vm} }, "VM/disk-0.luks.new", false, true, nil},
		{"decrypt", create("--encrypt"), func(vm string) []string { return []string{"vm", "decrypt", vm, "--yes"} }, "VM/disk-0.raw.new", true, false, nil},
		{
			"snapshot", create("--encrypt"), func(vm string) []string { return []string{"vm", "snapshot", "create", vm, "first"} },
			"VM/snapshot-*.disk-0.luks.new", true, true, func(v *bundle.VM) bool { return len(v.Snapshots) > 0 },
		},
		{
			"revert", func(t *testing.T, s *site, vm string) {
				t.Helper()
				create("--encrypt")(t, s, vm)
				s.ok(t, "vm", "snapshot", "create", vm, "first")
			},
			func(vm string) []string { return []string{"vm", "snapshot", "revert", vm, "first", "--yes"} },
			"VM/disk-0.*.luks.new", true, true, func(v *bundle.VM) bool { return v.Disks[0].File != "disk-0.luks" },
		},
	}
}

// unfinished returns the file that the operation is writing, "" if there is none.
func (op interrupted) unfinished(s *site, vm string) string {
	found, _ := filepath.Glob(filepath.Join(s.store, strings.Replace(op.file, "VM", vm, 1)))
	if len(found) != 1 {
		return ""
	}
	return found[0]
}

// begin starts the operation and returns its task when so many MiB of the new
// disk have been written.
func (op interrupted) begin(t *testing.T, s *site, vm string, mib int64) (id string) {
	t.Helper()
	id = s.begin(t, op.args(vm)...)
	awaitEvery(t, 1e6, "the new disk to be written", func() bool {
		written := allocated(op.unfinished(s, vm))
		if written == 0 && s.isDone(t, op, vm) {
			t.Fatal("it was done before it could be interrupted")
		}
		return written >= mib<<20
	})
	return id
}

// isDone reports whether the VM has its disk as it is after the operation.
func (s *site) isDone(t *testing.T, op interrupted, vm string) bool {
	t.Helper()
	v, err := bundle.Read(s.folder(vm))
	if err != nil {
		return false
	}
	if op.done != nil {
		return op.done(v)
	}
	return v.Encrypted() == op.after
}

// finished waits for the task and looks at the disk.
func (op interrupted) finished(t *testing.T, s *site, vm, id, sum string) {
	t.Helper()
	s.ok(t, "task", "wait", id)
	if !s.isDone(t, op, vm) {
		t.Errorf("%s is as it was before", vm)
	}
	if v := s.show(t, vm); v.Encrypted != op.after || v.CryptoState != "unlocked" || v.PowerState != "poweredOff" {
		t.Errorf("%s afterwards: %+v", vm, v)
	}
	if got := s.content(t, vm, "disk-0"); got != sum {
		t.Errorf("content of %s is not that of the image", vm)
	}
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	s.ok(t, "vm", "delete", vm, "--yes")
}

// TestTasksSurviveCrashes kills the controller, and the host, while a disk is
// being rewritten: the task goes on after the restart and the data is right.
func TestTasksSurviveCrashes(t *testing.T) {
	t.Parallel()
	s := newReadySite(t)
	sum := s.image(t, "data.raw", interruptedMiB)
	for i, op := range operations() {
		t.Run("controller killed during "+op.name, func(t *testing.T) {
			vm := fmt.Sprintf("c-%d", i)
			op.prepare(t, s, vm)
			id := op.begin(t, s, vm, 20)
			s.controller.Kill()
			if s.isDone(t, op, vm) {
				t.Fatal("it was not interrupted")
			}
			must(t, s.controller.Start())
			op.finished(t, s, vm, id, sum)
		})
		t.Run("host killed during "+op.name, func(t *testing.T) {
			vm := fmt.Sprintf("h-%d", i)
			op.prepare(t, s, vm)
			id := op.begin(t, s, vm, 200)
			s.host.Kill()
			if s.isDone(t, op, vm) || op.unfinished(s, vm) == "" {
				t.Fatal("it was not interrupted")
			}
			must(t, s.host.Start())
			op.finished(t, s, vm, id, sum)
		})
	}
	t.Run("canceled", func(t *testing.T) { cancels(t, s, sum) })
	t.Run("controller killed during a rekey of many VMs", func(t *testing.T) { bulkRekey(t, s) })
}

// cancels stops each operation by `task cancel`: the VM is as it was.
func cancels(t *testing.T, s *site, sum string) {
	for i, op := range operations() {
		t.Run(op.name, func(t *testing.T) {
			vm := fmt.Sprintf("x-%d", i)
			op.prepare(t, s, vm)
			id := op.begin(t, s, vm, 20)
			s.ok(t, "task", "cancel", id)
			s.refused(t, refusal{1, "ended as canceled", ""}, "task", "wait", id)
			if got := s.task(t, id); got.State != "canceled" {
				t.Errorf("the task is %+v", got)
			}
			if left := s.leftovers(t); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
			if op.name == "create" || op.name == "clone" {
				s.refused(t, refusal{3, vm, "strongroom vm ls"}, "vm", "show", vm)
				if _, err := os.Lstat(s.folder(vm)); !os.IsNotExist(err) {
					t.Errorf("the VM's folder is there: %v", err)
				}
				return
			}
			if v := s.show(t, vm); s.isDone(t, op, vm) || v.Encrypted != op.before || v.CryptoState != "unlocked" {
				t.Errorf("%s afterwards: %+v", vm, v)
			}
			if s.content(t, vm, "disk-0") != sum {
				t.Errorf("content of %s has changed", vm)
			}
			// The same again, to its end.
			s.ok(t, op.args(vm)...)
			if s.content(t, vm, "disk-0") != sum {
				t.Errorf("content of %s is not that of the image", vm)
			}
			s.ok(t, "vm", "delete", vm, "--yes")
		})
	}
}

// bulkRekey moves 20 VMs to another provider and kills the controller on the
// way: 118, 126, 210, 216.
func bulkRekey(t *testing.T, s *site) {
	const count = 20
	s.provider(t, "kp-2")
	name := func(i int) string { return fmt.Sprintf("bulk-%02d", i) }
	var ids []string
	for i := range count {
		ids = append(ids, s.begin(t, "vm", "create", name(i), "--datastore", "ds", "--disk", "1M", "--encrypt"))
	}
	s.ok(t, append([]string{"task", "wait"}, ids...)...)
	moved := func() (n int) {
		for i := range count {
			if inspect(t, filepath.Join(s.folder(name(i)), "disk-0.luks")).Safes[0].KEK.Provider == "kp-2" {
				n++
			}
		}
		return n
	}

	ctx := t.Context()
	var command sync.WaitGroup
	var result lab.Result
	command.Go(func() { result, _ = s.controller.CLI(ctx, "vm", "rekey", "--all", "--provider", "kp-2") })
	awaitEvery(t, 1e6, "the first VM to be rekeyed", func() bool { return moved() > 0 })
	s.controller.Kill()
	if n := moved(); n == count {
		t.Fatal("all VMs were rekeyed before the controller was killed")
	} else {
		t.Logf("killed after %d of %d VMs", n, count)
	}
	must(t, s.controller.Start())
	command.Wait()
	if result.Code != 0 && result.Code != 6 && result.Code != 1 {
		t.Errorf("the command said %d: %s", result.Code, result.Stderr)
	}

	// What had been asked for is done.
	var list struct{ Tasks []taskState }
	must(t, s.ok(t, "task", "ls", "-o", "json").JSON(&list))
	asked := 0
	for _, task := range list.Tasks {
		if task.Kind == "vm.rekey" && strings.HasPrefix(task.Target, "vm/bulk-") {
			asked++
			s.ok(t, "task", "wait", task.ID)
		}
	}
	if n := moved(); asked == 0 || n < asked {
		t.Errorf("%d rekeys were asked for, %d VMs have the new provider", asked, n)
	}
	// And the rest, asked for again.
	s.ok(t, "vm", "rekey", "--all", "--provider", "kp-2")
	if n := moved(); n != count {
		t.Errorf("%d of %d VMs have the new provider", n, count)
	}
	if s.showProvider(t, "kp-1").InUse {
		t.Error("kp-1 counts as in use")
	}
	s.ok(t, "provider", "delete", "kp-1", "--yes")
	for i := range count {
		if v := s.show(t, name(i)); v.CryptoState != "unlocked" || v.Key.Provider != "kp-2" {
			t.Errorf("%s without kp-1: %+v", name(i), v)
		}
	}
}
