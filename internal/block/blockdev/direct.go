package blockdev

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// bounceSize is the most bytes of an unaligned request that are moved at once.
	bounceSize = 128 << 10
	// bounceCount is how many unaligned requests are moved at once; more wait.
	bounceCount = 8
	// alignMax is an alignment, in bytes, that suits where the kernel tells none.
	alignMax = 4096
	// processorsMin is how many of Go's processors (GOMAXPROCS) a program has at
	// least that does direct I/O.
	processorsMin = 8
)

// direct is what a File with direct I/O needs to keep to the alignment that the
// kernel asks for (O_DIRECT in open(2), STATX_DIOALIGN in statx(2)). Requests that
// have it go to the file as they are. Others go through bounce buffers, of which
// there is a fixed number, made when they are first needed.
type direct struct {
	f      *os.File
	unit   int64 // of offsets and lengths, in bytes: a power of two, 512 to 65536
	memory int   // of buffers, in bytes: a power of two
	bounce chan []byte
}

// newDirect turns direct I/O on. It belongs to the open file description, so it
// comes along with a descriptor that is passed on.
func newDirect(f *os.File, fd, blockSize int, size int64, isBlock bool) (*direct, error) {
	unit, memory, err := directAlignment(fd, blockSize, isBlock)
	if err != nil {
		return nil, err
	}
	if size%int64(unit) != 0 {
		return nil, fmt.Errorf("%w: the size, %d bytes, is not a multiple of %d", ErrNoDirect, size, unit)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoDirect, err)
	}
	raiseProcessors()
	d := &direct{f: f, unit: int64(unit), memory: memory, bounce: make(chan []byte, bounceCount)}
	for range bounceCount {
		d.bounce <- nil
	}
	return d, nil
}

// raiseProcessors lets as many requests wait for a device as there are goroutines
// that ask. A thread in a system call keeps its processor until the runtime takes
// it away, 20 µs later at the earliest: with two of them, two threads that wait
// for the device keep all others from working. What is served from the page
// cache does not wait, and is left as it is; so is what a user has set.
func raiseProcessors() {
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) < processorsMin {
		runtime.GOMAXPROCS(processorsMin)
	}
}

// directAlignment returns what offsets and lengths, and what buffers must be
// multiples of.
func directAlignment(fd, blockSize int, isBlock bool) (unit, memory int, err error) {
	st := statDirect(fd)
	switch {
	case st.Mask&unix.STATX_DIOALIGN != 0 && st.Dio_offset_align == 0:
		return 0, 0, ErrNoDirect
	case st.Mask&unix.STATX_DIOALIGN != 0:
		unit, memory = int(st.Dio_offset_align), int(st.Dio_mem_align)
	case isBlock:
		unit, memory = blockSize, alignMax
	default:
		unit, memory = alignMax, alignMax
	}
	unit = max(unit, blockSize)
	if unit > bounceSize/2 || unit&(unit-1) != 0 {
		return 0, 0, fmt.Errorf("%w: it wants requests aligned to %d bytes", ErrNoDirect, unit)
	}
	return unit, memory, nil
}

// statDirect asks for the alignment of direct I/O. Where the kernel does not tell, or
// a sandbox does not let it, STATX_DIOALIGN is not in the Mask.
func statDirect(fd int) (st unix.Statx_t) {
	// Without a name, which Linux 6.11 and later allow: a sandbox sees by that,
	// that the call is about the descriptor.
	_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(fd), 0, unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, uintptr(unsafe.Pointer(&st)), 0)
	if errno == unix.EFAULT {
		errno, _ = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st).(unix.Errno)
	}
	if errno != 0 {
		st.Mask = 0
	}
	return st
}

// aligned reports whether the kernel takes the request as it is.
func (d *direct) aligned(p []byte, off int64) bool {
	at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	return (off|int64(len(p)))&(d.unit-1) == 0 && at&uintptr(d.memory-1) == 0
}

func (d *direct) readAt(p []byte, off int64) (int, error) {
	if d.aligned(p, off) {
		return d.f.ReadAt(p, off)
	}
	return d.pieces(p, off, func(buf []byte, start int64, part []byte, into int) error {
		if _, err := d.f.ReadAt(buf, start); err != nil {
			return err
		}
		copy(part, buf[into:])
		return nil
	})
}

// writeAt needs the units that p touches for itself: of those at its ends it reads
// the rest and writes it back.
func (d *direct) writeAt(p []byte, off int64) (int, error) {
	if d.aligned(p, off) {
		return d.f.WriteAt(p, off)
	}
	return d.pieces(p, off, func(buf []byte, start int64, part []byte, into int) error {
		first, last := buf[:d.unit], buf[int64(len(buf))-d.unit:]
		end := into + len(part)
		if into > 0 {
			if _, err := d.f.ReadAt(first, start); err != nil {
				return err
			}
		}
		if end < len(buf) && (into == 0 || len(buf) > len(first)) {
			if _, err := d.f.ReadAt(last, start+int64(len(buf)-len(last))); err != nil {
				return err
			}
		}
		copy(buf[into:], part)
		_, err := d.f.WriteAt(buf, start)
		return err
	})
}

// pieces calls move for each part of p with a buffer for the whole units at start
// that hold it, into of their bytes before it.
func (d *direct) pieces(p []byte, off int64, move func(buf []byte, start int64, part []byte, into int) error) (int, error) {
	buf := <-d.bounce
	defer func() { d.bounce <- buf }()
	if buf == nil {
		fresh, err := newBounce()
		if err != nil {
			return 0, err
		}
		buf = fresh
	}
	for done := 0; done < len(p); {
		start := (off + int64(done)) &^ (d.unit - 1)
		into := int(off + int64(done) - start)
		part := p[done:min(len(p), done+bounceSize-into)]
		_, length := Widen(start, int64(into+len(part)), d.unit)
		if err := move(buf[:length], start, part, into); err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(p), nil
}

// close gives the buffers back to the system. No request is running.
func (d *direct) close() {
	for range bounceCount {
		if buf := <-d.bounce; buf != nil {
			_ = unix.Munmap(buf) // fails only for what Mmap did not return
		}
	}
}

func newBounce() ([]byte, error) {
	buf, err := unix.Mmap(-1, 0, bounceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("cannot map a buffer of %d bytes: %w", bounceSize, err)
	}
	// Best effort: a kernel without it only dumps more.
	_ = unix.Madvise(buf, unix.MADV_DONTDUMP)
	return buf, nil
}
