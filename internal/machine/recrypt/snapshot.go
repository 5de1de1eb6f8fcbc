package recrypt

import (
	"context"
	"errors"
	"fmt"

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

// Original is a file that [CopyTogether] copies, and what the copy is called.
type Original struct {
	To, From  string
	Encrypted bool
}

// CopyTogether is [Copy] for several disks that a volume process is using, from one
// folder to another. suspended calls the function that it is given once, while the
// files stay as they are, and returns an error if they may not have: so the copies
// are of one point in time. Nothing slow is done meanwhile: blocks are shared, and
// where the storage cannot, it returns [blockdev.ErrNoClone].
//
// When it returns nil, all copies are complete and durable; after an error there may
// be some of them.
func CopyTogether(ctx context.Context, to, from Folder, disks []Original, keks KEKs, suspended func(func() error) error) (err error) {
	defer func() {
		if err == nil {
			return
		}
		for _, d := range disks {
			err = errors.Join(err, to.Remove(d.To+Unfinished))
		}
	}()
	if err := shareBlocks(to, from, disks, suspended); err != nil {
		return err
	}
	for _, d := range disks {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if d.Encrypted {
			if err := probe(ctx, to, d.To+Unfinished, keks); err != nil {
				return fmt.Errorf("%s: %w", d.From, err)
			}
		}
		if err := Finish(to, d.To); err != nil {
			return err
		}
	}
	return nil
}

// shareBlocks makes the files of the copies, durable and unfinished.
func shareBlocks(to, from Folder, disks []Original, suspended func(func() error) error) (err error) {
	var open []blockdev.Device
	defer func() {
		for _, dev := range open {
			err = errors.Join(err, dev.Close())
		}
	}()
	var clone []func() error
	var copies []blockdev.Resizer
	for _, d := range disks {
		src, err := from.OpenShared(d.From)
		if err != nil {
			return err
		}
		open = append(open, src)
		if err := to.Remove(d.To + Unfinished); err != nil {
			return err
		}
		dst, err := to.Create(d.To + Unfinished)
		if err != nil {
			return err
		}
		open, copies = append(open, dst), append(copies, dst)
		cloner, ok := dst.(blockdev.Cloner)
		if !ok {
			return blockdev.ErrNoClone
		}
		clone = append(clone, func() error { return cloner.CloneFrom(src) })
	}
	err = suspended(func() error {
		for _, f := range clone {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, dst := range copies {
		if err := dst.Flush(); err != nil {
			return err
		}
	}
	return nil
}
