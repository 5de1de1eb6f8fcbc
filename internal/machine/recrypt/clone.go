package recrypt

import (
	"context"
	"errors"

	"github.com/google/uuid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
)

// Clone makes in folder to a disk of its own of the encrypted one in file name of
// folder from: with another UUID, and with the same DEK in a key safe under the
// KEK named by ref. Where the storage can share blocks it takes a moment and no
// space, else the ciphertext is copied and compared, holes left out.
//
// When it returns nil, the new disk is complete and durable under the same name;
// after an error nothing of that name is there. The original is only read.
// It returns an error wrapping [volume.ErrRekeying] if a deep rekey of the
// original is under way.
func Clone(ctx context.Context, to, from Folder, name string, ref keysafe.Ref, keks KEKs, progress Progress) error {
	return withFile(from, name, func(src blockdev.Resizer) error {
		id := uuid.NewString()
		safe, err := safeForClone(ctx, src, id, ref, keks)
		if err != nil {
			return err
		}
		err = clone(ctx, to, src, name, progress, func(dst blockdev.Device) error {
			return volume.Reidentify(dst, id, safe)
		})
		return finish(ctx, to, name, err, keks)
	})
}

// safeForClone wraps the DEK of the volume on src for the volume with that UUID.
func safeForClone(ctx context.Context, src blockdev.Device, id string, ref keysafe.Ref, keks KEKs) (*keysafe.Safe, error) {
	dek, next, safes, err := UnwrapDEKs(ctx, src, keks)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	defer next.Close()
	if safes.Next != nil {
		return nil, volume.ErrRekeying
	}
	kek, err := keks(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	return keysafe.Wrap(kek, dek, ref, volume.Owner(id), 1)
}

// ClonePlain is [Clone] for a disk that is not encrypted.
func ClonePlain(ctx context.Context, to, from Folder, name string, progress Progress) error {
	return withFile(from, name, func(src blockdev.Resizer) error {
		err := clone(ctx, to, src, name, progress, func(blockdev.Device) error { return nil })
		if err != nil {
			return errors.Join(err, to.Remove(name+Unfinished))
		}
		return Finish(to, name)
	})
}

// CloneRecrypt is [Clone] with a DEK of its own: the data are written anew under
// it and compared. It works also while a deep rekey of the original is under way.
// Passphrases of the original do not open the new disk.
func CloneRecrypt(ctx context.Context, to, from Folder, name string, ref keysafe.Ref, keks KEKs, progress Progress) error {
	src, _, err := OpenRekeying(ctx, from, name, keks)
	if err != nil {
		return err
	}
	return errors.Join(cloneRecrypt(ctx, to, src, name, ref, keks, progress), src.Close())
}

func cloneRecrypt(ctx context.Context, to Folder, src *volume.Volume, name string, ref keysafe.Ref, keks KEKs, progress Progress) error {
	info, err := src.Inspect()
	if err != nil {
		return err
	}
	spec := freshSpec(info.Size, ref)
	spec.sectorSize, spec.label, spec.allowDiscards, spec.thin = info.SectorSize, info.Label, info.AllowDiscards, info.Thin
	vol, err := newVolume(ctx, to, name, spec, keks)
	if err != nil {
		return err
	}
	return finish(ctx, to, name, copyTo(ctx, vol, src, volume.CopyOptions{KeepHoles: true}, progress), keks)
}

// clone makes file name+[Unfinished] with the contents of src, has them changed,
// and closes it when it is durable.
func clone(ctx context.Context, to Folder, src blockdev.Resizer, name string, progress Progress, change func(blockdev.Device) error) error {
	if err := to.Remove(name + Unfinished); err != nil {
		return err
	}
	dst, err := to.Create(name + Unfinished)
	if err != nil {
		return err
	}
	err = cloneContents(ctx, dst, src, progress)
	if err == nil {
		err = change(dst)
	}
	if err == nil {
		err = dst.Flush()
	}
	return errors.Join(err, dst.Close())
}

// cloneContents shares the blocks of src, or copies what is not a hole.
func cloneContents(ctx context.Context, dst, src blockdev.Resizer, progress Progress) error {
	if cloner, ok := dst.(blockdev.Cloner); ok {
		if err := cloner.CloneFrom(src); !errors.Is(err, blockdev.ErrNoClone) {
			return err
		}
	}
	if err := dst.Resize(src.Size()); err != nil {
		return err
	}
	return volume.Copy(ctx, dst, src, volume.CopyOptions{KeepHoles: true, Verify: true, Progress: progress})
}

// withFile runs f with a file of the folder open, for exclusive use.
func withFile(folder Folder, name string, f func(blockdev.Resizer) error) error {
	file, err := folder.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f(file), file.Close())
}
