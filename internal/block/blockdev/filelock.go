package blockdev

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"strongroom/internal/filelock"
)

// HeaderRetry is how often somebody who waits for a header lock looks again. One
// who takes it again and again leaves it free for longer, once in a while.
const HeaderRetry = 5 * time.Millisecond

// QEMU's image locking (block/file-posix.c): a user of an image puts a shared
// lock on byte 100+i for every permission i that it uses, and on byte 200+i for
// every permission that it does not let others have, then looks for locks of
// others that conflict.
const (
	lockUses   = 100
	lockDenies = 200
	lockEnd    = 300
	lockPermOf = 1 // the permission "write"
	headerWait = 10 * time.Second
)

// lock takes both locks of a File (see there), or none.
func (f *File) lock() error {
	if f.opts.Unlocked {
		return nil
	}
	if !f.isBlock {
		if err := filelock.Settle(ErrInUse, f.lockInUse); err != nil {
			return err
		}
	}
	return f.flock(unix.LOCK_SH)
}

// lockInUse takes the in-use lock. A writer takes all of QEMU's bytes for
// itself. A reader does what QEMU does for a read-only image: it denies "write"
// to others and then looks whether one has it already.
func (f *File) lockInUse() error {
	if !f.opts.ReadOnly {
		return f.ofdLock(unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: lockUses, Len: lockEnd - lockUses})
	}
	if err := f.ofdLock(unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: lockDenies + lockPermOf, Len: 1}); err != nil {
		return err
	}
	// F_RDLCK would not see QEMU's shared lock, F_WRLCK may be asked for, though
	// not set, on a read-only descriptor.
	probe := unix.Flock_t{Type: unix.F_WRLCK, Start: lockUses + lockPermOf, Len: 1}
	if err := f.ofdLock(unix.F_OFD_GETLK, &probe); err != nil {
		return err
	}
	if probe.Type != unix.F_UNLCK {
		return ErrInUse
	}
	return nil
}

func (f *File) ofdLock(cmd int, lock *unix.Flock_t) error {
	lock.Whence = io.SeekStart
	for {
		err := unix.FcntlFlock(uintptr(f.fd), cmd, lock)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN || err == unix.EACCES:
			return ErrInUse
		case err != nil:
			return fmt.Errorf("cannot lock: %w", err)
		default:
			return nil
		}
	}
}

// flock changes the flock. cryptsetup holds a conflicting one only for the time
// of a header access, so it is worth waiting for; but not for ever, since a
// stopped process may hold it too.
func (f *File) flock(how int) error {
	deadline := time.Now().Add(headerWait)
	for {
		err := unix.Flock(f.fd, how|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(deadline):
			time.Sleep(HeaderRetry)
		case errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("%w: its header is locked", ErrInUse)
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("cannot lock: %w", err)
		}
	}
}

// WithHeaderLock implements [HeaderLocker] by cryptsetup's flock of the file.
// It tells processes apart, not holders of descriptors of one open file: those
// must agree who writes the header. On a block device cryptsetup keeps its lock
// elsewhere (/run/cryptsetup), so there O_EXCL must do: it keeps out all but
// commands that write the header alone.
func (f *File) WithHeaderLock(access Access, fn func() error) error {
	pass, err := f.guard.Enter(0, 0, Shared)
	if err != nil {
		return fmt.Errorf("cannot lock header of %s: %w", f.name, err)
	}
	defer f.guard.Leave(pass)
	f.header.Lock()
	defer f.header.Unlock()
	how, rest := unix.LOCK_EX, unix.LOCK_SH
	if access == Shared {
		how = unix.LOCK_SH
	}
	if f.opts.Unlocked {
		rest = unix.LOCK_UN
	}
	// A change of the lock is not atomic: also when it fails the old one is
	// gone, so the resting state is restored on every way out.
	defer unix.Flock(f.fd, rest)
	if err := f.flock(how); err != nil {
		return fmt.Errorf("cannot lock header of %s: %w", f.name, err)
	}
	return fn()
}
