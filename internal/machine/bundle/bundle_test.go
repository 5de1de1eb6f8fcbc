package bundle_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
)

func sample() *bundle.VM {
	return &bundle.VM{
		Version:  bundle.Version,
		ID:       "6f1f0d0a-9f6e-4d4e-8d52-0b3a1f1f2c3d",
		Name:     "web-1",
		Created:  time.Date(2026, 11, 23, 8, 0, 0, 0, time.UTC),
		Settings: bundle.Settings{CPUs: 2, MemoryMiB: 512, Machine: "q35", Network: "none", Kernel: "iso/vmlinuz", Append: "quiet"},
		Key:      &bundle.Key{Provider: "kp-1", KeyID: "a/b"},
		Disks: []bundle.Disk{
			{Name: "disk-0", File: "disk-0.luks", Format: bundle.FormatLUKS, SizeBytes: 1 << 30},
			{Name: "disk-1", File: "disk-1.raw", Format: bundle.FormatRaw, SizeBytes: 512},
		},
	}
}

func TestWriteRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := sample()
	want.Retired = []string{"disk-0.raw"}
	want.Settings.DiskInterface = bundle.InterfaceNBD
	want.Disks[0].Encrypting = "disk-0.img"
	if err := bundle.Write(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := bundle.Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if left, err := bundle.Unfinished(dir); err != nil || len(left) > 0 {
		t.Errorf("Unfinished = %v, %v", left, err)
	}
}

func TestInvalid(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*bundle.VM){
		"disk interface":      func(vm *bundle.VM) { vm.Settings.DiskInterface = "auto" },
		"version":             func(vm *bundle.VM) { vm.Version = 2 },
		"name with a slash":   func(vm *bundle.VM) { vm.Name = "a/b" },
		"empty name":          func(vm *bundle.VM) { vm.Name = "" },
		"no id":               func(vm *bundle.VM) { vm.ID = "" },
		"id not canonical":    func(vm *bundle.VM) { vm.ID = strings.ToUpper(vm.ID) },
		"no CPU":              func(vm *bundle.VM) { vm.Settings.CPUs = 0 },
		"too little memory":   func(vm *bundle.VM) { vm.Settings.MemoryMiB = 1 },
		"machine":             func(vm *bundle.VM) { vm.Settings.Machine = "q35,accel=kvm" },
		"kernel outside":      func(vm *bundle.VM) { vm.Settings.Kernel = "../../etc/shadow" },
		"kernel absolute":     func(vm *bundle.VM) { vm.Settings.Kernel = "/etc/shadow" },
		"append alone":        func(vm *bundle.VM) { vm.Settings.Kernel = "" },
		"disk file outside":   func(vm *bundle.VM) { vm.Disks[0].File = "../disk-0.luks" },
		"disk file is a path": func(vm *bundle.VM) { vm.Disks[0].File = "a/b" },
		"disk file hidden":    func(vm *bundle.VM) { vm.Disks[0].File = ".lock" },
		"disk file is vm.json": func(vm *bundle.VM) {
			vm.Disks[0].File = bundle.FileName
		},
		"disk file unfinished":             func(vm *bundle.VM) { vm.Disks[0].File = "disk-0.new" },
		"two of a file":                    func(vm *bundle.VM) { vm.Disks[1].File = vm.Disks[0].File },
		"two of a name":                    func(vm *bundle.VM) { vm.Disks[1].Name = vm.Disks[0].Name },
		"format":                           func(vm *bundle.VM) { vm.Disks[0].Format = "qcow2" },
		"odd size":                         func(vm *bundle.VM) { vm.Disks[0].SizeBytes = 513 },
		"negative size":                    func(vm *bundle.VM) { vm.Disks[0].SizeBytes = -512 },
		"retired file outside":             func(vm *bundle.VM) { vm.Retired = []string{"../disk-0.raw"} },
		"retired disk in use":              func(vm *bundle.VM) { vm.Retired = []string{vm.Disks[0].File} },
		"retired twice":                    func(vm *bundle.VM) { vm.Retired = []string{"disk-0.raw", "disk-0.raw"} },
		"retired vm.json":                  func(vm *bundle.VM) { vm.Retired = []string{bundle.FileName} },
		"being encrypted, as another disk": func(vm *bundle.VM) { vm.Disks[0].Encrypting = vm.Disks[1].File },
		"being encrypted, as itself":       func(vm *bundle.VM) { vm.Disks[0].Encrypting = vm.Disks[0].File },
		"being encrypted, retired": func(vm *bundle.VM) {
			vm.Disks[0].Encrypting, vm.Retired = "disk-0.raw", []string{"disk-0.raw"}
		},
		"being encrypted, twice": func(vm *bundle.VM) {
			vm.Disks[1].Format, vm.Disks[0].Encrypting, vm.Disks[1].Encrypting = bundle.FormatLUKS, "disk-0.raw", "disk-0.raw"
		},
		"being encrypted, with a snapshot": func(vm *bundle.VM) {
			vm.Disks[0].Encrypting = "disk-0.raw"
			vm.Snapshots = []bundle.Snapshot{{ID: vm.ID, Name: "before", Created: vm.Created, Settings: vm.Settings}}
		},
		"being encrypted, in a snapshot": func(vm *bundle.VM) {
			disk := vm.Disks[0]
			disk.File, disk.Encrypting = "snapshot.luks", "snapshot.raw"
			vm.Snapshots = []bundle.Snapshot{{ID: vm.ID, Name: "before", Created: vm.Created, Settings: vm.Settings, Disks: []bundle.Disk{disk}}}
		},
		"being encrypted, outside":    func(vm *bundle.VM) { vm.Disks[0].Encrypting = "../disk-0.raw" },
		"being encrypted, and plain":  func(vm *bundle.VM) { vm.Disks[1].Encrypting = "disk-1.img" },
		"being encrypted without key": func(vm *bundle.VM) { vm.Disks[0].Encrypting, vm.Key = "disk-0.raw", nil },
		"provider name":               func(vm *bundle.VM) { vm.Key.Provider = "no/slash" },
	} {
		vm := sample()
		change(vm)
		if _, err := vm.Encode(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	good, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"unknown field": strings.Replace(string(good), `"name"`, `"extra": 1, "name"`, 1),
		"twice":         strings.Replace(string(good), `"name": "web-1"`, `"name": "web-2", "name": "web-1"`, 1),
		"twice, inside": strings.Replace(string(good), `"file": "disk-0.luks"`, `"file": "x", "file": "disk-0.luks"`, 1),
		"other letters": strings.Replace(string(good), `"name": "web-1"`, `"Name": "web-1"`, 1),
		"other case":    strings.Replace(string(good), `"name": "web-1"`, `"NAME": "web-2", "name": "web-1"`, 1),
		"trailing":      string(good) + "{}",
		"empty":         "",
		"not JSON":      "vm",
		"too long":      string(good) + strings.Repeat(" ", bundle.SizeMax),
	} {
		if vm, err := bundle.Parse([]byte(text)); err == nil || vm != nil {
			t.Errorf("%s: Parse = %v, %v", name, vm, err)
		}
	}
}

// TestLink checks that a folder from elsewhere cannot make us read a file
// outside of it.
func TestLink(t *testing.T) {
	t.Parallel()
	dir, outside := t.TempDir(), t.TempDir()
	if err := bundle.Write(outside, sample()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, bundle.FileName), filepath.Join(dir, bundle.FileName)); err != nil {
		t.Fatal(err)
	}
	if vm, err := bundle.Read(dir); err == nil {
		t.Errorf("Read through a link = %v", vm)
	}
}

// TestFIFO checks that a folder from elsewhere cannot keep us waiting.
func TestFIFO(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, bundle.FileName), 0o600); err != nil {
		t.Fatal(err)
	}
	if vm, err := bundle.Read(dir); errs.KindOf(err) != errs.Invalid || vm != nil {
		t.Errorf("Read of a FIFO = %v, %v", vm, err)
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	lock, err := bundle.Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundle.Acquire(dir); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("second Acquire: %v", err)
	}
	for range 2 {
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	}
	again, err := bundle.Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Release()
}

func TestRemove(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "web-1")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	vm := sample()
	vm.Retired = []string{"disk-0.raw"}
	if err := bundle.Write(dir, vm); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"disk-0.luks", "disk-1.raw", "disk-0.raw", "disk-1.luks.new", bundle.LogName, "notes.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := bundle.Remove(dir, vm); errs.KindOf(err) != errs.InvalidState {
		t.Errorf("Remove with a stranger's file: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "notes.txt")); err != nil {
		t.Errorf("the stranger's file is gone: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "notes.txt")); err != nil {
		t.Fatal(err)
	}
	if err := bundle.Remove(dir, vm); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	good, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	_, snapshots := vector(f)
	f.Add(snapshots)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		vm, err := bundle.Parse(text)
		if err != nil {
			if vm != nil {
				t.Error("a VM beside an error")
			}
			return
		}
		once, err := vm.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := bundle.Parse(once)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := again.Encode(); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("encoding is not stable: %v\n%s\n%s", err, once, twice)
		}
	})
}
