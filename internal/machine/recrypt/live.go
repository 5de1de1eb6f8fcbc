package recrypt

import (
	"context"
	"errors"
	"fmt"

	"strongroom/internal/crypto/keysafe"
)

// NewTarget makes what a disk in use of size bytes is moved to, in a file of that
// name plus [Unfinished], durable and closed: an empty volume with a new DEK under
// the KEK named by ref, or an empty plain disk if ref is zero. Whoever has filled
// it calls [Finish].
func NewTarget(ctx context.Context, folder Folder, name string, size int64, ref keysafe.Ref, keks KEKs) error {
	if err := free(folder, name, ref); err != nil {
		return err
	}
	if ref.IsZero() {
		file, err := newPlain(folder, name, size)
		if err != nil {
			return err
		}
		if err := errors.Join(file.Flush(), file.Close()); err != nil {
			return errors.Join(err, folder.Remove(name+Unfinished))
		}
		return nil
	}
	vol, err := newVolume(ctx, folder, name, freshSpec(size, ref), keks)
	if err != nil {
		return err
	}
	return vol.Close()
}

// free makes sure that there is no file of that name. What an earlier call of the
// same operation left, before vm.json named it, is out of date and removed: its
// KEK, which is this operation's, tells whose it is.
func free(folder Folder, name string, ref keysafe.Ref) error {
	there, err := folder.Exists(name)
	if err != nil || !there {
		return err
	}
	if ref.IsZero() {
		return inTheWay(name)
	}
	switch _, safes, err := Inspect(folder, name); {
	case err != nil:
		return fmt.Errorf("%w: %w", inTheWay(name), err)
	case safes.Current.KEK != ref || safes.Next != nil:
		return inTheWay(name)
	}
	return folder.Remove(name)
}
