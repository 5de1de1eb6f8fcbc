package blockdev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"strongroom/internal/durable"
)

// FileOptions say how a file is opened. The zero value opens an existing file
// for reading and writing, for this opener alone.
type FileOptions struct {
	// ReadOnly refuses writes. Read-only openers share the file with each
	// other, but with no writer.
	ReadOnly bool
	// Create makes the file, mode 0600 and empty, and makes its name durable;
	// it fails with [io/fs.ErrExist] if there is one.
	Create bool
	// Unlocked opens a file that another process may be writing, for a look at
	// its header. It needs ReadOnly.
	Unlocked bool
	// Direct goes past the page cache (O_DIRECT): the host keeps no second copy of
	// what a guest caches itself. It returns [ErrNoDirect] where the file system or
	// the size of the file does not allow it. A descriptor that is open for it
	// already stays so. The program gets at least 8 of Go's processors (GOMAXPROCS),
	// because more threads wait for a device than a small machine has.
	Direct bool
	// NoFollow refuses a symbolic link in place of the file, for a folder that
	// may have come from elsewhere.
	NoFollow bool
}

// File is a regular file or a block device as a [Device].
//
// Requests go through the page cache, or past it ([FileOptions]). Holes in a
// regular file are real: Discard and WriteZeroes with mayPunch give storage
// back. Resize of a block device accepts only the size that it has.
//
// # Locks
//
// A File that is not Unlocked holds two locks from open to close. They belong
// to the open file description: a descriptor passed to another process
// ([File.Dup], SCM_RIGHTS) takes them along, and they end when the last
// descriptor is closed, so with the last process that could still write.
//
//   - The in-use lock is on the byte ranges that QEMU uses for the same
//     purpose (open file description locks on bytes 100 to 299), so that not
//     only two of us but also QEMU and we keep each other out. A block device
//     is instead opened with O_EXCL, which keeps out mounts and device mapper.
//   - A shared flock, which is how cryptsetup locks a LUKS2 header in a file:
//     it may read the header but not write it. [File.WithHeaderLock] makes it
//     exclusive for a moment.
type File struct {
	guard     Guard
	f         *os.File
	fd        int // f's; valid inside guard
	name      string
	size      atomic.Int64
	blockSize int
	opts      FileOptions
	direct    *direct    // nil: through the page cache
	isBlock   bool       // a block device
	header    sync.Mutex // held while the flock differs from its resting state
	failed    atomic.Pointer[error]
}

var (
	_ Resizer      = (*File)(nil)
	_ Extenter     = (*File)(nil)
	_ HeaderLocker = (*File)(nil)
	_ EarlyFlusher = (*File)(nil)
)

// OpenFile opens the file or block device at path. It returns [ErrInUse] if
// another opener, also one in this process, has it open in a conflicting way.
func OpenFile(path string, opts FileOptions) (*File, error) {
	flags := os.O_RDWR
	if opts.ReadOnly {
		flags = os.O_RDONLY
	}
	if opts.Create {
		flags |= os.O_CREATE | os.O_EXCL
	} else if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeDevice != 0 && !opts.Unlocked {
		flags |= unix.O_EXCL // without O_CREAT: claim the block device
	}
	if opts.NoFollow {
		flags |= unix.O_NOFOLLOW
	}
	// O_NONBLOCK: a FIFO in place of the file is refused, not waited for.
	f, err := os.OpenFile(path, flags|unix.O_NOCTTY|unix.O_NONBLOCK, 0o600)
	if err != nil {
		switch {
		case errors.Is(err, unix.EBUSY):
			err = ErrInUse
		case errors.Is(err, unix.ELOOP) && opts.NoFollow:
			err = errors.New("it is a symbolic link")
		}
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	file, err := NewFile(f, opts)
	if err == nil && opts.Create {
		if err = durable.SyncDir(filepath.Dir(path)); err != nil {
			err = fmt.Errorf("cannot make a new file durable: %w", err)
			file.Close()
		}
	}
	if err != nil {
		f.Close()
		if opts.Create {
			os.Remove(path)
		}
		return nil, err
	}
	return file, nil
}

// NewFile makes a Device of an open file, such as one whose descriptor another
// process has passed on; Create is ignored. It returns [ErrReadOnly] if f is not
// open for writing and the options ask for that. On success f belongs to the
// File, on error to the caller.
func NewFile(f *os.File, opts FileOptions) (*File, error) {
	file := &File{f: f, fd: int(f.Fd()), name: f.Name(), blockSize: 512, opts: opts}
	if err := file.setUp(); err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", f.Name(), err)
	}
	return file, nil
}

func (f *File) setUp() error {
	if f.opts.Unlocked && !f.opts.ReadOnly {
		return errors.New("a file may be opened without a lock only for reading")
	}
	st, err := f.f.Stat()
	if err != nil {
		return err
	}
	switch st.Mode().Type() {
	case 0:
		f.size.Store(st.Size())
	case os.ModeDevice:
		f.isBlock = true
		size, err := unix.Seek(f.fd, 0, io.SeekEnd)
		if err != nil {
			return err
		}
		f.size.Store(size)
		if f.blockSize, err = unix.IoctlGetInt(f.fd, unix.BLKSSZGET); err != nil {
			return err
		}
	default:
		return ErrNotStorage
	}
	flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY && !f.opts.ReadOnly {
		return ErrReadOnly
	}
	if flags&unix.O_APPEND != 0 {
		return errors.New("it is open for appending, so that every write would go to its end")
	}
	f.opts.Direct = f.opts.Direct || flags&unix.O_DIRECT != 0
	if err := f.setUpDirect(); err != nil {
		return err
	}
	return f.lock()
}

func (f *File) setUpDirect() (err error) {
	if !f.opts.Direct {
		return nil
	}
	if f.direct, err = newDirect(f.f, f.fd, f.blockSize, f.size.Load(), f.isBlock); err == nil {
		f.blockSize = int(f.direct.unit)
	}
	return err
}

// pread and pwrite transfer all of p, or return an error. The range is inside the
// file, and held.
func (f *File) pread(p []byte, off int64) (int, error) {
	if f.direct != nil {
		return f.direct.readAt(p, off)
	}
	return f.f.ReadAt(p, off) // goes on after EINTR and short reads
}

func (f *File) pwrite(p []byte, off int64) (int, error) {
	if f.direct != nil {
		return f.direct.writeAt(p, off)
	}
	return f.f.WriteAt(p, off)
}

// Name returns the path that the file was opened by.
func (f *File) Name() string { return f.name }

// Dup returns a second descriptor of the same open file, to pass to another
// process together with the locks. It belongs to the caller.
func (f *File) Dup() (*os.File, error) {
	pass, err := f.guard.Enter(0, 0, Shared)
	if err != nil {
		return nil, fmt.Errorf("cannot duplicate descriptor of %s: %w", f.name, err)
	}
	defer f.guard.Leave(pass)
	fd, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot duplicate descriptor of %s: %w", f.name, err)
	}
	return os.NewFile(uintptr(fd), f.name), nil
}

// enter admits a request. Blocks are kept whole against other requests of this
// process by the Guard, because the page cache promises that only on some file
// systems.
func (f *File) enter(op string, off, n int64, access Access) (*Pass, error) {
	if access == Exclusive && f.opts.ReadOnly {
		return nil, f.fail(op, off, n, ErrReadOnly)
	}
	wideOff, wideLen := Widen(off, n, int64(f.blockSize))
	pass, err := f.guard.Enter(wideOff, wideLen, access)
	if err != nil {
		return nil, f.fail(op, off, n, err)
	}
	if err := CheckRange(f.size.Load(), off, n); err != nil {
		f.guard.Leave(pass)
		return nil, f.fail(op, off, n, err)
	}
	return pass, nil
}

// fail puts the request in front of err and marks a full storage as such.
func (f *File) fail(op string, off, n int64, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		err = fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return fmt.Errorf("cannot %s %d bytes at %d of %s: %w", op, n, off, f.name, err)
}

// ReadAt implements [Device]. It returns [io.ErrUnexpectedEOF] if the file
// became shorter behind our back.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	pass, err := f.enter("read", off, int64(len(p)), Shared)
	if err != nil {
		return 0, err
	}
	defer f.guard.Leave(pass)
	n, err := f.pread(p, off)
	if err == nil {
		return n, nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, f.fail("read", off, int64(len(p)), err)
}

// WriteAt implements [Device].
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	pass, err := f.enter("write", off, int64(len(p)), Exclusive)
	if err != nil {
		return 0, err
	}
	defer f.guard.Leave(pass)
	n, err := f.pwrite(p, off)
	if err != nil {
		return n, f.fail("write", off, int64(len(p)), err)
	}
	return n, nil
}

// zeros is never written to.
var zeros [16 << 10]byte

// WriteZeroes implements [Device].
func (f *File) WriteZeroes(off, n int64, mayPunch bool) error {
	pass, err := f.enter("zero", off, n, Exclusive)
	if err != nil {
		return err
	}
	defer f.guard.Leave(pass)
	if n == 0 {
		return nil
	}
	modes := []uint32{unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_PUNCH_HOLE}
	if mayPunch {
		modes[0], modes[1] = modes[1], modes[0]
	} else {
		modes = modes[:1]
	}
	for _, mode := range modes {
		err := f.fallocate(mode, off, n)
		if err == nil {
			return nil
		}
		if !unsupported(err) {
			return f.fail("zero", off, n, err)
		}
	}
	for done := int64(0); done < n; {
		k, err := f.pwrite(zeros[:min(n-done, int64(len(zeros)))], off+done)
		if err != nil {
			return f.fail("zero", off, n, err)
		}
		done += int64(k)
	}
	return nil
}

// Discard implements [Device]. Where the storage can punch holes the range
// reads as zeros afterwards, elsewhere nothing happens. On a block device too
// only the zeroing kind of discard is used: what it may return otherwise, old
// ciphertext for one, is of no use to a layer for which zeros mean "never
// written".
func (f *File) Discard(off, n int64) error {
	pass, err := f.enter("discard", off, n, Exclusive)
	if err != nil {
		return err
	}
	defer f.guard.Leave(pass)
	if n == 0 {
		return nil
	}
	if err := f.fallocate(unix.FALLOC_FL_PUNCH_HOLE, off, n); err != nil && !unsupported(err) {
		return f.fail("discard", off, n, err)
	}
	return nil
}

// fallocate applies mode to a range without changing the size.
func (f *File) fallocate(mode uint32, off, n int64) error {
	for {
		err := unix.Fallocate(f.fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if err != unix.EINTR {
			return err
		}
	}
}

// unsupported reports whether a fallocate failed because the file system (or,
// with EINVAL, a block device for an unaligned range) does not have it.
func unsupported(err error) bool {
	return err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EINVAL || err == unix.ENODEV
}

// Flush implements [Device]. Once it has failed it fails for ever: the kernel
// reports lost writes only once and may have dropped them, so that a later
// success would mean nothing.
func (f *File) Flush() error {
	pass, err := f.guard.Enter(0, 0, Shared)
	if err != nil {
		return fmt.Errorf("cannot flush %s: %w", f.name, err)
	}
	defer f.guard.Leave(pass)
	if f.opts.ReadOnly {
		return nil
	}
	if failed := f.failed.Load(); failed != nil {
		return *failed
	}
	for {
		err := unix.Fdatasync(f.fd)
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			failure := fmt.Errorf("cannot flush %s: %w", f.name, err)
			f.failed.Store(&failure)
			return failure
		}
	}
}

// FlushEarly implements [EarlyFlusher].
func (f *File) FlushEarly(off, n int64) {
	if f.opts.ReadOnly || f.direct != nil {
		return
	}
	pass, err := f.guard.Enter(0, 0, Shared)
	if err != nil {
		return
	}
	defer f.guard.Leave(pass)
	_ = unix.SyncFileRange(f.fd, off, n, unix.SYNC_FILE_RANGE_WRITE) // Flush reports what fails
}

// Size implements [Device].
func (f *File) Size() int64 { return f.size.Load() }

// BlockSize implements [Device]: the logical block size of a block device, 512
// for a regular file, and the unit of direct I/O if that is more.
func (f *File) BlockSize() int { return f.blockSize }

// Close implements [Device]. The locks end with it unless [File.Dup] has made
// other descriptors of the file.
func (f *File) Close() error {
	if !f.guard.Close() {
		return nil
	}
	if f.direct != nil {
		f.direct.close()
	}
	if err := f.f.Close(); err != nil {
		return fmt.Errorf("cannot close %s: %w", f.name, err)
	}
	return nil
}

// Resize implements [Resizer].
func (f *File) Resize(size int64) error {
	fail := func(err error) error { return fmt.Errorf("cannot resize %s to %d bytes: %w", f.name, size, err) }
	if f.opts.ReadOnly {
		return fail(ErrReadOnly)
	}
	if size < 0 || size%int64(f.blockSize) != 0 {
		return fail(ErrBadSize)
	}
	pass, err := f.guard.EnterAll()
	if err != nil {
		return fail(err)
	}
	defer f.guard.Leave(pass)
	if f.isBlock {
		if size != f.size.Load() {
			return fail(ErrBadSize)
		}
		return nil
	}
	if err := f.f.Truncate(size); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) {
			err = fmt.Errorf("%w: %w", ErrNoSpace, err)
		}
		return fail(err)
	}
	f.size.Store(size)
	return nil
}

// NextExtent implements [Extenter]. Where the file system does not tell, all is
// data. Space that was allocated and never written counts as a hole.
func (f *File) NextExtent(off int64) (Extent, error) {
	fail := func(err error) (Extent, error) {
		return Extent{}, fmt.Errorf("cannot find extent at %d of %s: %w", off, f.name, err)
	}
	pass, err := f.guard.Enter(0, 0, Shared)
	if err != nil {
		return fail(err)
	}
	defer f.guard.Leave(pass)
	size := f.size.Load()
	if off < 0 || off >= size {
		return fail(ErrOutOfRange)
	}
	// Seeking moves the file offset, which nobody uses.
	data, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO: // no data up to the end
		return Extent{Offset: off, Length: size - off, Hole: true}, nil
	case err == unix.EINVAL || err == unix.EOPNOTSUPP:
		return Extent{Offset: off, Length: size - off}, nil
	case err != nil:
		return fail(err)
	case data > off:
		return Extent{Offset: off, Length: min(data, size) - off, Hole: true}, nil
	}
	end, err := unix.Seek(f.fd, off, unix.SEEK_HOLE)
	if err != nil || end <= off { // punched between the two calls
		end = min(off+int64(f.blockSize), size)
	}
	return Extent{Offset: off, Length: min(end, size) - off}, nil
}
