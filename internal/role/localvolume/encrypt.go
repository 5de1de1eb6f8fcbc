package localvolume

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

// EncryptOptions say which plain disk is encrypted where it is.
type EncryptOptions struct {
	// Storage is the disk; a block device needs a Header, a file that Encrypt makes
	// if there is none.
	Storage
	KeyFile string
	// Rate bounds what is encrypted, in bytes a second; 0: any number.
	Rate int64
	// Progress, if not nil, is told the bytes done and the bytes to do.
	Progress func(done, total int64)
}

// EncryptInPlace makes a plain disk a volume, without room for a second copy
// (docs/spec/in-place-encryption.md): in a regular file, which grows by a header, or
// under a detached header. An interruption leaves a file
// that nothing opens until the next EncryptInPlace with the same key has gone on
// to the end; if no data were encrypted yet it leaves the disk as it was. A volume
// that the key opens is left as it is.
func EncryptInPlace(ctx context.Context, opts EncryptOptions) (_ volume.Info, err error) {
	dek, err := readKey(opts.KeyFile)
	if err != nil {
		return volume.Info{}, err
	}
	defer dek.Close()
	if opts.Header != "" {
		return encryptDetached(ctx, opts, dek)
	}
	if st, err := os.Stat(opts.File); err == nil && st.Mode()&os.ModeDevice != 0 {
		return volume.Info{}, errs.New(errs.Invalid, "it is a block device, which cannot grow by a header").
			WithHint("keep the header in a file: strongroom volume encrypt %s --header FILE --key-file %s", opts.File, opts.KeyFile)
	}
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
		return volume.Info{}, ofVM(state.Safe)
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
		return volume.Info{}, encryptedInPart(err)
	}
	return volume.Info{}, explain(errors.Join(err, undo))
}

func ofVM(safe *keysafe.Safe) error {
	return errs.New(errs.InvalidState, "it has a key safe under provider %s: it is a disk of a VM", safe.KEK.Provider).
		WithHint("strongroom vm encrypt NAME --in-place")
}

// encryptedInPart tells that err came too late to be undone.
func encryptedInPart(err error) error {
	return errs.New(errs.KindOf(explain(err)), "part of the data is encrypted already: %w", err).
		WithHint("repeat the command with the same key; it goes on")
}

// headerSize is how long a detached header is, in bytes: with room for some
// keyslots and a journal.
const headerSize = luks.DataOffsetDefault

// encryptDetached is EncryptInPlace under a detached header.
func encryptDetached(ctx context.Context, opts EncryptOptions, dek *keymem.Key) (_ volume.Info, err error) {
	data, err := blockdev.OpenFile(opts.File, blockdev.FileOptions{})
	if err != nil {
		return volume.Info{}, explain(err)
	}
	header, err := openHeader(opts.Header, data, dek)
	if err != nil {
		return volume.Info{}, explain(errors.Join(err, data.Close()))
	}
	dev := volume.NewDetached(header, data)
	defer func() { err = errors.Join(err, dev.Close()) }()
	info, err := volume.Inspect(dev)
	if err != nil {
		return volume.Info{}, explain(err)
	}
	if len(info.Safes) > 0 {
		return volume.Info{}, ofVM(info.Safes[0])
	}
	err = volume.EncryptDetached(ctx, dev, volume.EncryptOptions{DEK: dek, Rate: volume.NewRate(opts.Rate), Progress: opts.Progress})
	if err == nil {
		info, err := volume.Inspect(dev)
		return info, explain(err)
	}
	if errors.Is(err, volume.ErrEncrypted) || errors.Is(err, volume.ErrWrongKey) || errors.Is(err, volume.ErrOtherDevice) {
		return volume.Info{}, explain(err) // it is not this call's to undo
	}
	undo := volume.CancelDetached(dev, dek)
	if errors.Is(undo, volume.ErrEncrypting) {
		return volume.Info{}, encryptedInPart(err)
	}
	if undo == nil {
		undo = errors.Join(os.Remove(opts.Header), durable.SyncDir(filepath.Dir(opts.Header)))
	}
	return volume.Info{}, explain(errors.Join(err, undo))
}

// openHeader opens the detached header of the disk on data. If there is no such file
// it makes one that says that nothing of the disk is encrypted; it has its name when
// it is whole and durable.
func openHeader(name string, data blockdev.Device, dek *keymem.Key) (*blockdev.File, error) {
	st, err := os.Stat(name)
	if err == nil && !st.Mode().IsRegular() {
		return nil, errs.New(errs.Invalid, "the header %s is not a regular file", name)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return blockdev.OpenFile(name, blockdev.FileOptions{})
	}
	temporary := name + newSuffix
	header, err := create(temporary, "if it is left from an encryption that was interrupted: rm "+temporary)
	if err != nil {
		return nil, err
	}
	if err = header.Resize(headerSize); err == nil {
		err = volume.BeginEncryption(volume.NewDetached(header, data), volume.EncryptOptions{DEK: dek, AllowDiscards: true})
	}
	if err == nil {
		err = os.Rename(temporary, name)
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(name))
	}
	if err != nil {
		os.Remove(temporary)
		return nil, errors.Join(err, header.Close())
	}
	return header, nil
}
