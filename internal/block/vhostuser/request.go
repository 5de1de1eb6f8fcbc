package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

// Requests and their status (virtio 1.2, section 5.2.6).
const (
	opRead        = 0
	opWrite       = 1
	opFlush       = 4
	opGetID       = 8
	opDiscard     = 11
	opWriteZeroes = 13

	statusOK          = 0
	statusFailed      = 1
	statusUnsupported = 2

	sizeRequest = 16 // type u32, reserved u32, sector u64
	sizeRange   = 16 // sector u64, sectors u32, flags u32
	rangeUnmap  = 1
	sizeID      = 20
)

// What breaks a queue because there is nowhere to write a status to.
var (
	errNoHeader = errors.New("a request is shorter than its header")
	errNoStatus = errors.New("a request has no room for its status")
)

// What fails a request.
var (
	errTransfer    = fmt.Errorf("request is not a whole number of sectors, or longer than %d bytes", maxTransfer)
	errRange       = errors.New("request names no ranges, or too many, or too long ones")
	errUnsupported = errors.New("request is of an unknown kind")
)

const (
	// bounceSize is how much of a request goes through a worker's own buffer at
	// a time.
	bounceSize = 64 << 10
	// directMin is the length of a segment from which on it pays to hand it to
	// the device by itself, rather than to copy it together with its neighbours.
	directMin = 32 << 10
)

// request is what one worker has in work.
type request struct {
	chain chain
	head  [sizeRequest]byte
	buf   []byte // bounceSize bytes; nil until first used
}

// kind and sector are those of the header, as it was read.
func (r *request) kind() uint32   { return binary.LittleEndian.Uint32(r.head[:]) }
func (r *request) sector() uint64 { return binary.LittleEndian.Uint64(r.head[8:]) }

// prepare splits a collected chain into header, data and status. It returns the
// status byte, which is in guest memory, and the length of what the device may
// write.
func (r *request) prepare() (status []byte, written uint32, err error) {
	c := &r.chain
	if copyOut(r.head[:], &c.out) < sizeRequest {
		return nil, 0, errNoHeader
	}
	n := total(c.in)
	if n == 0 {
		return nil, 0, errNoStatus
	}
	last := c.in[len(c.in)-1]
	status = last[len(last)-1:]
	if last = last[:len(last)-1]; len(last) == 0 {
		c.in = c.in[:len(c.in)-1]
	} else {
		c.in[len(c.in)-1] = last
	}
	return status, uint32(min(n, math.MaxUint32)), nil
}

// serve does a prepared request on a device.
func (r *request) serve(c *Config, durable bool) error {
	dev := c.Device
	switch r.kind() {
	case opRead:
		off, err := r.place(dev, total(r.chain.in))
		if err != nil {
			return err
		}
		return r.read(dev, off)
	case opWrite:
		if c.ReadOnly {
			return blockdev.ErrReadOnly
		}
		off, err := r.place(dev, total(r.chain.out))
		if err != nil {
			return err
		}
		if err := r.write(dev, off); err != nil {
			return err
		}
	case opFlush:
		return dev.Flush()
	case opGetID:
		var id [sizeID]byte
		copy(id[:], c.Serial)
		copyIn(r.chain.in, id[:])
		return nil
	case opDiscard, opWriteZeroes:
		if c.ReadOnly {
			return blockdev.ErrReadOnly
		}
		if err := r.ranges(dev, r.kind() == opDiscard); err != nil {
			return err
		}
	default:
		return errUnsupported
	}
	if durable {
		return dev.Flush()
	}
	return nil
}

// place returns the offset of n bytes at the request's sector, which are inside
// the device.
func (r *request) place(dev blockdev.Device, n uint64) (int64, error) {
	if n%sectorSize != 0 || n > maxTransfer {
		return 0, errTransfer
	}
	return place(dev, r.sector(), n)
}

func place(dev blockdev.Device, sector, n uint64) (int64, error) {
	if sector > math.MaxInt64/sectorSize {
		return 0, blockdev.ErrOutOfRange
	}
	off := int64(sector * sectorSize)
	return off, blockdev.CheckRange(dev.Size(), off, int64(n))
}

// direct returns how many bytes at the start of a list of segments are handed to
// the device where they are: whole sectors of a long segment, or of the only one.
func direct(segs [][]byte) int {
	n := len(segs[0]) &^ (sectorSize - 1)
	if n >= directMin || len(segs) == 1 {
		return n
	}
	return 0
}

// read reads into guest memory.
func (r *request) read(dev blockdev.Device, off int64) error {
	left := int(total(r.chain.in))
	for segs := r.chain.in; left > 0; {
		n := direct(segs)
		if n > 0 {
			if _, err := dev.ReadAt(segs[0][:n], off); err != nil {
				return err
			}
			segs = skip(segs, n)
		} else {
			buf, err := r.bounce(left)
			if err != nil {
				return err
			}
			if _, err := dev.ReadAt(buf, off); err != nil {
				return err
			}
			segs = copyIn(segs, buf)
			n = len(buf)
		}
		left, off = left-n, off+int64(n)
	}
	return nil
}

// write writes from guest memory, which the guest may change meanwhile. Then
// either contents may be written; nothing else can come of it, since a device
// does not change a buffer that it writes from.
func (r *request) write(dev blockdev.Device, off int64) error {
	left := int(total(r.chain.out))
	for left > 0 {
		n := direct(r.chain.out)
		if n > 0 {
			if _, err := dev.WriteAt(r.chain.out[0][:n], off); err != nil {
				return err
			}
			r.chain.out = skip(r.chain.out, n)
		} else {
			buf, err := r.bounce(left)
			if err != nil {
				return err
			}
			n = copyOut(buf, &r.chain.out)
			if _, err := dev.WriteAt(buf, off); err != nil {
				return err
			}
		}
		left, off = left-n, off+int64(n)
	}
	return nil
}

// ranges discards, or writes zeros to, the ranges that the request lists. All
// are checked before the first is touched.
func (r *request) ranges(dev blockdev.Device, discard bool) error {
	n := total(r.chain.out)
	if n == 0 || n%sizeRange != 0 || n > maxRanges*sizeRange {
		return errRange
	}
	var space [maxRanges * sizeRange]byte
	list := space[:copyOut(space[:], &r.chain.out)]
	limit, flags := uint32(maxZeroSectors), uint32(rangeUnmap)
	if discard {
		limit, flags = maxDiscardSectors, 0
	}
	for b := list; len(b) > 0; b = b[sizeRange:] {
		sectors := binary.LittleEndian.Uint32(b[8:])
		if binary.LittleEndian.Uint32(b[12:])&^flags != 0 {
			return errUnsupported
		}
		if sectors > limit {
			return errRange
		}
		if _, err := place(dev, binary.LittleEndian.Uint64(b), uint64(sectors)*sectorSize); err != nil {
			return err
		}
	}
	for b := list; len(b) > 0; b = b[sizeRange:] {
		off := int64(binary.LittleEndian.Uint64(b) * sectorSize)
		length := int64(binary.LittleEndian.Uint32(b[8:])) * sectorSize
		var err error
		if discard {
			err = dev.Discard(off, length)
		} else {
			err = dev.WriteZeroes(off, length, binary.LittleEndian.Uint32(b[12:])&rangeUnmap != 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bounce returns min(n, bounceSize) bytes of the worker's own.
func (r *request) bounce(n int) ([]byte, error) {
	if r.buf == nil {
		b, err := unix.Mmap(-1, 0, bounceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil, fmt.Errorf("cannot map a buffer of %d bytes: %w", bounceSize, err)
		}
		// The guest's plain data. Best effort: a kernel without it only dumps more.
		_ = unix.Madvise(b, unix.MADV_DONTDUMP)
		r.buf = b
	}
	return r.buf[:min(n, bounceSize)], nil
}

// release gives the buffer back to the system.
func (r *request) release() {
	if r.buf != nil {
		_ = unix.Munmap(r.buf) // fails only for what Mmap did not return
		r.buf = nil
	}
}

func total(segs [][]byte) uint64 {
	n := uint64(0)
	for _, s := range segs {
		n += uint64(len(s))
	}
	return n
}

// skip takes n bytes of the first segment away.
func skip(segs [][]byte, n int) [][]byte {
	if n == len(segs[0]) {
		return segs[1:]
	}
	segs[0] = segs[0][n:]
	return segs
}

// copyOut copies from the start of a list of segments, takes away what it has
// copied, and returns how much that is.
func copyOut(p []byte, segs *[][]byte) int {
	done := 0
	for done < len(p) && len(*segs) > 0 {
		n := copy(p[done:], (*segs)[0])
		*segs = skip(*segs, n)
		done += n
	}
	return done
}

// copyIn copies to the start of a list of segments, as much as there is room for,
// and returns the rest of the list.
func copyIn(segs [][]byte, p []byte) [][]byte {
	for len(p) > 0 && len(segs) > 0 {
		n := copy(segs[0], p)
		segs = skip(segs, n)
		p = p[n:]
	}
	return segs
}

func opName(kind uint32) string {
	switch kind {
	case opRead:
		return "read"
	case opWrite:
		return "write"
	case opFlush:
		return "flush"
	case opGetID:
		return "get id"
	case opDiscard:
		return "discard"
	case opWriteZeroes:
		return "write zeroes"
	}
	return "unknown"
}
