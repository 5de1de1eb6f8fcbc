package localvolume

import (
	"context"
	"errors"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/errs"
)

// EncryptOptions say which plain disk is encrypted where it is.
type EncryptOptions struct {
	File    string
	KeyFile string
	// Rate bounds what is encrypted, in bytes a second; 0: any number.
	Rate int64
	// Progress, if not nil, is told the bytes done and the bytes to do.
	Progress func(done, total int64)
}

// EncryptInPlace makes a plain disk in a regular file a volume, without room for a
// second copy (docs/spec/in-place-encryption.md). An interruption leaves a file
// that nothing opens until the next EncryptInPlace with the same key has gone on
// to the end; if no data were encrypted yet it leaves the disk as it was. A volume
// that the key opens is left as it is.
func EncryptInPlace(ctx context.Context, opts EncryptOptions) (_ volume.Info, err error) {
	dek, err := readKey(opts.KeyFile)
	if err != nil {
		return volume.Info{}, err
	}
	defer dek.Close()
	dev, err := blockdev.OpenFile(opts.File, blockdev.FileOptions{})
	if err != nil {
		return volume.Info{}, explain(err)
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	state, err := volume.InspectEncryption(dev, 0)
	if err != nil {
		return volume.Info{}, explain(err)
	}
	if state != nil && state.Safe != nil {
		return volume.Info{}, errs.New(errs.InvalidState, "it has a key safe under provider %s: it is a disk of a VM", state.Safe.KEK.Provider).
			WithHint("strongroom vm encrypt NAME --in-place")
	}
	err = volume.EncryptInPlace(ctx, dev, volume.EncryptOptions{
		DEK: dek, AllowDiscards: true, Rate: volume.NewRate(opts.Rate), Progress: opts.Progress,
	})
	if err == nil {
		info, err := volume.Inspect(dev)
		return info, explain(err)
	}
	if errors.Is(err, volume.ErrEncrypted) || errors.Is(err, volume.ErrWrongKey) {
		return volume.Info{}, explain(err) // it is not this call's to undo
	}
	undo := volume.CancelEncryption(dev, 0)
	if errors.Is(undo, volume.ErrEncrypting) {
		return volume.Info{}, errs.New(errs.KindOf(explain(err)), "part of the data is encrypted already: %w", err).
			WithHint("repeat the command with the same key; it goes on")
	}
	return volume.Info{}, explain(errors.Join(err, undo))
}
