package sandbox

import (
	"slices"

	"golang.org/x/sys/unix"
)

// calls are the rules of a volume process whose PID is pid, the most frequent
// first. A call without a rule is refused.
//
// They come from traces of the package's and QEMU's tests (NBD, vhost-user, rekey,
// resize, shutdown), and from the sources of the Go runtime, of which a trace does not show all.
func calls(pid uint32) []rule {
	var rules []rule
	for _, call := range slices.Concat(data, goRuntime, libc) {
		rules = append(rules, rule{call: call, verdict: allow})
	}
	rules = append(rules,
		// Memory is never made executable.
		rule{unix.SYS_MMAP, allow, [][]condition{{unset(2, unix.PROT_EXEC)}}},
		rule{unix.SYS_MPROTECT, allow, [][]condition{{unset(2, unix.PROT_EXEC)}}},
		// New threads, no new process. The C library of a test binary falls back
		// to clone, whose flags a filter can see.
		rule{unix.SYS_CLONE, allow, [][]condition{{set(0, unix.CLONE_THREAD), unset(0, namespaces)}}},
		rule{unix.SYS_CLONE3, absent, nil},
		// Signals to itself: the Go scheduler's.
		rule{unix.SYS_TGKILL, allow, [][]condition{{is(0, pid)}}},
		rule{unix.SYS_FCNTL, allow, oneOf(1,
			unix.F_DUPFD_CLOEXEC, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL,
			unix.F_OFD_SETLK, unix.F_OFD_GETLK, unix.F_ADD_SEALS, unix.F_GET_SEALS)},
		// Of block devices.
		rule{unix.SYS_IOCTL, allow, oneOf(1, unix.BLKSSZGET)},
		// How a disk wants direct I/O to be aligned; without a name, so of a
		// descriptor.
		rule{unix.SYS_STATX, allow, [][]condition{{is(1, 0), condition{argument: 1, upper: true, mask: ^uint32(0)}, is(2, unix.AT_EMPTY_PATH)}}},
		// Names of mappings.
		rule{unix.SYS_PRCTL, allow, oneOf(0, unix.PR_SET_VMA)},
		rule{unix.SYS_SETSOCKOPT, allow, oneOf(1, unix.SOL_SOCKET)},
		// On a connection, to nobody else.
		rule{unix.SYS_SENDTO, allow, [][]condition{{is(4, 0), condition{argument: 4, upper: true, mask: ^uint32(0)}}}},
	)
	for _, call := range slices.Concat(hostile, hostileArch) {
		rules = append(rules, rule{call: call, verdict: end})
	}
	return rules
}

// is, set and unset are conditions on the lower half of an argument.
func is(argument, value uint32) condition {
	return condition{argument: argument, mask: ^uint32(0), value: value}
}

func set(argument, bits uint32) condition {
	return condition{argument: argument, mask: bits, value: bits}
}

func unset(argument, bits uint32) condition {
	return condition{argument: argument, mask: bits}
}

func oneOf(argument uint32, values ...uint32) [][]condition {
	var only [][]condition
	for _, v := range values {
		only = append(only, []condition{is(argument, v)})
	}
	return only
}

const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// data are the calls of the data path and of what controls it.
var data = []uint32{
	unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_PREADV, unix.SYS_PWRITEV, unix.SYS_PREADV2, unix.SYS_PWRITEV2,
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV,
	unix.SYS_FDATASYNC, unix.SYS_FSYNC, unix.SYS_SYNC_FILE_RANGE, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE, unix.SYS_LSEEK, unix.SYS_FSTAT, unix.SYS_FLOCK,
	unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_RECVFROM, unix.SYS_ACCEPT4, unix.SYS_LISTEN, unix.SYS_SHUTDOWN,
	unix.SYS_GETSOCKOPT, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_CLOSE,
	unix.SYS_MEMFD_SECRET, unix.SYS_MEMFD_CREATE, unix.SYS_MLOCK, unix.SYS_MUNLOCK,
	unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID,
}

// goRuntime are the calls of the Go runtime.
var goRuntime = []uint32{
	unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_CREATE1, unix.SYS_EVENTFD2,
	unix.SYS_NANOSLEEP, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_CLOCK_GETTIME, unix.SYS_GETTIMEOFDAY,
	unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_GETRANDOM,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK,
	unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_RESTART_SYSCALL, unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
}

// libc are the calls that the C library of a binary built with cgo adds, for
// its threads and memory.
var libc = []uint32{
	unix.SYS_BRK, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_GETCPU,
}

// hostile are calls that nothing in a volume process makes, not even to see
// whether it can: other programs and processes, other namespaces, and the parts of the
// kernel that attacks go through.
var hostile = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_PIDFD_GETFD, unix.SYS_KCMP, unix.SYS_OPEN_BY_HANDLE_AT,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_OPEN_TREE, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID, unix.SYS_CAPSET,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT,
}
