package sandbox

import (
	"errors"

	"github.com/landlock-lsm/go-landlock/landlock"
	"github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// landlockNet is the first version of Landlock that knows TCP ports.
const landlockNet = 4

// restrict forbids all that the kernel's Landlock can forbid and returns its
// version. A descriptor keeps the rights that it was opened with.
func restrict() (version int, err error) {
	version, err = syscall.LandlockGetABIVersion()
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP): // not built in, not enabled
		return 0, nil
	case err != nil:
		return 0, err
	}
	// The best effort is about the version only: all other failures are returned.
	return version, landlock.V7.BestEffort().Restrict()
}
