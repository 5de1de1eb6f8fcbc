package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/image"
	"strongroom/internal/machine/recrypt"
)

// creating is the name of the folder in which the VM with an id is made. It is
// no valid name of a VM folder, so nothing half made is ever registered.
func creating(id string) string { return ".creating-" + id }

// createVM makes a VM and registers it.
func (h *Host) createVM(ctx context.Context, req *strongroomv1.AgentCreateVMRequest, r report) error {
	root, err := h.secrets.datastorePath(req.GetDatastore())
	if err != nil {
		return err
	}
	vm, err := newVM(req)
	if err != nil {
		return err
	}
	return h.makeFolder(ctx, req.GetDatastore(), vm, "VM created", func(work string) error {
		return h.fillFolder(ctx, root, work, vm, req, r)
	})
}

// makeFolder makes the folder of a new VM and registers it. The whole folder is
// filled under another name and renamed when it is durable; a call that was
// interrupted is begun anew, one that had ended is recognised by the VM's id.
func (h *Host) makeFolder(ctx context.Context, datastore string, vm *bundle.VM, done string, fill func(work string) error) error {
	root, err := h.secrets.datastorePath(datastore)
	if err != nil {
		return err
	}
	reg := registered{ID: vm.ID, Name: vm.Name, Datastore: datastore, Folder: vm.Name}
	// A call that is repeated may find the first one still at its end.
	release, err := h.machineOf(reg).acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	dir := filepath.Join(root, reg.Folder)
	switch there, err := bundle.Read(dir); {
	case err == nil && there.ID == reg.ID:
		return h.register(reg)
	case errs.KindOf(err) != errs.NotFound:
		return errs.New(errs.Exists, "there is a VM folder %s on datastore %s", reg.Folder, reg.Datastore).
			WithHint("strongroom vm register %s --datastore %s", reg.Folder, reg.Datastore)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.Exists, "there is something called %s on datastore %s", reg.Folder, reg.Datastore)
	}

	work := filepath.Join(root, creating(reg.ID))
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	if err := fill(work); err != nil {
		return errors.Join(err, os.RemoveAll(work))
	}
	if err := os.Rename(work, dir); err != nil {
		return errors.Join(err, os.RemoveAll(work))
	}
	if err := durable.SyncDir(root); err != nil {
		return err
	}
	h.log.LogAttrs(ctx, slog.LevelInfo, done, slog.String("vm", reg.Name))
	return h.register(reg)
}

// newVM returns the content of vm.json for a request, with the defaults.
func newVM(req *strongroomv1.AgentCreateVMRequest) (*bundle.VM, error) {
	s := req.GetSettings()
	vm := &bundle.VM{
		Version: bundle.Version, ID: req.GetId(), Name: req.GetName(), Created: time.Now().UTC().Truncate(time.Second),
		Settings: bundle.Settings{
			CPUs: max(1, int(s.GetCpus())), MemoryMiB: int(s.GetMemoryMib()), Machine: s.GetMachine(), Network: s.GetNetwork(),
			Kernel: s.GetKernel(), Initrd: s.GetInitrd(), Append: s.GetAppend(),
		},
	}
	if want := s.GetDiskInterface(); want != interfaceAuto {
		vm.Settings.DiskInterface = want
	}
	if vm.Settings.MemoryMiB == 0 {
		vm.Settings.MemoryMiB = 1024
	}
	if vm.Settings.Machine == "" {
		vm.Settings.Machine = "q35"
	}
	if vm.Settings.Network == "" {
		vm.Settings.Network = "none"
	}
	return vm, vm.Validate()
}

// fillFolder makes the disks and, last, vm.json.
func (h *Host) fillFolder(ctx context.Context, root, dir string, vm *bundle.VM, req *strongroomv1.AgentCreateVMRequest, r report) error {
	folder := recrypt.Dir{Path: dir}
	var ref keysafe.Ref
	if k := req.GetKey(); k != nil {
		ref = keysafe.Ref{Provider: k.GetProvider(), KeyID: k.GetKeyId()}
	}
	for i, want := range req.GetDisks() {
		name := "disk-" + strconv.Itoa(i)
		encrypted := !ref.IsZero() && !want.GetPlain()
		d := bundle.Disk{Name: name, Format: bundle.FormatRaw}
		if encrypted {
			d.Format = bundle.FormatLUKS
		}
		d.File = bundle.DiskFile(name, d.Format)
		src, err := h.openSource(ctx, root, req, i)
		if err != nil {
			return errs.Wrap(err, "cannot make %s", name)
		}
		d.SizeBytes = max(want.GetSizeBytes(), src.size)
		vm.Disks = append(vm.Disks, d)
		if err := vm.Validate(); err != nil {
			return errors.Join(err, src.Close())
		}
		err = h.makeDisk(ctx, folder, d, src, ref, r)
		if err := errors.Join(err, src.Close()); err != nil {
			return errs.Wrap(err, "cannot make %s", name)
		}
	}
	if vm.Encrypted() {
		vm.Key = bundle.KeyOf(ref)
	}
	return bundle.Write(dir, vm)
}

// makeDisk makes one disk, durable and under its final name.
func (h *Host) makeDisk(ctx context.Context, folder recrypt.Dir, d bundle.Disk, src *source, ref keysafe.Ref, r report) (err error) {
	progress := func(done, total int64) { r("copying "+d.Name, done, total, unitBytes) }
	if src.luks != nil {
		return recrypt.Adopt(ctx, folder, d.File, d.SizeBytes, src.raw, src.luks.Segment, src.dek, ref, h.kek, progress)
	}
	var disk blockdev.Device
	if d.Format == bundle.FormatLUKS {
		disk, err = recrypt.NewVolume(ctx, folder, d.File, d.SizeBytes, src.thin, ref, h.kek)
	} else {
		disk, err = newPlain(folder, d.File, d.SizeBytes)
	}
	if err != nil {
		return err
	}
	err = src.copyTo(ctx, disk, progress)
	if err == nil {
		err = disk.Flush()
	}
	if err := errors.Join(err, disk.Close()); err != nil {
		return err
	}
	return recrypt.Finish(folder, d.File)
}

func newPlain(folder recrypt.Dir, name string, size int64) (blockdev.Device, error) {
	file, err := folder.Create(name + recrypt.Unfinished)
	if err != nil {
		return nil, err
	}
	if err := file.Resize(size); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// source is the image that a disk is copied from; an empty disk has none.
type source struct {
	size  int64           // bytes, a multiple of the sector size
	thin  bool            // zeros are left out of an encrypted disk
	raw   blockdev.Device // of a raw or a LUKS image
	qcow2 string          // path of a qcow2 image
	luks  *luks.Foreign   // of a LUKS image
	dek   *keymem.Key     // of a LUKS image
}

// openSource finds the image of disk i on the datastore whose root is given.
func (h *Host) openSource(ctx context.Context, root string, req *strongroomv1.AgentCreateVMRequest, i int) (*source, error) {
	want := req.GetDisks()[i]
	if want.GetImage() == "" {
		return &source{}, nil
	}
	path, err := onDatastore(root, want.GetImage())
	if err != nil {
		return nil, err
	}
	switch want.GetImageFormat() {
	case "raw":
		dev, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true})
		if err != nil {
			return nil, imageError(want.GetImage(), err)
		}
		size := (dev.Size() + bundle.SectorSize - 1) / bundle.SectorSize * bundle.SectorSize
		return &source{size: size, thin: want.GetThin(), raw: dev}, nil
	case "luks":
		if req.GetKey() == nil || want.GetPlain() || want.GetThin() {
			return nil, errs.New(errs.Invalid, "a LUKS image becomes an encrypted disk, which has what the image has").WithHint("strongroom vm create --encrypt")
		}
		passphrase, err := h.secrets.parcel.Open(req.GetPassphrases()[uint32(i)], parcel.ImageContext{Recipient: h.secrets.identity.HostID, VM: req.GetId(), Disk: i}.String())
		if err != nil {
			return nil, err
		}
		defer passphrase.Close()
		return h.openLUKS(ctx, path, want.GetImage(), passphrase)
	case "qcow2":
		size, err := image.VirtualSize(path)
		if err != nil {
			return nil, err
		}
		return &source{size: size, thin: want.GetThin(), qcow2: path}, nil
	}
	return nil, errs.New(errs.Invalid, "image format %.32q is neither raw, qcow2 nor luks", want.GetImageFormat())
}

func imageError(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.NotFound, "there is no image %s on the datastore", name)
	}
	return fmt.Errorf("cannot open image %s: %w", name, err)
}

// onDatastore returns the path of a file on a datastore. It refuses names and
// links that lead out of it.
func onDatastore(root, name string) (string, error) {
	outside := errs.New(errs.Invalid, "%.128q is no path on the datastore, relative to its root", name)
	if !filepath.IsLocal(name) {
		return "", outside
	}
	dir, err := os.OpenRoot(root)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	// The root follows links inside of it and fails on those that lead out.
	if _, err := dir.Stat(name); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", errs.New(errs.NotFound, "there is no %s on the datastore", name)
		}
		return "", outside
	}
	return filepath.Join(root, name), nil
}

// copyTo writes the image to disk, which reads as zeros. Sectors of the image that
// are holes are written as zeros, so that dm-crypt reads zeros there too, unless
// the import is thin.
func (s *source) copyTo(ctx context.Context, disk blockdev.Device, progress func(done, total int64)) error {
	switch {
	case s.raw != nil:
		_, encrypted := disk.(*volume.Volume)
		return volume.Copy(ctx, disk, s.raw, volume.CopyOptions{KeepHoles: !encrypted || s.thin, Verify: true, Progress: progress})
	case s.qcow2 != "":
		return convert(ctx, s.qcow2, disk, s.thin, func(part float64) { progress(int64(part*float64(s.size)), s.size) })
	}
	return nil
}

// Close releases the image and its key. It is idempotent.
func (s *source) Close() error {
	s.dek.Close()
	if s.raw != nil {
		return s.raw.Close()
	}
	return nil
}

// register adds a VM to the host's registry, or changes its entry.
func (h *Host) register(reg registered) error {
	err := h.secrets.updateRegistry(func(r *registry) error {
		at := -1
		for i, other := range r.VMs {
			switch {
			case other.ID == reg.ID:
				at = i
			case other.Name == reg.Name:
				return errs.New(errs.Exists, "a VM named %s is registered already", reg.Name)
			case other.Datastore == reg.Datastore && other.Folder == reg.Folder:
				return errs.New(errs.Exists, "folder %s of datastore %s is registered as VM %s", reg.Folder, reg.Datastore, other.Name).
					WithHint("strongroom vm unregister %s", other.Name)
			}
		}
		if at < 0 {
			r.VMs = append(r.VMs, reg)
		} else {
			r.VMs[at] = reg
		}
		return nil
	})
	if err == nil {
		h.machineOf(reg).setPlace(reg)
	}
	return err
}

// unregister takes a VM off the registry; one that is not there is no error.
func (h *Host) unregister(id string) error {
	err := h.secrets.updateRegistry(func(r *registry) error {
		r.VMs = slices.DeleteFunc(r.VMs, func(reg registered) bool { return reg.ID == id })
		return nil
	})
	if err == nil {
		h.mu.Lock()
		delete(h.machines, id)
		h.mu.Unlock()
	}
	return err
}
