package sandbox

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// verdict is what becomes of a system call.
type verdict uint32

const (
	allow  verdict = unix.SECCOMP_RET_ALLOW
	refuse verdict = unix.SECCOMP_RET_ERRNO | verdict(unix.EPERM)
	absent verdict = unix.SECCOMP_RET_ERRNO | verdict(unix.ENOSYS)
	end    verdict = unix.SECCOMP_RET_KILL_PROCESS
)

// rule is the verdict on one system call.
type rule struct {
	call    uint32
	verdict verdict
	// only are alternatives: unless all conditions of one hold, the call is
	// refused. Empty: no conditions.
	only [][]condition
}

// condition compares half of an argument: argument & mask == value. The lower
// half is all that the kernel reads of an int.
type condition struct {
	argument uint32 // from 0
	upper    bool   // half
	mask     uint32
	value    uint32
}

// Offsets in struct seccomp_data of linux/seccomp.h, little endian.
const (
	offsetCall      = 0
	offsetArch      = 4
	offsetArguments = 16
)

// callBitX32 marks a call by the x32 interface, amd64 only.
const callBitX32 = 0x40000000

// program is the filter in classic BPF. Every rule is a block that ends in a
// verdict, so that there are no far jumps.
func program(arch uint32, rules []rule) []unix.SockFilter {
	p := []unix.SockFilter{
		load(offsetArch),
		jump(unix.BPF_JEQ, arch, 1, 0),
		ret(end), // a call by another interface, whose numbers differ
		load(offsetCall),
		jump(unix.BPF_JGE, callBitX32, 0, 1),
		ret(end),
	}
	for _, r := range rules {
		b := r.block()
		p = append(p, jump(unix.BPF_JEQ, r.call, 0, uint8(len(b))))
		p = append(p, b...)
	}
	return append(p, ret(refuse))
}

// block is the verdict on r's call.
func (r rule) block() []unix.SockFilter {
	var b []unix.SockFilter
	for _, all := range r.only {
		for i, c := range all {
			offset := offsetArguments + 8*c.argument
			if c.upper {
				offset += 4
			}
			b = append(b, load(offset), unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: c.mask},
				jump(unix.BPF_JEQ, c.value, 0, uint8(3*(len(all)-i-1)+1))) // else to the next alternative
		}
		b = append(b, ret(r.verdict))
	}
	if len(r.only) > 0 {
		return append(b, ret(refuse))
	}
	return append(b, ret(r.verdict))
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func jump(test uint16, k uint32, ifTrue, ifFalse uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, K: k, Jt: ifTrue, Jf: ifFalse}
}

func ret(v verdict) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: uint32(v)}
}

// filter filters the calls of all threads. It returns false if the kernel cannot.
func filter() (bool, error) {
	// Without a program it fails for that, if not for what it lacks.
	switch _, err := seccomp(nil); {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return false, nil
	case !errors.Is(err, unix.EFAULT):
		return false, fmt.Errorf("the kernel does not say whether it can: %w", err)
	}
	p := program(auditArch, calls(uint32(os.Getpid())))
	if len(p) > math.MaxUint16 {
		return false, fmt.Errorf("program of %d steps is too long", len(p))
	}
	thread, err := seccomp(&unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]})
	runtime.KeepAlive(p)
	switch {
	case err != nil:
		return false, err
	case thread != 0:
		return false, fmt.Errorf("thread %d has another filter", thread)
	}
	return true, nil
}

// seccomp sets a filter for all threads, or returns the thread that did not take it.
func seccomp(p *unix.SockFprog) (thread int, err error) {
	n, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(p)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
