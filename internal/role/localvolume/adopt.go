package localvolume

import (
	"context"
	"errors"
	"os"

	"github.com/google/uuid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keyfile"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// AdoptOptions say which LUKS volume of another program becomes a volume.
type AdoptOptions struct {
	Storage
	Out        string      // the new volume; must not exist
	KeyFile    string      // where its key is written; must not exist
	Passphrase *keymem.Key // of File, or what its key file holds; it stays the caller's
	// Progress, if not nil, is told the bytes done and the bytes to do.
	Progress func(done, total int64)
}

// Adopt makes a volume of a LUKS1 or LUKS2 volume of another program: its data as
// they are encrypted, and its key in a key file. File is only read; its
// passphrases are not taken along, but whoever had one can have the key.
func Adopt(ctx context.Context, opts AdoptOptions) (volume.Info, error) {
	if _, err := os.Lstat(opts.KeyFile); err == nil { // the copy may take hours
		return volume.Info{}, errs.New(errs.Exists, "there is a file %s", opts.KeyFile).WithHint("choose another --key-file")
	}
	src, err := blockdev.OpenFile(opts.File, blockdev.FileOptions{ReadOnly: true})
	if err != nil {
		return volume.Info{}, explain(err)
	}
	defer src.Close()
	foreign, header, err := readForeign(src, opts.Header)
	if err != nil {
		return volume.Info{}, explainForeign(err)
	}
	defer header.Close()
	dek, err := foreign.Unlock(ctx, header, opts.Passphrase)
	if err != nil {
		return volume.Info{}, explainForeign(err)
	}
	defer dek.Close()
	out, err := create(opts.Out, "choose another --out")
	if err != nil {
		return volume.Info{}, err
	}
	info, err := adopt(ctx, out, src, foreign.Segment, dek, opts.Progress)
	err = errors.Join(err, out.Close())
	if err == nil {
		err = keyfile.Write(opts.KeyFile, dek) // last: what fails leaves no key
	}
	if err != nil {
		os.Remove(opts.Out)
		return volume.Info{}, explain(err)
	}
	return info, nil
}

// readForeign reads the header of the LUKS volume whose data are on src, from src or
// from the file headerName, and returns where it is, which the caller closes.
func readForeign(src blockdev.Device, headerName string) (*luks.Foreign, blockdev.Device, error) {
	if headerName == "" {
		foreign, err := luks.ReadForeign(src, src.Size())
		return foreign, src, err
	}
	header, err := blockdev.OpenFile(headerName, blockdev.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, nil, err
	}
	foreign, err := luks.ReadForeignDetached(header, header.Size(), src.Size())
	if err != nil {
		return nil, nil, errors.Join(err, header.Close())
	}
	return foreign, header, nil
}

// adopt makes out, which is empty, a volume of the data in that segment of src. It
// is durable then.
func adopt(ctx context.Context, out blockdev.Resizer, src blockdev.Device, segment luks.Segment, dek *keymem.Key, progress func(done, total int64)) (volume.Info, error) {
	size, err := segment.Length(src.Size())
	if err != nil {
		return volume.Info{}, err
	}
	err = volume.Format(out, volume.FormatOptions{Size: size, SectorSize: segment.SectorSize, UUID: uuid.NewString(), DEK: dek, AllowDiscards: true})
	if err != nil {
		return volume.Info{}, err
	}
	if err := volume.Adopt(ctx, out, src, segment, progress); err != nil {
		return volume.Info{}, err
	}
	return volume.Inspect(out)
}

// explainForeign tells what is wrong with a LUKS volume of another program.
func explainForeign(err error) error {
	switch {
	case errors.Is(err, luks.ErrWrongKey), errors.Is(err, luks.ErrNoPassphrase):
		return errs.New(errs.Denied, "the passphrase opens no keyslot").WithHint("try it: cryptsetup open --test-passphrase FILE")
	case errors.Is(err, luks.ErrDetached):
		return explain(err)
	case errors.Is(err, luks.ErrReencrypting), errors.Is(err, luks.ErrEncrypting):
		return errs.New(errs.Invalid, "%w", err).WithHint("cryptsetup reencrypt --resume-only FILE")
	case errors.Is(err, luks.ErrUnsupported):
		return errs.New(errs.Invalid, "%w", err).WithHint("cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512 FILE")
	}
	return explain(err)
}
