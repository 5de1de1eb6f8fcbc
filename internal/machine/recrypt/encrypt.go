package recrypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"

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
	if done {
		if done, err = encrypted(ctx, folder, src, name, ref, keks); done || err != nil {
			return err
		}
	}
	vol, err := newVolume(ctx, folder, name, freshSpec(src.Size(), ref), keks)
	if err != nil {
		return err
	}
	return finish(ctx, folder, name, copyTo(ctx, vol, src, volume.CopyOptions{}, progress), keks)
}

// encrypted reports whether file name is the result of an earlier call that was
// interrupted before vm.json named it. If the VM ran meanwhile, the result is
// stale and will be replaced: its KEK, which is this call's, tells whose it is.
// A file with another KEK is somebody's.
func encrypted(ctx context.Context, folder Folder, src blockdev.Device, name string, ref keysafe.Ref, keks KEKs) (bool, error) {
	switch _, safes, err := Inspect(folder, name); {
	case err != nil:
		return false, fmt.Errorf("%w: %w", inTheWay(name), err)
	case safes.Current.KEK != ref || safes.Next != nil:
		return false, inTheWay(name)
	}
	vol, _, err := OpenVolume(ctx, folder, name, keks)
	if err != nil {
		return false, err
	}
	same, err := equal(ctx, vol, src)
	if err := errors.Join(err, vol.Close()); err != nil {
		return false, err
	}
	return same, folder.Sync()
}

// finish gives a volume that was written without error its name, after a last
// look that it opens as a power-on would open it. After an error it removes
// what was written.
func finish(ctx context.Context, folder Folder, name string, err error, keks KEKs) error {
	if err == nil {
		err = probe(ctx, folder, name+Unfinished, keks)
	}
	if err != nil {
		return errors.Join(err, folder.Remove(name+Unfinished))
	}
	return Finish(folder, name)
}

// probe opens a volume by the key safe in its header and closes it again.
func probe(ctx context.Context, folder Folder, name string, keks KEKs) error {
	vol, _, err := OpenVolume(ctx, folder, name, keks)
	if err != nil {
		return err
	}
	return vol.Close()
}

func inTheWay(name string) error {
	return errs.New(errs.Exists, "file %s is in the way", name).
		WithHint("move it out of the VM folder if it is not wanted")
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
		// A plain disk does not tell which call made it: only its content can.
		same, err := sameContent(ctx, folder, name, src)
		if err != nil {
			return err
		}
		if !same {
			return inTheWay(name)
		}
		return folder.Sync()
	}
	dst, err := newPlain(folder, name, src.Size())
	if err != nil {
		return err
	}
	// Sectors never written to the volume stay holes of the file.
	if err := copyTo(ctx, dst, src, volume.CopyOptions{KeepHoles: true}, progress); err != nil {
		return errors.Join(err, folder.Remove(name+Unfinished))
	}
	return Finish(folder, name)
}

// newPlain makes an empty plain disk in a file of that name plus [Unfinished].
func newPlain(folder Folder, name string, size int64) (blockdev.Device, error) {
	if err := folder.Remove(name + Unfinished); err != nil {
		return nil, err
	}
	file, err := folder.Create(name + Unfinished)
	if err != nil {
		return nil, err
	}
	if err := file.Resize(size); err != nil {
		return nil, errors.Join(err, file.Close(), folder.Remove(name+Unfinished))
	}
	return file, nil
}

// sameContent reports whether the plain disk in file name holds what src holds.
func sameContent(ctx context.Context, folder Folder, name string, src blockdev.Device) (bool, error) {
	plain, err := folder.Open(name)
	if err != nil {
		return false, err
	}
	same, err := equal(ctx, plain, src)
	return same, errors.Join(err, plain.Close())
}

func equal(ctx context.Context, a, b blockdev.Device) (bool, error) {
	if a.Size() != b.Size() {
		return false, nil
	}
	step := min(1<<20, a.Size())
	bufA, bufB := make([]byte, step), make([]byte, step)
	for off := int64(0); off < a.Size(); off += step {
		n := min(step, a.Size()-off)
		if _, err := a.ReadAt(bufA[:n], off); err != nil {
			return false, err
		}
		if _, err := b.ReadAt(bufB[:n], off); err != nil {
			return false, err
		}
		if !bytes.Equal(bufA[:n], bufB[:n]) {
			return false, nil
		}
		if err := context.Cause(ctx); err != nil {
			return false, err
		}
	}
	return true, nil
}
