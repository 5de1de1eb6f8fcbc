package recrypt

import (
	"context"
	"errors"

	"strongroom/internal/block/blockdev"
)

// Copy makes file to of the folder a copy of the encrypted disk in file from, which
// is only read: the same disk, with its UUID and key safe, at another time. Where
// the storage can share blocks it takes a moment and no space, else the ciphertext
// is copied and compared, holes left out.
//
// When it returns nil, the copy is complete and durable, replaces what had its
// name, and was opened by its key safe; after an error there is what was there
// before. It returns an error wrapping [volume.ErrRekeying] if a deep rekey of the
// disk is under way.
func Copy(ctx context.Context, folder Folder, to, from string, keks KEKs, progress Progress) error {
	return copyFile(ctx, folder, to, from, progress, func() error {
		return probe(ctx, folder, to+Unfinished, keks)
	})
}

// CopyPlain is [Copy] for a disk that is not encrypted.
func CopyPlain(ctx context.Context, folder Folder, to, from string, progress Progress) error {
	return copyFile(ctx, folder, to, from, progress, func() error { return nil })
}

func copyFile(ctx context.Context, folder Folder, to, from string, progress Progress, verify func() error) error {
	err := withFile(folder, from, func(src blockdev.Resizer) error {
		return clone(ctx, folder, src, to, progress, func(blockdev.Device) error { return nil })
	})
	if err == nil {
		err = verify()
	}
	if err != nil {
		return errors.Join(err, folder.Remove(to+Unfinished))
	}
	return Finish(folder, to)
}
