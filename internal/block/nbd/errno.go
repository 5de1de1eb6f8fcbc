package nbd

import (
	"errors"
	"fmt"
	"syscall"

	"strongroom/internal/block/blockdev"
)

// Error numbers of the protocol: a fixed list, whatever the system's own are.
const (
	errnoPerm     = 1
	errnoIO       = 5
	errnoNoMem    = 12
	errnoInval    = 22
	errnoNoSpace  = 28
	errnoOverflow = 75
	errnoNotSup   = 95
	errnoShutdown = 108
)

// errnoOf returns the number that tells a client of err best.
func errnoOf(err error) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, blockdev.ErrOutOfRange):
		return errnoInval
	case errors.Is(err, blockdev.ErrReadOnly), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EROFS):
		return errnoPerm
	case errors.Is(err, blockdev.ErrNoSpace), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return errnoNoSpace
	case errors.Is(err, syscall.ENOMEM):
		return errnoNoMem
	case errors.Is(err, blockdev.ErrClosed):
		return errnoShutdown
	case errors.Is(err, errors.ErrUnsupported):
		return errnoNotSup
	}
	return errnoIO
}

// RemoteError is an error that the server reported for a request of a
// [Client]. It unwraps to the sentinel of package blockdev, if there is one for
// it.
type RemoteError struct {
	Errno   uint32 // the protocol's number, such as 28 for ENOSPC
	Message string // the server's words; may be empty, at most 4096 bytes
}

// Error implements error.
func (e *RemoteError) Error() string {
	if e.Message != "" {
		return fmt.Sprintf("NBD server: %s (%s)", e.Message, errnoName(e.Errno))
	}
	return "NBD server: " + errnoName(e.Errno)
}

// Unwrap returns the sentinel of the error number.
func (e *RemoteError) Unwrap() error {
	switch e.Errno {
	case errnoPerm:
		return blockdev.ErrReadOnly
	case errnoNoSpace:
		return blockdev.ErrNoSpace
	case errnoShutdown:
		return blockdev.ErrClosed
	case errnoNoMem:
		return syscall.ENOMEM
	case errnoNotSup:
		return errors.ErrUnsupported
	}
	return nil
}

func errnoName(n uint32) string {
	switch n {
	case errnoPerm:
		return "EPERM"
	case errnoIO:
		return "EIO"
	case errnoNoMem:
		return "ENOMEM"
	case errnoInval:
		return "EINVAL"
	case errnoNoSpace:
		return "ENOSPC"
	case errnoOverflow:
		return "EOVERFLOW"
	case errnoNotSup:
		return "ENOTSUP"
	case errnoShutdown:
		return "ESHUTDOWN"
	}
	return fmt.Sprintf("error %d", n)
}
