package main

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel's interface, include/uapi/linux/io_uring.h.
const (
	opRead       = 22
	opReadFixed  = 4
	opWriteFixed = 5

	fixedFile = 1 << 0 // of sqe.flags

	setupClamp        = 1 << 4
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	enterGetEvents = 1 << 0

	registerBuffers = 0
	registerFiles   = 2

	offSQRing = 0
	offSQEs   = 0x10000000
)

type params struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wqFd uint32
	_                                                                  [3]uint32
	sq                                                                 struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
		_                                                           uint64
	}
	cq struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
		_                                                           uint64
	}
}

type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	len, rwFlags  uint32
	userData      uint64
	bufIndex      uint16
	_             uint16
	_             int32
	_             [2]uint64
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

// ring is an io_uring of one thread. File 0 and the buffers are registered.
type ring struct {
	fd             int
	memory, memSQE []byte
	sqHead, sqTail *atomic.Uint32
	cqHead, cqTail *atomic.Uint32
	sqMask, cqMask uint32
	sqes           []sqe
	cqes           []cqe
	queued         uint32 // SQEs not yet submitted
}

func newRing(entries, file int, buffers [][]byte) (*ring, error) {
	p := params{flags: setupClamp | setupSingleIssuer | setupDeferTaskrun}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r := &ring{fd: int(fd)}
	if err := r.setUp(&p, file, buffers); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *ring) setUp(p *params, file int, buffers [][]byte) (err error) {
	if p.features&featSingleMmap == 0 {
		return fmt.Errorf("the kernel is too old for this program")
	}
	size := max(int(p.sq.array+p.sqEntries*4), int(p.cq.cqes)+int(p.cqEntries)*int(unsafe.Sizeof(cqe{})))
	if r.memory, err = unix.Mmap(r.fd, offSQRing, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return err
	}
	if r.memSQE, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return err
	}
	word := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.memory[off])) }
	r.sqHead, r.sqTail, r.cqHead, r.cqTail = word(p.sq.head), word(p.sq.tail), word(p.cq.head), word(p.cq.tail)
	r.sqMask, r.cqMask = word(p.sq.ringMask).Load(), word(p.cq.ringMask).Load()
	r.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&r.memSQE[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&r.memory[p.cq.cqes])), p.cqEntries)
	for i := range p.sqEntries { // SQEs are used in their own order
		word(p.sq.array + 4*i).Store(i)
	}
	iov := make([]unix.Iovec, len(buffers))
	for i, b := range buffers {
		iov[i].Base = &b[0]
		iov[i].SetLen(len(b))
	}
	if err := r.register(registerBuffers, unsafe.Pointer(&iov[0]), len(iov)); err != nil {
		return fmt.Errorf("registering buffers: %w", err)
	}
	files := []int32{int32(file)}
	if err := r.register(registerFiles, unsafe.Pointer(&files[0]), 1); err != nil {
		return fmt.Errorf("registering the file: %w", err)
	}
	return nil
}

func (r *ring) register(what uintptr, arg unsafe.Pointer, n int) error {
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), what, uintptr(arg), uintptr(n), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// push queues a request. There are never more than fit.
func (r *ring) push(s sqe) {
	r.sqes[(r.sqTail.Load()+r.queued)&r.sqMask] = s
	r.queued++
}

// transfer queues a read or a write with the buffer of that number.
func (r *ring) transfer(buffer int, write bool, p []byte, off int64) {
	op := uint8(opReadFixed)
	if write {
		op = opWriteFixed
	}
	r.push(sqe{
		opcode: op, flags: fixedFile, off: uint64(off), addr: uint64(uintptr(unsafe.Pointer(&p[0]))), len: uint32(len(p)),
		userData: uint64(buffer), bufIndex: uint16(buffer),
	})
}

// enter submits what is queued and waits for so many completions.
func (r *ring) enter(wait int) error {
	r.sqTail.Add(r.queued)
	for {
		n := r.sqTail.Load() - r.sqHead.Load()
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), uintptr(wait), enterGetEvents, 0, 0)
		switch errno {
		case 0:
			r.queued = 0
			return nil
		case unix.EINTR:
		default:
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
}

// pop calls f for each completion that is there, and returns how many.
func (r *ring) pop(f func(userData uint64, res int32) error) (int, error) {
	head, tail := r.cqHead.Load(), r.cqTail.Load()
	n := int(tail - head)
	for ; head != tail; head++ {
		c := r.cqes[head&r.cqMask]
		if err := f(c.userData, c.res); err != nil {
			return 0, err
		}
	}
	r.cqHead.Store(head)
	return n, nil
}

func (r *ring) close() {
	if r.memory != nil {
		unix.Munmap(r.memory)
	}
	if r.memSQE != nil {
		unix.Munmap(r.memSQE)
	}
	unix.Close(r.fd)
}
