package host

import (
	"context"
	"log/slog"
	"path/filepath"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/machine/bundle"
	"strongroom/internal/machine/recrypt"
)

// exportDiskKey returns the DEK of an encrypted disk, sealed to a user's public
// key, and what else it takes to open the disk without us. The DEK was checked
// against the disk. It works in any power state.
func (h *Host) exportDiskKey(ctx context.Context, what, disk string, public []byte) (*strongroomv1.ExportDiskKeyResponse, error) {
	if disk == "" {
		return nil, errs.New(errs.Invalid, "which disk's key is not said").WithHint("strongroom vm show %s", what)
	}
	if len(public) != parcel.PublicKeySize {
		return nil, errs.New(errs.Invalid, "the public key has %d bytes, not %d", len(public), parcel.PublicKeySize)
	}
	m, release, err := h.reserve(ctx, what) // no rekey may end between the key and the answer
	if err != nil {
		return nil, err
	}
	defer release()
	reg, on := m.state()
	dir, vm, err := h.read(reg)
	if err != nil {
		return nil, err
	}
	indices, err := chosen(vm, []string{disk})
	if err != nil {
		return nil, err
	}
	if err := notEncrypting(vm, indices); err != nil {
		return nil, err
	}
	d := vm.Disks[indices[0]]
	if d.Format != bundle.FormatLUKS {
		return nil, errs.New(errs.InvalidState, "%s of %s is not encrypted: it has no key", d.Name, vm.Name)
	}
	path := filepath.Join(dir, d.File)
	dek, info, err := h.verifiedDEK(ctx, path)
	if err != nil {
		return nil, errs.Wrap(err, "cannot export the key of %s of %s", d.Name, vm.Name)
	}
	defer dek.Close()
	sealed, err := parcel.Seal(public, parcel.DiskContext{VM: vm.ID, UUID: info.UUID}.String(), dek)
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	h.log.LogAttrs(ctx, slog.LevelWarn, "disk key exported", slog.String("vm", reg.Name), slog.String("disk", d.Name))
	res := &strongroomv1.ExportDiskKeyResponse{Parcel: sealed, Layout: &strongroomv1.VolumeLayout{
		VmId: vm.ID, Vm: reg.Name, Disk: d.Name, Uuid: info.UUID, Host: h.secrets.identity.Name, Path: path,
		SizeBytes: info.Size, DataOffset: info.DataOffset, SectorSize: uint32(info.SectorSize),
		AllowDiscards: info.AllowDiscards, Thin: info.Thin, Key: keyRef(info.Safes[0].KEK), PowerState: "poweredOff",
	}}
	if on {
		res.Layout.PowerState = "poweredOn"
	}
	return res, nil
}

// verifiedDEK returns the DEK of the volume at path, which the caller closes,
// and its header. It has checked that the two belong together. Another process
// may have the volume open.
func (h *Host) verifiedDEK(ctx context.Context, path string) (_ *keymem.Key, _ volume.Info, err error) {
	file, err := blockdev.OpenFile(path, blockdev.FileOptions{ReadOnly: true, Unlocked: true, NoFollow: true})
	if err != nil {
		return nil, volume.Info{}, err
	}
	defer file.Close()
	info, err := volume.Inspect(file)
	if err != nil {
		return nil, volume.Info{}, err
	}
	if info.Rekey != nil {
		return nil, volume.Info{}, errs.New(errs.InvalidState, "it is being rekeyed and has two keys now").
			WithReason(strongroomv1.ReasonRekeyInProgress).WithHint("finish it first: strongroom vm rekey NAME --deep")
	}
	dek, _, _, err := recrypt.UnwrapDEKs(ctx, file, h.kek)
	if err != nil {
		return nil, volume.Info{}, err
	}
	v, err := volume.Open(file, dek, volume.Options{ReadOnly: true})
	if err != nil {
		dek.Close()
		return nil, volume.Info{}, err
	}
	v.Close() // and with it the file
	return dek, info, nil
}

// fillDisks makes disks of a VM safe for dm-crypt: those named, or all thin ones.
func (h *Host) fillDisks(ctx context.Context, id string, disks []string, r report) error {
	o, err := h.takeOffline(ctx, id, "filling a disk")
	if err != nil {
		return err
	}
	defer o.release()
	indices, err := o.encrypted(disks)
	if err != nil {
		return err
	}
	if err := o.notRekeying(disks); err != nil {
		return err
	}
	if len(disks) == 0 {
		if indices, err = o.thin(indices); err != nil {
			return err
		}
	}
	p := newDisksProgress(r, o.vm, indices, 1)
	for _, i := range indices {
		d := o.vm.Disks[i]
		progress, done := p.disk("filling "+d.Name, d.SizeBytes)
		if err := recrypt.Fill(ctx, o.folder(), d.File, h.kek, progress); err != nil {
			return errs.Wrap(err, "cannot fill %s of %s", d.Name, o.vm.Name)
		}
		h.log.LogAttrs(ctx, slog.LevelInfo, "disk filled", slog.String("vm", o.vm.Name), slog.String("disk", d.Name))
		done()
	}
	return nil
}

// thin returns those among the encrypted disks that are.
func (o *offline) thin(indices []int) ([]int, error) {
	var out []int
	for _, i := range indices {
		d := o.vm.Disks[i]
		info, _, err := recrypt.Inspect(o.folder(), d.File)
		if err != nil {
			return nil, errs.Wrap(err, "cannot look at %s of %s", d.Name, o.vm.Name)
		}
		if info.Thin {
			out = append(out, i)
		}
	}
	return out, nil
}
