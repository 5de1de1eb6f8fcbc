package host

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/qemu"
	"strongroom/internal/machine/recrypt"
)

// read returns the folder of a VM and what it says.
func (h *Host) read(reg registered) (dir string, vm *bundle.VM, err error) {
	if dir, err = h.folder(reg); err == nil {
		vm, err = readVM(reg, dir)
	}
	return dir, vm, err
}

// describe returns what a user wants to know of a VM, read from its folder. It
// works while the VM runs, and tells as locked a VM whose key cannot be had and
// whose DEKs no volume process holds: it could not go on.
func (h *Host) describe(ctx context.Context, m *machine) (*strongroomv1.VM, error) {
	// One at a time, so that the later one has read what is later.
	m.describing.Lock()
	defer m.describing.Unlock()
	vm, err := h.look(ctx, m)
	if err == nil {
		vm.Description = h.nextDescription()
	}
	return vm, err
}

func (h *Host) nextDescription() *strongroomv1.Description {
	return &strongroomv1.Description{Instance: h.instance, Sequence: h.told.Add(1)}
}

// look is what describe finds.
func (h *Host) look(ctx context.Context, m *machine) (*strongroomv1.VM, error) {
	reg, on := m.state()
	dir, vm, err := h.read(reg)
	if err != nil {
		return nil, err
	}
	out := &strongroomv1.VM{
		Id: vm.ID, Name: reg.Name, Cluster: h.secrets.identity.Cluster, Host: h.secrets.identity.Name,
		Datastore: reg.Datastore, Folder: reg.Folder, PowerState: "poweredOff", CryptoState: "unlocked",
		Encrypted: vm.Encrypted(), Created: timestamppb.New(vm.Created),
		Settings: describeSettings(vm.Settings),
	}
	var interfaces map[string]qemu.Interface
	unlocked := false
	if r := m.run(); on && r != nil {
		out.PowerState, interfaces, unlocked = "poweredOn", r.interfaces, r.process() != nil
	}
	if vm.Key != nil {
		out.Key = keyRef(vm.Key.Ref())
	}
	h.describeSnapshots(ctx, m, dir, vm, out)
	for _, d := range vm.Disks {
		disk, keys, err := h.describeDisk(dir, vm, d)
		for _, key := range keys {
			if err == nil && !unlocked {
				err = h.holdsKEK(ctx, key)
			}
		}
		if err != nil {
			// One bad disk must not hide the VM, nor the others.
			out.CryptoState, out.LockReason = "locked", reason(errs.Wrap(err, "disk %s", d.Name))
		}
		disk.Interface = string(interfaces[d.Name])
		out.Disks = append(out.Disks, disk)
	}
	return out, nil
}

func describeSettings(s bundle.Settings) *strongroomv1.VMSettings {
	return &strongroomv1.VMSettings{
		Cpus: uint32(s.CPUs), MemoryMib: uint32(s.MemoryMiB), Machine: s.Machine, Kernel: s.Kernel, Initrd: s.Initrd, Append: s.Append,
		Network: s.Network, DiskInterface: cmp.Or(s.DiskInterface, interfaceAuto),
	}
}

// describeSnapshots adds a VM's snapshots to out. One whose keys cannot be had
// does not keep the VM from running, so the VM is not locked by that.
func (h *Host) describeSnapshots(ctx context.Context, m *machine, dir string, vm *bundle.VM, out *strongroomv1.VM) {
	out.CurrentSnapshot = vm.Snapshot
	describe := m.snapshotDisks.look(h, dir, vm)
	for _, s := range vm.Snapshots {
		snapshot := &strongroomv1.Snapshot{
			Id: s.ID, Name: s.Name, Description: s.Description, Created: timestamppb.New(s.Created), Parent: s.Parent, Settings: describeSettings(s.Settings),
		}
		for _, d := range s.Disks {
			disk, keys, err := describe(d)
			for _, key := range keys {
				if err == nil {
					err = h.holdsKEK(ctx, key)
				}
			}
			if err != nil {
				snapshot.LockReason = reason(errs.Wrap(err, "disk %s", d.Name))
			}
			snapshot.Disks = append(snapshot.Disks, disk)
		}
		out.Snapshots = append(out.Snapshots, snapshot)
	}
	out.ConsolidationNeeded = hasStrays(dir, vm) && m.idle() && stillHasStrays(dir)
}

// hasStrays reports whether the folder has files of snapshots that the VM does not
// have. An operation under way makes them before vm.json names them.
func hasStrays(dir string, vm *bundle.VM) bool {
	strays, err := bundle.Strays(dir, vm)
	return err == nil && len(strays) > 0
}

// stillHasStrays is hasStrays with vm.json as it is now: one may just have been named.
func stillHasStrays(dir string) bool {
	vm, err := bundle.Read(dir)
	return err == nil && hasStrays(dir, vm)
}

// describeDisk also returns the addresses of the keys that the disk needs.
func (h *Host) describeDisk(dir string, vm *bundle.VM, d bundle.Disk) (*strongroomv1.Disk, []keysafe.Ref, error) {
	out := &strongroomv1.Disk{Name: d.Name, File: d.File, SizeBytes: d.SizeBytes, Encrypted: d.Format == bundle.FormatLUKS}
	if d.Encrypting != "" {
		return describeInPlace(dir, vm, d)
	}
	path := filepath.Join(dir, d.File)
	var err error
	if out.AllocatedBytes, err = allocated(path); err != nil || !out.Encrypted {
		return out, nil, err
	}
	safes, vol, err := peek(path)
	if err != nil {
		return out, nil, err
	}
	safe := safes.Current
	out.Key, out.Uuid, out.Generation, out.Cipher, out.Thin = keyRef(safe.KEK), vol.UUID, safe.Generation, cipherName, vol.Thin
	keys := []keysafe.Ref{safe.KEK}
	if next := safes.Next; next != nil {
		out.Rekey = &strongroomv1.DiskRekey{Key: keyRef(next.KEK), DoneBytes: vol.Rekey.Done, TotalBytes: vol.Rekey.Total}
		keys = append(keys, next.KEK)
	}
	return out, keys, nil
}

// describeInPlace is describeDisk for a disk that is being encrypted in place, at
// this moment or not. Until its header tells, its key is the VM's.
func describeInPlace(dir string, vm *bundle.VM, d bundle.Disk) (*strongroomv1.Disk, []keysafe.Ref, error) {
	out := &strongroomv1.Disk{
		Name: d.Name, File: d.File, SizeBytes: d.SizeBytes, Encrypted: true, Cipher: cipherName, Key: keyRef(vm.Key.Ref()),
		Encryption: &strongroomv1.DiskEncryption{TotalBytes: d.SizeBytes},
	}
	name, err := recrypt.InPlaceFile(recrypt.Dir{Path: dir}, d.Encrypting, d.File)
	if err != nil {
		return out, nil, err
	}
	out.File = name
	if out.AllocatedBytes, err = allocated(filepath.Join(dir, name)); err != nil {
		return out, nil, err
	}
	file, err := blockdev.OpenFile(filepath.Join(dir, name), blockdev.FileOptions{ReadOnly: true, Unlocked: true, NoFollow: true})
	if err != nil {
		return out, nil, err
	}
	defer file.Close()
	state, err := volume.InspectEncryption(file, d.SizeBytes)
	if err != nil || state == nil || state.Safe == nil {
		return out, nil, err
	}
	out.Uuid, out.Generation, out.Key = state.UUID, state.Safe.Generation, keyRef(state.Safe.KEK)
	out.Encryption.DoneBytes = state.Done
	return out, []keysafe.Ref{state.Safe.KEK}, nil
}

// cipherName is how the API calls the cipher of every encrypted disk.
const cipherName = "xts-aes-256"

// allocated returns how many bytes the disk in that file takes on the datastore.
func allocated(path string) (int64, error) {
	info, err := os.Lstat(path)
	if err == nil {
		err = isStorage(info)
	}
	if err != nil {
		return 0, err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return stat.Blocks * 512, nil
	}
	return 0, nil
}

// isStorage returns an error unless a disk can be in what info tells of. A link
// cannot: it may lead anywhere.
func isStorage(info fs.FileInfo) error {
	if mode := info.Mode().Type(); mode != 0 && mode != fs.ModeDevice {
		return fmt.Errorf("file %s: %w", info.Name(), blockdev.ErrNotStorage)
	}
	return nil
}

// peek reads the header of a volume that another process may have open.
func peek(path string) (recrypt.Safes, volume.Info, error) {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true, NoFollow: true})
	if err != nil {
		return recrypt.Safes{}, volume.Info{}, err
	}
	defer file.Close()
	info, err := volume.Inspect(file)
	if err != nil {
		return recrypt.Safes{}, volume.Info{}, err
	}
	safes, err := recrypt.SafesOf(info)
	return safes, info, err
}

func keyRef(ref keysafe.Ref) *strongroomv1.KeyRef {
	return &strongroomv1.KeyRef{Provider: ref.Provider, KeyId: ref.KeyID}
}

// reason returns the text of err with its machine-readable reason and hint, for
// people who look at a VM and not at an error.
func reason(err error) string {
	err = explain(err)
	text := err.Error()
	if r := errs.ReasonOf(err); r != "" {
		text += " (" + r + ")"
	}
	if hint := errs.HintOf(err); hint != "" {
		text += "; " + hint
	}
	return text
}
