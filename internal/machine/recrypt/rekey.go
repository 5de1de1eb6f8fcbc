package recrypt

import (
	"context"
	"errors"

	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// Rewrap returns a key safe for the DEK in safe under the KEK named by ref: the
// part of a shallow rekey that needs keys. The new safe was verified. It
// returns safe itself if it is under that KEK already.
func Rewrap(ctx context.Context, safe *keysafe.Safe, ref keysafe.Ref, keks KEKs) (*keysafe.Safe, error) {
	if safe.KEK == ref {
		return safe, nil
	}
	oldKEK, err := keks(ctx, safe.KEK)
	if err != nil {
		return nil, err
	}
	defer oldKEK.Close()
	newKEK, err := keks(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer newKEK.Close()
	next, err := safe.Rewrap(oldKEK, newKEK, ref)
	if err != nil {
		return nil, errs.New(errs.Corrupt, "%w", err)
	}
	return next, nil
}

// ShallowRekey wraps the DEK of the disk in file name under the KEK named by
// ref. When it returns nil, both copies of the header hold the new key safe,
// durably; when it fails, the header opens with the old KEK or the new one.
func ShallowRekey(ctx context.Context, folder Folder, name string, ref keysafe.Ref, keks KEKs) error {
	// The DEK is needed, so that a stale key safe is found out before the old
	// one is given up.
	vol, safe, err := OpenVolume(ctx, folder, name, keks)
	if err != nil {
		return err
	}
	next, err := Rewrap(ctx, safe, ref, keks)
	if err == nil {
		// Also if it is in place: after an interrupted call it may be in one copy
		// of the header only, or not durable.
		err = vol.ReplaceSafe(next)
	}
	return errors.Join(err, vol.Close())
}

// Fill makes the disk in file name safe for dm-crypt: see [volume.Volume.Fill].
// It may be called again after it was interrupted.
func Fill(ctx context.Context, folder Folder, name string, keks KEKs, progress Progress) error {
	vol, _, err := OpenVolume(ctx, folder, name, keks)
	if err != nil {
		return err
	}
	return errors.Join(vol.Fill(ctx, progress), vol.Close())
}

// DeepRekey gives the disk in file name a new DEK, under the KEK named by ref,
// and rewrites its data. The name keeps telling the old volume until the new
// one is complete, verified and durable. The LUKS UUID stays, so that the disk
// keeps its identity.
func DeepRekey(ctx context.Context, folder Folder, name string, ref keysafe.Ref, keks KEKs, progress Progress) error {
	src, safe, err := OpenVolume(ctx, folder, name, keks)
	if err != nil {
		return err
	}
	if safe.KEK == ref {
		// Done by an earlier call: a deep rekey has a KEK of its own. That call may
		// have failed before the new name was durable.
		return errors.Join(folder.Sync(), src.Close())
	}
	return errors.Join(deepRekey(ctx, folder, src, name, safe, ref, keks, progress), src.Close())
}

func deepRekey(ctx context.Context, folder Folder, src *volume.Volume, name string, safe *keysafe.Safe, ref keysafe.Ref, keks KEKs, progress Progress) error {
	info, err := src.Inspect()
	if err != nil {
		return err
	}
	spec := volumeSpec{
		size: info.Size, sectorSize: info.SectorSize, uuid: info.UUID, label: info.Label, allowDiscards: info.AllowDiscards, thin: info.Thin,
		ref: ref, generation: safe.Generation + 1,
	}
	dst, err := newVolume(ctx, folder, name, spec, keks)
	if err != nil {
		return err
	}
	return finish(ctx, folder, name, copyTo(ctx, dst, src, volume.CopyOptions{KeepHoles: true}, progress), keks)
}
