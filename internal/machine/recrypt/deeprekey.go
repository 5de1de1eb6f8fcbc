package recrypt

import (
	"context"
	"errors"

	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// DeepRekey gives the disk in file name a new DEK, under the KEK named by ref,
// and rewrites its data in place, no faster than rate, which may change meanwhile.
// It goes on with a deep rekey that is under way, whoever began it, and then has
// its new key under ref too.
//
// Interrupted or failed, it leaves a disk that needs both KEKs, unless no data
// had been moved yet; the next call goes on.
func DeepRekey(ctx context.Context, folder Folder, name string, ref keysafe.Ref, keks KEKs, rate *volume.Rate, progress Progress) error {
	vol, safes, err := OpenRekeying(ctx, folder, name, keks)
	if err != nil {
		return err
	}
	err = deepRekey(ctx, vol, safes, ref, keks, rate, progress)
	if err := errors.Join(err, vol.Close()); err != nil {
		return err
	}
	return probe(ctx, folder, name, keks)
}

func deepRekey(ctx context.Context, vol *volume.Volume, safes Safes, ref keysafe.Ref, keks KEKs, rate *volume.Rate, progress Progress) error {
	dek, safe, err := NextDEK(ctx, vol.UUID(), safes, ref, keks)
	if err != nil {
		return err
	}
	defer dek.Close()
	err = vol.Rekey(ctx, volume.RekeyOptions{NewDEK: dek, NewSafe: safe, Rate: rate, Progress: progress})
	if err == nil {
		return nil
	}
	// A rekey of which nothing was moved must not keep the disk from other things.
	if undo := vol.CancelRekey(); !errors.Is(undo, volume.ErrRekeying) {
		err = errors.Join(err, undo)
	}
	return err
}

// NextDEK returns what a deep rekey of the volume with that UUID and those key
// safes needs to lead to a DEK under the KEK named by ref: a new DEK, which the
// caller closes, or nil if one is under way, or was finished; and the new key safe,
// or nil if that is in the header.
func NextDEK(ctx context.Context, uuid string, safes Safes, ref keysafe.Ref, keks KEKs) (*keymem.Key, *keysafe.Safe, error) {
	switch {
	case safes.Next != nil:
		// Also if it is the one in the header: perhaps that is in one copy only.
		safe, err := Rewrap(ctx, safes.Next, ref, keks)
		return nil, safe, err
	case safes.Current.KEK == ref:
		return nil, nil, nil // a deep rekey has a KEK of its own
	}
	kek, err := keks(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	defer kek.Close()
	dek, err := keymem.Random(keysafe.DEKSize)
	if err != nil {
		return nil, nil, err
	}
	safe, err := keysafe.Wrap(kek, dek, ref, volume.Owner(uuid), safes.Current.Generation+1)
	if err != nil {
		return nil, nil, errors.Join(err, dek.Close())
	}
	return dek, safe, nil
}
