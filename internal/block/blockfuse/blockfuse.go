// Package blockfuse shows a block device as one regular file, through FUSE: for
// loop devices, and for storage engines that want a file or a device, such as a
// Ceph OSD. The protocol is spoken by github.com/hanwen/go-fuse (ADR 9).
//
// The mount point is itself a regular file, and the root of the file system is
// the device. What the file does:
//
//   - Reads and writes of any alignment, at the same time. They bypass the page
//     cache whether or not the file was opened with O_DIRECT, so a completed
//     write is in the device, and a shared mapping is refused.
//   - fsync, O_DSYNC and RWF_DSYNC flush the device.
//   - FALLOC_FL_PUNCH_HOLE discards and leaves zeros, FALLOC_FL_ZERO_RANGE writes
//     zeros. SEEK_HOLE and SEEK_DATA tell the device's holes.
//   - The size is the device's, always: truncating is refused, a write beyond the
//     end is ENOSPC as on a block device. After a resize of the device the next
//     stat shows the new size.
//   - Locks are those of a local file.
//
// Only the user who mounted it may open the file, which has mode 0600, or 0400
// if it is read-only. Not even root may in place of another user.
//
// A device that fails, or is closed because its key or its disk is gone, fails
// each request at once, with EIO. A request is answered only after the device
// has done it, and nothing is kept in between. So one that neither fails nor answers
// makes its requests wait, until they are broken off with the mount: a write that
// was given up could still reach the device, over a later one.
//
// Invariants: at most [maxRequests] requests are in work, each with at most
// maxTransfer bytes; no request allocates beyond what go-fuse itself does for
// it; the device is not used after Unmount has returned nil.
//
// A process must not open its own mount by the os package before someone has
// polled the file: the poller of the runtime may then wait for an answer that the
// same runtime should give.
//
// All exported functions are safe for concurrent use.
package blockfuse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"strongroom/internal/block/blockdev"
)

const (
	// maxTransfer is the most bytes that one request carries: the kernel's own
	// limit. Less would split the common request of 1 MiB.
	maxTransfer = 1 << 20
	// maxRequests is the number of requests in work.
	maxRequests = 64
	// busyRetry is the pause before unmounting a file that is open is tried again.
	busyRetry = 20 * time.Millisecond
)

// fileSystem is how our mounts are named in /proc/mounts: "fuse.strongroom".
const fileSystem = "strongroom"

// ErrBusy: somebody has the file open.
var ErrBusy = errors.New("the file is open")

// Options say how a device is shown. The zero value shows it for writing.
type Options struct {
	// Log receives a line when a request is the first that fails. Default:
	// slog.Default().
	Log *slog.Logger
	// ReadOnly refuses every request that changes the device.
	ReadOnly bool
	// Source is what people see as the device in the list of mounts.
	Source string
}

// Mount is a device that is shown as a file.
type Mount struct {
	path   string // absolute
	made   bool   // the file was made for the mount
	direct bool   // mounted by us, not by fusermount3
	server *fuse.Server
	done   chan struct{} // closed when the last request was served
	ended  sync.Mutex    // held by Unmount
}

// New shows dev at path, which must be an empty regular file or not be there;
// then it is made, and removed by Unmount. A dead mount of ours at path is
// cleared away ([Clear]). dev stays the caller's and must not be closed before
// Unmount has returned nil, if requests are to succeed.
//
// Root mounts by itself, others through the program fusermount3.
//
// Errors: [ErrMountPoint], [ErrMounted], [ErrDead], or those of the system.
func New(path string, dev blockdev.Device, opts Options) (*Mount, error) {
	m, err := mount(path, dev, opts)
	if err != nil {
		return nil, fmt.Errorf("cannot show the volume as %s: %w", path, err)
	}
	return m, nil
}

func mount(path string, dev blockdev.Device, opts Options) (*Mount, error) {
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	if _, err := Clear(path); err != nil {
		return nil, err
	}
	path, made, err := prepare(path)
	if err != nil {
		return nil, err
	}
	m := &Mount{path: path, made: made, direct: os.Geteuid() == 0, done: make(chan struct{})}
	options := &fuse.MountOptions{
		DirectMountStrict: m.direct,
		DirectMountFlags:  unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC,
		Options:           []string{"default_permissions", "noexec"},
		FsName:            opts.Source,
		Name:              fileSystem,
		MaxWrite:          maxTransfer,
		MaxBackground:     maxRequests,
		// What waits for the kernel's next request counts too.
		MaxInflightRequestBytes: (maxRequests + 1) * (maxTransfer + 8192),
		// Without it the kernel serves asynchronous requests one after another.
		ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		DisableXAttrs:     true,
		// Data come from memory: there is nothing to splice.
		DisableSplice: true,
		Logger:        slog.NewLogLogger(opts.Log.Handler(), slog.LevelDebug),
		// A process that may be damaged serves no data.
		PanicHandler: func(p any) fuse.Status { panic(p) },
	}
	if options.FsName == "" {
		options.FsName = fileSystem
	}
	if opts.ReadOnly {
		options.DirectMountFlags |= unix.MS_RDONLY
		if !m.direct {
			options.Options = append(options.Options, "ro")
		}
	}
	m.server, err = fuse.NewServer(newFile(dev, opts), path, options)
	if err != nil {
		m.removeFile()
		if m.direct {
			return nil, fmt.Errorf("mounting with /dev/fuse: %w", err)
		}
		return nil, fmt.Errorf("mounting with fusermount3: %w", err)
	}
	go func() {
		defer close(m.done)
		m.server.Serve()
	}()
	return m, nil
}

// Path returns the absolute path of the file.
func (m *Mount) Path() string { return m.path }

// Done returns a channel that is closed when the file is no longer served:
// after Unmount, or because somebody else has unmounted it.
func (m *Mount) Done() <-chan struct{} { return m.done }

// Unmount ends the service. While the file is open it waits; when ctx ends, root
// breaks off: the users' requests fail with ECONNABORTED from then on. Others than
// root cannot do that and get [ErrBusy]; the mount is then there still, and
// breaks when the process ends. It is idempotent.
//
// It does not flush the device.
func (m *Mount) Unmount(ctx context.Context) error {
	m.ended.Lock()
	defer m.ended.Unlock()
	if err := m.detach(ctx); err != nil {
		return fmt.Errorf("cannot unmount %s: %w", m.path, err)
	}
	<-m.done
	m.removeFile()
	return nil
}

// detach takes the file system from its mount point, unless that has been done.
func (m *Mount) detach(ctx context.Context) error {
	retry := time.NewTicker(busyRetry)
	defer retry.Stop()
	for {
		select {
		case <-m.done:
			return nil
		default:
		}
		var err error
		if m.direct {
			err = unix.Unmount(m.path, unix.UMOUNT_NOFOLLOW)
		} else {
			err = m.server.Unmount()
		}
		switch {
		case err == nil:
			return nil
		case m.direct && err != unix.EBUSY:
			return err
		}
		select {
		case <-m.done:
			return nil
		case <-retry.C:
			continue
		case <-ctx.Done():
		}
		if m.direct {
			return unix.Unmount(m.path, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE|unix.MNT_DETACH)
		}
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
}

// removeFile removes the mount point if it was made for the mount. What somebody
// has put there since stays.
func (m *Mount) removeFile() {
	if st, err := os.Lstat(m.path); err == nil && m.made && isEmptyFile(st) {
		_ = os.Remove(m.path) // an empty file is all that can be left
		m.made = false
	}
}
