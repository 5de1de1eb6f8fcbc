package recrypt

import (
	"context"
	"errors"

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
