package blockdev

import (
	"fmt"

	"golang.org/x/sys/unix"
)

var _ Cloner = (*File)(nil)

// CloneFrom implements [Cloner] with a reflink (ioctl_ficlone(2)), which XFS,
// Btrfs, NFS 4.2 and others have, between two regular files of one file system.
func (f *File) CloneFrom(src Device) error {
	from, ok := src.(*File)
	if !ok || from == f || from.isBlock || f.isBlock {
		return fmt.Errorf("cannot clone to %s: %w", f.name, ErrNoClone)
	}
	fail := func(err error) error { return fmt.Errorf("cannot clone %s to %s: %w", from.name, f.name, err) }
	if f.opts.ReadOnly {
		return fail(ErrReadOnly)
	}
	reading, err := from.guard.Enter(0, from.size.Load(), Shared)
	if err != nil {
		return fail(err)
	}
	defer from.guard.Leave(reading)
	writing, err := f.guard.EnterAll()
	if err != nil {
		return fail(err)
	}
	defer f.guard.Leave(writing)
	for {
		err := unix.IoctlFileClone(f.fd, from.fd)
		switch err {
		case nil:
			f.size.Store(from.size.Load())
			return nil
		case unix.EINTR:
			continue
		case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS, unix.EXDEV, unix.EINVAL:
			return fail(fmt.Errorf("%w: %w", ErrNoClone, err))
		case unix.ENOSPC, unix.EDQUOT:
			return fail(fmt.Errorf("%w: %w", ErrNoSpace, err))
		}
		return fail(err)
	}
}
