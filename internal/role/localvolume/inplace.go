package localvolume

import (
	"context"
	"errors"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// rekeyInPlace rekeys a volume where it is, or goes on with a rekey that was
// interrupted (docs/spec/online-rekey.md).
func rekeyInPlace(ctx context.Context, s Storage, oldKey, newKey *keymem.Key, opts volume.RekeyOptions) (err error) {
	dev, err := s.open(blockdev.FileOptions{})
	if err != nil {
		return err
	}
	v, left, err := openRekeying(dev, oldKey, newKey)
	opts.NewDEK = left
	if err != nil {
		return explain(errors.Join(err, dev.Close()))
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	info, err := v.Inspect()
	if err != nil {
		return explain(err)
	}
	if err := ofNoVM(info); err != nil {
		return err
	}
	err = v.Rekey(ctx, opts)
	if err == nil {
		return nil
	}
	undo := v.CancelRekey()
	if errors.Is(undo, volume.ErrRekeying) {
		return errs.New(errs.KindOf(explain(err)), "part of the data is under the new key already: %w", err).
			WithHint("repeat the command with the same keys; it goes on")
	}
	return explain(errors.Join(err, undo))
}

// openRekeying opens a volume that is under the old key, or between it and the
// new one, or under the new one. It returns the key that it is still to be given,
// nil in the last case, where an interruption may have left something to tidy.
func openRekeying(dev blockdev.Device, oldKey, newKey *keymem.Key) (_ *volume.Volume, left *keymem.Key, err error) {
	info, err := volume.Inspect(dev)
	if err != nil {
		return nil, nil, err
	}
	if info.Rekey != nil {
		v, err := volume.Open(dev, oldKey, volume.Options{NextDEK: newKey})
		return v, newKey, err
	}
	if v, err := volume.Open(dev, newKey, volume.Options{}); !errors.Is(err, volume.ErrWrongKey) {
		return v, nil, err
	}
	v, err := volume.Open(dev, oldKey, volume.Options{})
	return v, newKey, err
}
