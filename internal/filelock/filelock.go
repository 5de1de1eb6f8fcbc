// Package filelock takes advisory locks of files, flock(2), that end with the
// process that holds them, and tells a lock that somebody holds from one whose
// last copy is about to vanish: a process that is being started has a copy of
// every descriptor, and with it of every lock, from its fork to its exec, also of
// those that were closed meanwhile.
//
// All functions are safe for concurrent use.
package filelock

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Wait is how long a lock must be held by others before it counts as held:
	// longer than another process takes from fork to exec.
	Wait = 250 * time.Millisecond
	// Retry is how often somebody who waits for a lock looks again.
	Retry = 5 * time.Millisecond
)

// ErrHeld: somebody else holds the lock.
var ErrHeld = errors.New("in use by another process")

// Take takes the exclusive lock of f and returns [ErrHeld] if somebody else holds
// it. The lock ends when the last descriptor of this open file is closed.
func Take(f *os.File) error {
	return Settle(ErrHeld, func() error {
		for {
			switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
			case nil:
				return nil
			case unix.EINTR:
			case unix.EWOULDBLOCK:
				return ErrHeld
			default:
				return fmt.Errorf("cannot lock: %w", err)
			}
		}
	})
}

// Settle calls take, which returns held where somebody has the lock, until it
// returns otherwise or [Wait] is over, and returns what it returned last.
func Settle(held error, take func() error) error {
	err := take()
	if !errors.Is(err, held) {
		return err
	}
	// However long this process's own forks take: with this lock there are none.
	syscall.ForkLock.RLock()
	err = take()
	syscall.ForkLock.RUnlock()
	for deadline := time.Now().Add(Wait); errors.Is(err, held) && time.Now().Before(deadline); {
		time.Sleep(Retry)
		err = take()
	}
	return err
}
