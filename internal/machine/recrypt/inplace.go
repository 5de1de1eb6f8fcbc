package recrypt

import (
	"context"
	"errors"

	"github.com/google/uuid"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
)

// EncryptInPlace makes the plain disk of size bytes in file plain an encrypted
// volume in the same file, at most rate bytes a second (0: any number), with a new
// DEK under the KEK named by ref, and then gives the file the name encrypted. From
// before the call until after it vm.json says that this is under way. It goes on
// with an encryption that was interrupted, whoever began it, and then has its key
// under ref too.
//
// After an error undone says whether the file is the plain disk, as it was.
// Otherwise nothing opens it until a later call has succeeded.
func EncryptInPlace(ctx context.Context, folder Folder, plain, encrypted string, size int64, ref keysafe.Ref, keks KEKs, rate int64, progress Progress) (undone bool, err error) {
	// The vm.json that says what is under way may not be durable yet.
	if err := folder.Sync(); err != nil {
		return false, err
	}
	name, err := InPlaceFile(folder, plain, encrypted)
	if err != nil {
		return false, err
	}
	file, err := folder.Open(name)
	if err != nil {
		return false, err
	}
	err = encryptInPlace(ctx, file, size, ref, keks, rate, progress)
	if err != nil && name == plain {
		// An encryption that has encrypted nothing must not keep the disk from other
		// things.
		undo := volume.CancelEncryption(file, size)
		if undone = undo == nil; !errors.Is(undo, volume.ErrEncrypting) {
			err = errors.Join(err, undo)
		}
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return undone, err
	}
	if err := probe(ctx, folder, name, keks); err != nil {
		return false, err
	}
	if name == encrypted {
		return false, nil
	}
	return false, folder.Rename(plain, encrypted)
}

// InPlaceFile returns which of its two names the file has of a disk that is being
// encrypted in place: the one of the plain disk, or the one it gets at the end.
func InPlaceFile(folder Folder, plain, encrypted string) (string, error) {
	renamed, err := folder.Exists(encrypted)
	if err != nil || !renamed {
		return plain, err
	}
	there, err := folder.Exists(plain)
	if err == nil && there {
		err = inTheWay(encrypted)
	}
	return encrypted, err
}

func encryptInPlace(ctx context.Context, file blockdev.Resizer, size int64, ref keysafe.Ref, keks KEKs, rate int64, progress Progress) error {
	id, dek, safe, err := inPlaceKey(ctx, file, size, ref, keks)
	if err != nil {
		return err
	}
	defer dek.Close()
	return volume.EncryptInPlace(ctx, file, volume.EncryptOptions{
		Size: size, DEK: dek, Safe: safe, UUID: id, AllowDiscards: true, Rate: volume.NewRate(rate), Progress: progress,
	})
}

// inPlaceKey returns the UUID, the DEK, which the caller closes, and the key safe
// of a disk that is to be encrypted in place: new ones, or those of the encryption
// that was begun, with its key safe under the KEK named by ref.
func inPlaceKey(ctx context.Context, file blockdev.Device, size int64, ref keysafe.Ref, keks KEKs) (id string, dek *keymem.Key, safe *keysafe.Safe, err error) {
	begun, err := volume.InspectEncryption(file, size)
	switch {
	case err != nil:
		return "", nil, nil, err
	case begun == nil:
		id = uuid.NewString()
		dek, safe, err = newDEK(ctx, id, ref, keks)
		return id, dek, safe, err
	case begun.Safe == nil:
		return "", nil, nil, errs.New(errs.Corrupt, "the disk has no key safe").WithHint("finish its encryption with its volume key: strongroom volume encrypt")
	}
	if dek, err = unwrap(ctx, begun.Safe, begun.UUID, keks); err != nil {
		return "", nil, nil, err
	}
	if safe, err = Rewrap(ctx, begun.Safe, ref, keks); err != nil {
		return "", nil, nil, errors.Join(err, dek.Close())
	}
	return begun.UUID, dek, safe, nil
}

func newDEK(ctx context.Context, id string, ref keysafe.Ref, keks KEKs) (*keymem.Key, *keysafe.Safe, error) {
	kek, err := keks(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	defer kek.Close()
	dek, err := keymem.Random(keysafe.DEKSize)
	if err != nil {
		return nil, nil, err
	}
	safe, err := keysafe.Wrap(kek, dek, ref, volume.Owner(id), 1)
	if err != nil {
		return nil, nil, errors.Join(err, dek.Close())
	}
	return dek, safe, nil
}
