package localvolume

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/durable"
	"strongroom/internal/errs"
)

// newSuffix is added to a volume's name for the one that will replace it.
const newSuffix = ".new"

// RekeyOptions say how a volume gets another key.
type RekeyOptions struct {
	Storage    // with a detached header, only in place
	KeyFile    string
	NewKeyFile string
	// InPlace rewrites the volume where it is, without room for a second one; it
	// may be a block device.
	InPlace bool
	// Rate bounds what is rewritten in place, in bytes a second; 0: any number.
	Rate int64
	// Progress, if not nil, is told the bytes done and the bytes to do.
	Progress func(done, total int64)
}

// Rekey writes the volume anew under another DEK: to a new file beside it, which
// is verified and then takes its place. At every instant the file's name leads
// to the old volume or to the new one, whole; what an interruption may leave
// is the unfinished new file, which the next Rekey refuses to overwrite.
//
// In place, an interruption leaves a volume that needs both keys, and the next
// Rekey with them, in place too, goes on; if no data were moved yet it leaves
// the volume as it was.
//
// UUID, label, sector size and discard setting are kept, passphrases are not. A
// volume with a key safe is refused: it belongs to a VM, whose vm.json and key
// provider have a say.
func Rekey(ctx context.Context, opts RekeyOptions) error {
	if opts.Header != "" && !opts.InPlace {
		return errs.New(errs.Invalid, "a volume with a detached header is rekeyed in place only").WithHint("add --in-place")
	}
	file, err := filepath.EvalSymlinks(opts.File) // or the link would be replaced
	if err != nil {
		return explain(err)
	}
	oldKey, err := readKey(opts.KeyFile)
	if err != nil {
		return err
	}
	defer oldKey.Close()
	newKey, err := readKey(opts.NewKeyFile)
	if err != nil {
		return err
	}
	defer newKey.Close()
	if oldKey.Equal(newKey) {
		return errs.New(errs.Invalid, "the new key is the old one")
	}
	if opts.InPlace {
		return rekeyInPlace(ctx, opts.Storage, oldKey, newKey, volume.RekeyOptions{Rate: volume.NewRate(opts.Rate), Progress: opts.Progress})
	}
	stat, err := os.Stat(file)
	if err != nil {
		return explain(err)
	}
	if !stat.Mode().IsRegular() {
		return errs.New(errs.Invalid, "%s is not a regular file, and cannot be replaced by another", file)
	}
	old, err := openWith(Storage{File: file}, oldKey, blockdev.FileOptions{}) // locks writers and readers out, although it is only read
	if err != nil {
		return err
	}
	defer old.Close()
	info, err := old.Inspect()
	if err != nil {
		return explain(err)
	}
	if err := ofNoVM(info); err != nil {
		return err
	}
	return replace(ctx, file, stat, old, newKey, volume.FormatOptions{
		Size: info.Size, SectorSize: info.SectorSize, DataOffset: info.DataOffset,
		UUID: info.UUID, Label: info.Label, AllowDiscards: info.AllowDiscards, Thin: info.Thin, DEK: newKey,
	}, opts.Progress)
}

// ofNoVM refuses a volume with a key safe.
func ofNoVM(info volume.Info) error {
	if len(info.Safes) == 0 {
		return nil
	}
	return errs.New(errs.InvalidState, "the volume has a key safe under provider %s: it is a disk of a VM", info.Safes[0].KEK.Provider).
		WithHint("strongroom vm rekey NAME --deep")
}

// replace writes the contents of old to a new volume and puts that in the place
// of file.
func replace(ctx context.Context, file string, stat fs.FileInfo, old *volume.Volume, dek *keymem.Key, opts volume.FormatOptions, progress func(done, total int64)) (err error) {
	name := file + newSuffix
	dev, err := create(name, "if it is left from a rekey that was interrupted: rm "+name)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(name)
		}
	}()
	if err := errors.Join(volume.Format(dev, opts), keepOwner(name, stat)); err != nil {
		dev.Close()
		return explain(err)
	}
	renewed, err := volume.Open(dev, dek, volume.Options{})
	if err != nil {
		dev.Close()
		return explain(err)
	}
	defer renewed.Close() // holds the lock until the name is in place
	if err := volume.Copy(ctx, renewed, old, volume.CopyOptions{KeepHoles: true, Verify: true, Progress: progress}); err != nil {
		return explain(err)
	}
	if err := os.Rename(name, file); err != nil {
		return explain(err)
	}
	return durable.SyncDir(filepath.Dir(file))
}

// DecryptOptions say where a volume's data are written.
type DecryptOptions struct {
	Storage
	KeyFile string
	Out     string // must not exist
	// Progress, if not nil, is told the bytes done and the bytes to do.
	Progress func(done, total int64)
}

// Decrypt writes the plain data of the volume to a new file, mode 0600, and
// verifies them. What was never written is a hole there.
func Decrypt(ctx context.Context, opts DecryptOptions) (err error) {
	v, err := open(opts.Storage, opts.KeyFile, blockdev.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer v.Close()
	out, err := create(opts.Out, "choose another --out")
	if err != nil {
		return err
	}
	defer func() {
		err = explain(errors.Join(err, out.Close()))
		if err != nil {
			os.Remove(opts.Out)
		}
	}()
	if err := out.Resize(v.Size()); err != nil {
		return err
	}
	return volume.Copy(ctx, out, v, volume.CopyOptions{KeepHoles: true, Verify: true, Progress: opts.Progress})
}

// FillOptions say which volume is filled.
type FillOptions struct {
	Storage
	KeyFile string
	// Progress, if not nil, is told the bytes done and the bytes to do.
	Progress func(done, total int64)
}

// Fill writes zeros to every sector of the volume that was never written, so
// that dm-crypt reads them too: see [volume.Volume.Fill]. Interrupted, it may be
// called again; nothing that the volume reads as changes.
func Fill(ctx context.Context, opts FillOptions) error {
	v, err := open(opts.Storage, opts.KeyFile, blockdev.FileOptions{})
	if err != nil {
		return err
	}
	return explain(errors.Join(v.Fill(ctx, opts.Progress), v.Close()))
}

// create makes a new file; hint says what to do if there is one.
func create(name, hint string) (*blockdev.File, error) {
	dev, err := blockdev.OpenFile(name, blockdev.FileOptions{Create: true})
	if errors.Is(err, fs.ErrExist) {
		return nil, errs.New(errs.Exists, "%w", err).WithHint("%s", hint)
	}
	return dev, explain(err)
}

// keepOwner gives the file at name the owner and the mode of another.
func keepOwner(name string, like fs.FileInfo) error {
	err := os.Chmod(name, like.Mode().Perm())
	if sys, ok := like.Sys().(*syscall.Stat_t); ok {
		err = errors.Join(err, os.Chown(name, int(sys.Uid), int(sys.Gid)))
	}
	return err
}
