// Package sandbox locks a volume process down: what is broken into by a guest's
// requests finds descriptors that it has already, and no way to more.
//
// [Enter] puts two walls in place, both for all threads and for good. Landlock
// (kernel documentation, userspace-api/landlock.rst): no file can be reached by
// name, no TCP port bound or connected to, no abstract unix socket and no process
// outside signalled. Seccomp (seccomp(2)): only the system calls of the list in
// calls.go are made; docs/reference/volume-process.md tells it to users. What a
// compromised process would try first ends it, all else fails with EPERM.
//
// Invariants: what the kernel has is put in place, or Enter fails; what it lacks
// is in the [State]. The process must have no_new_privs, and enters once.
package sandbox

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// State says which walls are in place.
type State struct {
	Landlock int  // version of the kernel's Landlock, 0 if it has none
	Seccomp  bool // calls are filtered
}

// Missing says what the kernel lacks, for people; nothing on a recent one.
func (s State) Missing() []string {
	var missing []string
	switch {
	case s.Landlock == 0:
		missing = append(missing, "Landlock")
	case s.Landlock < landlockNet:
		missing = append(missing, "Landlock of network ports")
	}
	if !s.Seccomp {
		missing = append(missing, "seccomp filters")
	}
	return missing
}

// Enter puts the process into the sandbox. When it fails, the process must end.
func Enter() (State, error) {
	if n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || n != 1 {
		return State{}, errors.New("a volume process must be started without the right to gain privileges")
	}
	// The last file that is opened by name: log lines have the local time.
	_, _ = time.Now().Zone()
	if err := limit(); err != nil {
		return State{}, err
	}
	var s State
	var err error
	if s.Landlock, err = restrict(); err != nil {
		return State{}, fmt.Errorf("cannot enter the Landlock sandbox: %w", err)
	}
	if s.Seccomp, err = filter(); err != nil {
		return State{}, fmt.Errorf("cannot filter system calls: %w", err)
	}
	return s, nil
}

// Limits of a volume process.
const (
	// descriptorsMax is for disks, connections and the rings of vhost-user,
	// each of which has three.
	descriptorsMax = 4096
	// dataMax bounds the process's private memory, in bytes, far above what its
	// buffers take. The address space itself cannot be bounded: it holds the guest's
	// memory.
	dataMax = 4 << 30
)

// limit makes the process's memory private, and its resources few.
func limit() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid core dumps: %w", err)
	}
	for _, l := range []struct {
		name     string
		resource int
		max      uint64
	}{
		{"core dumps", unix.RLIMIT_CORE, 0},
		{"descriptors", unix.RLIMIT_NOFILE, descriptorsMax},
		{"memory", unix.RLIMIT_DATA, dataMax},
	} {
		var now unix.Rlimit
		if err := unix.Getrlimit(l.resource, &now); err != nil {
			return fmt.Errorf("cannot limit %s: %w", l.name, err)
		}
		n := min(l.max, now.Max)
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("cannot limit %s: %w", l.name, err)
		}
	}
	unix.Umask(0o077)
	return nil
}
