// Package recrypt changes how a disk of a powered-off VM is encrypted: it
// encrypts a plain disk, decrypts an encrypted one, and gives an encrypted one
// a new KEK (shallow rekey) or a new DEK as well (deep rekey). It makes the disks
// of a clone, each with a key safe of its own, and the copies that snapshots are.
// For a VM that runs it makes the new file, which the volume process fills.
//
// Encryption and decryption write a whole new file ("disk-0.luks.new") beside
// the old one, make it durable, open it as a power-on would (from the key
// safe in its own header), compare it with the original byte by byte, and only
// then give it its final name. A deep rekey works in place
// (docs/spec/online-rekey.md). At every instant, power loss included, the
// folder holds one complete disk under the name that vm.json tells, or will
// tell after the caller's next step; tests fail every I/O to show it.
//
// Every operation is idempotent: called again after it was interrupted, it
// recognises what it finished by the KEK's address in the key safe, goes on with
// a deep rekey, and throws away only its own unfinished ".new" files.
//
// The functions are safe for concurrent use on different disks. The caller
// holds the VM folder's lock.
package recrypt

import (
	"context"
	"errors"

	"github.com/google/uuid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// Unfinished is the suffix of a file that is being written. A file with this
// suffix may always be deleted while no operation runs.
const Unfinished = ".new"

// Folder is a VM folder as this package needs it. [Dir] is the real one. Names
// have no separators.
type Folder interface {
	// Exists reports whether there is a file of that name.
	Exists(name string) (bool, error)
	// Open opens an existing file for exclusive use. It returns an error
	// wrapping [blockdev.ErrInUse] if somebody else has it open.
	Open(name string) (blockdev.Resizer, error)
	// OpenShared opens an existing file that a volume process may be using, for
	// reading.
	OpenShared(name string) (blockdev.Device, error)
	// Create makes an empty file. It returns an error wrapping [fs.ErrExist]
	// if there is one.
	Create(name string) (blockdev.Resizer, error)
	// Rename gives a file another name, replacing what was there, and returns
	// when that is durable.
	Rename(old, new string) error
	// Remove deletes a file, durably. It succeeds if there is none.
	Remove(name string) error
	// Sync makes the names in the folder durable as they are.
	Sync() error
}

// KEKs finds the KEK that a key safe names. The caller closes the key.
type KEKs func(ctx context.Context, ref keysafe.Ref) (*keymem.Key, error)

// Progress is told how many of all bytes are done; it may be nil. Writing and
// verifying count alike.
type Progress func(done, total int64)

// NewVolume formats an encrypted volume of size bytes in a new file of that
// name plus [Unfinished], with a new DEK wrapped under the KEK named by ref,
// and returns it open. The caller fills it and calls [Finish].
//
// thin says that sectors which the caller leaves alone stand for zeros of an
// image; see [volume.FormatOptions].
func NewVolume(ctx context.Context, folder Folder, name string, size int64, thin bool, ref keysafe.Ref, keks KEKs) (*volume.Volume, error) {
	spec := freshSpec(size, ref)
	spec.thin = thin
	return newVolume(ctx, folder, name, spec, keks)
}

// Finish gives name+[Unfinished] its name. The file must be closed and durable.
func Finish(folder Folder, name string) error {
	return folder.Rename(name+Unfinished, name)
}

type volumeSpec struct {
	size          int64 // bytes
	sectorSize    int   // bytes
	uuid          string
	label         string
	allowDiscards bool
	thin          bool
	ref           keysafe.Ref
	generation    uint64
}

// sectorSize is that of the volumes made here, in bytes: a larger one would
// change the block size of the guest's disk under dm-crypt.
const sectorSize = 512

// freshSpec describes a volume with an identity of its own.
func freshSpec(size int64, ref keysafe.Ref) volumeSpec {
	return volumeSpec{size: size, sectorSize: sectorSize, uuid: uuid.NewString(), allowDiscards: true, ref: ref, generation: 1}
}

func newVolume(ctx context.Context, folder Folder, name string, spec volumeSpec, keks KEKs) (*volume.Volume, error) {
	dek, err := keymem.Random(keysafe.DEKSize)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	file, err := format(ctx, folder, name, spec, dek, keks)
	if err != nil {
		return nil, err
	}
	vol, err := volume.Open(file, dek, volume.Options{})
	if err != nil {
		return nil, errors.Join(err, file.Close(), folder.Remove(name+Unfinished))
	}
	return vol, nil
}

// format makes a volume with that DEK in a new file of that name plus
// [Unfinished], and returns the file.
func format(ctx context.Context, folder Folder, name string, spec volumeSpec, dek *keymem.Key, keks KEKs) (_ blockdev.Resizer, err error) {
	if spec.size <= 0 || spec.size%int64(spec.sectorSize) != 0 {
		return nil, errs.New(errs.Invalid, "a disk of %d bytes is not one of whole sectors of %d bytes", spec.size, spec.sectorSize)
	}
	if err := folder.Remove(name + Unfinished); err != nil {
		return nil, err
	}
	kek, err := keks(ctx, spec.ref)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	safe, err := keysafe.Wrap(kek, dek, spec.ref, volume.Owner(spec.uuid), spec.generation)
	if err != nil {
		return nil, err
	}
	file, err := folder.Create(name + Unfinished)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.Close(), folder.Remove(name+Unfinished))
		}
	}()
	err = volume.Format(file, volume.FormatOptions{
		Size: spec.size, SectorSize: spec.sectorSize, UUID: spec.uuid, Label: spec.label, DEK: dek, Safe: safe, AllowDiscards: spec.allowDiscards, Thin: spec.thin,
	})
	if err != nil {
		return nil, err
	}
	return file, nil
}

// OpenVolume opens the encrypted disk in file name by the key safe in its
// header, as a power-on does. Closing the volume closes the file. It returns an
// error wrapping [volume.ErrRekeying] if a deep rekey is under way.
func OpenVolume(ctx context.Context, folder Folder, name string, keks KEKs) (*volume.Volume, *keysafe.Safe, error) {
	vol, safes, err := OpenRekeying(ctx, folder, name, keks)
	if err != nil {
		return nil, nil, err
	}
	if safes.Next != nil {
		return nil, nil, errors.Join(volume.ErrRekeying, vol.Close())
	}
	return vol, safes.Current, nil
}

// OpenRekeying is OpenVolume also for a disk of which a deep rekey is under way.
func OpenRekeying(ctx context.Context, folder Folder, name string, keks KEKs) (*volume.Volume, Safes, error) {
	file, err := folder.Open(name)
	if err != nil {
		return nil, Safes{}, err
	}
	vol, safes, err := openVolume(ctx, file, keks)
	if err != nil {
		return nil, Safes{}, errors.Join(err, file.Close())
	}
	return vol, safes, nil
}

func openVolume(ctx context.Context, file blockdev.Resizer, keks KEKs) (*volume.Volume, Safes, error) {
	dek, next, safes, err := UnwrapDEKs(ctx, file, keks)
	if err != nil {
		return nil, Safes{}, err
	}
	defer dek.Close()
	defer next.Close()
	vol, err := volume.Open(file, dek, volume.Options{NextDEK: next})
	return vol, safes, err
}

// Safes are the key safes in the header of a volume.
type Safes struct {
	Current *keysafe.Safe
	Next    *keysafe.Safe // of the DEK that a deep rekey leads to; nil if none is under way
}

// SafesOf returns the key safes in a header.
func SafesOf(info volume.Info) (Safes, error) {
	want := 1
	if info.Rekey != nil {
		want = 2
	}
	if len(info.Safes) != want {
		return Safes{}, errs.New(errs.Corrupt, "the volume has %d key safes, not %d", len(info.Safes), want).
			WithHint("open it with its volume key or passphrase: cryptsetup open")
	}
	safes := Safes{Current: info.Safes[0]}
	if want == 2 {
		safes.Next = info.Safes[1]
	}
	return safes, nil
}

// UnwrapDEKs returns the DEK of the volume on file, the one that a deep rekey
// leads to, or nil if none is under way, and the key safes they came from. The
// caller closes the DEKs.
func UnwrapDEKs(ctx context.Context, file blockdev.Device, keks KEKs) (dek, next *keymem.Key, _ Safes, err error) {
	info, safes, err := inspect(file)
	if err != nil {
		return nil, nil, Safes{}, err
	}
	if dek, err = unwrap(ctx, safes.Current, info.UUID, keks); err != nil {
		return nil, nil, Safes{}, err
	}
	if safes.Next != nil {
		if next, err = unwrap(ctx, safes.Next, info.UUID, keks); err != nil {
			return nil, nil, Safes{}, errors.Join(err, dek.Close())
		}
	}
	return dek, next, safes, nil
}

func unwrap(ctx context.Context, safe *keysafe.Safe, uuid string, keks KEKs) (*keymem.Key, error) {
	kek, err := keks(ctx, safe.KEK)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	dek, err := safe.Unwrap(kek, volume.Owner(uuid))
	if err != nil {
		return nil, errs.New(errs.Corrupt, "%w", err)
	}
	return dek, nil
}

// inspect reads the header and its key safes.
func inspect(file blockdev.Device) (volume.Info, Safes, error) {
	info, err := volume.Inspect(file)
	if err != nil {
		return volume.Info{}, Safes{}, err
	}
	safes, err := SafesOf(info)
	return info, safes, err
}

// Inspect tells what the volume in file name is, without a key.
func Inspect(folder Folder, name string) (volume.Info, Safes, error) {
	file, err := folder.Open(name)
	if err != nil {
		return volume.Info{}, Safes{}, err
	}
	info, safes, err := inspect(file)
	return info, safes, errors.Join(err, file.Close())
}

// copyTo copies src to dst, reads both again and compares, and closes dst, which
// is then durable.
func copyTo(ctx context.Context, dst, src blockdev.Device, opts volume.CopyOptions, progress Progress) error {
	opts.Verify, opts.Progress = true, progress
	return errors.Join(volume.Copy(ctx, dst, src, opts), dst.Close())
}
