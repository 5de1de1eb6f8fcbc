package bundle_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"strongroom/internal/machine/bundle"
)

const (
	first  = "11111111-1111-4111-8111-111111111111"
	second = "22222222-2222-4222-8222-222222222222"
	third  = "33333333-3333-4333-8333-333333333333"
)

// vector returns the valid vm.json of docs/spec/vm-folder.md.
func vector(t testing.TB) (*bundle.VM, []byte) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "vm-snapshots.json"))
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bundle.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return vm, text
}

// TestSnapshotVectors are those of docs/spec/vm-folder.md.
func TestSnapshotVectors(t *testing.T) {
	t.Parallel()
	vm, text := vector(t)
	if got, err := vm.Encode(); err != nil || string(got) != string(text) {
		t.Errorf("encoded again, with error %v, it is\n%s", err, got)
	}
	if s := vm.FindSnapshot(vm.Snapshot); s == nil || s.Name != "upgraded" || s.Disks[0].File != bundle.SnapshotFile(second, "disk-0", bundle.FormatLUKS) {
		t.Errorf("the current snapshot is %+v", s)
	}
	for name, change := range map[string]func(*bundle.VM){
		"a parent follows its child": func(vm *bundle.VM) { vm.Snapshots[0].Parent = second },
		"its own parent":             func(vm *bundle.VM) { vm.Snapshots[0].Parent = first },
		"an id twice":                func(vm *bundle.VM) { vm.Snapshots[1].ID = first },
		"no id":                      func(vm *bundle.VM) { vm.Snapshots[0].ID = "" },
		"a name twice":               func(vm *bundle.VM) { vm.Snapshots[1].Name = vm.Snapshots[0].Name },
		"no name":                    func(vm *bundle.VM) { vm.Snapshots[1].Name = "a b" },
		"a file twice":               func(vm *bundle.VM) { vm.Snapshots[0].Disks[0].File = vm.Disks[0].File },
		"a file of two snapshots":    func(vm *bundle.VM) { vm.Snapshots[0].Disks[0].File = vm.Snapshots[1].Disks[0].File },
		"no file name":               func(vm *bundle.VM) { vm.Snapshots[0].Disks[0].File = "disk-0.new" },
		"a file outside":             func(vm *bundle.VM) { vm.Snapshots[0].Disks[0].File = "../disk-0.luks" },
		"a retired file":             func(vm *bundle.VM) { vm.Retired = []string{vm.Snapshots[0].Disks[0].File} },
		"not printable":              func(vm *bundle.VM) { vm.Snapshots[0].Description = "\x1b[2J" },
		"not UTF-8":                  func(vm *bundle.VM) { vm.Snapshots[0].Description = "\xff" },
		"a description too long":     func(vm *bundle.VM) { vm.Snapshots[0].Description = strings.Repeat("a", bundle.DescriptionMax+1) },
		"out of range":               func(vm *bundle.VM) { vm.Snapshots[0].Settings.CPUs = 0 },
		"no such snapshot":           func(vm *bundle.VM) { vm.Snapshot = third },
		"too many": func(vm *bundle.VM) {
			for i := range bundle.SnapshotsMax - 1 {
				s := vm.Snapshots[0]
				s.ID, s.Name, s.Disks = fmt.Sprintf("33333333-3333-4333-8333-3333333333%02d", i), fmt.Sprint("s", i), nil
				vm.Snapshots = append(vm.Snapshots, s)
			}
		},
	} {
		bad := vm.Clone()
		change(bad)
		if err := bad.Validate(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if got, err := vm.Encode(); err != nil || string(got) != string(text) {
		t.Error("a clone shares something with its original")
	}
}

// TestDropSnapshot: children and the current marker go to the parent.
func TestDropSnapshot(t *testing.T) {
	t.Parallel()
	vm, _ := vector(t)
	leaf := bundle.Snapshot{ID: third, Name: "leaf", Parent: second, Settings: vm.Settings}
	vm.Snapshots = append(vm.Snapshots, leaf)
	want := vm.Clone()

	vm.DropSnapshot(second)
	want.Snapshots = slices.Delete(want.Snapshots, 1, 2)
	want.Snapshots[1].Parent, want.Snapshot = first, first
	want.Retired = []string{bundle.SnapshotFile(second, "disk-0", bundle.FormatLUKS)}
	if diff := cmp.Diff(want, vm); diff != "" {
		t.Error(diff)
	}
	vm.DropSnapshot(second) // there is none any more
	vm.DropSnapshot(first)
	if vm.Snapshot != "" || len(vm.Snapshots) != 1 || vm.Snapshots[0].Parent != "" || len(vm.Retired) != 2 {
		t.Errorf("without the root: %+v", vm)
	}
	if err := vm.Validate(); err != nil {
		t.Error(err)
	}
}

// TestStrays: only what a snapshot or a revert makes can be one, and vm.json does
// not name it.
func TestStrays(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "web-1")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	vm, _ := vector(t)
	vm.Retired = []string{bundle.RevertedFile(third, "disk-0", bundle.FormatLUKS)}
	if err := bundle.Write(dir, vm); err != nil {
		t.Fatal(err)
	}
	strays := []string{
		bundle.RevertedFile(third, "disk-0", bundle.FormatRaw), bundle.RevertedFile(third, "disk-1", bundle.FormatLUKS),
		bundle.SnapshotFile(third, "disk-0", bundle.FormatLUKS), bundle.SnapshotFile(third, "disk-0", bundle.FormatRaw),
	}
	others := []string{"disk-0.raw", "disk-0.luks", "snapshot.luks", "snapshot-1.disk-0.luks", "disk-0." + third, "disk-0." + third + ".luks.new", "notes.txt"}
	for _, name := range slices.Concat(strays, others, vm.Retired, []string{vm.Disks[0].File, vm.Snapshots[0].Disks[0].File, vm.Snapshots[1].Disks[0].File}) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := bundle.Strays(dir, vm)
	slices.Sort(strays)
	if err != nil || !slices.Equal(got, strays) {
		t.Errorf("Strays = %q, %v; want %q", got, err, strays)
	}

	// With the VM all of it goes but what is somebody's.
	for _, name := range others {
		if !strings.HasSuffix(name, ".new") {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := bundle.Remove(dir, vm); err != nil {
		t.Error(err)
	}
}
