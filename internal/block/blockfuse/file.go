package blockfuse

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

// blockSize is the unit that the file recommends for requests, in bytes.
const blockSize = 4096

// file answers the requests of the kernel. Each method runs in a goroutine that
// belongs to go-fuse, which reads the next request when it returns.
type file struct {
	fuse.RawFileSystem // ENOSYS for all that a lone file has not

	dev      blockdev.Device
	extents  blockdev.Extenter // nil: the device does not know its holes
	readOnly bool
	log      *slog.Logger
	failed   atomic.Bool // a failure was logged
	attr     fuse.Attr   // all but the size
	free     chan *result
}

func newFile(dev blockdev.Device, opts Options) *file {
	now := time.Now()
	f := &file{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		dev:           dev,
		readOnly:      opts.ReadOnly,
		log:           opts.Log,
		free:          make(chan *result, maxRequests),
		attr: fuse.Attr{
			Ino: fuse.FUSE_ROOT_ID, Mode: unix.S_IFREG | 0o600, Nlink: 1, Blksize: blockSize,
			Owner: fuse.Owner{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())},
		},
	}
	f.attr.SetTimes(&now, &now, &now)
	if opts.ReadOnly {
		f.attr.Mode = unix.S_IFREG | 0o400
	}
	f.extents, _ = dev.(blockdev.Extenter)
	return f
}

// String implements [fuse.RawFileSystem].
func (f *file) String() string { return fileSystem }

// GetAttr implements [fuse.RawFileSystem]. The kernel asks each time, because the
// size may have changed.
func (f *file) GetAttr(_ <-chan struct{}, _ *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.Attr = f.attr
	out.Size = uint64(f.dev.Size())
	out.Blocks = (out.Size + 511) / 512
	return fuse.OK
}

// SetAttr implements [fuse.RawFileSystem]. Times are nobody's business, all else
// stays as it is.
func (f *file) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if size, ok := in.GetSize(); ok && size != uint64(f.dev.Size()) {
		return fuse.EPERM
	}
	if mode, ok := in.GetMode(); ok && mode&0o7777 != f.attr.Mode&0o7777 {
		return fuse.EPERM
	}
	uid, setsUID := in.GetUID()
	gid, setsGID := in.GetGID()
	if setsUID && uid != f.attr.Uid || setsGID && gid != f.attr.Gid {
		return fuse.EPERM
	}
	return f.GetAttr(cancel, nil, out)
}

// StatFs implements [fuse.RawFileSystem].
func (f *file) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Bsize: blockSize, Frsize: blockSize, Blocks: uint64(f.dev.Size()) / blockSize, Files: 1, NameLen: 255}
	return fuse.OK
}

// Open implements [fuse.RawFileSystem]. Who may is decided by the kernel: the
// mount has default_permissions and not allow_other.
func (f *file) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if f.readOnly && in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		return fuse.EROFS
	}
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES | fuse.FOPEN_NOFLUSH
	return fuse.OK
}

// Read implements [fuse.RawFileSystem]. At the end of the file it reads less, as
// files do.
func (f *file) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	off, n := f.clip(in.Offset, uint64(min(int(in.Size), len(buf))))
	r := f.result(buf[:n])
	if n > 0 {
		if _, err := f.dev.ReadAt(r.data, off); err != nil {
			r.Done()
			return nil, f.status("read", err)
		}
	}
	return r, fuse.OK
}

// result is what a Read returns to go-fuse, which calls Done when it is sent.
type result struct {
	free chan<- *result
	data []byte
}

func (f *file) result(data []byte) *result {
	select {
	case r := <-f.free:
		r.data = data
		return r
	default:
		return &result{free: f.free, data: data}
	}
}

func (r *result) Bytes([]byte) ([]byte, fuse.Status) { return r.data, fuse.OK }
func (r *result) Size() int                          { return len(r.data) }
func (r *result) Done() {
	r.data = nil
	select {
	case r.free <- r:
	default:
	}
}

// Write implements [fuse.RawFileSystem]. A write that reaches beyond the end does
// what fits.
func (f *file) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if f.readOnly {
		return 0, fuse.EROFS
	}
	off, n := f.clip(in.Offset, uint64(len(data)))
	if n == 0 && len(data) > 0 {
		return 0, noSpace
	}
	if _, err := f.dev.WriteAt(data[:n], off); err != nil {
		return 0, f.status("write", err)
	}
	// The kernel does not follow such a write with an FSYNC, as it does on other
	// file systems; O_SYNC has the bit of O_DSYNC in it.
	if in.Flags&unix.O_DSYNC != 0 {
		if err := f.dev.Flush(); err != nil {
			return 0, f.status("flush", err)
		}
	}
	return uint32(n), fuse.OK
}

// Fsync implements [fuse.RawFileSystem].
func (f *file) Fsync(_ <-chan struct{}, _ *fuse.FsyncIn) fuse.Status {
	if f.readOnly {
		return fuse.OK
	}
	return f.status("flush", f.dev.Flush())
}

// Fallocate implements [fuse.RawFileSystem].
func (f *file) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	const keepSize = unix.FALLOC_FL_KEEP_SIZE
	if f.readOnly {
		return fuse.EROFS
	}
	off, n := f.clip(in.Offset, in.Length)
	if in.Mode&keepSize == 0 && uint64(n) < in.Length {
		return noSpace
	}
	switch in.Mode &^ keepSize {
	case unix.FALLOC_FL_PUNCH_HOLE:
		return f.status("punch", f.punch(off, n))
	case unix.FALLOC_FL_ZERO_RANGE:
		return f.status("zero", f.dev.WriteZeroes(off, n, false))
	}
	return fuse.Status(unix.EOPNOTSUPP) // storage cannot be reserved
}

// punch discards a range and makes it read as zeros, which a discard alone does
// not promise.
func (f *file) punch(off, n int64) error {
	if f.extents == nil {
		return f.dev.WriteZeroes(off, n, true)
	}
	if err := f.dev.Discard(off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		e, err := f.extents.NextExtent(off)
		if err != nil {
			return err
		}
		length := min(e.Length, end-off)
		if !e.Hole {
			if err := f.dev.WriteZeroes(off, length, true); err != nil {
				return err
			}
		}
		off += length
	}
	return nil
}

// Lseek implements [fuse.RawFileSystem] for SEEK_DATA and SEEK_HOLE; the kernel
// does the others itself.
func (f *file) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	size := f.dev.Size()
	if in.Offset >= uint64(size) {
		return fuse.Status(unix.ENXIO)
	}
	wantHole := in.Whence == unix.SEEK_HOLE
	if !wantHole && in.Whence != unix.SEEK_DATA {
		return fuse.EINVAL
	}
	off := int64(in.Offset)
	for off < size {
		e := blockdev.Extent{Offset: off, Length: size - off}
		if f.extents != nil {
			var err error
			if e, err = f.extents.NextExtent(off); err != nil {
				return f.status("seek", err)
			}
		}
		if e.Hole == wantHole {
			out.Offset = uint64(off)
			return fuse.OK
		}
		off += e.Length
		select {
		case <-cancel: // the extents may be many
			return fuse.EINTR
		default:
		}
	}
	if !wantHole {
		return fuse.Status(unix.ENXIO)
	}
	out.Offset = uint64(off) // the end counts as a hole
	return fuse.OK
}

// clip returns the part of n bytes at off that lies inside the device.
func (f *file) clip(off, n uint64) (int64, int64) {
	size := uint64(f.dev.Size())
	if off >= size || off > math.MaxInt64 {
		return int64(size), 0
	}
	return int64(off), int64(min(n, size-off))
}

const noSpace = fuse.Status(unix.ENOSPC)

// status is the number that tells the kernel of err. What the device below could
// not do is EIO, whatever it was: a number that means something else to a caller,
// such as EINTR or EAGAIN, would have it wait or try again.
func (f *file) status(op string, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	if !f.failed.Swap(true) {
		f.log.LogAttrs(context.Background(), slog.LevelError, "a request of the mounted file failed, the first of them",
			slog.String("op", op), slog.Any("err", err))
	}
	switch {
	case errors.Is(err, blockdev.ErrNoSpace):
		return noSpace
	case errors.Is(err, blockdev.ErrReadOnly):
		return fuse.EROFS
	}
	return fuse.EIO
}
