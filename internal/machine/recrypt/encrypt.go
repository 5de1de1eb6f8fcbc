package recrypt

import (
	"context"
	"errors"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// Encrypt writes the plain disk in file plain as an encrypted volume to file
// encrypted, with a new DEK under the KEK named by ref. When it returns nil,
// the volume is complete, verified and durable under its name, and plain is
// untouched: the caller makes vm.json name the new file, then removes the old.
func Encrypt(ctx context.Context, folder Folder, plain, encrypted string, ref keysafe.Ref, keks KEKs, progress Progress) error {
	src, err := folder.Open(plain)
	if err != nil {
		return err
	}
	return errors.Join(encrypt(ctx, folder, src, encrypted, ref, keks, progress), src.Close())
}

func encrypt(ctx context.Context, folder Folder, src blockdev.Device, name string, ref keysafe.Ref, keks KEKs, progress Progress) error {
	done, err := folder.Exists(name)
	if err != nil {
		return err
	}
	reopen := func() (blockdev.Device, error) {
		vol, _, err := OpenVolume(ctx, folder, name, keks)
		return vol, err
	}
	if done {
		// Made by an earlier call that was interrupted before vm.json named it,
		// or somebody's file: only the content can tell.
		_, safe, err := Inspect(folder, name)
		if err != nil || safe.KEK != ref {
			return errs.New(errs.Exists, "file %s is in the way", name).
				WithHint("move it out of the VM folder if it is not wanted")
		}
		return verify(ctx, src, reopen, progress)
	}
	vol, err := newVolume(ctx, folder, name, freshSpec(src.Size(), ref), keks)
	if err != nil {
		return err
	}
	reopenNew := func() (blockdev.Device, error) {
		vol, _, err := OpenVolume(ctx, folder, name+Unfinished, keks)
		return vol, err
	}
	if err := copyVerified(ctx, vol, src, volume.CopyOptions{}, reopenNew, progress); err != nil {
		return errors.Join(err, folder.Remove(name+Unfinished))
	}
	return Finish(folder, name)
}

// Decrypt writes the encrypted disk in file encrypted as a plain one to file
// plain. When it returns nil, the plain disk is complete, verified and durable,
// and the encrypted one untouched.
func Decrypt(ctx context.Context, folder Folder, encrypted, plain string, keks KEKs, progress Progress) error {
	src, _, err := OpenVolume(ctx, folder, encrypted, keks)
	if err != nil {
		return err
	}
	return errors.Join(decrypt(ctx, folder, src, plain, progress), src.Close())
}

func decrypt(ctx context.Context, folder Folder, src blockdev.Device, name string, progress Progress) error {
	done, err := folder.Exists(name)
	if err != nil {
		return err
	}
	if done {
		err := verify(ctx, src, func() (blockdev.Device, error) { return folder.Open(name) }, progress)
		if errors.Is(err, volume.ErrDiffers) {
			return errs.New(errs.Exists, "file %s is in the way", name).
				WithHint("move it out of the VM folder if it is not wanted")
		}
		return err
	}
	if err := folder.Remove(name + Unfinished); err != nil {
		return err
	}
	dst, err := folder.Create(name + Unfinished)
	if err != nil {
		return err
	}
	if err := dst.Resize(src.Size()); err != nil {
		return errors.Join(err, dst.Close(), folder.Remove(name+Unfinished))
	}
	reopen := func() (blockdev.Device, error) { return folder.Open(name + Unfinished) }
	if err := copyVerified(ctx, dst, src, volume.CopyOptions{SparseZeroes: true}, reopen, progress); err != nil {
		return errors.Join(err, folder.Remove(name+Unfinished))
	}
	return Finish(folder, name)
}

func verify(ctx context.Context, src blockdev.Device, reopen func() (blockdev.Device, error), progress Progress) error {
	written, err := reopen()
	if err != nil {
		return err
	}
	return errors.Join(volume.Compare(ctx, written, src, progress), written.Close())
}
