// Package blockdev is the contract of a block device: what every layer of the
// data path offers to the layer above it. An encrypted volume, a file, memory,
// an NBD client and a fault-injecting device are all a [Device].
//
// Package blockdevtest holds the conformance suite that each of them passes.
//
// The data path allocates nothing per request, so the contract takes the
// caller's buffers and hands out none. There is no context: like a file, a
// device is interrupted by closing it.
package blockdev

import (
	"errors"
	"io"
	"math"
)

// Sentinels that callers branch on; they are wrapped with the device's name
// and the range of the request.
var (
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("device is closed")
	// ErrOutOfRange: the request reaches beyond the end of the device, or its
	// offset or length is negative. Nothing was read or written.
	ErrOutOfRange = errors.New("request is outside the device")
	// ErrReadOnly: the device does not accept writes.
	ErrReadOnly = errors.New("device is read-only")
	// ErrNoSpace: the storage below is full. Bytes outside the request are
	// unchanged; bytes inside it may be old or new.
	ErrNoSpace = errors.New("no space left on the storage")
	// ErrInUse: another process has the device open.
	ErrInUse = errors.New("device is in use")
	// ErrBadSize: Resize was asked for a size that the device cannot have.
	// Nothing was changed.
	ErrBadSize = errors.New("size is negative, no multiple of the block size, or fixed by the storage")
	// ErrNoDirect: the storage does not do direct I/O.
	ErrNoDirect = errors.New("direct I/O is not possible here")
	// ErrNoClone: the storage cannot share blocks between the two devices.
	ErrNoClone = errors.New("the storage cannot clone it")
	// ErrNotStorage: what a path names cannot be a device.
	ErrNotStorage = errors.New("it is neither a regular file nor a block device")
)

// Device is random-access storage of a fixed number of bytes.
//
// Requests may have any alignment and length; a request aligned to BlockSize
// is atomic with respect to other requests of this process and, on real
// storage, each of its blocks is written whole or not at all. Requests that
// overlap and run at the same time take effect in any order, block by block.
//
// All methods may be called concurrently. Buffers belong to the caller again
// when a method returns, and a Write method never changes its buffer.
//
// A write is durable when a Flush that began after it returned has returned
// without error. After a failed Flush, nothing can be assumed of writes since
// the last successful one.
type Device interface {
	// ReadAt reads len(p) bytes at off. Unlike a file, it never reads fewer
	// without an error: a range that is not wholly inside the device is
	// [ErrOutOfRange].
	io.ReaderAt
	// WriteAt writes len(p) bytes at off, or returns an error.
	io.WriterAt
	// WriteZeroes makes n bytes at off read as zeros. If mayPunch is true the
	// storage may be given back; it still reads as zeros.
	WriteZeroes(off, n int64, mayPunch bool) error
	// Discard tells that the contents of n bytes at off are no longer needed.
	// They may read as anything that was there before or as zeros.
	Discard(off, n int64) error
	// Flush makes all completed writes durable.
	Flush() error
	// Size returns the size in bytes. It changes only by Resize.
	Size() int64
	// BlockSize returns the size in bytes of the smallest unit that is written
	// atomically: a power of two, 512 to 65536.
	BlockSize() int
	// Close releases the device without a Flush. It waits for running
	// requests; later ones fail with [ErrClosed]. It is idempotent.
	Close() error
}

// Resizer is a Device whose size can change while it is in use.
type Resizer interface {
	Device
	// Resize sets the size in bytes, a multiple of BlockSize. New space reads
	// as zeros. Shrinking discards what lies beyond.
	Resize(size int64) error
}

// Extent is a run of bytes with one allocation state.
type Extent struct {
	Offset int64 // bytes from the start of the device
	Length int64 // bytes, greater than zero
	Hole   bool  // not allocated; reads as zeros
}

// EarlyFlusher is a Device with a cache that can be told when to write.
type EarlyFlusher interface {
	Device
	// FlushEarly begins to write what the cache holds of n bytes at off, and does
	// not wait for it, so that the next Flush has less to do. It promises nothing.
	FlushEarly(off, n int64)
}

// Extenter is a Device that knows its holes.
type Extenter interface {
	Device
	// NextExtent returns the extent that starts at off, 0 <= off < Size. It is
	// a hint: data that happens to be zero may be reported as data, a hole
	// never as anything but zeros.
	NextExtent(off int64) (Extent, error)
}

// Cloner is a Device that can take over the contents of another one without
// copying them: both share their blocks until one of them is written.
type Cloner interface {
	Device
	// CloneFrom gives the device the size and contents of src, which is flushed.
	// It returns [ErrNoClone], and then has changed nothing, if the storage does
	// not do that; the caller copies instead. It becomes durable with a Flush.
	CloneFrom(src Device) error
}

// HeaderLocker is a Device whose header another program may read or write while
// the device is open, under a lock that both keep to.
type HeaderLocker interface {
	Device
	// WithHeaderLock runs f while no other program writes the header, nor, if
	// access is [Exclusive], reads it. It returns f's error, or [ErrInUse] if
	// the lock could not be had in a few seconds; then f did not run.
	WithHeaderLock(access Access, f func() error) error
}

// CheckRange returns [ErrOutOfRange] unless n bytes at off lie inside a device
// of size bytes.
func CheckRange(size, off, n int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return ErrOutOfRange
	}
	return nil
}

// Widen returns the smallest range that holds n bytes at off and starts and
// ends at multiples of unit, a power of two. A range that is negative or whose
// end is no int64 is returned as it is, for the caller to refuse.
func Widen(off, n, unit int64) (wideOff, wideLen int64) {
	if off < 0 || n < 0 || n > math.MaxInt64-off || off+n > math.MaxInt64-unit {
		return off, n
	}
	start := off &^ (unit - 1)
	return start, (off+n+unit-1)&^(unit-1) - start
}
