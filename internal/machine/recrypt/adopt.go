package recrypt

import (
	"context"
	"errors"

	"strongroom/internal/block/blockdev"
	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/keysafe"
)

// Adopt makes an encrypted disk of size bytes in file name of a LUKS volume of
// another program, whose data lie in that segment of src: its DEK is wrapped
// under the KEK named by ref, the encrypted data are copied as they are and
// compared. src is only read; its keyslots are not taken along. When it returns
// nil, the disk is complete and durable under its name.
//
// Whoever could open src, or a copy of it, has the DEK: a [DeepRekey] ends that.
func Adopt(ctx context.Context, folder Folder, name string, size int64, src blockdev.Device, segment luks.Segment, dek *keymem.Key, ref keysafe.Ref, keks KEKs, progress Progress) error {
	spec := freshSpec(size, ref)
	spec.sectorSize = segment.SectorSize
	file, err := format(ctx, folder, name, spec, dek, keks)
	if err != nil {
		return err
	}
	err = errors.Join(volume.Adopt(ctx, file, src, segment, progress), file.Close())
	return finish(ctx, folder, name, err, keks)
}
